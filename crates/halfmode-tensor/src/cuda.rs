//! Tensors in the memory of an NVIDIA GPU.
//!
//! Crates above launch their kernels through [`CudaDevice::launch`] and [`CudaDevice::matmul`] on the bytes of
//! tensors ([`Tensor::input`], [`Tensor::output`], [`Tensor::operand`]). Work runs in the order in which it is
//! launched; reading values waits for it.

use crate::storage::{Storage, each_storage};
use crate::tensor::Contents;
use crate::{Device, Error, Ledger, Purpose, Real, Result, Tensor, View};
use halfmode_precision::{DType, Precision};
use std::path::PathBuf;
use std::sync::Arc;

pub use crate::cuda_feed::Feed;
pub use halfmode_cuda::{
    Arg, Compute, Context, DeviceInfo, Error as CudaError, Graph, Grid, Library, Matmul, MemoryInfo, Operand, Roots,
    Scalar, Source, Span, Spent, Timer, load, n_devices,
};

/// An NVIDIA GPU and what is allocated on it.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    context: Context,
    pub(crate) ledger: Arc<Ledger>,
}

const POINTWISE: Source = Source { name: "pointwise", text: include_str!("../kernels/pointwise.cu") };

/// Threads of a block of an elementwise kernel.
const THREADS: usize = 256;
/// Blocks of the first pass of a reduction. Fixed, so that a sum has one order.
const SUM_BLOCKS: usize = 512;

impl Device {
    /// GPU `ordinal`. Compiled kernels are kept in `cache` where there is one.
    ///
    /// # Errors
    /// [`Error::Cuda`] without a driver or such a device.
    pub fn cuda(ordinal: usize, cache: Option<PathBuf>) -> Result<Self> {
        let context = Context::new(ordinal, Roots::from_environment(), cache)?;
        Ok(Device::Cuda(CudaDevice { context, ledger: Arc::default() }))
    }

    /// The GPU, if this device is one and not its plan.
    #[must_use]
    pub fn as_cuda(&self) -> Option<&CudaDevice> {
        if let Device::Cuda(cuda) = self { Some(cuda) } else { None }
    }
}

/// `NAME=VALUE`, for a kernel's types and sizes.
#[must_use]
pub fn define(name: &str, value: impl std::fmt::Display) -> String {
    format!("{name}={value}")
}

/// A count as a kernel's `long long`.
#[must_use]
pub fn count(n: usize) -> Arg<'static> {
    // A count of things in memory fits.
    Arg::I64(n as i64)
}

impl CudaDevice {
    /// The driver's side of the device.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Launches kernel `entry` of a file compiled with `defines`.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn launch(&self, source: Source, defines: &[String], entry: &str, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        let kernel = self.context.kernel(source, defines, entry)?;
        Ok(self.context.launch(&kernel, grid, args)?)
    }

    /// Launches a matrix product.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn matmul(&self, matmul: &Matmul<'_>) -> Result<()> {
        Ok(self.context.matmul(matmul)?)
    }

    /// A grid for `n_items` threads that stride over the rest.
    #[must_use]
    pub fn grid(&self, n_items: usize) -> Grid {
        Grid::over(n_items, THREADS, 32 * self.context.info().n_multiprocessors)
    }

    pub(crate) fn storage(&self, bytes: usize, contents: Contents) -> Result<Storage> {
        let mut buffer = self.context.alloc(bytes)?;
        match contents {
            Contents::Zeros => buffer.fill(0)?,
            // All ones are a NaN in every format.
            Contents::Arbitrary if cfg!(debug_assertions) => buffer.fill(0xff)?,
            Contents::Arbitrary => {}
        }
        Ok(Storage::Cuda(buffer))
    }

    /// Writes the values of `from`, rounded, to `to`, which has as many.
    ///
    /// # Errors
    /// [`Error::Cuda`], [`Error::Shared`] if other tensors share the target.
    pub fn convert(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        let n = scalars(from);
        let defines = [define("S", from.precision()), define("T", to.precision())];
        self.launch(POINTWISE, &defines, "convert", self.grid(n.div_ceil(4)), &[from.input()?, to.output()?, count(n)])
    }

    pub(crate) fn add_assign(&self, sum: &mut Tensor, term: &Tensor) -> Result<()> {
        let n = scalars(sum);
        let defines = [define("S", term.precision()), define("T", sum.precision())];
        let grid = self.grid(n.div_ceil(4));
        self.launch(POINTWISE, &defines, "add_assign", grid, &[term.input()?, sum.output()?, count(n)])
    }

    pub(crate) fn scale_assign(&self, x: &mut Tensor, factor: f64) -> Result<()> {
        let n = scalars(x);
        let defines = [define("S", x.precision()), define("T", x.precision())];
        let args = [x.output()?, Arg::F64(factor), count(n)];
        self.launch(POINTWISE, &defines, "scale_assign", self.grid(n.div_ceil(4)), &args)
    }

    pub(crate) fn sum_squares(&self, x: &Tensor) -> Result<f64> {
        let device = x.device();
        let parts = device.alloc_unwritten([SUM_BLOCKS], DType::real(Precision::F64), Purpose::Workspace)?;
        let mut parts = parts;
        let defines = [define("S", x.precision()), define("T", x.precision())];
        let args = [x.input()?, parts.output()?, count(scalars(x))];
        self.launch(POINTWISE, &defines, "sum_squares", Grid::row(SUM_BLOCKS, THREADS), &args)?;
        Ok(parts.to_vec::<f64>()?.iter().sum())
    }

    /// Launches an elementwise function; one input counts as both.
    pub(crate) fn map(&self, (source, entry): (Source, &str), inputs: &[&Tensor], out: &mut Tensor) -> Result<()> {
        let stored = |idx: usize| inputs.get(idx).or(inputs.first()).map_or(out.precision(), |it| it.precision());
        let defines = [define("S", stored(0)), define("R", stored(1)), define("T", out.precision())];
        let n = scalars(out);
        let mut args = inputs.iter().map(|it| it.input()).collect::<Result<Vec<_>>>()?;
        args.extend([out.output()?, count(n)]);
        self.launch(source, &defines, entry, self.grid(n.div_ceil(4)), &args)
    }

    pub(crate) fn gather(&self, x: &Tensor, indices: &[usize], len: usize, out: &mut Tensor) -> Result<()> {
        let bytes = len * x.precision().bytes();
        let Storage::Cuda(source) = x.storage() else { return Err(Error::NotOnGpu) };
        let Storage::Cuda(target) = out.storage_mut()? else { return Err(Error::NotOnGpu) };
        for (row, &index) in indices.iter().enumerate() {
            target.copy_from(row * bytes, source, index * bytes, bytes)?;
        }
        Ok(())
    }
}

