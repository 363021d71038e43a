//! One device: its context, its stream, its memory.

#![allow(unsafe_code, reason = "calls to the CUDA driver")]

use crate::blas::Blas;
use crate::fft::Fft;
use crate::kernel::{Kernel, KernelKey};
use crate::libraries::{self, Library, Roots};
use crate::pool::Pool;
use crate::profile::Recorder;
use crate::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Which of the process's devices.
    pub ordinal: usize,
    /// Such as `NVIDIA H200`.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub n_multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: usize,
    /// Bytes of the second cache.
    pub l2: usize,
    /// The CUDA version of the driver: 13000 is 13.0.
    pub driver: i32,
}

impl DeviceInfo {
    /// The architecture that kernels are compiled for, with the instructions of this chip alone where it has some.
    #[must_use]
    pub fn arch(&self) -> String {
        let (major, minor) = self.capability;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free, as the driver counts it.
    pub free: usize,
    /// All of it.
    pub total: usize,
    /// Held by this context, in use or waiting to be used again.
    pub held: usize,
    /// The most that this context ever held.
    pub held_peak: usize,
}

/// A device that this process works on. Cloning shares it.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

pub(crate) struct Inner {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    stream: sys::CUstream,
    /// Copies from the host, beside the launches of the other.
    copies: sys::CUstream,
    info: DeviceInfo,
    roots: Roots,
    cache: Option<PathBuf>,
    memory: Mutex<Memory>,
    kernels: Mutex<HashMap<KernelKey, Kernel>>,
    blas: OnceLock<Blas>,
    recorder: Mutex<Option<Recorder>>,
    fft: OnceLock<Fft>,
}

#[derive(Default)]
struct Memory {
    pool: Pool,
    /// Pools of captured graphs, which nobody else takes from: a replay writes there again.
    captured: BTreeMap<u64, Pool>,
    /// The graph that is being captured.
    capturing: Option<u64>,
    n_captured: u64,
    held_peak: usize,
}

impl Memory {
    fn held(&self) -> usize {
        self.pool.held() + self.captured.values().map(Pool::held).sum::<usize>()
    }

    /// Where memory is taken from now.
    fn active(&mut self) -> &mut Pool {
        match self.capturing {
            Some(id) => self.captured.entry(id).or_default(),
            None => &mut self.pool,
        }
    }
}

// SAFETY: the handles are the driver's, which may be called from any thread; everything that changes is
// behind a lock.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("info", &self.0.info).finish_non_exhaustive()
    }
}

/// The driver's errors, with the call that failed.
pub(crate) fn check<T>(call: &'static str, outcome: std::result::Result<T, DriverError>) -> Result<T> {
    outcome.map_err(|err| {
        let text = |it: std::result::Result<&std::ffi::CStr, DriverError>| {
            it.map_or_else(|_| "unknown".to_owned(), |it| it.to_string_lossy().into_owned())
        };
        Error::Driver { call, name: text(err.error_name()), text: text(err.error_string()) }
    })
}

/// How many devices the driver reports.
///
/// # Errors
/// [`Error::Library`] without a driver, [`Error::OldDriver`], [`Error::Driver`].
pub fn n_devices(roots: &Roots) -> Result<usize> {
    start_driver(roots)?;
    Ok(usize::try_from(check("cuDeviceGetCount", result::device::get_count())?).unwrap_or(0))
}

/// Loads and starts the driver; returns its CUDA version.
fn start_driver(roots: &Roots) -> Result<i32> {
    libraries::load(Library::Driver, roots)?;
    let mut version = 0;
    // SAFETY: the driver is loaded, and the argument is a number that it writes.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
    if version < 13000 {
        return Err(Error::OldDriver { found: version });
    }
    check("cuInit", result::init())?;
    Ok(version)
}

