//! Normalisation of fields by their own statistics.

use crate::pointwise::{Grads, check_len, filled, rows_of, storage, weight_dtype};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Purpose, Real, Tensor, with_real};
use smallvec::smallvec;

/// What shares a mean and a variance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// The points of one channel of one sample; without weights.
    Instance,
    /// All points and channels of one sample, with a weight and a bias per channel.
    Group,
}

/// `y = (x - mean) / sqrt(var + 1e-5)`, then times `weight` plus `bias` for [`NormKind::Group`].
/// The variance is the biased one; statistics are summed in f64.
///
/// # Shapes
/// - input 0, `x`: `[batch, …, c]`, real
/// - inputs 1 and 2 of [`NormKind::Group`]: `weight`, `bias` `[c]`
/// - output: the shape of `x`
///
/// # Saved for backward
/// `x`; `weight` is shared. Statistics are formed again.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the channel counts disagree.
///
/// Source: `torch.nn.functional.instance_norm` and `torch.nn.GroupNorm(1, c)`, as neuraloperator uses them.
#[derive(Clone, Copy, Debug)]
pub struct FieldNorm(pub NormKind);

const EPS: f64 = 1e-5;

impl FieldNorm {
    /// Calls `each` with the range of rows and of channels of everything that shares statistics.
    fn groups(self, batch: usize, c: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let per_sample = if self.0 == NormKind::Instance { c } else { 1 };
        (0..batch * per_sample).map(move |idx| {
            let first = idx % per_sample;
            (idx / per_sample, if per_sample == 1 { 0..c } else { first..first + 1 })
        })
    }
}

/// The rows of sample `b`, restricted to `channels`.
fn members<R: Real>(
    values: &[R],
    (b, rows, c): (usize, usize, usize),
    channels: &std::ops::Range<usize>,
) -> impl Iterator<Item = f64> + Clone {
    let sample = &values[b * rows * c..(b + 1) * rows * c];
    sample.chunks_exact(c).flat_map(move |row| row[channels.clone()].iter().map(|it| it.to_f64()))
}

/// Mean and reciprocal standard deviation.
fn statistics(values: impl Iterator<Item = f64> + Clone, n: usize) -> (f64, f64) {
    let mean = values.clone().sum::<f64>() / n as f64;
    let var = values.map(|it| (it - mean) * (it - mean)).sum::<f64>() / n as f64;
    (mean, 1.0 / (var + EPS).sqrt())
}

impl Op for FieldNorm {
    fn name(&self) -> &'static str {
        match self.0 {
            NormKind::Instance => "instance_norm",
            NormKind::Group => "group_norm",
        }
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let (x, affine) = match self.0 {
            NormKind::Instance => (self.expect_inputs::<1>(inputs)?[0], None),
            NormKind::Group => {
                let [x, weight, bias] = self.expect_inputs(inputs)?;
                (x, Some((weight, bias)))
            }
        };
        let (rows, c) = rows_of(x);
        let batch = x.shape().first().copied().unwrap_or(1).max(1);
        let rows = rows / batch;
        let run = || -> crate::Result<Tensor> {
            if let Some((weight, bias)) = affine {
                check_len(self.name(), "weight", weight, c)?;
                check_len(self.name(), "bias", bias, c)?;
            }
            with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, x.shape(), storage(cx), Purpose::Activation, || {
                let x = x.to_vec::<R>()?;
                let mut y = x.clone();
                let affine = affine.map(|(w, b)| Ok::<_, crate::Error>((w.to_vec::<f64>()?, b.to_vec::<f64>()?))).transpose()?;
                for (b, channels) in self.groups(batch, c) {
                    let (mean, rstd) = statistics(members(&x, (b, rows, c), &channels), rows * channels.len());
                    for row in y[b * rows * c..(b + 1) * rows * c].chunks_exact_mut(c) {
                        for (channel, y) in channels.clone().zip(&mut row[channels.clone()]) {
                            let (w, b) = affine.as_ref().map_or((1.0, 0.0), |(w, b)| (w[channel], b[channel]));
                            *y = R::from_f64((y.to_f64() - mean) * rstd * w + b);
                        }
                    }
                }
                Ok(y)
            }))
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        let mut saved = Saved::new(self.name()).keep(cx, "x", x)?;
        if let Some((weight, _)) = affine {
            saved = saved.share(cx, "weight", weight);
        }
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let x = saved.take("x")?;
        let weight = saved.take("weight").ok();
        let n_inputs = if weight.is_some() { 3 } else { 1 };
        let Some(g) = grads[0].take() else { return Ok(vec![None; n_inputs]) };
        let (rows, c) = rows_of(&x);
        let batch = x.shape().first().copied().unwrap_or(1).max(1);
        let rows = rows / batch;
        let (mut grad_w, mut grad_b) = (vec![0.0; c], vec![0.0; c]);
        let run = || -> crate::Result<Vec<Option<Tensor>>> {
            let gx = with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, x.shape(), storage(cx), Purpose::Activation, || {
                let (x, g) = (x.to_vec::<R>()?, g.to_vec::<R>()?);
                let w = weight.as_ref().map(|w| w.to_vec::<f64>()).transpose()?.unwrap_or_else(|| vec![1.0; c]);
                let mut gx = vec![R::ZERO; x.len()];
                for (b, channels) in self.groups(batch, c) {
                    let n = (rows * channels.len()) as f64;
                    let (mean, rstd) = statistics(members(&x, (b, rows, c), &channels), rows * channels.len());
                    let sample = b * rows * c..(b + 1) * rows * c;
                    let (mut sum, mut product) = (0.0, 0.0);
                    for (x, g) in x[sample.clone()].chunks_exact(c).zip(g[sample.clone()].chunks_exact(c)) {
                        for channel in channels.clone() {
                            let (x_hat, g) = ((x[channel].to_f64() - mean) * rstd, g[channel].to_f64());
                            grad_w[channel] += g * x_hat;
                            grad_b[channel] += g;
                            sum += g * w[channel];
                            product += g * w[channel] * x_hat;
                        }
                    }
                    let lines = x[sample.clone()].chunks_exact(c).zip(g[sample.clone()].chunks_exact(c));
                    for ((x, g), gx) in lines.zip(gx[sample].chunks_exact_mut(c)) {
                        for channel in channels.clone() {
                            let (x_hat, g) = ((x[channel].to_f64() - mean) * rstd, g[channel].to_f64());
                            gx[channel] = R::from_f64(rstd * (g * w[channel] - (sum + x_hat * product) / n));
                        }
                    }
                }
                Ok(gx)
            }))?;
            let Some(weight) = &weight else { return Ok(vec![Some(gx)]) };
            let of_weight = |values: Vec<f64>| {
                filled::<f64>(&cx.device, weight.shape(), weight_dtype(cx), Purpose::Grad, || Ok(values))
            };
            Ok(vec![Some(gx), Some(of_weight(grad_w)?), Some(of_weight(grad_b)?)])
        };
        run().map_err(|err| err.in_op(self.name()))
    }
}
