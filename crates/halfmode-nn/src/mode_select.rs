//! Fewer active modes than a weight holds.

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda_boxes::Inside;
use crate::pointwise::{Grads, filled};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Domain};
use halfmode_tensor::{Purpose, Shape, Tensor, with_real};
use smallvec::smallvec;
use std::sync::Arc;

/// Picks modes of a spectral weight.
///
/// # Shapes
/// - input: `[modes, …]`; output: `[modes.len(), …]`
///
/// # Saved for backward
/// Nothing but the shape.
///
/// # Errors
/// [`halfmode_tensor::Error::Index`] if a mode is not there.
#[derive(Clone, Debug)]
pub struct SelectModes {
    /// Modes of the whole weight along each axis.
    stored: Arc<[usize]>,
    /// Those that are chosen.
    used: Arc<[usize]>,
    /// Where they begin.
    first: Arc<[usize]>,
}

impl SelectModes {
    /// The modes of `used` extents within a weight of `stored` ones: around the centre on all axes
    /// but the last, from the start on the last; on all axes around the centre for complex data.
    ///
    /// Source: the slices of neuraloperator's `SpectralConv.forward`.
    #[must_use]
    pub fn new(stored: &[usize], used: &[usize], domain: Domain) -> Self {
        let d = stored.len();
        let first =
            |axis: usize| if domain == Domain::Real && axis + 1 == d { 0 } else { (stored[axis] - used[axis]) / 2 };
        SelectModes { stored: stored.into(), used: used.into(), first: (0..d).map(first).collect() }
    }

    /// Flat indices of the chosen modes.
    fn modes(&self) -> Vec<usize> {
        let modes = (0..self.used.iter().product()).map(|flat: usize| {
            let (mut rest, mut at, mut stride) = (flat, 0, 1);
            for axis in (0..self.stored.len()).rev() {
                at += (self.first[axis] + rest % self.used[axis]) * stride;
                rest /= self.used[axis];
                stride *= self.stored[axis];
            }
            at
        });
        modes.collect()
    }

    fn gather(&self, w: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if !w.device().is_cpu() {
            return self.gather_on_gpu(w);
        }
        Ok(w.gather(&self.modes(), Purpose::Workspace)?)
    }

    fn scatter(&self, cx: &Cx, grad: &Tensor) -> Result<Tensor> {
        let shape = Shape::from([&[self.stored.iter().product()], &grad.shape()[1..]].concat());
        let dtype = DType::real(grad.precision());
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            let mut all = cx.device.alloc_unwritten(shape, dtype, Purpose::Grad)?;
            self.inside(grad).put(&cx.device, grad, &mut all)?;
            return Ok(all);
        }
        with_real!(grad.precision(), R => filled::<R>(&cx.device, &shape, dtype, Purpose::Grad, || {
            let len = grad.shape()[1..].iter().product::<usize>();
            let (g, mut all) = (grad.to_vec::<R>()?, vec![<R as halfmode_tensor::Real>::ZERO; shape.numel()]);
            for (mode, g) in self.modes().into_iter().zip(g.chunks_exact(len.max(1))) {
                all[mode * len..(mode + 1) * len].copy_from_slice(g);
            }
            Ok(all)
        }))
    }
}

#[cfg(feature = "cuda")]
impl SelectModes {
    /// The chosen modes as a box inside all.
    fn inside(&self, w: &Tensor) -> Inside<'_> {
        let inner = w.shape().iter().skip(1).product();
        Inside { whole: &self.stored, extents: &self.used, first: &self.first, inner }
    }

    fn gather_on_gpu(&self, w: &Tensor) -> Result<Tensor> {
        let (n, stored) = (w.shape().first().copied().unwrap_or(0), self.stored.iter().product::<usize>());
        if n < stored {
            return Err(halfmode_tensor::Error::Index { op: "gather", index: stored - 1, n }.into());
        }
        let shape: Vec<usize> =
            std::iter::once(self.used.iter().product()).chain(w.shape().iter().skip(1).copied()).collect();
        let mut chosen = w.device().alloc_unwritten(shape, w.dtype(), Purpose::Workspace)?;
        self.inside(w).take(w.device(), w, &mut chosen)?;
        Ok(chosen)
    }
}

impl Op for SelectModes {
    fn name(&self) -> &'static str {
        "select_modes"
    }

    fn forward(&self, _: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [w] = self.expect_inputs(inputs)?;
        let chosen = self.gather(w).map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![chosen], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.scatter(cx, &g).map_err(|err| err.in_op(self.name()))?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slices that neuraloperator's arithmetic gives: `start // 2 .. max + (-start // 2)`, and `..max - start`.
    #[test]
    fn modes_around_the_centre_and_from_the_start() {
        assert_eq!(SelectModes::new(&[4, 3], &[4, 3], Domain::Real).modes(), (0..12).collect::<Vec<_>>());
        assert_eq!(SelectModes::new(&[4, 3], &[2, 2], Domain::Real).modes(), [3, 4, 6, 7]);
        assert_eq!(SelectModes::new(&[5], &[2], Domain::Real).modes(), [0, 1]);
        assert_eq!(SelectModes::new(&[8], &[5], Domain::Complex).modes(), [1, 2, 3, 4, 5]);
    }
}
