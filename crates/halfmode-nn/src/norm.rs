//! Normalisation of fields by their own statistics.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::pointwise::{Grads, check_axes, check_len, check_real, rows_of, storage, weight_dtype};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Device, Purpose, Target, Tensor};
use smallvec::smallvec;

/// What shares a mean and a variance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// The points of one channel of one sample; without weights.
    Instance,
    /// The same, with a weight and a bias per channel.
    AffineInstance,
    /// All points and channels of one sample, with a weight and a bias per channel.
    Group,
}

/// `y = (x - mean) / sqrt(var + 1e-5)`, then times `weight` plus `bias` but for [`NormKind::Instance`].
/// The variance is the biased one. Statistics are summed in f64; on the CPU tiles of 64 rows are in the accumulator.
///
/// # Shapes
/// - input 0, `x`: `[batch, …, c]`, real
/// - inputs 1 and 2, but for [`NormKind::Instance`]: `weight`, `bias` `[c]`
/// - output: the shape of `x`
///
/// # Saved for backward
/// `x`; `weight` is shared. Statistics are formed again.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the channel counts disagree, there are no channels or fewer than two axes;
/// [`halfmode_tensor::Error::DType`] for complex operands.
///
/// Source: `torch.nn.functional.instance_norm`, `torch.nn.InstanceNorm2d(c, affine=True)` and `torch.nn.GroupNorm(1, c)`.
#[derive(Clone, Copy, Debug)]
pub struct FieldNorm(pub NormKind);

const EPS: f64 = 1e-5;

/// Sizes of one call.
pub(crate) struct Dims {
    pub(crate) batch: usize,
    /// Points of a sample.
    pub(crate) rows: usize,
    pub(crate) c: usize,
    /// Whether each channel has statistics of its own.
    pub(crate) per_channel: bool,
}

/// The kernels of normalisation. The default bodies are the definition, in double precision; a device
/// overrides them.
pub(crate) trait NormKernels {
    /// Writes `y`, times weight plus bias where there are any.
    fn norm_forward(&self, dims: &Dims, x: &Tensor, affine: Option<[&Tensor; 2]>, y: &mut Tensor) -> Result<()> {
        dims.forward_by_definition(x, affine, y)
    }

    /// Writes the gradient of `x` and, where asked for, those of weight and bias.
    fn norm_backward(
        &self,
        dims: &Dims,
        [x, g]: [&Tensor; 2],
        weight: Option<&Tensor>,
        gx: &mut Tensor,
        grads: Option<[&mut Tensor; 2]>,
    ) -> Result<()> {
        write_sums(dims.backward_by_definition([x, g], weight, gx)?, grads)
    }
}

impl NormKernels for Device {
    fn norm_forward(&self, dims: &Dims, x: &Tensor, affine: Option<[&Tensor; 2]>, y: &mut Tensor) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => cpu::forward(self, dims, x, affine, y),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::forward(self, dims, x, affine, y),
        }
    }

    fn norm_backward(
        &self,
        dims: &Dims,
        operands: [&Tensor; 2],
        weight: Option<&Tensor>,
        gx: &mut Tensor,
        grads: Option<[&mut Tensor; 2]>,
    ) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => write_sums(cpu::backward(self, dims, operands, weight, gx)?, grads),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::backward(self, dims, operands, weight, gx, grads),
        }
    }
}

/// Rounds the gradients of weight and bias to the storage of tensors.
fn write_sums(sums: [Vec<f64>; 2], grads: Option<[&mut Tensor; 2]>) -> Result<()> {
    for (grad, sums) in grads.into_iter().flatten().zip(sums) {
        grad.copy_from_slice(&sums)?;
    }
    Ok(())
}

impl Dims {
    pub(crate) fn new(kind: NormKind, x: &Tensor) -> Self {
        let (rows, c) = rows_of(x);
        let batch = x.shape().first().copied().unwrap_or(1).max(1);
        Dims { batch, rows: rows / batch, c, per_channel: kind != NormKind::Group }
    }

