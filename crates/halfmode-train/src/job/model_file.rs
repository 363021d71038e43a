//! Model files: what `predict` and `eval` read, and how fields are normalised.

use crate::job::config::check_compute;
use crate::job::{JobError, ModelConfig};
use crate::{Array, load_parameters, read_named};
use halfmode_autograd::{Cx, Tape};
use halfmode_data::{FieldPairs, UnitGaussian};
use halfmode_nn::Module;
use halfmode_nn::{ParamSpec, Params};
use halfmode_operators::Fno;
use halfmode_precision::{DType, Domain, Precision, PrecisionConfig, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use ndarray::{ArrayD, ArrayViewD, Axis, IxDyn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The newest layout of the metadata that this version writes and reads.
pub(crate) const FORMAT_VERSION: u64 = 1;

/// How fields are normalised, per channel, fitted on training data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Normalisers {
    /// Of inputs.
    pub input: UnitGaussian,
    /// Of outputs.
    pub output: UnitGaussian,
}

impl Normalisers {
    /// Per-channel mean and standard deviation of these samples: of complex ones, a complex mean and one real
    /// deviation.
    ///
    /// # Errors
    /// Those of fitting.
    pub fn fit(pairs: &FieldPairs) -> Result<Self, JobError> {
        let fit = |fields: &ArrayD<f32>| match pairs.domain() {
            Domain::Real => UnitGaussian::fit_per_channel(&fields.view()),
            Domain::Complex => UnitGaussian::fit_complex_per_channel(&fields.view()),
        };
        Ok(Normalisers { input: fit(pairs.x())?, output: fit(pairs.y())? })
    }

    /// Mean 0 and standard deviation 1, for planning.
    ///
    /// # Errors
    /// Never for positive channel counts.
    pub fn identity(model: &ModelConfig) -> Result<Self, JobError> {
        let one = |channels: usize| -> Result<UnitGaussian, JobError> {
            let shape = IxDyn(&statistics(model, channels));
            let dims: Vec<usize> = (0..model.fno().n_modes.len() + 2).filter(|&dim| dim != 1).collect();
            let (mean, std) = (ArrayD::zeros(shape.clone()), ArrayD::ones(shape));
            Ok(UnitGaussian::from_parts(mean, std, UnitGaussian::EPS, dims)?)
        };
        let fno = model.fno();
        Ok(Normalisers { input: one(fno.in_channels)?, output: one(fno.out_channels)? })
    }

    /// Refuses statistics that are not one per channel of this model.
    pub(crate) fn check(&self, model: &ModelConfig) -> Result<(), JobError> {
        let fno = model.fno();
        for (normaliser, channels) in [(&self.input, fno.in_channels), (&self.output, fno.out_channels)] {
            let extents = self::statistics(model, channels);
            let statistics = normaliser.mean().shape().to_vec();
            if statistics != extents {
                return Err(halfmode_data::Error::NormaliserShape { statistics, found: extents }.into());
            }
        }
        Ok(())
    }
}

/// The shape of a normaliser's statistics: one per channel, and of complex fields one per part.
fn statistics(model: &ModelConfig, channels: usize) -> Vec<usize> {
    let mut extents = vec![1; model.fno().n_modes.len() + 2];
    extents[1] = channels;
    if model.domain() == Domain::Complex {
        extents.push(2);
    }
    extents
}

/// The JSON object under `halfmode` in a model file's metadata.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) format_version: u64,
    /// The model's constructor arguments.
    pub(crate) config: ModelConfig,
    /// Absent for imported models that take and give raw fields.
    #[serde(default)]
    pub(crate) normalisers: Option<Normalisers>,
    #[serde(default)]
    pub(crate) precision: PrecisionConfig,
    /// The whole job, for checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) job: Option<crate::job::JobConfig>,
    /// Where the run was, for checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) state: Option<crate::job::TrainState>,
}

/// Reads a file and its metadata.
pub(crate) fn read_model_file(path: &Path) -> Result<(BTreeMap<String, Array>, Metadata), JobError> {
    let (arrays, metadata) = read_named_checked(path)?;
    let why = |err| format!("it has metadata that cannot be used: {err}");
    let metadata =
        serde_json::from_value(metadata).map_err(|err| JobError::ModelFile { path: path.to_owned(), why: why(err) })?;
    Ok((arrays, metadata))
}

