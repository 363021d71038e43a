//! The Fourier neural operator (Li et al. 2021), as neuraloperator builds it.

use crate::{Error, FnoConfig, PositionalEmbedding, Result, StabilizerKind};
use halfmode_autograd::{Tape, Var};
use halfmode_fft::{Transform, TransformConfig};
use halfmode_nn::{Activation, Channels, FnoBlock, GridEmbedding, Init, Module, ParamSpec, PointwiseMlp, Stabilizer};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::Device;
use std::sync::{Arc, Mutex, PoisonError};

/// Lifting, `n_layers` blocks, projection.
///
/// # Shapes
/// - input: `[batch, in_channels, n_1, …, n_d]`; any grid that resolves the modes
/// - output: `[batch, out_channels, n_1, …, n_d]`
#[derive(Debug)]
pub struct Fno {
    config: FnoConfig,
    /// Transforms by device and grid: the tables are shared by all blocks and steps.
    transforms: Mutex<Vec<(Device, Arc<Transform>)>>,
}

/// Parameters of lifting and projection together, and of one block.
const N_OUTER: usize = 8;
const N_BLOCK: usize = 8;

impl Fno {
    /// Checks the configuration.
    ///
    /// # Errors
    /// [`Error::Config`] with the key that is out of range.
    pub fn new(config: FnoConfig) -> Result<Self> {
        config.validate()?;
        Ok(Fno { config, transforms: Mutex::default() })
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> &FnoConfig {
        &self.config
    }

    /// The planned transform of a grid.
    ///
    /// # Errors
    /// [`Error::Grid`] if it resolves fewer modes than the model keeps.
    pub fn transform(&self, device: &Device, grid: &[usize], accumulate: Precision) -> Result<Arc<Transform>> {
        let modes = self.config.stored_modes();
        let mut transforms = self.transforms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = transforms.iter().find(|(owner, transform)| {
            owner.same(device) && transform.config().grid == grid && transform.config().accumulate == accumulate
        });
        if let Some((_, transform)) = known {
            return Ok(Arc::clone(transform));
        }
        for (axis, (&n, &kept)) in grid.iter().zip(&modes).enumerate() {
            let resolved = if axis + 1 == grid.len() { n / 2 + 1 } else { n };
            if kept > resolved {
                return Err(Error::Grid { axis, n, resolved, kept });
            }
        }
        let config = TransformConfig { grid: grid.to_vec(), modes, domain: Domain::Real, accumulate, algorithm: None };
        let transform = Arc::new(Transform::new(device, config)?);
        transforms.push((device.clone(), Arc::clone(&transform)));
        Ok(transform)
    }

    /// Forgets the transforms of a device, so that its tables are freed.
    pub fn release(&self, device: &Device) {
        let mut transforms = self.transforms.lock().unwrap_or_else(PoisonError::into_inner);
        transforms.retain(|(owner, _)| !owner.same(device));
    }

    fn check_input(&self, x: &Var) -> Result<Vec<usize>> {
        let (shape, n_axes) = (x.value().shape(), self.config.n_modes.len());
        if shape.len() != n_axes + 2 || shape[1] != self.config.in_channels {
            return Err(Error::Input { found: shape.clone(), in_channels: self.config.in_channels, n_axes });
        }
        Ok(shape[2..].to_vec())
    }
}

/// A 1x1 convolution with torch's default initialisation.
fn conv(name: &str, (c_out, c_in): (usize, usize)) -> [ParamSpec; 2] {
    let init = Init::Uniform { bound: 1.0 / (c_in as f64).sqrt() };
    [
        ParamSpec::real(format!("{name}.weight"), &[c_out, c_in, 1], init),
        ParamSpec::real(format!("{name}.bias"), &[c_out], init),
    ]
}

impl Module for Fno {
    fn param_specs(&self) -> Vec<ParamSpec> {
        let config = &self.config;
        let (c, d) = (config.hidden_channels, config.n_modes.len());
        let [lifting, projection, hidden] = config.widths();
        let coordinates = if config.positional_embedding == PositionalEmbedding::Grid { d } else { 0 };
        let mut specs = Vec::new();
        specs.extend(conv("lifting.fcs.0", (lifting, config.in_channels + coordinates)));
        specs.extend(conv("lifting.fcs.1", (c, lifting)));
        specs.extend(conv("projection.fcs.0", (projection, c)));
        specs.extend(conv("projection.fcs.1", (config.out_channels, projection)));
        let ones = vec![1; d];
        let channel_shape = |lead: &[usize]| [lead, &ones[..]].concat();
        let std = (2.0 / (c + c) as f64).sqrt();
        for layer in 0..config.n_layers {
            let spectral_shape = [&[c, c][..], &config.stored_modes()].concat();
            let block = "fno_blocks";
            specs.push(ParamSpec::spectral(
                format!("{block}.convs.{layer}.weight.tensor"),
                &spectral_shape,
                Init::Normal { std },
            ));
            specs.push(ParamSpec::real(
                format!("{block}.convs.{layer}.bias"),
                &channel_shape(&[c]),
                Init::Normal { std },
            ));
            let bound = 1.0 / (c as f64).sqrt();
            specs.push(ParamSpec::real(
                format!("{block}.fno_skips.{layer}.conv.weight"),
                &[c, c, 1],
                Init::Uniform { bound },
            ));
            specs.extend(conv(&format!("{block}.channel_mlp.{layer}.fcs.0"), (hidden, c)));
            specs.extend(conv(&format!("{block}.channel_mlp.{layer}.fcs.1"), (c, hidden)));
            specs.push(ParamSpec::real(
                format!("{block}.channel_mlp_skips.{layer}.weight"),
                &channel_shape(&[1, c]),
                Init::Ones,
            ));
        }
        specs
    }