    /// The places of everything that shares statistics, group by group.
    fn groups(&self) -> impl Iterator<Item = Vec<usize>> {
        let Dims { batch, rows, c, per_channel } = *self;
        let per_sample = if per_channel { c } else { 1 };
        (0..batch * per_sample).map(move |idx| {
            let channels = if per_channel { idx % c..idx % c + 1 } else { 0..c };
            let row = move |row: usize| ((idx / per_sample) * rows + row) * c;
            (0..rows).flat_map(|at| channels.clone().map(move |channel| row(at) + channel)).collect()
        })
    }

    fn forward_by_definition(&self, x: &Tensor, affine: Option<[&Tensor; 2]>, y: &mut Tensor) -> Result<()> {
        let x = x.to_vec::<f64>()?;
        let affine = affine.map(|it| Ok::<_, Error>([it[0].to_vec::<f64>()?, it[1].to_vec::<f64>()?])).transpose()?;
        let mut out = vec![0.0; x.len()];
        for group in self.groups() {
            let (mean, rstd) = statistics(&x, &group);
            for at in group {
                let [w, b] = affine.as_ref().map_or([1.0, 0.0], |[w, b]| [w[at % self.c], b[at % self.c]]);
                out[at] = (x[at] - mean) * rstd * w + b;
            }
        }
        Ok(y.copy_from_slice(&out)?)
    }

    fn backward_by_definition(
        &self,
        [x, g]: [&Tensor; 2],
        weight: Option<&Tensor>,
        gx: &mut Tensor,
    ) -> Result<[Vec<f64>; 2]> {
        let (x, g) = (x.to_vec::<f64>()?, g.to_vec::<f64>()?);
        let w = weight.map(|w| w.to_vec::<f64>()).transpose()?.unwrap_or_else(|| vec![1.0; self.c]);
        let (mut grad_w, mut grad_b, mut out) = (vec![0.0; self.c], vec![0.0; self.c], vec![0.0; x.len()]);
        for group in self.groups() {
            let (mean, rstd) = statistics(&x, &group);
            let x_hat = |at: usize| (x[at] - mean) * rstd;
            let (mut sum, mut product) = (0.0, 0.0);
            for &at in &group {
                let channel = at % self.c;
                grad_w[channel] += g[at] * x_hat(at);
                grad_b[channel] += g[at];
                sum += g[at] * w[channel];
                product += g[at] * w[channel] * x_hat(at);
            }
            let n = group.len() as f64;
            for at in group {
                out[at] = rstd * (g[at] * w[at % self.c] - (sum + x_hat(at) * product) / n);
            }
        }
        gx.copy_from_slice(&out)?;
        Ok([grad_w, grad_b])
    }
}

