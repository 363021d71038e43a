//! Normalisation by the statistics of a batch, or by those that training has gathered.

use crate::pointwise::{Grads, check_axes, check_len, check_real, filled, rows_of, storage, weight_dtype};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::DType;
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;

/// Whose mean and variance a batch norm takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchStatistics {
    /// Those of the batch: training.
    Batch,
    /// Given ones, gathered in training: evaluation.
    Running,
}

/// `y[.., c] = (x[.., c] - mean[c]) / sqrt(var[c] + 1e-5) · weight[c] + bias[c]`, with one mean and variance per
/// channel over samples and points. Statistics are summed in f64.
///
/// # Shapes
/// - input 0, `x`: `[batch, …, c]`, real; inputs 1 and 2: `weight`, `bias` `[c]`
/// - inputs 3 and 4 of [`BatchStatistics::Running`]: `mean`, `var` `[c]`, which get no gradient
/// - output 0: the shape of `x`; outputs 1 and 2 of [`BatchStatistics::Batch`]: the batch's mean and unbiased
///   variance, `[c]`, which running statistics move towards; gradients do not flow through them
///
/// # Saved for backward
/// `x`; the others are shared. Statistics of the batch are formed again.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the channel counts disagree, there are no channels or fewer than two axes;
/// [`halfmode_tensor::Error::DType`] for complex operands.
///
/// Source: `torch.nn.BatchNorm1d`, `2d` and `3d`, as neuraloperator uses them.
#[derive(Clone, Copy, Debug)]
pub struct BatchNorm(pub BatchStatistics);

const EPS: f64 = 1e-5;

/// Sums of `term(row, channel)` per channel over all rows.
fn channel_sums(rows: usize, c: usize, term: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let mut sums = vec![0.0; c];
    for row in 0..rows {
        sums.iter_mut().enumerate().for_each(|(channel, sum)| *sum += term(row, channel));
    }
    sums
}

/// Mean and biased variance per channel.
fn statistics<R: Real>(x: &[R], rows: usize, c: usize) -> (Vec<f64>, Vec<f64>) {
    let at = |row: usize, channel: usize| x[row * c + channel].to_f64();
    let divide = |sums: Vec<f64>| sums.into_iter().map(|sum| sum / rows.max(1) as f64).collect::<Vec<_>>();
    let mean = divide(channel_sums(rows, c, at));
    let var = divide(channel_sums(rows, c, |row, channel| (at(row, channel) - mean[channel]).powi(2)));
    (mean, var)
}

fn reciprocal_deviations(var: &[f64]) -> Vec<f64> {
    var.iter().map(|var| 1.0 / (var + EPS).sqrt()).collect()
}

impl BatchNorm {
    fn run(self, cx: &Cx, x: &Tensor, affine: [&Tensor; 2], given: Option<[&Tensor; 2]>) -> crate::Result<Outputs> {
        let (rows, c) = rows_of(x);
        check_real(self.name(), &[x, affine[0], affine[1]])?;
        check_axes(self.name(), "x", x, 2)?;
        for (operand, tensor) in ["weight", "bias"].into_iter().zip(affine) {
            check_len(self.name(), operand, tensor, c)?;
        }
        for (operand, tensor) in ["mean", "var"].into_iter().zip(given.into_iter().flatten()) {
            check_len(self.name(), operand, tensor, c)?;
        }
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return on_gpu::forward(cx, x, affine, given);
        }
        let one_each = (Shape::from([c]), weight_dtype(cx));
        with_real!(cx.policy.pointwise.accumulate, R => {
            let mut own = (vec![0.0; c], vec![0.0; c]);
            let y = filled::<R>(&cx.device, x.shape(), storage(cx), Purpose::Activation, || {
                let mut y = x.to_vec::<R>()?;
                let [w, b] = [affine[0].to_vec::<f64>()?, affine[1].to_vec::<f64>()?];
                own = match given {
                    Some([mean, var]) => (mean.to_vec::<f64>()?, var.to_vec::<f64>()?),
                    None => statistics(&y, rows, c),
                };
                let rstd = reciprocal_deviations(&own.1);
                for row in y.chunks_exact_mut(c) {
                    for (channel, y) in row.iter_mut().enumerate() {
                        *y = R::from_f64((y.to_f64() - own.0[channel]) * rstd[channel] * w[channel] + b[channel]);
                    }
                }
                Ok(y)
            })?;
            if given.is_some() {
                return Ok(smallvec![y]);
            }
            let unbiased = rows as f64 / rows.saturating_sub(1).max(1) as f64;
            own.1.iter_mut().for_each(|var| *var *= unbiased);
            let put = |values: &[f64]| {
                let (shape, DType { precision, .. }) = one_each.clone();
                Tensor::from_slice(&cx.device, values, shape, precision, Purpose::State)
            };
            Ok(smallvec![y, put(&own.0)?, put(&own.1)?])
        })
    }

    /// Gradients of `x`, `weight` and `bias`.
    fn adjoint(
        self,
        cx: &Cx,
        x: &Tensor,
        w: &Tensor,
        g: &Tensor,
        given: Option<[&Tensor; 2]>,
    ) -> crate::Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return on_gpu::adjoint(cx, x, w, g, given);
        }
        let (rows, c) = rows_of(x);
        let (mut grad_w, mut grad_b) = (vec![0.0; c], vec![0.0; c]);
        with_real!(cx.policy.pointwise.accumulate, R => {
            let gx = filled::<R>(&cx.device, x.shape(), storage(cx), Purpose::Activation, || {
                let (x, g, w) = (x.to_vec::<R>()?, g.to_vec::<R>()?, w.to_vec::<f64>()?);
                let (mean, var) = match given {
                    Some([mean, var]) => (mean.to_vec::<f64>()?, var.to_vec::<f64>()?),
                    None => statistics(&x, rows, c),
                };
                let rstd = reciprocal_deviations(&var);
                let g_at = |row: usize, channel: usize| g[row * c + channel].to_f64();
                let x_hat = |row: usize, channel: usize| (x[row * c + channel].to_f64() - mean[channel]) * rstd[channel];
                grad_b = channel_sums(rows, c, g_at);
                grad_w = channel_sums(rows, c, |row, channel| g_at(row, channel) * x_hat(row, channel));
                // Statistics of the batch depend on every value; given ones on none.
                let share = if given.is_some() { 0.0 } else { 1.0 / rows.max(1) as f64 };
                let at = |idx: usize| {
                    let (row, channel) = (idx / c, idx % c);
                    let centred = grad_b[channel] + x_hat(row, channel) * grad_w[channel];
                    R::from_f64(w[channel] * rstd[channel] * (g_at(row, channel) - share * centred))
                };
                Ok((0..x.len()).map(at).collect())
            })?;
            let put = |values: &[f64]| {
                Tensor::from_slice(&cx.device, values, w.shape().clone(), weight_dtype(cx).precision, Purpose::Grad)
            };
            Ok(vec![Some(gx), Some(put(&grad_w)?), Some(put(&grad_b)?)])
        })
    }
}

