//! Samples: loaded on the host, normalised, and brought to the device.

#[cfg(feature = "cuda")]
use crate::job::host_fields::HostFields;
use crate::job::{DataSource, JobConfig, JobError, Normalisers};
use halfmode_data::{CacheOutcome, DarcyPt, FieldPairs, NpzFile, Problem, read_pairs};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use ndarray::ArrayD;
use std::num::NonZeroUsize;
use std::path::Path;

/// Shapes of one set of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldShape {
    /// The name under which errors are reported: the resolution.
    pub label: String,
    /// Samples.
    pub n: usize,
    /// Channels in.
    pub c_in: usize,
    /// Channels out.
    pub c_out: usize,
    /// Points per axis.
    pub grid: Vec<usize>,
    /// Whether the fields are real or complex.
    pub domain: Domain,
}

impl FieldShape {
    /// The shape of the array that holds `n` of these fields with so many channels: of complex ones, with a
    /// last axis of 2.
    #[must_use]
    pub fn array(&self, n: usize, channels: usize) -> Vec<usize> {
        let parts: &[usize] = if self.domain == Domain::Complex { &[2] } else { &[] };
        [&[n, channels][..], &self.grid, parts].concat()
    }

    /// What a tensor of these fields holds.
    pub(crate) fn dtype(&self, precision: Precision) -> DType {
        DType { domain: self.domain, precision }
    }
}

/// Shapes of all samples of a job: what planning needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataShapes {
    /// Training samples.
    pub train: FieldShape,
    /// Test samples.
    pub tests: Vec<FieldShape>,
}

/// All samples of a job.
#[derive(Clone, Debug)]
pub struct JobData {
    /// Training samples.
    pub train: FieldPairs,
    /// Test samples by label.
    pub tests: Vec<(String, FieldPairs)>,
    /// What is worth telling about where they came from.
    pub notes: Vec<String>,
}

/// `64` for a square grid, `64x48` for another.
fn label(grid: &[usize]) -> String {
    match grid {
        [first, rest @ ..] if rest.iter().all(|n| n == first) => first.to_string(),
        _ => grid.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
    }
}

/// Labels made unique by a number where two test sets share a resolution.
fn unique_labels(grids: &[Vec<usize>]) -> Vec<String> {
    let mut labels: Vec<String> = Vec::new();
    for grid in grids {
        let base = label(grid);
        let n_same = grids.iter().take(labels.len()).filter(|other| *other == grid).count();
        labels.push(if n_same == 0 { base } else { format!("{base}#{}", n_same + 1) });
    }
    labels
}

impl JobData {
    /// The shapes of these samples.
    #[must_use]
    pub fn shapes(&self) -> DataShapes {
        let shape = |label: String, pairs: &FieldPairs| FieldShape {
            label,
            n: pairs.len(),
            c_in: pairs.c_in(),
            c_out: pairs.c_out(),
            grid: pairs.grid().to_vec(),
            domain: pairs.domain(),
        };
        DataShapes {
            train: shape(label(self.train.grid()), &self.train),
            tests: self.tests.iter().map(|(label, pairs)| shape(label.clone(), pairs)).collect(),
        }
    }
}

/// The shapes of a job's samples without loading them.
///
/// # Errors
/// Those of reading the headers of files; [`halfmode_data::Error::Domain`] for arrays of numbers that the model does not take.
pub fn data_shapes(config: &JobConfig) -> Result<DataShapes, JobError> {
    let domain = config.model.domain();
    match config.data.source() {
        DataSource::Generated(generated) => {
            let shape = |problem: Problem| {
                let (n, grid) = (problem.n(), problem.grid());
                FieldShape { label: label(&grid), n, c_in: 1, c_out: 1, grid, domain: Domain::Real }
            };
            let tests = generated.test_resolutions.iter().map(|&n| shape(generated.test(n))).collect();
            Ok(DataShapes { train: shape(generated.train()), tests })
        }
        DataSource::DarcyPt(darcy) => {
            let shape = |file: DarcyPt, n: usize, resolution: usize| -> Result<FieldShape, JobError> {
                let n = file.n_samples()?.min(n);
                let (label, grid) = (resolution.to_string(), vec![resolution; 2]);
                Ok(FieldShape { label, n, c_in: 1, c_out: 1, grid, domain: Domain::Real })
            };
            let train = shape(darcy.train_file(), darcy.n_train, darcy.resolution)?;
            let tests = darcy.test_resolutions.iter().map(|&n| shape(darcy.test_file(n), darcy.n_test, n));
            Ok(DataShapes { train, tests: tests.collect::<Result<Vec<_>, _>>()? })
        }
        DataSource::File(file) => {
            let shape = |path: &Path| -> Result<FieldShape, JobError> {
                let mut npz = NpzFile::open(path)?;
                let mut extents = |key: &str| file.layout.in_file().extents(key, &npz.info(key)?, domain);
                let ((n, c_in, grid), (_, c_out, _)) = (extents(&file.input)?, extents(&file.output)?);
                Ok(FieldShape { label: label(&grid), n, c_in, c_out, grid, domain })
            };
            let train = shape(&file.train)?;
            let mut tests = file.test.iter().map(|path| shape(path)).collect::<Result<Vec<_>, _>>()?;
            let labels = unique_labels(&tests.iter().map(|test| test.grid.clone()).collect::<Vec<_>>());
            tests.iter_mut().zip(labels).for_each(|(test, label)| test.label = label);
            Ok(DataShapes { train, tests })
        }
    }
}