impl Context {
    /// Device `ordinal` with a stream of its own. Compiled kernels are kept in `cache` where there is one.
    ///
    /// # Errors
    /// [`Error::Library`] without a driver, [`Error::OldDriver`], [`Error::Ordinal`] if there is no such device,
    /// [`Error::Driver`].
    pub fn new(ordinal: usize, roots: Roots, cache: Option<PathBuf>) -> Result<Self> {
        let driver = start_driver(&roots)?;
        let n_devices = usize::try_from(check("cuDeviceGetCount", result::device::get_count())?).unwrap_or(0);
        let index = i32::try_from(ordinal).ok().filter(|_| ordinal < n_devices);
        let index = index.ok_or(Error::Ordinal { ordinal, n_devices })?;
        let device = check("cuDeviceGet", result::device::get(index))?;
        let name = check("cuDeviceGetName", result::device::get_name(device))?;
        let attribute = |attribute| -> Result<i32> {
            // SAFETY: `device` came from the driver.
            check("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, attribute) })
        };
        use sys::CUdevice_attribute_enum as A;
        let size = |value: i32| usize::try_from(value).unwrap_or(0);
        let info = DeviceInfo {
            ordinal,
            name,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            n_multiprocessors: size(attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?),
            shared_memory: size(attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?),
            l2: size(attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
            driver,
        };
        // SAFETY: `device` came from the driver; released when the context is dropped.
        let raw = check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: `raw` is alive.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(raw) })?;
        let stream = || check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking));
        let (stream, copies) = (stream()?, stream()?);
        Ok(Context(Arc::new(Inner {
            device,
            raw,
            stream,
            copies,
            info,
            roots,
            cache,
            memory: Mutex::default(),
            kernels: Mutex::default(),
            blas: OnceLock::new(),
            recorder: Mutex::default(),
            fft: OnceLock::new(),
        })))
    }

    /// What the device is.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Where libraries and headers are looked for.
    #[must_use]
    pub fn roots(&self) -> &Roots {
        &self.0.roots
    }

    pub(crate) fn cache(&self) -> Option<&PathBuf> {
        self.0.cache.as_ref()
    }

    /// Whether both handles name one context.
    #[must_use]
    pub fn same(&self, other: &Context) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.0.stream
    }

    pub(crate) fn copies(&self) -> sys::CUstream {
        self.0.copies
    }

    /// Makes the context the calling thread's own, as every call to the driver needs.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.0.raw) })
    }

    /// Waits until everything launched so far is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what an earlier launch did.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.0.stream) })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn kernels(&self) -> MutexGuard<'_, HashMap<KernelKey, Kernel>> {
        self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn recorder(&self) -> MutexGuard<'_, Option<Recorder>> {
        self.0.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn blas(&self) -> Result<&Blas> {
        if let Some(blas) = self.0.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::new(self)?;
        Ok(self.0.blas.get_or_init(|| blas))
    }

    pub(crate) fn fft_library(&self) -> Result<&Fft> {
        if let Some(fft) = self.0.fft.get() {
            return Ok(fft);
        }
        let fft = Fft::new(self)?;
        Ok(self.0.fft.get_or_init(|| fft))
    }

    /// Bytes of the device's memory.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        self.bind()?;
        let (free, total) = check("cuMemGetInfo", result::mem_get_info())?;
        let memory = self.memory();
        Ok(MemoryInfo { free, total, held: memory.held(), held_peak: memory.held_peak })
    }

    /// The address of `bytes` bytes of memory with arbitrary contents.
    pub(crate) fn take(&self, bytes: usize) -> Result<u64> {
        let mut memory = self.memory();
        if let Some(address) = memory.active().take(bytes) {
            return Ok(address);
        }
        self.bind()?;
        let segment = Pool::segment_for(bytes);
        // SAFETY: nothing reads the memory before a kernel or a copy has written it.
        let allocate = || segment.and_then(|size| unsafe { result::malloc_sync(size) }.ok().map(|it| (it, size)));
        let mut found = allocate();
        if found.is_none() {
            // SAFETY: no buffer lies in a wholly free segment, and the driver waits for work in flight.
            memory.pool.drain_free_segments().into_iter().for_each(|it| _ = unsafe { result::free_sync(it) });
            found = allocate();
        }
        let Some((start, size)) = found else {
            let (free, total) = check("cuMemGetInfo", result::mem_get_info())?;
            return Err(Error::OutOfMemory { bytes, free, total, held: memory.held() });
        };
        memory.active().add_segment(start, size);
        memory.held_peak = memory.held_peak.max(memory.held());
        let held = memory.held();
        memory.active().take(bytes).ok_or(Error::OutOfMemory { bytes, free: 0, total: 0, held })
    }

    /// Gives the memory at an address back to the pool that it came from.
    pub(crate) fn give(&self, address: u64) {
        let mut memory = self.memory();
        match memory.captured.values_mut().find(|pool| pool.holds(address)) {
            Some(pool) => pool.give(address),
            None => memory.pool.give(address),
        }
    }

    /// Takes memory from a pool of its own from now on; returns the pool's number, or `None` during a capture.
    pub(crate) fn begin_own_pool(&self) -> Option<u64> {
        let mut memory = self.memory();
        if memory.capturing.is_some() {
            return None;
        }
        memory.n_captured += 1;
        memory.capturing = Some(memory.n_captured);
        memory.capturing
    }

    /// Whether launches are recorded into a graph at present: the host must not wait for the device then.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.memory().capturing.is_some()
    }

    /// Where bytes for this address may be copied from the host at once: on the stream of the launches, or while
    /// they are recorded on the other. `None` for memory of the graph that is being recorded, which every replay
    /// writes to in its turn.
    pub(crate) fn upload_stream(&self, address: u64) -> Option<sys::CUstream> {
        let memory = self.memory();
        let Some(id) = memory.capturing else { return Some(self.0.stream) };
        let is_own = memory.captured.get(&id).is_some_and(|pool| pool.holds(address));
        (!is_own).then_some(self.0.copies)
    }

    /// Takes memory from the common pool again.
    pub(crate) fn end_own_pool(&self) {
        self.memory().capturing = None;
    }

    /// Gives a graph's pool to everybody, once the graph is no more.
    pub(crate) fn release_own_pool(&self, id: u64) {
        let mut memory = self.memory();
        if let Some(pool) = memory.captured.remove(&id) {
            memory.pool.absorb(pool);
        }
    }

    /// Gives memory that nobody uses back to the driver.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn trim(&self) -> Result<()> {
        self.bind()?;
        let segments = self.memory().pool.drain_free_segments();
        for segment in segments {
            // SAFETY: no buffer lies in it, and the driver waits for work in flight.
            check("cuMemFree", unsafe { result::free_sync(segment) })?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nobody else holds the context, its stream or a buffer of its memory: each of them holds the
        // context alive. Errors have nobody to go to.
        unsafe {
            let _ = result::ctx::set_current(self.raw);
            let _ = result::stream::synchronize(self.copies);
            let _ = result::stream::synchronize(self.stream);
            self.kernels.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
            drop(self.blas.take());
            drop(self.fft.take());
            let memory = self.memory.get_mut().unwrap_or_else(PoisonError::into_inner);
            let pools = std::iter::once(&mut memory.pool).chain(memory.captured.values_mut());
            for segment in pools.flat_map(Pool::drain) {
                let _ = result::free_sync(segment);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::stream::destroy(self.copies);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