/// The same by the kernels of [`crate::norm`]: to them a batch is one sample whose channels stand for themselves.
#[cfg(feature = "cuda")]
mod on_gpu {
    use super::{Cx, Outputs, Purpose, Tensor, rows_of, smallvec, storage, weight_dtype};
    use crate::Result;
    use crate::norm::{Dims, cuda};

    fn dims(x: &Tensor) -> Dims {
        let (rows, c) = rows_of(x);
        Dims { batch: 1, rows, c, per_channel: true }
    }

    fn statistics(cx: &Cx, x: &Tensor, given: Option<[&Tensor; 2]>) -> Result<Tensor> {
        match given {
            Some(given) => cuda::given(&cx.device, given),
            None => cuda::statistics(&cx.device, &dims(x), x),
        }
    }

    pub(super) fn forward(cx: &Cx, x: &Tensor, affine: [&Tensor; 2], given: Option<[&Tensor; 2]>) -> Result<Outputs> {
        let mut y = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
        let stats = statistics(cx, x, given)?;
        cuda::normalise(&cx.device, &dims(x), [x, &stats], Some(affine), &mut y)?;
        if given.is_some() {
            return Ok(smallvec![y]);
        }
        let [mean, var] = cuda::observed(&cx.device, &dims(x), &stats, weight_dtype(cx))?;
        Ok(smallvec![y, mean, var])
    }

    pub(super) fn adjoint(
        cx: &Cx,
        x: &Tensor,
        w: &Tensor,
        g: &Tensor,
        given: Option<[&Tensor; 2]>,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
        let of_weight = || cx.device.alloc_unwritten(w.shape().clone(), weight_dtype(cx), Purpose::Grad);
        let (mut grad_w, mut grad_b) = (of_weight()?, of_weight()?);
        let stats = statistics(cx, x, given)?;
        let grads = Some([&mut grad_w, &mut grad_b]);
        cuda::adjoint(&cx.device, &dims(x), [x, g, &stats], given.is_some(), Some(w), &mut gx, grads)?;
        Ok(vec![Some(gx), Some(grad_w), Some(grad_b)])
    }
}

impl Op for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let (x, affine, given) = match self.0 {
            BatchStatistics::Batch => {
                let [x, weight, bias] = self.expect_inputs(inputs)?;
                (x, [weight, bias], None)
            }
            BatchStatistics::Running => {
                let [x, weight, bias, mean, var] = self.expect_inputs(inputs)?;
                (x, [weight, bias], Some([mean, var]))
            }
        };
        let outputs = self.run(cx, x, affine, given).map_err(|err| err.in_op(self.name()))?;
        let mut saved = Saved::new(self.name()).keep(cx, "x", x)?.share(cx, "weight", affine[0]);
        if let Some([mean, var]) = given {
            saved = saved.share(cx, "mean", mean).share(cx, "var", var);
        }
        Ok((outputs, saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (x, weight) = (saved.take("x")?, saved.take("weight")?);
        let given = match self.0 {
            BatchStatistics::Batch => None,
            BatchStatistics::Running => Some([saved.take("mean")?, saved.take("var")?]),
        };
        let n_inputs = if given.is_some() { 5 } else { 3 };
        let Some(g) = grads[0].take() else { return Ok(vec![None; n_inputs]) };
        let given = given.as_ref().map(|[mean, var]| [mean, var]);
        let mut all = self.adjoint(cx, &x, &weight, &g, given).map_err(|err| err.in_op(self.name()))?;
        all.resize(n_inputs, None);
        Ok(all)
    }
}
