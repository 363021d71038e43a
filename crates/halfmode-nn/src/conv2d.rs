//! Two-dimensional convolutions and their transposes, stride 1.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
mod patches;
mod reference;
#[cfg(feature = "cuda")]
mod singles;

pub use reference::conv2d_reference;

use crate::dense_weights::widen_weights;
use crate::partial::part_ranges;
use crate::pointwise::{Grads, check_len, check_real, storage};
use crate::row_map::sum_rows;
use crate::rows::{add_bias, add_column_sums};
use crate::{Error, Result};
use cpu::{Correlation, adjoint_weights};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor, with_real};
use smallvec::smallvec;

/// Which of the two linear maps of one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvKind {
    /// `K`, from `c_in` to `c_out` channels.
    Forward,
    /// `K^T`, from `c_out` to `c_in` channels.
    Transposed,
}

/// A convolution with stride 1 and zeros around the field, or its transpose:
///
/// ```text
/// (K x)[i, j, o]   = sum over d_1, d_2, c of w[d_1, d_2, c, o] x[i + d_1 - p_1, j + d_2 - p_2, c]
/// (K^T y)[i, j, c] = sum over d_1, d_2, o of w[d_1, d_2, c, o] y[i - d_1 + p_1, j - d_2 + p_2, o]
/// ```
///
/// plus `b` of the output channel. `torch.nn.functional.conv2d` and `conv_transpose2d` with the weight's axes moved:
/// see [`ParamLayout::Convolution`](crate::ParamLayout::Convolution).
///
/// # Shapes
/// - input 0: `[batch, n_1, n_2, c_in]` (`c_out` for the transpose), real
/// - input 1, the weight `w`: `[k_1, k_2, c_in, c_out]`
/// - input 2, the bias `b`, which may be left out: one number per output channel
/// - output: `[batch, n_1 + 2 p_1 - k_1 + 1, …, c_out]`, or `[batch, n_1 + k_1 - 1 - 2 p_1, …, c_in]` for the
///   transpose
///
/// # Saved for backward
/// `x`, the input; `weight` is shared.
///
/// # Errors
/// [`Error::Shape`] if axes or channels disagree or there are no channels, [`Error::Kernel`] if nothing of the field is
/// left, and [`halfmode_tensor::Error`] for complex operands and for a padded field beyond the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// The map or its transpose.
    pub kind: ConvKind,
    /// Zeros before and after the field along each axis, as the forward map counts them.
    pub padding: [usize; 2],
}

impl Conv2d {
    /// `K` with this padding on both axes.
    #[must_use]
    pub const fn new(padding: usize) -> Self {
        Conv2d { kind: ConvKind::Forward, padding: [padding; 2] }
    }

    /// `K^T` with the padding of `K` on both axes.
    #[must_use]
    pub const fn transposed(padding: usize) -> Self {
        Conv2d { kind: ConvKind::Transposed, padding: [padding; 2] }
    }

    const fn adjoint(self) -> Self {
        let kind = match self.kind {
            ConvKind::Forward => ConvKind::Transposed,
            ConvKind::Transposed => ConvKind::Forward,
        };
        Conv2d { kind, padding: self.padding }
    }

