//! Weights of dense layers as kernels want them: accumulators, and transposed once per call rather than once
//! per tile.

use crate::Result;
use crate::pointwise::{accumulators, not_accumulators};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Real, Tensor, with_real};

/// Weights in the accumulator's precision; shared where they are already.
pub(crate) fn widen_weights(accumulate: Precision, tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(tensors.iter().map(|w| w.cast(accumulate, Purpose::Workspace)).collect::<std::result::Result<_, _>>()?)
}

/// The transpose `[c_in, c_out]` of a weight `[c_out, c_in]` that holds accumulators; trailing extents of 1 are
/// left out.
pub(crate) fn transpose_weight(w: &Tensor) -> Result<Tensor> {
    let c_out = w.shape().first().copied().unwrap_or(1);
    let c_in = w.numel() / c_out.max(1);
    let device = w.device();
    let mut w_t = device.alloc_unwritten([c_in, c_out], DType::real(w.precision()), Purpose::Workspace)?;
    if device.launches() {
        let mut out = w_t.view_mut()?;
        with_real!(w.precision(), R => {
            let from = accumulators::<R>("transpose", "weight", w)?;
            let to = R::direct_mut(&mut out).ok_or_else(|| not_accumulators::<R>("transpose", "weight", w.dtype()))?;
            for (i, row) in to.chunks_exact_mut(c_out.max(1)).enumerate() {
                row.iter_mut().enumerate().for_each(|(o, to)| *to = from[o * c_in + i]);
            }
        });
    }
    Ok(w_t)
}