/// Mean and reciprocal standard deviation of the values at these places.
fn statistics(values: &[f64], places: &[usize]) -> (f64, f64) {
    let n = places.len() as f64;
    let mean = places.iter().map(|&at| values[at]).sum::<f64>() / n;
    let var = places.iter().map(|&at| (values[at] - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (var + EPS).sqrt())
}

impl Op for FieldNorm {
    fn name(&self) -> &'static str {
        match self.0 {
            NormKind::Instance | NormKind::AffineInstance => "instance_norm",
            NormKind::Group => "group_norm",
        }
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let (x, affine) = match self.0 {
            NormKind::Instance => (self.expect_inputs::<1>(inputs)?[0], None),
            NormKind::AffineInstance | NormKind::Group => {
                let [x, weight, bias] = self.expect_inputs(inputs)?;
                (x, Some([weight, bias]))
            }
        };
        let dims = Dims::new(self.0, x);
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_axes(self.name(), "x", x, 2)?;
            for (operand, tensor) in ["weight", "bias"].into_iter().zip(affine.iter().flatten()) {
                check_len(self.name(), operand, tensor, dims.c)?;
            }
            let mut y = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
            cx.device.norm_forward(&dims, x, affine, &mut y)?;
            Ok(y)
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        let mut saved = Saved::new(self.name()).keep(cx, "x", x)?;
        if let Some([weight, _]) = affine {
            saved = saved.share(cx, "weight", weight);
        }
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let x = saved.take("x")?;
        let weight = saved.take("weight").ok();
        let Some(g) = grads[0].take() else { return Ok(vec![None; if weight.is_some() { 3 } else { 1 }]) };
        let run = || -> Result<Vec<Option<Tensor>>> {
            let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
            let dims = Dims::new(self.0, &x);
            let Some(weight) = &weight else {
                cx.device.norm_backward(&dims, [&x, &g], None, &mut gx, None)?;
                return Ok(vec![Some(gx)]);
            };
            let of_weight = || cx.device.alloc_unwritten(weight.shape().clone(), weight_dtype(cx), Purpose::Grad);
            let (mut grad_w, mut grad_b) = (of_weight()?, of_weight()?);
            cx.device.norm_backward(&dims, [&x, &g], Some(weight), &mut gx, Some([&mut grad_w, &mut grad_b]))?;
            Ok(vec![Some(gx), Some(grad_w), Some(grad_b)])
        };
        run().map_err(|err| err.in_op(self.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_precision::{DType, Precision};

    /// Runs the default bodies.
    struct Definition;
    impl NormKernels for Definition {}

    fn tensor(device: &Device, shape: &[usize], precision: Precision, (seed, mean): (usize, f64)) -> Tensor {
        let n = shape.iter().product::<usize>();
        let values: Vec<f64> =
            (0..n).map(|i| mean + 2.0 * ((i + 1) as f64 * 0.754_877_666 + seed as f64 * 0.1).fract() - 1.0).collect();
        Tensor::from_slice(device, &values, shape, precision, Purpose::Workspace).unwrap()
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-300)
    }

    #[test]
    fn the_override_computes_what_the_default_bodies_say() {
        let device = Device::cpu(2).unwrap();
        for shape in [[1, 5, 1, 3], [2, 7, 11, 1], [3, 16, 16, 5], [2, 1, 130, 17]] {
            for kind in [NormKind::Instance, NormKind::AffineInstance, NormKind::Group] {
                for (precision, tolerance) in [
                    (Precision::F64, 1e-12),
                    // Sums of tiles in f32, of up to 64 values of size 30 with deviation 0.6.
                    (Precision::F32, 64.0 * 2f64.powi(-24) * 50.0),
                ] {
                    let make = |seed: usize, mean: f64| tensor(&device, &shape, precision, (seed, mean));
                    let (x, g) = (make(1, 30.0), make(2, 0.3));
                    let [w, b] = [3, 4].map(|seed| tensor(&device, &shape[3..], precision, (seed, 0.5)));
                    let affine = (kind != NormKind::Instance).then_some([&w, &b]);
                    let weight = affine.map(|it| it[0]);
                    let like = || device.alloc(x.shape().clone(), DType::real(precision), Purpose::Workspace).unwrap();
                    let (mut y, mut want_y, mut gx, mut want_gx) = (like(), like(), like(), like());
                    let dims = Dims::new(kind, &x);
                    device.norm_forward(&dims, &x, affine, &mut y).unwrap();
                    Definition.norm_forward(&dims, &x, affine, &mut want_y).unwrap();
                    let sum = || device.alloc([shape[3]], DType::real(Precision::F64), Purpose::Workspace).unwrap();
                    let (mut gw, mut gb, mut want_gw, mut want_gb) = (sum(), sum(), sum(), sum());
                    let sums = Some([&mut gw, &mut gb]);
                    device.norm_backward(&dims, [&x, &g], weight, &mut gx, sums).unwrap();
                    let sums = Some([&mut want_gw, &mut want_gb]);
                    Definition.norm_backward(&dims, [&x, &g], weight, &mut want_gx, sums).unwrap();
                    let values = |it: &Tensor| it.to_vec::<f64>().unwrap();
                    for (what, error) in [
                        ("y", distance(&values(&y), &values(&want_y))),
                        ("gx", distance(&values(&gx), &values(&want_gx))),
                        ("gw", distance(&values(&gw), &values(&want_gw))),
                        ("gb", distance(&values(&gb), &values(&want_gb))),
                    ] {
                        assert!(error <= tolerance, "{what} {kind:?} {precision} {shape:?}: {error:.2e}");
                    }
                }
            }
        }
    }
}
