//! Where jets begin and end, and what acts on their values alone.

use super::maps::{check_jet, row_len};
use crate::pointwise::{Grads, check_axes, check_len, check_real, rows_of, storage, weight_dtype};
use crate::rows::add_column_sums;
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;

/// The directions of a jet's tangents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tangents {
    /// The unit vectors of the last axis: as many tangents as channels.
    Unit,
    /// One direction, given by a tensor in the shape of the value.
    Given,
}

impl Tangents {
    fn n(self, channels: usize) -> usize {
        match self {
            Tangents::Unit => channels,
            Tangents::Given => 1,
        }
    }
}

/// The jet of a variable: its value, and the directions as tangents.
///
/// # Shapes
/// - input 0, `x`: `[…, c]`; input 1, the direction, in the shape of `x`: for [`Tangents::Given`] alone, without
///   gradient
/// - output: `[1 + c, …, c]`, or `[2, …, c]`
///
/// # Saved for backward
/// Nothing.
#[derive(Clone, Copy, Debug)]
pub struct JetStart(pub Tangents);

/// The end of a jet of a velocity by its own state: the velocity, and minus the trace of its Jacobian.
///
/// # Shapes
/// - input 0, the jet: `[1 + c, …, c]`, or `[2, …, c]`; input 1 as in [`JetStart`]: the same direction
/// - output 0, the value: `[…, c]`, in the storage format
/// - output 1, minus the divergence, or Hutchinson's estimate of it: `[…, 1]`, in the accumulation format
///
/// # Saved for backward
/// The direction, shared, if there is one.
#[derive(Clone, Copy, Debug)]
pub struct JetDivergence {
    /// Along which directions the jet goes.
    pub tangents: Tangents,
    /// Channels of the state: `c`.
    pub channels: usize,
}

/// `y[.., c] = x[.., c] + bias[c]` of a jet: tangents stay as they are. The bias is shared.
#[derive(Clone, Copy, Debug)]
pub struct JetBias;

/// One more channel of a jet, the same number at every point and with tangents of zero: the time.
///
/// # Shapes
/// - input 0, the jet: `[1 + m, …, c]`; input 1, `t`: `[1]`
/// - output: `[1 + m, …, c + 1]`
///
/// # Saved for backward
/// Nothing.
#[derive(Clone, Copy, Debug)]
pub struct JetConstant;

/// Numbers 1 and -1 with equal chance, the same for the same seed: a direction for Hutchinson's estimate.
///
/// # Errors
/// [`halfmode_tensor::Error::TooLarge`] if there are too many to count, and those of allocation.
pub fn random_signs(device: &Device, shape: &[usize], precision: Precision, seed: u64) -> Result<Tensor> {
    use rand_chacha::ChaCha12Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    let shape = Shape::new(shape);
    let Some(n) = shape.checked_numel() else {
        return Err(halfmode_tensor::Error::TooLarge { shape, dtype: DType::real(precision) }.into());
    };
    let signs: Vec<f64> = (0..n).map(|_| if rng.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
    Ok(Tensor::from_slice(device, &signs, shape, precision, Purpose::Data)?)
}

type Forward = halfmode_autograd::Result<(Outputs, Saved)>;

fn direction<'a>(op: &dyn Op, tangents: Tangents, inputs: &[&'a Tensor]) -> halfmode_autograd::Result<[&'a Tensor; 2]> {
    match (tangents, inputs) {
        (Tangents::Unit, [x]) => Ok([x, x]),
        (Tangents::Given, [x, direction]) => Ok([x, direction]),
        _ => {
            let expected = if tangents == Tangents::Unit { 1 } else { 2 };
            Err(halfmode_autograd::Error::Arity { op: op.name(), expected, found: inputs.len() })
        }
    }
}

/// `[rows, …]` of `shape`.
fn stacked(rows: usize, shape: &[usize]) -> Shape {
    Shape::from([&[rows], shape].concat())
}

fn with_last(shape: &[usize], last: usize) -> Shape {
    let mut shape = shape.to_vec();
    if let Some(channels) = shape.last_mut() {
        *channels = last;
    }
    Shape::from(shape)
}

/// Numbers of a tensor as accumulators, all of them or the first `n`.
fn read<R: Real>(x: &Tensor, n: usize) -> Result<Vec<R>> {
    let mut out = vec![R::ZERO; n];
    x.view()?.slice(0..n).widen(&mut out);
    Ok(out)
}