    const fn op_name(self) -> &'static str {
        match self.kind {
            ConvKind::Forward => "conv2d",
            ConvKind::Transposed => "conv_transpose2d",
        }
    }

    /// The sizes of a call.
    pub(crate) fn correlation(self, x: &Shape, w: &Shape) -> Result<Correlation> {
        let wrong = |operand, expected: [usize; 4], found: &Shape| {
            Err(Error::Shape { op: self.op_name(), operand, expected: expected.into(), found: found.clone() })
        };
        let [k1, k2, c_in, c_out] = w[..] else { return wrong("weight", [1; 4], w) };
        let [batch, n1, n2, c] = x[..] else { return wrong("x", [1, 1, 1, c_in], x) };
        if c_in == 0 || c_out == 0 {
            return wrong("weight", [k1, k2, c_in.max(1), c_out.max(1)], w);
        }
        // Sums of a few extents fit 128 bits.
        let (kernel, [p1, p2]) = ([k1, k2], self.padding.map(|p| p as i128));
        let (c_x, c_y, pad) = match self.kind {
            ConvKind::Forward => (c_in, c_out, [p1, p2]),
            ConvKind::Transposed => (c_out, c_in, [k1 as i128 - 1 - p1, k2 as i128 - 1 - p2]),
        };
        if c != c_x {
            return wrong("x", [batch, n1, n2, c_x], x);
        }
        let [y1, y2] = [0, 1].map(|axis| [n1, n2][axis] as i128 + 2 * pad[axis] + 1 - kernel[axis] as i128);
        if y1 <= 0 || y2 <= 0 || k1 == 0 || k2 == 0 {
            return Err(Error::Kernel { op: self.op_name(), kernel, padding: self.padding, field: [n1, n2] });
        }
        // The field with what lies around it, of which a part is in scratch.
        let [m1, m2] = [0, 1].map(|axis| [y1, y2][axis] + kernel[axis] as i128 - 1).map(saturated);
        let padded = Shape::from([batch.max(1), m1, m2, c_x.max(c_y)]);
        if padded.checked_numel().is_none_or(|n| n > isize::MAX as usize / 8) {
            let dtype = DType::real(Precision::F64);
            return Err(halfmode_tensor::Error::TooLarge { shape: padded, dtype }.into());
        }
        let (y, pad) = ([y1, y2].map(saturated), pad.map(|p| p as isize));
        Ok(Correlation { batch, x: [n1, n2], c_x, y, c_y, kernel, pad })
    }

    /// The weight as [`Correlation`] wants it: accumulators, turned round for the transpose.
    pub(crate) fn panels(self, cx: &Cx, w: &Tensor) -> Result<Tensor> {
        let wide = widen_weights(cx.policy.pointwise.storage.accumulate(), &[w])?.remove(0);
        match self.kind {
            ConvKind::Forward => Ok(wide),
            ConvKind::Transposed => adjoint_weights(&wide),
        }
    }

    fn run(self, cx: &Cx, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        check_real(self.op_name(), &[x, w])?;
        let sizes = self.correlation(x.shape(), w.shape())?;
        if let Some(bias) = bias {
            check_real(self.op_name(), &[bias])?;
            check_len(self.op_name(), "bias", bias, sizes.c_y)?;
        }
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return cuda::run(self, cx, sizes, [x, w], bias);
        }
        let w = self.panels(cx, w)?;
        let mut y = cx.device.alloc_unwritten(sizes.output_shape(), storage(cx), Purpose::Activation)?;
        with_real!(cx.policy.pointwise.storage, R => {
            let bias = match bias {
                Some(bias) if cx.device.launches() => bias.to_vec::<R>()?,
                _ => Vec::new(),
            };
            sizes.run::<R>(&cx.device, x, &w, &mut y, |_, _| {}, |_, y| if !bias.is_empty() { add_bias(y, &bias) })?;
        });
        Ok(y)
    }

    fn pull_back(self, cx: &Cx, x: &Tensor, w: &Tensor, g: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let gx = if needs[0] { Some(self.adjoint().run(cx, g, w, None)?) } else { None };
        let forward = Conv2d { kind: ConvKind::Forward, ..self };
        let gw = if needs[1] {
            let (field, image) = match self.kind {
                ConvKind::Forward => (x, g),
                ConvKind::Transposed => (g, x),
            };
            Some(weight_gradient(cx, forward.correlation(field.shape(), w.shape())?, w.shape(), [field, image])?)
        } else {
            None
        };
        let mut grads = vec![gx, gw];
        if needs.len() > 2 {
            grads.push(bias_gradient(cx, g)?);
        }
        Ok(grads)
    }
}

/// A size in 64 bits, or the largest such number.
fn saturated(n: i128) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The gradient by the weight of `<image, K field>`.
fn weight_gradient(cx: &Cx, sizes: Correlation, shape: &Shape, [field, image]: [&Tensor; 2]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if !cx.device.is_cpu() {
        return cuda::weight_of(cx, sizes, shape, [field, image]);
    }
    let parts = part_ranges(sizes.batch, 1);
    with_real!(cx.policy.pointwise.storage, R => {
        sizes.weight_gradient::<R>(&cx.device, shape, &parts, &[cpu::Pair::new(field, image)])
    })
}

/// The sum of a gradient over points.
fn bias_gradient(cx: &Cx, g: &Tensor) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if !cx.device.is_cpu() {
        return cuda::bias_of(cx, g).map(Some);
    }
    let channels = Shape::from([g.shape().last().copied().unwrap_or(1)]);
    let sums = with_real!(cx.policy.pointwise.storage, R => {
        sum_rows::<R, 1, 1>(&cx.device, [g], [&channels], |[g], sums| add_column_sums(g, sums[0]))
    })?;
    Ok(sums.into_iter().next())
}

impl Op for Conv2d {
    fn name(&self) -> &'static str {
        self.op_name()
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let (x, w, bias) = match *inputs {
            [x, w] => (x, w, None),
            [x, w, bias] => (x, w, Some(bias)),
            _ => {
                let (expected, found) = (3, inputs.len());
                return Err(halfmode_autograd::Error::Arity { op: self.name(), expected, found });
            }
        };
        let y = self.run(cx, x, w, bias).map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x", x)?.share(cx, "weight", w)))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let (x, w) = (saved.take("x")?, saved.take("weight")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None; needs.len()]) };
        self.pull_back(cx, &x, &w, &g, needs).map_err(|err| err.in_op(self.name()))
    }
}
