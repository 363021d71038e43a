//! Elementwise kernels and reductions over whole tensors.

use crate::view::{View, ViewMut};
use crate::{Device, Error, Purpose, Real, Result, Tensor, with_real};
use halfmode_precision::{DType, Domain};
use rayon::prelude::*;

/// Scalars that one task widens, works on and narrows. Fixed, so that sums do not depend on the
/// number of threads.
pub(crate) const TILE: usize = 4096;

pub(crate) fn convert(device: &Device, src: View<'_>, dst: ViewMut<'_>) {
    device.run(|| {
        dst.chunks(TILE).into_par_iter().enumerate().for_each(|(idx, mut to)| {
            let from = src.slice(idx * TILE..idx * TILE + to.len());
            // Widening is exact and the accumulator of the wider side loses nothing before the
            // one rounding.
            with_real!(from.precision().min(to.as_view().precision()), R => {
                let mut tile = [R::ZERO; TILE];
                let tile = &mut tile[..to.len()];
                from.widen(tile);
                to.narrow(tile);
            });
        });
    });
}

/// An elementwise function of several operands, generic over the accumulator.
pub trait Elementwise: Sync {
    /// Writes `out[i]` from `inputs[..][i]`; `out` starts as a copy of `inputs[0]`.
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]);
}

fn check_domain(op: &'static str, operand: &'static str, domain: Domain, x: &Tensor) -> Result<()> {
    if x.dtype().domain == domain {
        return Ok(());
    }
    let expected = if domain == Domain::Real { "real" } else { "complex" };
    Err(Error::DType { op, operand, expected, found: x.dtype() })
}

impl Tensor {
    /// `out = f(inputs)` tile by tile, in the accumulator of `dtype`'s precision.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] or [`Error::Devices`] if the operands do not match, [`Error::Rank`] if
    /// there are none, and those of [`Device::alloc`].
    pub fn elementwise<F: Elementwise>(
        op: &'static str,
        f: &F,
        inputs: &[&Tensor],
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Tensor> {
        let Some(first) = inputs.first() else {
            return Err(Error::Rank { op, operand: "inputs", expected: 1, found: [0].into() });
        };
        for input in inputs {
            if input.shape() != first.shape() {
                let (expected, found) = (first.shape().clone(), input.shape().clone());
                return Err(Error::Shape { op, operand: "inputs", expected, found });
            }
            check_domain(op, "inputs", dtype.domain, input)?;
            if !input.device().same(first.device()) {
                return Err(Error::Devices { op });
            }
        }
        let device = first.device();
        let mut out = device.alloc(first.shape().clone(), dtype, purpose)?;
        if device.launches() {
            let views = inputs.iter().map(|it| it.view()).collect::<Result<Vec<_>>>()?;
            let target = out.view_mut()?;
            device.run(|| with_real!(dtype.precision, R => run_tiles::<R, F>(f, &views, target)));
        }
        Ok(out)
    }

    /// Adds `other` in place, in the accumulator of this tensor's precision.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] or [`Error::Devices`] if the operands do not match, [`Error::Shared`] if
    /// the buffer is shared.
    pub fn add_assign(&mut self, other: &Tensor) -> Result<()> {
        if self.shape() != other.shape() {
            let (expected, found) = (self.shape().clone(), other.shape().clone());
            return Err(Error::Shape { op: "add_assign", operand: "other", expected, found });
        }
        check_domain("add_assign", "other", self.dtype().domain, other)?;
        if !self.device().same(other.device()) {
            return Err(Error::Devices { op: "add_assign" });
        }
        if !self.device().launches() {
            return Ok(());
        }
        let device = self.device().clone();
        let precision = self.precision();
        let src = other.view()?;
        let dst = self.view_mut()?;
        device.run(|| {
            with_real!(precision, R => dst.chunks(TILE).into_par_iter().enumerate().for_each(|(idx, mut to)| {
                let len = to.len();
                let (mut sum, mut term) = ([R::ZERO; TILE], [R::ZERO; TILE]);
                to.as_view().widen(&mut sum[..len]);
                src.slice(idx * TILE..idx * TILE + len).widen(&mut term[..len]);
                sum[..len].iter_mut().zip(&term[..len]).for_each(|(sum, term)| *sum += *term);
                to.narrow(&sum[..len]);
            }));
        });
        Ok(())
    }

    /// Multiplies by a number in place.
    ///
    /// # Errors
    /// [`Error::Shared`] if the buffer is shared.
    pub fn scale_assign(&mut self, factor: f64) -> Result<()> {
        if !self.device().launches() {
            return Ok(());
        }
        let device = self.device().clone();
        let precision = self.precision();
        let dst = self.view_mut()?;
        device.run(|| {
            with_real!(precision, R => dst.chunks(TILE).into_par_iter().for_each(|mut to| {
                let len = to.len();
                let mut tile = [R::ZERO; TILE];
                to.as_view().widen(&mut tile[..len]);
                tile[..len].iter_mut().for_each(|value| *value *= R::from_f64(factor));
                to.narrow(&tile[..len]);
            }));
        });
        Ok(())
    }

    /// Whether every scalar is finite. On the planning device: true.
    #[must_use]
    pub fn all_finite(&self) -> bool {
        let Ok(view) = self.view() else { return true };
        let check = || {
            (0..view.len().div_ceil(TILE)).into_par_iter().all(|idx| {
                let piece = view.slice(idx * TILE..((idx + 1) * TILE).min(view.len()));
                match piece {
                    View::F64(values) => values.iter().all(|it| it.is_finite()),
                    View::F32(values) => f32::vectorised(
                        #[inline(always)]
                        || values.iter().fold(true, |all, it| all & it.is_finite()),
                    ),
                    View::Bf16(values) => values.iter().all(|it| it.is_finite()),
                    View::F16(values) => values.iter().all(|it| it.is_finite()),
                }
            })
        };
        self.device().run(check).unwrap_or(true)
    }

    /// Sum of squares of all scalars, in double precision and in a fixed order.
    ///
    /// # Errors
    /// [`Error::NoValues`] on the planning device.
    pub fn sum_squares(&self) -> Result<f64> {
        let view = self.view()?;
        let partial = |idx: usize| {
            let piece = view.slice(idx * TILE..((idx + 1) * TILE).min(view.len()));
            (0..piece.len()).map(|i| piece.get(i) * piece.get(i)).sum::<f64>()
        };
        let n_tiles = view.len().div_ceil(TILE);
        let sums = self.device().run(|| (0..n_tiles).into_par_iter().map(partial).collect::<Vec<f64>>());
        Ok(sums.unwrap_or_default().into_iter().sum())
    }
}

fn run_tiles<R: Real, F: Elementwise>(f: &F, inputs: &[View<'_>], out: ViewMut<'_>) {
    out.chunks(TILE).into_par_iter().enumerate().for_each(|(idx, mut to)| {
        let len = to.len();
        let wide: Vec<Vec<R>> = inputs
            .iter()
            .map(|input| {
                let mut tile = vec![R::ZERO; len];
                input.slice(idx * TILE..idx * TILE + len).widen(&mut tile);
                tile
            })
            .collect();
        let refs: Vec<&[R]> = wide.iter().map(Vec::as_slice).collect();
        let mut result = wide[0].clone();
        f.tile(&refs, &mut result);
        to.narrow(&result);
    });
}