/// A tensor that `fill` makes where kernels run.
fn made<R: Real>(
    cx: &Cx,
    shape: &Shape,
    (dtype, purpose): (DType, Purpose),
    fill: impl FnOnce() -> Result<Vec<R>>,
) -> Result<Tensor> {
    crate::pointwise::filled(&cx.device, shape, dtype, purpose, fill)
}

impl Op for JetStart {
    fn name(&self) -> &'static str {
        "jet_start"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, along] = direction(self, self.0, inputs)?;
        let (n, (_, c)) = (x.numel(), rows_of(x));
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_axes(self.name(), "x", x, 1)?;
            check_len(self.name(), "direction", along, n)?;
            let shape = stacked(1 + self.0.n(c), x.shape());
            with_real!(cx.policy.pointwise.storage, R => made::<R>(cx, &shape, (storage(cx), Purpose::Activation), || {
                let mut out = read::<R>(x, n)?;
                match self.0 {
                    Tangents::Given => out.extend(read::<R>(along, n)?),
                    Tangents::Unit => {
                        out.resize((1 + c) * n, R::ZERO);
                        for (k, row) in out[n..].chunks_exact_mut(n.max(1)).enumerate() {
                            row.iter_mut().skip(k).step_by(c).for_each(|it| *it = R::ONE);
                        }
                    }
                }
                Ok(out)
            }))
        };
        Ok((smallvec![run().map_err(|err| err.in_op(self.name()))?], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let mut out = vec![None; needs.len()];
        let Some(g) = grads[0].take() else { return Ok(out) };
        let n = row_len(&g);
        let run = || -> Result<Tensor> {
            let shape = Shape::from(g.shape()[1..].to_vec());
            with_real!(cx.policy.pointwise.storage, R => {
                made::<R>(cx, &shape, (storage(cx), Purpose::Activation), || read::<R>(&g, n))
            })
        };
        out[0] = Some(run().map_err(|err| err.in_op(self.name()))?);
        Ok(out)
    }
}

impl Op for JetDivergence {
    fn name(&self) -> &'static str {
        "jet_divergence"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [jet, along] = direction(self, self.tangents, inputs)?;
        let (n, c) = (row_len(jet), self.channels);
        let run = || -> Result<[Tensor; 2]> {
            check_real(self.name(), inputs)?;
            check_jet(self.name(), "jet", jet)?;
            if self.tangents == Tangents::Given {
                check_len(self.name(), "direction", along, n)?;
            }
            let shape = Shape::from(jet.shape().get(1..).unwrap_or_default().to_vec());
            let expected = stacked(1 + self.tangents.n(c), &with_last(&shape, c));
            if *jet.shape() != expected {
                return Err(Error::Shape { op: self.name(), operand: "jet", expected, found: jet.shape().clone() });
            }
            let as_storage = (storage(cx), Purpose::Activation);
            with_real!(cx.policy.pointwise.accumulate, R => {
                let value = made::<R>(cx, &shape, as_storage, || read::<R>(jet, n))?;
                let of_trace = (weight_dtype(cx), Purpose::Activation);
                let trace = made::<R>(cx, &with_last(&shape, 1), of_trace, || {
                    let all = read::<R>(jet, jet.numel())?;
                    let signs = if self.tangents == Tangents::Given { read::<R>(along, n)? } else { Vec::new() };
                    let points = 0..n / c.max(1);
                    Ok(points.map(|point| {
                        let mut sum = R::ZERO;
                        match self.tangents {
                            Tangents::Unit => (0..c).for_each(|k| sum += all[(k + 1) * n + point * c + k]),
                            Tangents::Given => {
                                let own = point * c..(point + 1) * c;
                                own.for_each(|i| sum += signs[i] * all[n + i]);
                            }
                        }
                        -sum
                    }).collect())
                })?;
                Ok([value, trace])
            })
        };
        let [value, trace] = run().map_err(|err| err.in_op(self.name()))?;
        let mut saved = Saved::new(self.name());
        if self.tangents == Tangents::Given {
            saved = saved.share(cx, "direction", along);
        }
        Ok((smallvec![value, trace], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let along = if self.tangents == Tangents::Given { Some(saved.take("direction")?) } else { None };
        let mut out = vec![None; needs.len()];
        let (gv, gm) = (grads[0].take(), grads[1].take());
        let Some(known) = gv.as_ref().or(gm.as_ref()) else { return Ok(out) };
        let (shape, c) = (with_last(known.shape(), self.channels), self.channels);
        let n = shape.numel();
        let run = || -> Result<Tensor> {
            let of_jet = stacked(1 + self.tangents.n(c), &shape);
            with_real!(cx.policy.pointwise.storage, R => made::<R>(cx, &of_jet, (storage(cx), Purpose::Activation), || {
                let mut all = gv.as_ref().map_or_else(|| Ok(vec![R::ZERO; n]), |gv| read::<R>(gv, n))?;
                all.resize((1 + self.tangents.n(c)) * n, R::ZERO);
                let Some(gm) = &gm else { return Ok(all) };
                let gm = read::<R>(gm, n / c.max(1))?;
                match &along {
                    None => {
                        for (k, row) in all[n..].chunks_exact_mut(n.max(1)).enumerate() {
                            row.iter_mut().skip(k).step_by(c).zip(&gm).for_each(|(it, gm)| *it = -*gm);
                        }
                    }
                    Some(along) => {
                        let signs = read::<R>(along, n)?;
                        all[n..].iter_mut().zip(&signs).enumerate().for_each(|(i, (it, sign))| *it = -gm[i / c] * *sign);
                    }
                }
                Ok(all)
            }))
        };
        out[0] = Some(run().map_err(|err| err.in_op(self.name()))?);
        Ok(out)
    }
}

impl Op for JetBias {
    fn name(&self) -> &'static str {
        "jet_bias"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, bias] = self.expect_inputs(inputs)?;
        let (n, c) = (row_len(x), rows_of(x).1);
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_jet(self.name(), "x", x)?;
            check_len(self.name(), "bias", bias, c)?;
            with_real!(cx.policy.pointwise.storage, R => {
                made::<R>(cx, x.shape(), (storage(cx), Purpose::Activation), || {
                    let (mut all, bias) = (read::<R>(x, x.numel())?, read::<R>(bias, c)?);
                    for row in all[..n].chunks_exact_mut(c.max(1)) {
                        row.iter_mut().zip(&bias).for_each(|(x, b)| *x += *b);
                    }
                    Ok(all)
                })
            })
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).share(cx, "bias", bias)))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let bias = saved.take("bias")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let run = || -> Result<Tensor> {
            with_real!(cx.policy.pointwise.accumulate, R => {
                made::<R>(cx, bias.shape(), (weight_dtype(cx), Purpose::Grad), || {
                    let mut sums = vec![R::ZERO; bias.numel()];
                    add_column_sums(&read::<R>(&g, row_len(&g))?, &mut sums);
                    Ok(sums)
                })
            })
        };
        let sums = run().map_err(|err| err.in_op(self.name()))?;
        Ok(vec![Some(g), Some(sums)])
    }
}

