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

    /// The same function on a GPU: a file and its entry, whose arguments are the inputs (at most two, stored as `S`
    /// and `R`), the output (stored as `T`) and the number of scalars.
    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(crate::cuda::Source, &'static str)> {
        None
    }
}

impl Tensor {
    /// Whether the values are of `domain`, which is what `op` needs of `operand`.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not.
    pub fn expect_domain(&self, op: &'static str, operand: &'static str, domain: Domain) -> Result<()> {
        if self.dtype().domain == domain {
            return Ok(());
        }
        let expected = if domain == Domain::Real { "real" } else { "complex" };
        Err(Error::DType { op, operand, expected, found: self.dtype() })
    }

    /// `out = f(inputs)` tile by tile, in the accumulator of `dtype`'s precision.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] or [`Error::Devices`] if the operands do not match, [`Error::Rank`] if
    /// there are none, an error on a GPU if `f` has no kernel, and those of [`Device::alloc`].
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
            input.expect_domain(op, "inputs", dtype.domain)?;
            if !input.device().same(first.device()) {
                return Err(Error::Devices { op });
            }
        }
        let device = first.device();
        let mut out = device.alloc_unwritten(first.shape().clone(), dtype, purpose)?;
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            let kernel = f.kernel().ok_or(Error::OnGpu)?;
            device.as_cuda().map_or(Ok(()), |cuda| cuda.map(kernel, inputs, &mut out))?;
            return Ok(out);
        }
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
        other.expect_domain("add_assign", "other", self.dtype().domain)?;
        if !self.device().same(other.device()) {
            return Err(Error::Devices { op: "add_assign" });
        }
        if !self.device().launches() {
            return Ok(());
        }
        let device = self.device().clone();
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = &device {
            return cuda.add_assign(self, other);
        }
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
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = &device {
            return cuda.scale_assign(self, factor);
        }
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
        #[cfg(feature = "cuda")]
        if let Device::Cuda(_) = self.device() {
            // A sum of squares in f64 is finite exactly if all terms are; f64 values beyond 1e154 count as too large.
            return self.sum_squares().is_ok_and(f64::is_finite);
        }
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

    /// Sum of squares of all scalars, in double precision and in an order that does not depend on
    /// the number of threads. Not finite exactly if a scalar is not, but for f64 beyond 1e154.
    ///
    /// # Errors
    /// [`Error::NoValues`] on the planning device.
    pub fn sum_squares(&self) -> Result<f64> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = self.device() {
            return cuda.sum_squares(self);
        }
        let view = self.view()?;
        let tile = |idx: usize| sum_squares(view.slice(idx * TILE..((idx + 1) * TILE).min(view.len())));
        let n_tiles = view.len().div_ceil(TILE);
        // A bias is not worth waking a pool for.
        if n_tiles <= 1 {
            return Ok(sum_squares(view));
        }
        let sums = self.device().run(|| (0..n_tiles).into_par_iter().map(tile).collect::<Vec<f64>>());
        Ok(sums.unwrap_or_default().iter().sum())
    }

    /// The entries `indices` of the outermost axis, in a tensor of their own.
    ///
    /// # Shapes
    /// - `self`: `[n, …]`; returns `[indices.len(), …]`
    ///
    /// # Errors
    /// [`Error::Index`] if an index is beyond the axis, [`Error::Rank`] if there is no axis, and those of
    /// [`Device::alloc`].
    pub fn gather(&self, indices: &[usize], purpose: Purpose) -> Result<Tensor> {
        let Some((&n, rest)) = self.shape().split_first() else {
            return Err(Error::Rank { op: "gather", operand: "x", expected: 1, found: self.shape().clone() });
        };
        if let Some(&index) = indices.iter().find(|&&index| index >= n) {
            return Err(Error::Index { op: "gather", index, n });
        }
        let shape: Vec<usize> = std::iter::once(indices.len()).chain(rest.iter().copied()).collect();
        let mut out = self.device().alloc_unwritten(shape, self.dtype(), purpose)?;
        if self.device().launches() {
            let len = rest.iter().product::<usize>() * self.dtype().domain.scalars();
            #[cfg(feature = "cuda")]
            if let Device::Cuda(cuda) = self.device() {
                cuda.gather(self, indices, len, &mut out)?;
                return Ok(out);
            }
            let (source, mut target) = (self.view()?, out.view_mut()?);
            for (row, &index) in indices.iter().enumerate() {
                target.slice_mut(row * len..(row + 1) * len).copy_from(source.slice(index * len..(index + 1) * len));
            }
        }
        Ok(out)
    }
}

fn sum_squares(values: View<'_>) -> f64 {
    match values {
        View::F32(values) => lanes(values, |x| f64::from(*x)),
        View::F64(values) => lanes(values, |x| *x),
        View::Bf16(values) => lanes(values, |x| f64::from(x.to_f32())),
        View::F16(values) => values.iter().map(|x| x.to_f64() * x.to_f64()).sum(),
    }
}

/// Independent partial sums of a reduction: one vector register of f32.
const LANES: usize = 16;

fn lanes<T>(values: &[T], wide: impl Fn(&T) -> f64) -> f64 {
    f32::vectorised(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let mut pieces = values.chunks_exact(LANES);
            for piece in &mut pieces {
                for (lane, value) in lanes.iter_mut().zip(piece) {
                    *lane += wide(value) * wide(value);
                }
            }
            for (lane, value) in lanes.iter_mut().zip(pieces.remainder()) {
                *lane += wide(value) * wide(value);
            }
            lanes.iter().sum()
        },
    )
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
