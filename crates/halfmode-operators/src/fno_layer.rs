//! One block of the Fourier neural operator, with every option of the peer.

use crate::fno::{Fno, conv};
use crate::{Error, Norm, Skip, StabilizerKind};
use halfmode_autograd::{Result, Tape, Var};
use halfmode_fft::Transform;
use halfmode_nn::{
    Activation, Add, ChannelBias, ChannelGate, Channels, FieldNorm, FnoBlock, FourierResample, Gelu, GridEmbedding,
    Init, Interpolate, Linear, ModeProduct, NormKind, ParamSpec, PointwiseMlp, SelectModes, SpectralConv, Stabilizer,
    Tanh,
};
use halfmode_precision::Domain;
use std::sync::Arc;

/// Block `idx` of a model.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) fno: &'a Fno,
    pub(crate) idx: usize,
}

/// The grids of a block and its transforms on them; one transform where the grids are one.
struct Grids {
    from: Vec<usize>,
    to: Vec<usize>,
    analysis: Arc<Transform>,
    synthesis: Arc<Transform>,
}

/// The parameters of a block, handed out in the order of its specs.
struct Weights<'a>(std::slice::Iter<'a, Var>);

impl<'a> Weights<'a> {
    fn next(&mut self) -> Result<&'a Var> {
        self.0.next().ok_or(halfmode_autograd::Error::Arity { op: "fno_layer", expected: 1, found: 0 })
    }

    fn skip(&mut self, kind: Skip) -> Result<Option<&'a Var>> {
        if matches!(kind, Skip::Linear | Skip::SoftGating) { self.next().map(Some) } else { Ok(None) }
    }
}