impl Op for JetConstant {
    fn name(&self) -> &'static str {
        "jet_constant"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, t] = self.expect_inputs(inputs)?;
        let (n, c) = (row_len(x), rows_of(x).1);
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_jet(self.name(), "x", x)?;
            check_len(self.name(), "t", t, 1)?;
            let shape = with_last(x.shape(), c + 1);
            with_real!(cx.policy.pointwise.storage, R => made::<R>(cx, &shape, (storage(cx), Purpose::Activation), || {
                let (all, t) = (read::<R>(x, x.numel())?, read::<R>(t, 1)?[0]);
                let points = n / c.max(1);
                let channel = |row: usize| if row < points { t } else { R::ZERO };
                let rows = all.chunks_exact(c.max(1)).enumerate();
                Ok(rows.flat_map(|(row, x)| x.iter().copied().chain([channel(row)])).collect())
            }))
        };
        Ok((smallvec![run().map_err(|err| err.in_op(self.name()))?], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let (n, wide) = (row_len(&g), rows_of(&g).1);
        let run = || -> Result<Vec<Option<Tensor>>> {
            with_real!(cx.policy.pointwise.storage, R => {
                let shape = with_last(g.shape(), wide - 1);
                let gx = needs[0].then(|| made::<R>(cx, &shape, (storage(cx), Purpose::Activation), || {
                    let all = read::<R>(&g, g.numel())?;
                    Ok(all.chunks_exact(wide).flat_map(|row| row[..wide - 1].to_vec()).collect())
                }));
                let gt = needs[1].then(|| made::<R>(cx, &Shape::from([1]), (weight_dtype(cx), Purpose::Grad), || {
                    let mut sum = R::ZERO;
                    read::<R>(&g, n)?.chunks_exact(wide).for_each(|row| sum += row[wide - 1]);
                    Ok(vec![sum])
                }));
                Ok(vec![gx.transpose()?, gt.transpose()?])
            })
        };
        run().map_err(|err| err.in_op(self.name()))
    }
}
