//! The Fourier neural operator (Li et al. 2021), as neuraloperator builds it.

use crate::fno_layer::Layer;
use crate::{Error, FnoConfig, PositionalEmbedding, Result};
use halfmode_autograd::{Tape, Var};
use halfmode_fft::{Transform, TransformConfig};
use halfmode_nn::{Channels, GridEmbedding, Init, Margin, Module, ParamSpec, PointwiseMlp};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::Device;
use std::sync::{Arc, Mutex, PoisonError};

/// Lifting, `n_layers` blocks, projection.
///
/// # Shapes
/// - input: `[batch, in_channels, n_1, …, n_d]`; a grid that resolves fewer modes than the model keeps
///   uses those that it resolves, as the peer does
/// - output: `[batch, out_channels, m_1, …, m_d]`; `m` is `n` but for `resolution_scaling_factor` and
///   [`Fno::forward_to`]
#[derive(Debug)]
pub struct Fno {
    config: FnoConfig,
    /// Transforms by device, grid and modes: the tables are shared by all blocks and steps.
    transforms: Mutex<Vec<(Device, Arc<Transform>)>>,
}

/// Parameters of lifting and projection together.
const N_OUTER: usize = 8;

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

    /// The planned transform of a grid with these modes.
    ///
    /// # Errors
    /// Those of planning.
    pub(crate) fn transform(
        &self,
        device: &Device,
        grid: &[usize],
        modes: &[usize],
        accumulate: Precision,
    ) -> Result<Arc<Transform>> {
        let mut transforms = self.transforms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = transforms.iter().find(|(owner, transform)| {
            let config = transform.config();
            owner.same(device) && config.grid == grid && config.modes == modes && config.accumulate == accumulate
        });
        if let Some((_, transform)) = known {
            return Ok(Arc::clone(transform));
        }
        let (grid, modes) = (grid.to_vec(), modes.to_vec());
        let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate, algorithm: None };
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
pub(crate) fn conv(name: &str, (c_out, c_in): (usize, usize)) -> [ParamSpec; 2] {
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
        let [lifting, projection, _] = config.widths();
        let coordinates = if config.positional_embedding == PositionalEmbedding::Grid { d } else { 0 };
        let mut specs = Vec::new();
        specs.extend(conv("lifting.fcs.0", (lifting, config.in_channels + coordinates)));
        specs.extend(conv("lifting.fcs.1", (c, lifting)));
        specs.extend(conv("projection.fcs.0", (projection, c)));
        specs.extend(conv("projection.fcs.1", (config.out_channels, projection)));
        for idx in 0..config.n_layers {
            specs.extend(Layer { fno: self, idx }.param_specs());
        }
        specs
    }

    fn forward(&self, tape: &mut Tape, params: &[Var], inputs: &[&Var]) -> halfmode_autograd::Result<Var> {
        let &[x] = inputs else {
            return Err(halfmode_autograd::Error::Arity { op: "fno", expected: 1, found: inputs.len() });
        };
        self.forward_to(tape, params, x, None)
    }
}

impl Fno {
    /// As [`Module::forward`] with the last block's output on the grid `output_shape`, whatever
    /// `resolution_scaling_factor` says. With domain padding that grid includes the padding.
    ///
    /// # Errors
    /// Those of the ops, for inputs of the wrong shape.
    pub fn forward_to(
        &self,
        tape: &mut Tape,
        params: &[Var],
        x: &Var,
        output_shape: Option<&[usize]>,
    ) -> halfmode_autograd::Result<Var> {
        let config = &self.config;
        let expected = self.param_specs().len();
        if params.len() != expected {
            return Err(halfmode_autograd::Error::Arity { op: "fno", expected, found: params.len() });
        }
        let grid = self.check_input(x).map_err(Error::in_op)?;
        let (outer, mut blocks) = params.split_at(N_OUTER);
        let embedding = match config.positional_embedding {
            PositionalEmbedding::Grid => GridEmbedding::Coordinates,
            PositionalEmbedding::None => GridEmbedding::None,
        };
        let lifting = PointwiseMlp { input: Channels::First, output: Channels::Last, embedding };
        let mut h = tape.apply(lifting, &[x, &outer[0], &outer[1], &outer[2], &outer[3]])?;
        let share = |axis: usize| config.domain_padding.get(axis, 0.0);
        let padding: Vec<usize> =
            grid.iter().enumerate().map(|(axis, &n)| (share(axis) * n as f64).round_ties_even() as usize).collect();
        if padding.iter().any(|&p| p > 0) {
            h = tape.apply(Margin::Pad(padding.clone()), &[&h])?;
        }
        for idx in 0..config.n_layers {
            let layer = Layer { fno: self, idx };
            let (weights, rest) = blocks.split_at(layer.param_specs().len());
            let to = if idx + 1 == config.n_layers { output_shape } else { None };
            h = layer.forward(tape, weights, &h, to)?;
            blocks = rest;
        }
        if padding.iter().any(|&p| p > 0) {
            // The blocks may have changed the resolution, of the padding too.
            let out = &h.value().shape()[1..=grid.len()];
            let amount = padding
                .iter()
                .zip(&grid)
                .zip(out)
                .map(|((&p, &n), &m)| (p as f64 * m as f64 / (n + 2 * p) as f64).round_ties_even() as usize);
            h = tape.apply(Margin::Crop(amount.collect()), &[&h])?;
        }
        let projection =
            PointwiseMlp { input: Channels::Last, output: Channels::First, embedding: GridEmbedding::None };
        tape.apply(projection, &[&h, &outer[4], &outer[5], &outer[6], &outer[7]])
    }
}
