//! One block of the Fourier neural operator, with every option of the peer.

use crate::field::{Field, LayerWeights, Weights, layer_specs};
use crate::fno::{Fno, conv, mlp};
use crate::{Error, Norm, Skip, StabilizerKind};
use halfmode_autograd::{Result, Tape, Var};
use halfmode_fft::Transform;
use halfmode_nn::{
    Activation, BatchNorm, BatchStatistics, ChannelBias, ChannelGate, Channels, FieldNorm, FnoBlock, FourierResample,
    Gelu, Init, Interpolate, JoinComplex, Linear, ModeProduct, NormKind, ParamSpec, SelectModes, SpectralConv,
    SplitComplex, Stabilizer, Tanh,
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
        let skip = |kind: Skip, name: String| {
            layer_specs(config.complex_data, |half| match kind {
                Skip::Linear => {
                    let bound = 1.0 / (c as f64).sqrt();
                    vec![ParamSpec::real(format!("{name}{half}.conv.weight"), &[c, c, 1], Init::Uniform { bound })]
                }
                Skip::SoftGating => {
                    let shape = [&[1, c][..], &ones].concat();
                    vec![ParamSpec::real(format!("{name}{half}.weight"), &shape, Init::Ones)]
                }
                Skip::Identity | Skip::None => Vec::new(),
            })
        };
        specs.extend(skip(config.fno_skip, format!("fno_blocks.fno_skips.{idx}")));
        if config.use_channel_mlp {
            let [_, _, hidden] = config.widths();
            specs.extend(layer_specs(config.complex_data, |half| {
                let name = format!("fno_blocks.channel_mlp.{idx}{half}.fcs");
                [conv(&format!("{name}.0"), (hidden, c)), conv(&format!("{name}.1"), (c, hidden))].concat()
            }));
            specs.extend(skip(config.channel_mlp_skip, format!("fno_blocks.channel_mlp_skips.{idx}")));
        }
        let inner = if config.norm == Norm::BatchNorm { ".norm" } else { "" };
        for norm in [2 * idx, 2 * idx + 1] {
            specs.extend(layer_specs(config.complex_data, |half| {
                let name = |what: &str| format!("fno_blocks.norm.{norm}{half}{inner}.{what}");
                let affine = || {
                    [
                        ParamSpec::real(name("weight"), &[c], Init::Ones),
                        ParamSpec::real(name("bias"), &[c], Init::Zeros),
                    ]
                };
                match config.norm {
                    Norm::None | Norm::InstanceNorm => Vec::new(),
                    Norm::GroupNorm => affine().into(),
                    Norm::BatchNorm => {
                        let mean = ParamSpec::statistic(name("running_mean"), &[c], Init::Zeros);
                        let var = ParamSpec::statistic(name("running_var"), &[c], Init::Ones);
                        affine().into_iter().chain([mean, var]).collect()
                    }
                }
            }));
        }
        specs
    }

    /// Applies the block to `x`, `[batch, n_1, …, n_d, c]`; its output is on the grid `to`, or on
    /// that of the configured scaling.
    pub(crate) fn forward(
        self,
        tape: &mut Tape,
        weights: &mut Weights<'_>,
        x: &Field,
        to: Option<&[usize]>,
    ) -> Result<Field> {
        let grids = self.grids(tape, x.part(), to).map_err(Error::in_op)?;
        let (stored, used) = (self.fno.config().stored_modes(), &grids.analysis.config().modes);
        let [first] = weights.take(1)? else { return Err(missing()) };
        let mut spectral = first.clone();
        if stored != *used {
            spectral = tape.apply(SelectModes::new(&stored, used, self.fno.domain()), &[&spectral])?;
        }
        match x {
            Field::Real(x) if self.is_fused() && grids.from == grids.to => {
                self.fused(tape, &grids, x, &spectral, weights).map(Field::Real)
            }
            _ => self.composed(tape, &grids, x, &spectral, weights),
        }
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
        let modes: Vec<usize> = config
            .active_modes()
            .into_iter()
            .enumerate()
            .map(|(axis, n)| n.min(config.resolved_modes(axis, from[axis])).min(config.resolved_modes(axis, to[axis])))
            .collect();
        let (device, policy) = (&tape.cx().device, &tape.cx().policy);
        let domain = self.fno.domain();
        let analysis = self.fno.transform(device, domain, &from, &modes, policy)?;
        let synthesis = self.fno.transform(device, domain, &to, &modes, policy)?;
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

    fn fused(self, tape: &mut Tape, grids: &Grids, x: &Var, spectral: &Var, weights: &mut Weights<'_>) -> Result<Var> {
        let block = FnoBlock {
            transform: Arc::clone(&grids.analysis),
            stabilizer: match self.fno.config().stabilizer {
                StabilizerKind::None => Stabilizer::None,
                StabilizerKind::Tanh => Stabilizer::Tanh,
            },
            activation: if self.is_last() { Activation::None } else { Activation::Gelu },
        };
        let inputs: Vec<&Var> = [x, spectral].into_iter().chain(weights.take(7)?).collect();
        tape.apply(block, &inputs)
    }

    /// The block as small ops, in either order of convolution, norm and activation.
    fn composed(
        self,
        tape: &mut Tape,
        grids: &Grids,
        x: &Field,
        spectral: &Var,
        weights: &mut Weights<'_>,
    ) -> Result<Field> {
        let config = self.fno.config();
        let [bias] = weights.take(1)? else { return Err(missing()) };
        let fno_skip = weights.layer(n_skip_weights(config.fno_skip))?;
        let (mut channel_mlp, mut mlp_skip) = (None, None);
        if config.use_channel_mlp {
            channel_mlp = Some(weights.layer(4)?);
            mlp_skip = Some(weights.layer(n_skip_weights(config.channel_mlp_skip))?);
        }
        let n_norm_weights = match config.norm {
            Norm::None | Norm::InstanceNorm => 0,
            Norm::GroupNorm => 2,
            Norm::BatchNorm => 4,
        };
        let norms = [weights.layer(n_norm_weights)?, weights.layer(n_norm_weights)?];
        let norm = |tape: &mut Tape, x: Field, which: usize| match config.norm {
            Norm::None => Ok(x),
            Norm::InstanceNorm => {
                x.through(tape, norms[which], |tape, _, x| tape.apply(FieldNorm(NormKind::Instance), &[x]))
            }
            Norm::GroupNorm => x.through(tape, norms[which], |tape, weights, x| match weights {
                [weight, bias] => tape.apply(FieldNorm(NormKind::Group), &[x, weight, bias]),
                _ => Err(missing()),
            }),
            Norm::BatchNorm => x.through(tape, norms[which], batch_norm),
        };
        let gelu = |tape: &mut Tape, x: Field| x.map(|part| tape.apply(Gelu, &[part]));
        let act = |tape: &mut Tape, x: Field| if self.is_last() { Ok(x) } else { gelu(tape, x) };

        let mut x = x.clone();
        if config.preactivation {
            x = gelu(tape, x)?;
            x = norm(tape, x, 0)?;
        }
        let fno_skip = self.skip(tape, grids, &x, config.fno_skip, fno_skip)?;
        let mlp_skip = match mlp_skip {
            Some(weights) => self.skip(tape, grids, &x, config.channel_mlp_skip, weights)?,
            None => None,
        };
        if config.stabilizer == StabilizerKind::Tanh {
            x = x.map(|part| tape.apply(Tanh, &[part]))?;
        }
        x = self.convolution(tape, grids, &x, spectral, bias)?;
        if !config.preactivation {
            x = norm(tape, x, 0)?;
        }
        if let Some(skip) = fno_skip {
            x = x.add(tape, &skip)?;
        }
        x = act(tape, x)?;
        if config.preactivation {
            x = norm(tape, x, 1)?;
        }
        if let Some(weights) = channel_mlp {
            x = x.through(tape, weights, |tape, weights, x| mlp(tape, weights, x, Channels::Last))?;
            if let Some(skip) = mlp_skip {
                x = x.add(tape, &skip)?;
            }
        }
        if !config.preactivation {
            x = norm(tape, x, 1)?;
            x = act(tape, x)?;
        }
        Ok(x)
    }

    /// The spectral convolution with its bias.
    ///
    /// Of complex fields the peer keeps, on the last axis, the first k frequencies of its spectrum as it lies in
    /// memory: `-n/2, …, k - 1 - n/2` with two and more axes, `0, …, k - 1` with one; and it takes products
    /// with the weight for those of frequencies `0, …, k - 1`. Our transforms keep `-k/2, …`, so fields are
    /// shifted by the difference before and behind.
    fn convolution(self, tape: &mut Tape, grids: &Grids, x: &Field, spectral: &Var, bias: &Var) -> Result<Field> {
        let product = if self.fno.config().separable { ModeProduct::Separable } else { ModeProduct::Dense };
        let op = SpectralConv::resampling(Arc::clone(&grids.analysis), Arc::clone(&grids.synthesis));
        let op = op.with_product(product);
        match x {
            Field::Real(x) => {
                let y = tape.apply(op, &[x, spectral])?;
                tape.apply(ChannelBias, &[&y, bias]).map(Field::Real)
            }
            Field::Complex([re, im]) => {
                let first = |sizes: &[usize]| sizes.last().map_or(0, |&n| (n / 2) as isize);
                let middle = first(&grids.analysis.config().modes);
                let lowest = if grids.from.len() > 1 { first(&grids.from) } else { 0 };
                let z = tape.apply(JoinComplex { turns: lowest - middle }, &[re, im])?;
                let z = tape.apply(op, &[&z, spectral])?;
                let parts = tape.apply_many(Box::new(SplitComplex { turns: middle }), &[&z])?;
                let [re, im] = &parts[..] else { return Err(missing()) };
                Ok(Field::Complex([tape.apply(ChannelBias, &[re, bias])?, im.clone()]))
            }
        }
    }

    /// What goes around a part of the block, on the output's grid.
    fn skip(
        self,
        tape: &mut Tape,
        grids: &Grids,
        x: &Field,
        kind: Skip,
        weights: LayerWeights<'_>,
    ) -> Result<Option<Field>> {
        let skip = match kind {
            Skip::None => return Ok(None),
            _ => x.through(tape, weights, |tape, weights, x| match (kind, weights) {
                (Skip::Linear, [w]) => tape.apply(Linear, &[x, w]),
                (Skip::SoftGating, [w]) => tape.apply(ChannelGate, &[x, w]),
                _ => Ok(x.clone()),
            })?,
        };
        if grids.from == grids.to {
            return Ok(Some(skip));
        }
        skip.map(|part| self.resample(tape, grids, part)).map(Some)
    }

    /// A real field on the output's grid.
    fn resample(self, tape: &mut Tape, grids: &Grids, x: &Var) -> Result<Var> {
        let (from, to) = (grids.from.clone(), grids.to.clone());
        if from.len() < 3 {
            return tape.apply(Interpolate { from, to }, &[x]);
        }
        // All modes that both grids resolve.
        let d = from.len();
        let both = from.iter().zip(&to).map(|(n, m)| *n.min(m)).enumerate();
        let modes: Vec<usize> = both.map(|(axis, n)| if axis + 1 == d { n / 2 + 1 } else { n }).collect();
        let cx = tape.cx();
        let plan = |grid: &[usize]| {
            self.fno.transform(&cx.device, Domain::Real, grid, &modes, &cx.policy).map_err(Error::in_op)
        };
        let resample = FourierResample { analysis: plan(&from)?, synthesis: plan(&to)? };
        tape.apply(resample, &[x])
    }
}

/// By the batch's statistics where a backward pass may follow, by the running ones else.
fn batch_norm(tape: &mut Tape, weights: &[Var], x: &Var) -> Result<Var> {
    let [weight, bias, mean, var] = weights else { return Err(missing()) };
    if !tape.cx().save {
        return tape.apply(BatchNorm(BatchStatistics::Running), &[x, weight, bias, mean, var]);
    }
    let outputs = tape.apply_many(Box::new(BatchNorm(BatchStatistics::Batch)), &[x, weight, bias])?;
    let [y, batch_mean, batch_var] = &outputs[..] else { return Err(missing()) };
    tape.observe(mean, batch_mean.value().clone());
    tape.observe(var, batch_var.value().clone());
    Ok(y.clone())
}

fn n_skip_weights(kind: Skip) -> usize {
    usize::from(matches!(kind, Skip::Linear | Skip::SoftGating))
}

fn missing() -> halfmode_autograd::Error {
    halfmode_autograd::Error::Arity { op: "fno_layer", expected: 1, found: 0 }
}