/// Reads a file of this program, with metadata of the layout that it reads.
pub(crate) fn read_named_checked(path: &Path) -> Result<(BTreeMap<String, Array>, serde_json::Value), JobError> {
    let bad = |why: String| JobError::ModelFile { path: path.to_owned(), why };
    // The path is said once.
    let (arrays, metadata) = read_named(path).map_err(|err| match err {
        crate::Error::Corrupt { reason, .. } => bad(format!("it is not a readable safetensors file: {reason}")),
        crate::Error::Io { source, .. } => bad(format!("it cannot be read: {source}")),
        other => bad(other.to_string()),
    })?;
    if metadata.is_null() {
        return Err(bad("it has no `halfmode` metadata: it was not written by halfmode".to_owned()));
    }
    let version = metadata.get("format_version").and_then(serde_json::Value::as_u64);
    if version != Some(FORMAT_VERSION) {
        let found = version.map_or("none".to_owned(), |it| it.to_string());
        return Err(bad(format!("it has format version {found}, this program reads {FORMAT_VERSION}")));
    }
    Ok((arrays, metadata))
}

/// Whether a file holds every parameter in its shape, before anything is allocated: metadata may
/// claim any size. The sentence says what is wrong.
pub(crate) fn check_arrays(specs: &[ParamSpec], arrays: &BTreeMap<String, Array>) -> Result<(), String> {
    for spec in specs {
        let expected = [&spec.file_shape[..], if spec.complex { &[2] } else { &[] }].concat();
        let found = arrays.get(&spec.name).map(|array| &array.shape);
        if found != Some(&expected) {
            let found = found.map_or("nothing".to_owned(), |shape| format!("shape {shape:?}"));
            return Err(format!("tensor `{}` should have shape {expected:?}, found {found}", spec.name));
        }
    }
    Ok(())
}

/// A trained model, ready for inference.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    normalisers: Option<Normalisers>,
    device: Device,
    policy: Arc<PrecisionPolicy>,
    fno: Fno,
    params: Params,
}

