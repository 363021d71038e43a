//! Padding, cropping and interpolation on a GPU.

use super::Interpolate;
use crate::Result;
use crate::cuda_boxes::{Inside, RESIZE};
use crate::pointwise::storage;
use halfmode_autograd::Cx;
use halfmode_precision::DType;
use halfmode_tensor::cuda::{Arg, count, define};
use halfmode_tensor::{Purpose, Shape, Tensor};

/// Between a field and the middle of a larger one; `widen` says which of the two is the source.
pub(super) fn copy_middle(
    cx: &Cx,
    x: &Tensor,
    [large, small]: [&Shape; 2],
    amount: &[usize],
    widen: bool,
) -> Result<Tensor> {
    let d = amount.len();
    let inside = Inside { whole: &large[1..=d], extents: &small[1..=d], first: amount, inner: large[d + 1] };
    let shape = if widen { large } else { small };
    let mut y = cx.device.alloc_unwritten(shape.clone(), storage(cx), Purpose::Activation)?;
    if widen {
        inside.put(&cx.device, x, &mut y)?;
    } else {
        inside.take(&cx.device, x, &mut y)?;
    }
    Ok(y)
}

/// Axis by axis, in accumulators between them; from the extents of `x` to those of the result.
pub(super) fn interpolate(
    op: &Interpolate,
    cx: &Cx,
    x: &Tensor,
    [from, to]: [&[usize]; 2],
    adjoint: bool,
) -> Result<Tensor> {
    let (d, entry) = (from.len(), if adjoint { "interpolate_backward" } else { "interpolate" });
    let mut y = x.clone();
    for axis in 0..d {
        let mut shape = y.shape().to_vec();
        shape[axis + 1] = to[axis];
        let (dtype, purpose) = match axis + 1 == d {
            true => (storage(cx), Purpose::Activation),
            false => (DType::real(cx.policy.pointwise.accumulate), Purpose::Workspace),
        };
        let inner = shape[axis + 2..].iter().product();
        let mut out = cx.device.alloc_unwritten(shape, dtype, purpose)?;
        let size = out.numel();
        if let Some(cuda) = cx.device.as_cuda().filter(|_| size > 0) {
            let defines = [define("S", y.precision()), define("T", out.precision())];
            let [n, m] = [op.from[axis], op.to[axis]].map(|n| Arg::I32(n as i32));
            let args = [y.input()?, out.output()?, count(size), n, m, count(inner), Arg::I32((d == 2).into())];
            cuda.launch(RESIZE, &defines, entry, cuda.grid(size), &args)?;
        }
        y = out;
    }
    Ok(y)
}
