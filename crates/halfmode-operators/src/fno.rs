//! The Fourier neural operator (Li et al. 2021), as neuraloperator builds it.

use crate::field::{Field, Weights, layer_specs};
use crate::fno_layer::Layer;
use crate::{Error, FnoConfig, PositionalEmbedding, Result};
use halfmode_autograd::{Tape, Var};
use halfmode_fft::{Transform, TransformConfig};
use halfmode_nn::{
    ChannelBias, Channels, Embed, ExtraChannels, GridEmbedding, Init, JoinComplex, Linear, Margin, Module, ParamSpec,
    PointwiseMlp, SplitComplex,
};
use halfmode_precision::{Domain, PrecisionPolicy};
use halfmode_tensor::Device;
use std::sync::{Arc, Mutex, PoisonError};

/// Lifting, `n_layers` blocks, projection.
///
/// # Shapes
/// - input: `[batch, in_channels, n_1, …, n_d]`; a grid that resolves fewer modes than the model keeps
///   uses those that it resolves, as the peer does
/// - output: `[batch, out_channels, m_1, …, m_d]`; `m` is `n` but for `resolution_scaling_factor` and
///   [`Fno::forward_to`]
///
/// Both are complex for `complex_data`, else real.
#[derive(Debug)]
pub struct Fno {
    config: FnoConfig,
    /// Transforms by device, grid and modes: the tables are shared by all blocks and steps.
    transforms: Mutex<Vec<(Device, Arc<Transform>)>>,
}

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

    /// Of the fields.
    pub(crate) fn domain(&self) -> Domain {
        if self.config.complex_data { Domain::Complex } else { Domain::Real }
    }

    /// The planned transform of a grid with these modes.
    ///
    /// # Errors
    /// Those of planning.
    pub(crate) fn transform(
        &self,
        device: &Device,
        domain: Domain,
        grid: &[usize],
        modes: &[usize],
        policy: &PrecisionPolicy,
    ) -> Result<Arc<Transform>> {
        let (accumulate, compute) = (policy.transform.accumulate, policy.compute);
        let mut transforms = self.transforms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = transforms.iter().find(|(owner, transform)| {
            let config = transform.config();
            owner.same(device)
                && config.grid == grid
                && config.modes == modes
                && config.domain == domain
                && config.accumulate == accumulate
                && transform.compute() == compute
        });
        if let Some((_, transform)) = known {
            return Ok(Arc::clone(transform));
        }
        let (grid, modes) = (grid.to_vec(), modes.to_vec());
        let config = TransformConfig { grid, modes, domain, accumulate, algorithm: None };
        let transform = Arc::new(Transform::new(device, config)?.with_compute(compute));
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
        if x.value().dtype().domain != self.domain() {
            return Err(halfmode_fft::Error::Domain {
                operand: "input",
                expected: if self.config.complex_data { "complex" } else { "real" },
            }
            .into());
        }
        Ok(shape[2..].to_vec())
    }

    /// Parameters of the lifting's layers, or of one of its two halves.
    fn n_lifting(&self) -> usize {
        if self.config.widths()[0] == 0 { 2 } else { 4 }
    }

    /// From channels-first input to channels-last blocks.
    fn lift(&self, tape: &mut Tape, weights: &mut Weights<'_>, x: &Var) -> halfmode_autograd::Result<Field> {
        let layer = weights.layer(self.n_lifting())?;
        let has_grid = self.config.positional_embedding == PositionalEmbedding::Grid;
        if let ([w1, b1, w2, b2], false) = (layer.0[0], self.config.complex_data) {
            let embedding = if has_grid { GridEmbedding::Coordinates } else { GridEmbedding::None };
            let op = PointwiseMlp { input: Channels::First, output: Channels::Last, embedding };
            return tape.apply(op, &[x, w1, b1, w2, b2]).map(Field::Real);
        }
        let embed = |tape: &mut Tape, part: &Var, extra: ExtraChannels| {
            tape.apply(Embed(if has_grid { extra } else { ExtraChannels::None }), &[part])
        };
        let embedded = if self.config.complex_data {
            let parts = tape.apply_many(Box::new(SplitComplex::default()), &[x])?;
            let [re, im] = &parts[..] else { return Err(arity(2, parts.len())) };
            let re = embed(tape, re, ExtraChannels::Coordinates)?;
            Field::Complex([re, embed(tape, im, ExtraChannels::Zeros)?])
        } else {
            Field::Real(embed(tape, x, ExtraChannels::Coordinates)?)
        };
        embedded.through(tape, layer, |tape, weights, x| match weights {
            [w, b] => {
                let y = tape.apply(Linear, &[x, w])?;
                tape.apply(ChannelBias, &[&y, b])
            }
            _ => mlp(tape, weights, x, Channels::Last),
        })
    }

    /// From channels-last blocks to channels-first output.
    fn project(&self, tape: &mut Tape, weights: &mut Weights<'_>, h: &Field) -> halfmode_autograd::Result<Var> {
        let layer = weights.layer(4)?;
        match h.through(tape, layer, |tape, weights, x| mlp(tape, weights, x, Channels::First))? {
            Field::Real(y) => Ok(y),
            Field::Complex([re, im]) => tape.apply(JoinComplex::default(), &[&re, &im]),
        }
    }
}