/// Real scalars of a tensor.
fn scalars(x: &Tensor) -> usize {
    x.numel() * x.dtype().domain.scalars()
}

impl Tensor {
    fn span(&self) -> Result<Span<'_>> {
        match self.storage() {
            Storage::Cuda(buffer) => Ok(buffer.span()),
            _ => Err(Error::NotOnGpu),
        }
    }

    /// The bytes as a kernel's input.
    ///
    /// # Errors
    /// [`Error::NotOnGpu`].
    pub fn input(&self) -> Result<Arg<'_>> {
        Ok(Arg::In(self.span()?))
    }

    /// The bytes as a kernel's output.
    ///
    /// # Errors
    /// [`Error::NotOnGpu`], [`Error::Shared`] if other tensors share the buffer.
    pub fn output(&mut self) -> Result<Arg<'_>> {
        match self.storage_mut()? {
            Storage::Cuda(buffer) => Ok(Arg::Out(buffer.span())),
            _ => Err(Error::NotOnGpu),
        }
    }

    /// Where the bytes are on the GPU, for tables of addresses that kernels read.
    ///
    /// # Errors
    /// [`Error::NotOnGpu`].
    pub fn address(&self) -> Result<u64> {
        match self.storage() {
            Storage::Cuda(buffer) => Ok(buffer.address()),
            _ => Err(Error::NotOnGpu),
        }
    }

    /// As [`Tensor::address`], to be written.
    ///
    /// # Errors
    /// [`Error::NotOnGpu`], [`Error::Shared`] if other tensors share the buffer.
    pub fn address_mut(&mut self) -> Result<u64> {
        self.storage_mut()?;
        self.address()
    }

    /// Overwrites the first bytes with words that are no numbers, such as addresses.
    ///
    /// # Errors
    /// [`Error::NotOnGpu`], [`Error::Shared`], [`Error::Cuda`] if the tensor has fewer bytes.
    pub fn upload_words(&mut self, words: &[u64]) -> Result<()> {
        match self.storage_mut()? {
            Storage::Cuda(buffer) => Ok(buffer.upload(0, bytemuck::cast_slice(words))?),
            _ => Err(Error::NotOnGpu),
        }
    }

    /// The values from scalar `offset` on as matrices of a product: stored rows are `row` scalars apart, matrices
    /// `stride`. A result is checked to be unshared by [`Tensor::result`].
    ///
    /// # Errors
    /// [`Error::NotOnGpu`], [`Error::Cuda`] if the offset is beyond the tensor.
    pub fn operand(&self, offset: usize, row: usize, stride: usize, transposed: bool) -> Result<Operand<'_>> {
        let Storage::Cuda(buffer) = self.storage() else { return Err(Error::NotOnGpu) };
        let span = buffer.slice(offset * self.precision().bytes()..buffer.len())?;
        Ok(Operand { span, precision: self.precision(), row, stride, transposed })
    }

    /// As [`Tensor::operand`], to be written.
    ///
    /// # Errors
    /// Those of [`Tensor::operand`], and [`Error::Shared`] if other tensors share the buffer.
    pub fn result(&mut self, offset: usize, row: usize, stride: usize) -> Result<Operand<'_>> {
        self.storage_mut()?;
        self.operand(offset, row, stride, false)
    }

    /// Rounds values to the storage precision on the host and copies them to the GPU.
    pub(crate) fn upload<R: Real>(&mut self, values: &[R]) -> Result<()> {
        let mut host = host(self.precision(), values.len())?;
        each_storage!(&mut host, stored => crate::ViewMut::from(stored.as_mut_slice()).narrow(values), ());
        match self.storage_mut()? {
            Storage::Cuda(buffer) => Ok(buffer.upload(0, host.host_bytes())?),
            _ => Err(Error::NotOnGpu),
        }
    }

    /// Copies the values from the GPU and widens them.
    pub(crate) fn download<R: Real>(&self) -> Result<Vec<R>> {
        let mut host = host(self.precision(), scalars(self))?;
        let Storage::Cuda(buffer) = self.storage() else { return Err(Error::NotOnGpu) };
        buffer.download(0, host.host_bytes())?;
        let mut values = vec![R::ZERO; scalars(self)];
        each_storage!(&host, stored => View::from(stored.as_slice()).widen(&mut values), ());
        Ok(values)
    }
}

/// Host memory of a precision.
fn host(precision: Precision, len: usize) -> Result<Storage> {
    Storage::zeros(precision, len).ok_or_else(|| Error::OutOfMemory {
        bytes: len * precision.bytes(),
        purpose: Purpose::Workspace,
        shape: [len].into(),
        dtype: DType::real(precision),
        live: 0,
    })
}
