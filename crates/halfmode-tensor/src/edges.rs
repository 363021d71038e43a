//! `ndarray` in and out: the arrays that users hold at the edges of the library.

use crate::{Device, Purpose, Real, Result, Shape, Tensor};
use halfmode_precision::{DType, Domain, Precision};
use ndarray::{ArrayD, ArrayViewD, IxDyn};
use num_complex::Complex;

impl Tensor {
    /// Copies a real array of any layout, rounding to `precision`.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub fn from_ndarray<R: Real>(
        device: &Device,
        array: ArrayViewD<'_, R>,
        precision: Precision,
        purpose: Purpose,
    ) -> Result<Tensor> {
        Self::from_scalars_ndarray(device, array, DType::real(precision), purpose)
    }

    /// Copies a complex array of any layout, rounding each part to `precision`.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub fn from_complex_ndarray<R: Real>(
        device: &Device,
        array: ArrayViewD<'_, Complex<R>>,
        precision: Precision,
        purpose: Purpose,
    ) -> Result<Tensor> {
        let scalars: Vec<R> = array.iter().flat_map(|z| [z.re, z.im]).collect();
        Self::from_scalars(device, &scalars, Shape::new(array.shape()), DType::complex(precision), purpose)
    }

    /// Copies an array of any layout as [`Tensor::to_ndarray`] gives it: one for a complex type has a last axis of
    /// 2, real and imaginary part.
    ///
    /// # Errors
    /// [`crate::Error::Length`] for a complex type without that axis, and those of [`Device::alloc`].
    pub fn from_scalars_ndarray<R: Real>(
        device: &Device,
        array: ArrayViewD<'_, R>,
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Tensor> {
        let shape = match (dtype.domain, array.shape()) {
            (Domain::Complex, [extents @ .., 2]) => Shape::new(extents),
            (_, extents) => Shape::new(extents),
        };
        match array.as_slice() {
            Some(values) => Self::from_scalars(device, values, shape, dtype, purpose),
            None => Self::from_scalars(device, &array.iter().copied().collect::<Vec<_>>(), shape, dtype, purpose),
        }
    }

    /// The values as an array; a complex tensor gets a trailing axis of length 2 (re, im).
    ///
    /// # Errors
    /// [`crate::Error::NoValues`] on the planning device.
    pub fn to_ndarray<R: Real>(&self) -> Result<ArrayD<R>> {
        let mut extents = self.shape().to_vec();
        if self.dtype().domain.scalars() == 2 {
            extents.push(2);
        }
        let n_values = self.numel() * self.dtype().domain.scalars();
        ArrayD::from_shape_vec(IxDyn(&extents), self.to_vec()?).map_err(|_| crate::Error::Length {
            n_values,
            shape: Shape::new(&extents),
            expected: n_values,
        })
    }

    /// The stored f32 values without a copy; `None` for other precisions and on the planning device.
    #[must_use]
    pub fn as_ndarray(&self) -> Option<ArrayViewD<'_, f32>> {
        match (self.view(), self.dtype().domain.scalars()) {
            (Ok(crate::View::F32(values)), 1) => ArrayViewD::from_shape(IxDyn(self.shape()), values).ok(),
            _ => None,
        }
    }
}