fn arity(expected: usize, found: usize) -> halfmode_autograd::Error {
    halfmode_autograd::Error::Arity { op: "fno", expected, found }
}

/// Two 1x1 convolutions with GELU between, of channels that are last.
pub(crate) fn mlp(tape: &mut Tape, weights: &[Var], x: &Var, output: Channels) -> halfmode_autograd::Result<Var> {
    let [w1, b1, w2, b2] = weights else { return Err(arity(4, weights.len())) };
    tape.apply(PointwiseMlp { input: Channels::Last, output, embedding: GridEmbedding::None }, &[x, w1, b1, w2, b2])
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
        let c_in = config.in_channels + coordinates;
        let mut specs = layer_specs(config.complex_data, |half| match lifting {
            0 => conv(&format!("lifting{half}.fcs.0"), (c, c_in)).into(),
            _ => {
                let first = conv(&format!("lifting{half}.fcs.0"), (lifting, c_in));
                [first, conv(&format!("lifting{half}.fcs.1"), (c, lifting))].concat()
            }
        });
        specs.extend(layer_specs(config.complex_data, |half| {
            let first = conv(&format!("projection{half}.fcs.0"), (projection, c));
            [first, conv(&format!("projection{half}.fcs.1"), (config.out_channels, projection))].concat()
        }));
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
        let mut weights = Weights { rest: params, complex: config.complex_data };
        let mut h = self.lift(tape, &mut weights, x)?;
        let outer = weights.take(if config.complex_data { 8 } else { 4 })?;
        let share = |axis: usize| config.domain_padding.get(axis, 0.0);
        let padding: Vec<usize> =
            grid.iter().enumerate().map(|(axis, &n)| (share(axis) * n as f64).round_ties_even() as usize).collect();
        if padding.iter().any(|&p| p > 0) {
            h = h.map(|part| tape.apply(Margin::Pad(padding.clone()), &[part]))?;
        }
        for idx in 0..config.n_layers {
            let to = if idx + 1 == config.n_layers { output_shape } else { None };
            h = Layer { fno: self, idx }.forward(tape, &mut weights, &h, to)?;
        }
        if padding.iter().any(|&p| p > 0) {
            // The blocks may have changed the resolution, of the padding too.
            let out = h.part().value().shape()[1..=grid.len()].to_vec();
            let amount = padding
                .iter()
                .zip(&grid)
                .zip(&out)
                .map(|((&p, &n), &m)| (p as f64 * m as f64 / (n + 2 * p) as f64).round_ties_even() as usize);
            let amount: Vec<usize> = amount.collect();
            h = h.map(|part| tape.apply(Margin::Crop(amount.clone()), &[part]))?;
        }
        self.project(tape, &mut Weights { rest: outer, complex: config.complex_data }, &h)
    }
}