    fn forward(&self, tape: &mut Tape, params: &[Var], inputs: &[&Var]) -> halfmode_autograd::Result<Var> {
        let arity = |expected, found| halfmode_autograd::Error::Arity { op: "fno", expected, found };
        let &[x] = inputs else { return Err(arity(1, inputs.len())) };
        let expected = N_OUTER + N_BLOCK * self.config.n_layers;
        if params.len() != expected {
            return Err(arity(expected, params.len()));
        }
        let grid = self.check_input(x).map_err(Error::in_op)?;
        let accumulate = tape.cx().policy.transform.accumulate;
        let transform = self.transform(&tape.cx().device.clone(), &grid, accumulate).map_err(Error::in_op)?;
        let (outer, blocks) = params.split_at(N_OUTER);
        let embedding = match self.config.positional_embedding {
            PositionalEmbedding::Grid => GridEmbedding::Coordinates,
            PositionalEmbedding::None => GridEmbedding::None,
        };
        let lifting = PointwiseMlp { input: Channels::First, output: Channels::Last, embedding };
        let mut h = tape.apply(lifting, &[x, &outer[0], &outer[1], &outer[2], &outer[3]])?;
        for (layer, weights) in blocks.chunks_exact(N_BLOCK).enumerate() {
            let block = FnoBlock {
                transform: Arc::clone(&transform),
                stabilizer: match self.config.stabilizer {
                    StabilizerKind::None => Stabilizer::None,
                    StabilizerKind::Tanh => Stabilizer::Tanh,
                },
                activation: if layer + 1 < self.config.n_layers { Activation::Gelu } else { Activation::None },
            };
            let inputs: Vec<&Var> = std::iter::once(&h).chain(weights).collect();
            h = tape.apply(block, &inputs)?;
        }
        let projection =
            PointwiseMlp { input: Channels::Last, output: Channels::First, embedding: GridEmbedding::None };
        tape.apply(projection, &[&h, &outer[4], &outer[5], &outer[6], &outer[7]])
    }
}
