//! The tensor: a shape over a counted buffer.

use crate::storage::Storage;
use crate::view::{View, ViewMut};
use crate::{Device, Error, Purpose, Real, Result, Shape, ops};
use halfmode_precision::{DType, Precision};
use std::sync::Arc;

#[derive(Debug)]
struct Buffer {
    storage: Storage,
    bytes: usize,
    purpose: Purpose,
    device: Device,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.ledger().freed(self.purpose, self.bytes);
        self.device.recycle(std::mem::replace(&mut self.storage, Storage::Planned));
    }
}

/// What a new tensor holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    Zeros,
    Arbitrary,
}

/// Contiguous, row-major values of one [`DType`]. Cloning shares the buffer; [`Tensor::copy`]
/// copies it. A complex tensor is interleaved (re, im) pairs.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    shape: Shape,
    dtype: DType,
}

impl Tensor {
    pub(crate) fn new(
        device: &Device,
        shape: Shape,
        dtype: DType,
        purpose: Purpose,
        contents: Contents,
    ) -> Result<Self> {
        let too_large = || Error::TooLarge { shape: shape.clone(), dtype };
        let scalars =
            shape.checked_numel().and_then(|n| n.checked_mul(dtype.domain.scalars())).ok_or_else(too_large)?;
        let bytes = scalars
            .checked_mul(dtype.precision.bytes())
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(too_large)?;
        let live = device.ledger().stats().total.live;
        let storage = device.storage(dtype.precision, scalars, bytes, contents)?.ok_or_else(|| Error::OutOfMemory {
            bytes,
            purpose,
            shape: shape.clone(),
            dtype,
            live,
        })?;
        Ok(Self::adopt(device, storage, bytes, shape, dtype, purpose))
    }

    fn adopt(device: &Device, storage: Storage, bytes: usize, shape: Shape, dtype: DType, purpose: Purpose) -> Self {
        device.ledger().allocated(purpose, bytes);
        let buffer = Arc::new(Buffer { storage, bytes, purpose, device: device.clone() });
        Tensor { buffer, shape, dtype }
    }

    /// A real tensor of `precision` from values, which are rounded to it. On the planning device
    /// the values are dropped.
    ///
    /// # Errors
    /// [`Error::Length`] if the values do not fill the shape, and those of [`Device::alloc`].
    pub fn from_slice<R: Real>(
        device: &Device,
        values: &[R],
        shape: impl Into<Shape>,
        precision: Precision,
        purpose: Purpose,
    ) -> Result<Self> {
        Self::from_scalars(device, values, shape.into(), DType::real(precision), purpose)
    }

    /// As [`Tensor::from_slice`] for any type; complex values are interleaved pairs.
    ///
    /// # Errors
    /// Those of [`Tensor::from_slice`].
    pub fn from_scalars<R: Real>(
        device: &Device,
        values: &[R],
        shape: impl Into<Shape>,
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Self> {
        let shape = shape.into();
        let scalars = shape.checked_numel().and_then(|n| n.checked_mul(dtype.domain.scalars()));
        let expected = scalars.ok_or_else(|| Error::TooLarge { shape: shape.clone(), dtype })?;
        if values.len() != expected {
            return Err(Error::Length { n_values: values.len(), shape, expected });
        }
        let mut tensor = Self::new(device, shape, dtype, purpose, Contents::Arbitrary)?;
        tensor.copy_from_slice(values)?;
        Ok(tensor)
    }

    /// Overwrites all scalars with values, which are rounded to the storage precision. On the
    /// planning device the values are dropped.
    ///
    /// # Errors
    /// [`Error::Length`] if there are more or fewer values, [`Error::Shared`] if other tensors share
    /// the buffer.
    pub fn copy_from_slice<R: Real>(&mut self, values: &[R]) -> Result<()> {
        let expected = self.numel() * self.dtype.domain.scalars();
        if values.len() != expected {
            return Err(Error::Length { n_values: values.len(), shape: self.shape.clone(), expected });
        }
        match self.device() {
            Device::Meta(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => self.upload(values),
            Device::Cpu(_) => {
                self.view_mut()?.narrow(values);
                Ok(())
            }
        }
    }

    /// Extents, outermost first.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.numel()
    }

    /// What an element is.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Storage of each real scalar.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.dtype.precision
    }