impl Layer<'_> {
    /// Activations follow every block but the last.
    fn is_last(self) -> bool {
        self.idx + 1 == self.fno.config().n_layers
    }

    /// In the order in which [`Layer::forward`] takes them: convolution, its skip, channel MLP, its
    /// skip, norms.
    pub(crate) fn param_specs(self) -> Vec<ParamSpec> {
        let (config, idx) = (self.fno.config(), self.idx);
        let (c, ones) = (config.hidden_channels, vec![1; config.n_modes.len()]);
        let std = Init::Normal { std: (2.0 / (c + c) as f64).sqrt() };
        let name = format!("fno_blocks.convs.{idx}.weight.tensor");
        let modes = config.stored_modes();
        let mut specs = vec![
            if config.separable {
                ParamSpec::separable(name, &[&[c][..], &modes].concat(), std)
            } else {
                ParamSpec::spectral(name, &[&[c, c][..], &modes].concat(), std)
            },
            ParamSpec::real(format!("fno_blocks.convs.{idx}.bias"), &[&[c][..], &ones].concat(), std),
        ];
        let skip = |kind: Skip, name: String| match kind {
            Skip::Linear => {
                let bound = 1.0 / (c as f64).sqrt();
                Some(ParamSpec::real(format!("{name}.conv.weight"), &[c, c, 1], Init::Uniform { bound }))
            }
            Skip::SoftGating => {
                Some(ParamSpec::real(format!("{name}.weight"), &[&[1, c][..], &ones].concat(), Init::Ones))
            }
            Skip::Identity | Skip::None => None,
        };
        specs.extend(skip(config.fno_skip, format!("fno_blocks.fno_skips.{idx}")));
        if config.use_channel_mlp {
            let [_, _, hidden] = config.widths();
            specs.extend(conv(&format!("fno_blocks.channel_mlp.{idx}.fcs.0"), (hidden, c)));
            specs.extend(conv(&format!("fno_blocks.channel_mlp.{idx}.fcs.1"), (c, hidden)));
            specs.extend(skip(config.channel_mlp_skip, format!("fno_blocks.channel_mlp_skips.{idx}")));
        }
        if config.norm == Norm::GroupNorm {
            for norm in [2 * idx, 2 * idx + 1] {
                specs.push(ParamSpec::real(format!("fno_blocks.norm.{norm}.weight"), &[c], Init::Ones));
                specs.push(ParamSpec::real(format!("fno_blocks.norm.{norm}.bias"), &[c], Init::Zeros));
            }
        }
        specs
    }

    /// Applies the block to `x`, `[batch, n_1, …, n_d, c]`; its output is on the grid `to`, or on
    /// that of the configured scaling.
    pub(crate) fn forward(self, tape: &mut Tape, weights: &[Var], x: &Var, to: Option<&[usize]>) -> Result<Var> {
        let grids = self.grids(tape, x, to).map_err(Error::in_op)?;
        let (stored, used) = (self.fno.config().stored_modes(), &grids.analysis.config().modes);
        let mut weights = Weights(weights.iter());
        let mut spectral = weights.next()?.clone();
        if stored != *used {
            spectral = tape.apply(SelectModes::new(&stored, used, Domain::Real), &[&spectral])?;
        }
        if self.is_fused() && grids.from == grids.to {
            return self.fused(tape, &grids, x, &spectral, weights);
        }
        self.composed(tape, &grids, x, &spectral, weights)
    }

    fn grids(self, tape: &Tape, x: &Var, to: Option<&[usize]>) -> crate::Result<Grids> {
        let config = self.fno.config();
        let shape = x.value().shape();
        let from = shape[1..shape.len() - 1].to_vec();
        let factor = config.resolution_scaling_factor.get(self.idx, 1.0);
        let scaled = || from.iter().map(|&n| ((n as f64 * factor).round_ties_even() as usize).max(1)).collect();
        let to: Vec<usize> = to.map_or_else(scaled, <[usize]>::to_vec);
        if to.len() != from.len() || to.contains(&0) {
            let (key, why) = ("output_shape", "one positive number per axis");
            return Err(Error::Config { key, value: format!("{to:?}"), why });
        }
        let d = from.len();
        let resolved = |axis: usize, n: usize| if axis + 1 == d { n / 2 + 1 } else { n };
        let modes: Vec<usize> = (0..d)
            .zip(config.active_modes())
            .map(|(axis, n)| n.min(resolved(axis, from[axis])).min(resolved(axis, to[axis])))
            .collect();
        let (device, accumulate) = (&tape.cx().device, tape.cx().policy.transform.accumulate);
        let analysis = self.fno.transform(device, &from, &modes, accumulate)?;
        let synthesis = self.fno.transform(device, &to, &modes, accumulate)?;
        Ok(Grids { from, to, analysis, synthesis })
    }

    /// Whether the block is the peer's default, which one op computes.
    fn is_fused(self) -> bool {
        let config = self.fno.config();
        config.use_channel_mlp
            && !config.preactivation
            && !config.separable
            && config.norm == Norm::None
            && config.fno_skip == Skip::Linear
            && config.channel_mlp_skip == Skip::SoftGating
    }

    fn fused(self, tape: &mut Tape, grids: &Grids, x: &Var, spectral: &Var, mut weights: Weights<'_>) -> Result<Var> {
        let block = FnoBlock {
            transform: Arc::clone(&grids.analysis),
            stabilizer: match self.fno.config().stabilizer {
                StabilizerKind::None => Stabilizer::None,
                StabilizerKind::Tanh => Stabilizer::Tanh,
            },
            activation: if self.is_last() { Activation::None } else { Activation::Gelu },
        };
        let mut inputs = vec![x, spectral];
        for _ in 0..7 {
            inputs.push(weights.next()?);
        }
        tape.apply(block, &inputs)
    }

    /// The block as small ops, in either order of convolution, norm and activation.
    fn composed(
        self,
        tape: &mut Tape,
        grids: &Grids,
        x: &Var,
        spectral: &Var,
        mut weights: Weights<'_>,
    ) -> Result<Var> {
        let config = self.fno.config();
        let bias = weights.next()?;
        let fno_skip = weights.skip(config.fno_skip)?;
        let mut mlp = Vec::new();
        let mut mlp_skip = None;
        if config.use_channel_mlp {
            for _ in 0..4 {
                mlp.push(weights.next()?);
            }
            mlp_skip = weights.skip(config.channel_mlp_skip)?;
        }
        let mut norms = Vec::new();
        if config.norm == Norm::GroupNorm {
            for _ in 0..2 {
                norms.push((weights.next()?, weights.next()?));
            }
        }
        let norm = |tape: &mut Tape, x: Var, which: usize| match config.norm {
            Norm::None => Ok(x),
            Norm::InstanceNorm => tape.apply(FieldNorm(NormKind::Instance), &[&x]),
            Norm::GroupNorm => tape.apply(FieldNorm(NormKind::Group), &[&x, norms[which].0, norms[which].1]),
        };
        let act = |tape: &mut Tape, x: Var| if self.is_last() { Ok(x) } else { tape.apply(Gelu, &[&x]) };

        let mut x = x.clone();
        if config.preactivation {
            x = tape.apply(Gelu, &[&x])?;
            x = norm(tape, x, 0)?;
        }
        let fno_skip = self.skip(tape, grids, &x, config.fno_skip, fno_skip)?;
        let mlp_kind = if config.use_channel_mlp { config.channel_mlp_skip } else { Skip::None };
        let mlp_skip = self.skip(tape, grids, &x, mlp_kind, mlp_skip)?;
        if config.stabilizer == StabilizerKind::Tanh {
            x = tape.apply(Tanh, &[&x])?;
        }
        let product = if config.separable { ModeProduct::Separable } else { ModeProduct::Dense };
        let convolution = SpectralConv::resampling(Arc::clone(&grids.analysis), Arc::clone(&grids.synthesis));
        x = tape.apply(convolution.with_product(product), &[&x, spectral])?;
        x = tape.apply(ChannelBias, &[&x, bias])?;
        if !config.preactivation {
            x = norm(tape, x, 0)?;
        }
        if let Some(skip) = fno_skip {
            x = tape.apply(Add, &[&x, &skip])?;
        }
        x = act(tape, x)?;
        if config.preactivation {
            x = norm(tape, x, 1)?;
        }
        if let [w1, b1, w2, b2] = mlp[..] {
            let embedding = GridEmbedding::None;
            let op = PointwiseMlp { input: Channels::Last, output: Channels::Last, embedding };
            x = tape.apply(op, &[&x, w1, b1, w2, b2])?;
            if let Some(skip) = mlp_skip {
                x = tape.apply(Add, &[&x, &skip])?;
            }
        }
        if !config.preactivation {
            x = norm(tape, x, 1)?;
            x = act(tape, x)?;
        }
        Ok(x)
    }

    /// What goes around a part of the block, on the output's grid.
    fn skip(self, tape: &mut Tape, grids: &Grids, x: &Var, kind: Skip, weight: Option<&Var>) -> Result<Option<Var>> {
        let skip = match (kind, weight) {
            (Skip::Linear, Some(w)) => tape.apply(Linear, &[x, w])?,
            (Skip::SoftGating, Some(w)) => tape.apply(ChannelGate, &[x, w])?,
            (Skip::Identity, _) => x.clone(),
            _ => return Ok(None),
        };
        if grids.from == grids.to {
            return Ok(Some(skip));
        }
        if grids.from.len() < 3 {
            let (from, to) = (grids.from.clone(), grids.to.clone());
            return tape.apply(Interpolate { from, to }, &[&skip]).map(Some);
        }
        // All modes that both grids resolve.
        let d = grids.from.len();
        let both = grids.from.iter().zip(&grids.to).map(|(n, m)| *n.min(m)).enumerate();
        let modes: Vec<usize> = both.map(|(axis, n)| if axis + 1 == d { n / 2 + 1 } else { n }).collect();
        let cx = tape.cx();
        let accumulate = cx.policy.transform.accumulate;
        let plan = |grid: &[usize]| self.fno.transform(&cx.device, grid, &modes, accumulate).map_err(Error::in_op);
        let resample = FourierResample { analysis: plan(&grids.from)?, synthesis: plan(&grids.to)? };
        tape.apply(resample, &[&skip]).map(Some)
    }
}
