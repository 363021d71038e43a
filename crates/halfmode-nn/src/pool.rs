//! Means over windows of a field.

#[cfg(feature = "cuda")]
mod cuda;

use crate::pointwise::{Grads, check_real, storage};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use rayon::prelude::*;
use smallvec::smallvec;

/// The mean over windows that lie side by side; points beyond the last whole window are left out. A window as large
/// as the field is the global mean.
///
/// # Shapes
/// - input: `[batch, n_1, n_2, c]` with the extents of `field`, real; output: `[batch, n_1 / w_1, n_2 / w_2, c]`
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// [`Error::Shape`] for another field, [`Error::Kernel`] for a window that is empty or larger than the field,
/// [`halfmode_tensor::Error::DType`] for a complex field; on a GPU an error for 2^30 windows or points of one and more.
///
/// Source: `torch.nn.functional.avg_pool2d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AveragePool {
    /// Points of the field along each axis.
    pub field: [usize; 2],
    /// Points of a window along each axis.
    pub window: [usize; 2],
}

impl AveragePool {
    /// Windows of 2 x 2 points.
    #[must_use]
    pub const fn halving(field: [usize; 2]) -> Self {
        AveragePool { field, window: [2, 2] }
    }

    /// One window.
    #[must_use]
    pub const fn global(field: [usize; 2]) -> Self {
        AveragePool { field, window: field }
    }

    fn n_windows(&self) -> [usize; 2] {
        [0, 1].map(|axis| self.field[axis].checked_div(self.window[axis]).unwrap_or(0))
    }

    fn share(&self) -> f64 {
        1.0 / (self.window[0] * self.window[1]) as f64
    }

    fn run(&self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let (field, window) = (self.field, self.window);
        check_real(self.name(), &[x])?;
        let [batch, n1, n2, c] = x.shape()[..] else { return self.wrong(x) };
        if [n1, n2] != field {
            return self.wrong(x);
        }
        let [m1, m2] = self.n_windows();
        if m1 == 0 || m2 == 0 {
            return Err(Error::Kernel { op: self.name(), kernel: window, padding: [0, 0], field });
        }
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return cuda::run(self, cx, x, [batch, c]);
        }
        let mut y = cx.device.alloc_unwritten([batch, m1, m2, c], storage(cx), Purpose::Activation)?;
        let row = n2 * c;
        let scratch = cx.device.scratch(row + m2 * c, cx.policy.pointwise.storage.accumulate().bytes());
        if cx.device.launches() && y.numel() > 0 {
            let (x, tasks) = (x.view()?, y.view_mut()?.chunks(m2 * c));
            with_real!(cx.policy.pointwise.storage, R => cx.device.run(|| {
                tasks.into_par_iter().enumerate().for_each(|(idx, mut y)| scratch.with::<R, _>(|scratch| {
                    let (own, out) = scratch.split_at_mut(row);
                    let first = idx / m1 * n1 + idx % m1 * window[0];
                    y.fill(out, |y| {
                        y.fill(R::ZERO);
                        for i in first..first + window[0] {
                            let x = x.slice(i * row..(i + 1) * row).widened(&mut *own);
                            for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(window[1] * c)) {
                                x.chunks_exact(c).for_each(|x| y.iter_mut().zip(x).for_each(|(y, x)| *y += *x));
                            }
                        }
                        let share = R::from_f64(self.share());
                        y.iter_mut().for_each(|y| *y *= share);
                    });
                }));
            }));
        }
        Ok(y)
    }

    fn wrong(&self, x: &Tensor) -> Result<Tensor> {
        let (expected, found) = (Shape::from([1, self.field[0], self.field[1], 1]), x.shape().clone());
        Err(Error::Shape { op: "average_pool", operand: "x", expected, found })
    }

    fn adjoint(&self, cx: &Cx, g: &Tensor) -> Result<Tensor> {
        let [batch, m1, m2, c] = g.shape()[..] else { return self.wrong(g) };
        let ([n1, n2], window) = (self.field, self.window);
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return cuda::adjoint(self, cx, g, [batch, c]);
        }
        let mut gx = cx.device.alloc_unwritten([batch, n1, n2, c], storage(cx), Purpose::Activation)?;
        let row = n2 * c;
        let scratch = cx.device.scratch(row + m2 * c, cx.policy.pointwise.storage.accumulate().bytes());
        if cx.device.launches() && gx.numel() > 0 {
            let (g, tasks) = (g.view()?, gx.view_mut()?.chunks(row));
            with_real!(cx.policy.pointwise.storage, R => cx.device.run(|| {
                let share = R::from_f64(self.share());
                tasks.into_par_iter().enumerate().for_each(|(idx, mut gx)| scratch.with::<R, _>(|scratch| {
                    let (own, out) = scratch.split_at_mut(m2 * c);
                    let (b, i) = (idx / n1, idx % n1 / window[0]);
                    gx.fill(out, |gx| {
                        gx.fill(R::ZERO);
                        if i < m1 {
                            let start = (b * m1 + i) * m2 * c;
                            let g = g.slice(start..start + m2 * c).widened(&mut *own);
                            for (gx, g) in gx.chunks_exact_mut(window[1] * c).zip(g.chunks_exact(c)) {
                                for gx in gx.chunks_exact_mut(c) {
                                    gx.iter_mut().zip(g).for_each(|(gx, g)| *gx = *g * share);
                                }
                            }
                        }
                    });
                }));
            }));
        }
        Ok(gx)
    }
}

impl Op for AveragePool {
    fn name(&self) -> &'static str {
        "average_pool"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        Ok((smallvec![self.run(cx, x).map_err(|err| err.in_op(self.name()))?], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.adjoint(cx, &g).map_err(|err| err.in_op(self.name()))?)])
    }
}