    /// Where the buffer lives.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.buffer.device
    }

    /// What the buffer is for.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.buffer.purpose
    }

    /// Bytes of the buffer.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.buffer.bytes
    }

    /// Whether both tensors share one buffer.
    #[must_use]
    pub fn shares_buffer(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }

    /// Whether nobody else shares the buffer, so that it may be written in place.
    #[must_use]
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// The stored scalars.
    ///
    /// # Errors
    /// [`Error::NoValues`] on the planning device.
    pub fn view(&self) -> Result<View<'_>> {
        match &self.buffer.storage {
            Storage::F64(values) => Ok(View::F64(values)),
            Storage::F32(values) => Ok(View::F32(values)),
            Storage::Bf16(values) => Ok(View::Bf16(values)),
            Storage::F16(values) => Ok(View::F16(values)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => Err(Error::OnGpu),
            Storage::Planned => Err(Error::NoValues),
        }
    }

    /// The stored scalars, to be written.
    ///
    /// # Errors
    /// [`Error::Shared`] if other tensors share the buffer, [`Error::NoValues`] on the planning
    /// device.
    pub fn view_mut(&mut self) -> Result<ViewMut<'_>> {
        let n_owners = Arc::strong_count(&self.buffer);
        match &mut Arc::get_mut(&mut self.buffer).ok_or(Error::Shared { n_owners })?.storage {
            Storage::F64(values) => Ok(ViewMut::F64(values)),
            Storage::F32(values) => Ok(ViewMut::F32(values)),
            Storage::Bf16(values) => Ok(ViewMut::Bf16(values)),
            Storage::F16(values) => Ok(ViewMut::F16(values)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => Err(Error::OnGpu),
            Storage::Planned => Err(Error::NoValues),
        }
    }

    /// The same buffer under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.checked_numel() != Some(self.numel()) {
            return Err(Error::Shape { op: "reshape", operand: "x", expected: self.shape.clone(), found: shape });
        }
        Ok(Tensor { buffer: Arc::clone(&self.buffer), shape, dtype: self.dtype })
    }

    /// The values rounded to another precision; shares the buffer if it is the same.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub fn cast(&self, precision: Precision, purpose: Purpose) -> Result<Tensor> {
        if precision == self.precision() { Ok(self.clone()) } else { self.convert(precision, purpose) }
    }

    /// A copy of the values in a buffer of its own.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub fn copy(&self, purpose: Purpose) -> Result<Tensor> {
        self.convert(self.precision(), purpose)
    }

    fn convert(&self, precision: Precision, purpose: Purpose) -> Result<Tensor> {
        let dtype = DType { domain: self.dtype.domain, precision };
        let mut out = Tensor::new(self.device(), self.shape.clone(), dtype, purpose, Contents::Arbitrary)?;
        match self.device() {
            Device::Meta(_) => {}
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => cuda.convert(self, &mut out)?,
            Device::Cpu(_) => ops::convert(self.device(), self.view()?, out.view_mut()?),
        }
        Ok(out)
    }

    /// The scalars in double precision; complex values are interleaved pairs.
    ///
    /// # Errors
    /// [`Error::NoValues`] on the planning device.
    pub fn to_vec<R: Real>(&self) -> Result<Vec<R>> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(_) = self.device() {
            return self.download();
        }
        let view = self.view()?;
        let mut values = vec![R::ZERO; view.len()];
        view.widen(&mut values);
        Ok(values)
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn storage(&self) -> &Storage {
        &self.buffer.storage
    }

    /// The storage, to be written.
    ///
    /// # Errors
    /// [`Error::Shared`] if other tensors share the buffer.
    #[cfg(feature = "cuda")]
    pub(crate) fn storage_mut(&mut self) -> Result<&mut Storage> {
        let n_owners = Arc::strong_count(&self.buffer);
        Ok(&mut Arc::get_mut(&mut self.buffer).ok_or(Error::Shared { n_owners })?.storage)
    }
}