/// Loads or generates a job's samples. `cache` is where generated ones are kept; `progress` gets
/// what is being made, how many are done, and how many there are.
///
/// # Errors
/// Those of generators and readers.
pub fn load_data(
    config: &JobConfig,
    cache: &Path,
    threads: usize,
    progress: &(dyn Fn(&str, usize, usize) + Sync),
) -> Result<JobData, JobError> {
    match config.data.source() {
        DataSource::Generated(generated) => {
            let mut notes = Vec::new();
            let mut make = |set: &str, problem: Problem| -> Result<FieldPairs, JobError> {
                let what = format!("{problem} {set}");
                let report = |done, n| progress(&what, done, n);
                let (pairs, outcome) = problem.load_or_generate(cache, NonZeroUsize::new(threads), &report)?;
                notes.extend(outcome.warning());
                if let CacheOutcome::Loaded { path } = &outcome {
                    notes.push(format!("{what}: read from {}", path.display()));
                }
                Ok(pairs)
            };
            let train = make("train", generated.train())?;
            let test = |&n: &usize| Ok((n.to_string(), make("test", generated.test(n))?));
            let tests = generated.test_resolutions.iter().map(test).collect::<Result<Vec<_>, JobError>>()?;
            Ok(JobData { train, tests, notes })
        }
        DataSource::DarcyPt(darcy) => {
            let train = darcy.train_file().read(darcy.n_train)?;
            let test = |&n: &usize| Ok((n.to_string(), darcy.test_file(n).read(darcy.n_test)?));
            let tests = darcy.test_resolutions.iter().map(test).collect::<Result<Vec<_>, JobError>>()?;
            Ok(JobData { train, tests, notes: Vec::new() })
        }
        DataSource::File(file) => {
            let read =
                |path: &Path| read_pairs(path, &file.input, &file.output, file.layout.in_file(), config.model.domain());
            let train = read(&file.train)?;
            let tests = file.test.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
            let labels = unique_labels(&tests.iter().map(|pairs| pairs.grid().to_vec()).collect::<Vec<_>>());
            Ok(JobData { train, tests: labels.into_iter().zip(tests).collect(), notes: Vec::new() })
        }
    }
}

/// One set of samples in f32.
#[derive(Debug)]
pub(crate) struct FieldSet {
    pub(crate) shape: FieldShape,
    x: Fields,
    y: Fields,
}

/// The inputs or the outputs of a set of samples.
#[derive(Debug)]
pub(crate) enum Fields {
    /// On a CPU, and on its plan.
    OnDevice(Tensor),
    /// For a GPU, whose memory is for training: it gets a batch at a time.
    #[cfg(feature = "cuda")]
    OnHost(HostFields),
}

impl FieldSet {
    /// Takes samples. Inputs are normalised; outputs too if `encode_outputs`.
    pub(crate) fn new(
        device: &Device,
        shape: FieldShape,
        pairs: Option<FieldPairs>,
        normalisers: &Normalisers,
        encode_outputs: bool,
    ) -> Result<Self, JobError> {
        let (x, y) = match pairs {
            Some(pairs) => {
                let (mut x, mut y) = pairs.into_parts();
                normalisers.input.encode(&mut x.view_mut())?;
                if encode_outputs {
                    normalisers.output.encode(&mut y.view_mut())?;
                }
                (Some(x), Some(y))
            }
            None => (None, None),
        };
        let fields = |array, channels| Fields::new(device, &shape, channels, array);
        let (x, y) = (fields(x, shape.c_in)?, fields(y, shape.c_out)?);
        Ok(FieldSet { shape, x, y })
    }

    pub(crate) fn x(&self) -> &Fields {
        &self.x
    }

    pub(crate) fn y(&self) -> &Fields {
        &self.y
    }

    /// Inputs and outputs, if the host has them.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_host(&self) -> Option<[&HostFields; 2]> {
        match (&self.x, &self.y) {
            (Fields::OnHost(x), Fields::OnHost(y)) => Some([x, y]),
            _ => None,
        }
    }
}

impl Fields {
    fn new(device: &Device, shape: &FieldShape, channels: usize, array: Option<ArrayD<f32>>) -> Result<Self, JobError> {
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            return Ok(Fields::OnHost(HostFields::new(device, shape, channels, array)));
        }
        let dtype = shape.dtype(Precision::F32);
        Ok(Fields::OnDevice(match array {
            Some(array) => Tensor::from_scalars_ndarray(device, array.view(), dtype, Purpose::Data)?,
            None => device.alloc([&[shape.n, channels][..], &shape.grid].concat(), dtype, Purpose::Data)?,
        }))
    }

    /// The samples of these indices on the device, `[indices, channels, n_1, …]`.
    ///
    /// # Errors
    /// Those of memory; [`halfmode_tensor::Error::Index`] if there is no such sample.
    pub(crate) fn batch(&self, indices: &[usize]) -> Result<Tensor, JobError> {
        match self {
            Fields::OnDevice(samples) => Ok(samples.gather(indices, Purpose::Data)?),
            #[cfg(feature = "cuda")]
            Fields::OnHost(samples) => samples.batch(indices),
        }
    }

    /// The same samples on the host, flat.
    ///
    /// # Errors
    /// Those of [`Fields::batch`].
    pub(crate) fn values(&self, indices: &[usize]) -> Result<Vec<f32>, JobError> {
        match self {
            Fields::OnDevice(samples) => Ok(samples.gather(indices, Purpose::Data)?.to_vec()?),
            #[cfg(feature = "cuda")]
            Fields::OnHost(samples) => samples.values(indices),
        }
    }
}