impl Model {
    /// Reads a model file or checkpoint. `precision` replaces the file's own.
    ///
    /// # Errors
    /// [`JobError::ModelFile`] if it cannot be read or does not fit its own configuration, [`JobError::Config`] for
    /// TF32 on a CPU.
    pub fn load(path: &Path, device: &Device, precision: Option<&PrecisionConfig>) -> Result<Self, JobError> {
        let (arrays, metadata) = read_model_file(path)?;
        let bad = |why: String| JobError::ModelFile { path: path.to_owned(), why };
        let policy = Arc::new(precision.unwrap_or(&metadata.precision).resolve()?);
        check_compute(&policy, device)?;
        let fno = Fno::new(metadata.config.fno().clone()).map_err(|err| bad(err.to_string()))?;
        let specs = fno.param_specs();
        check_arrays(&specs, &arrays).map_err(bad)?;
        let mut params = Params::new(device, specs, &policy, 0)?;
        load_parameters(&mut params, &arrays).map_err(|err| bad(err.to_string()))?;
        let (config, normalisers) = (metadata.config, metadata.normalisers);
        normalisers.as_ref().map_or(Ok(()), |it| it.check(&config)).map_err(|err| bad(err.to_string()))?;
        Ok(Model { config, normalisers, device: device.clone(), policy, fno, params })
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How it normalises fields.
    #[must_use]
    pub fn normalisers(&self) -> Option<&Normalisers> {
        self.normalisers.as_ref()
    }

    /// The formats it computes in.
    #[must_use]
    pub fn policy(&self) -> &PrecisionPolicy {
        &self.policy
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Predicts outputs for raw inputs, on the grid of the inputs unless the model scales it.
    ///
    /// # Shapes
    /// - `x`: `[n, in_channels, n_1, …, n_d]`
    /// - returns `[n, out_channels, n_1, …, n_d]`
    ///
    /// Complex fields have a last axis of 2, real and imaginary part.
    ///
    /// # Errors
    /// [`JobError::DataShape`] if `x` has other axes or channels, those of the model and of memory.
    pub fn predict(&self, x: &ArrayViewD<'_, f32>, batch: usize) -> Result<ArrayD<f32>, JobError> {
        self.predict_on(x, batch, None)
    }

    /// As [`Model::predict`], with outputs on the grid `output_shape`.
    ///
    /// # Errors
    /// Those of [`Model::predict`], and of an output grid that the model cannot make.
    pub fn predict_on(
        &self,
        x: &ArrayViewD<'_, f32>,
        batch: usize,
        output_shape: Option<&[usize]>,
    ) -> Result<ArrayD<f32>, JobError> {
        let fno = self.config.fno();
        let (shape, complex) = (x.shape(), fno.complex_data);
        let trailing = usize::from(complex);
        let fits = shape.len() == fno.n_modes.len() + 2 + trailing && (!complex || shape.ends_with(&[2]));
        if !fits || shape[1] != fno.in_channels {
            let parts = if complex { ", 2" } else { "" };
            let expected = format!("[n, {}, {} spatial axes{parts}]", fno.in_channels, fno.n_modes.len());
            return Err(JobError::DataShape { what: "the input".to_owned(), found: x.shape().to_vec(), expected });
        }
        let mut predictions = Vec::new();
        for chunk in x.axis_chunks_iter(Axis(0), batch.max(1)) {
            let mut input = chunk.as_standard_layout().into_owned();
            if let Some(normalisers) = &self.normalisers {
                normalisers.input.encode(&mut input.view_mut())?;
            }
            let precision = Precision::F32.min(self.policy.pointwise.storage);
            let dtype = DType { domain: self.config.domain(), precision };
            let input = Tensor::from_scalars_ndarray(&self.device, input.view(), dtype, Purpose::Data)?;
            let mut tape = Tape::new(Cx::inference(&self.device, &self.policy));
            let weights = self.params.leaves(&mut tape);
            let input = tape.constant(input);
            let y = self.fno.forward_to(&mut tape, &weights, &input, output_shape)?;
            let mut prediction = y.value().to_ndarray::<f32>()?;
            if let Some(normalisers) = &self.normalisers {
                normalisers.output.decode(&mut prediction.view_mut())?;
            }
            predictions.push(prediction);
        }
        let views: Vec<ArrayViewD<'_, f32>> = predictions.iter().map(|it| it.view()).collect();
        let empty = || {
            let mut extents = x.shape().to_vec();
            extents[1] = fno.out_channels;
            ArrayD::zeros(IxDyn(&extents))
        };
        Ok(ndarray::concatenate(Axis(0), &views).unwrap_or_else(|_| empty()))
    }

    /// The most bytes that the ledger would hold while predicting samples of this shape, in batches; learnt
    /// on the planning device, without values.
    ///
    /// # Errors
    /// Those of [`Model::predict_on`].
    pub fn planned_peak_bytes(
        &self,
        shape: &[usize],
        batch: usize,
        output_shape: Option<&[usize]>,
    ) -> Result<usize, JobError> {
        let device = self.device.twin();
        let params = Params::new(&device, self.fno.param_specs(), &self.policy, 0)?;
        let mut extents = shape.to_vec();
        if let Some(n) = extents.first_mut() {
            *n = batch.min(*n);
        }
        let mut dtype = DType::real(Precision::F32);
        if self.config.fno().complex_data {
            // The last axis holds both parts.
            extents.pop();
            dtype = DType::complex(Precision::F32);
        }
        let mut tape = Tape::new(Cx::inference(&device, &self.policy));
        let weights = params.leaves(&mut tape);
        let x = tape.constant(device.alloc(extents, dtype, Purpose::Data)?);
        self.fno.forward_to(&mut tape, &weights, &x, output_shape)?;
        Ok(device.memory().total.peak)
    }

    /// Mean relative errors on samples.
    ///
    /// # Errors
    /// Those of [`Model::predict`].
    pub fn evaluate(
        &self,
        pairs: &FieldPairs,
        batch: usize,
    ) -> Result<(crate::job::Evaluation, ArrayD<f32>), JobError> {
        let prediction = self.predict(&pairs.x().view(), batch)?;
        let (got, want) = (prediction.as_slice().unwrap_or_default(), pairs.y().as_slice().unwrap_or_default());
        let mean = |errors: Vec<f64>| errors.iter().sum::<f64>() / errors.len().max(1) as f64;
        let l2 = mean(crate::relative_l2(got, want, pairs.len())?);
        let h1 = mean(crate::relative_h1(got, want, pairs.y().shape(), &[])?);
        Ok((crate::job::Evaluation { l2, h1 }, prediction))
    }
}
