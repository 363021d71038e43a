//! Where tensors live and who computes on them.

use crate::storage::{Pool, Storage};
use crate::tensor::Contents;
use crate::{Error, Ledger, MemoryStats, Purpose, Result, Scratch, Shape, Tensor};
use halfmode_precision::{DType, Precision};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex, PoisonError};

/// The machine whose plans the planning device follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The CPU with this many threads.
    Cpu {
        /// Worker threads.
        threads: usize,
    },
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Host memory and a pool of worker threads.
#[derive(Clone, Debug)]
pub struct CpuDevice {
    threads: Arc<ThreadPool>,
    ledger: Arc<Ledger>,
    freed: Arc<Mutex<Pool>>,
}

/// Allocates without memory and launches nothing: what runs on it is priced, not computed.
#[derive(Clone, Debug)]
pub struct MetaDevice {
    target: Target,
    ledger: Arc<Ledger>,
}

/// A backend. Cloning shares the device, its threads and its ledger.
#[derive(Clone, Debug)]
pub enum Device {
    /// Computes on the CPU.
    Cpu(CpuDevice),
    /// Computes on an NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::CudaDevice),
    /// Plans for a target without computing.
    Meta(MetaDevice),
}

impl CpuDevice {
    fn freed(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.freed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes between what is live and the most that ever was.
    fn room(&self) -> usize {
        let total = self.ledger.stats().total;
        total.peak - total.live
    }
}

impl Device {
    /// The CPU with `threads` worker threads (0: one per core).
    ///
    /// # Errors
    /// [`Error::Threads`] if the system refuses the threads.
    pub fn cpu(threads: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|idx| format!("halfmode-{idx}"))
            .build()
            .map_err(|err| Error::Threads { threads, reason: err.to_string() })?;
        Ok(Device::Cpu(CpuDevice { threads: Arc::new(pool), ledger: Arc::default(), freed: Arc::default() }))
    }

    /// A device that follows the plans of `target` and computes nothing.
    #[must_use]
    pub fn meta(target: Target) -> Self {
        Device::Meta(MetaDevice { target, ledger: Arc::default() })
    }

    /// The planning twin of this device: the same target, an empty ledger.
    #[must_use]
    pub fn twin(&self) -> Self {
        Device::meta(self.target())
    }

    /// What this device computes on, or plans for.
    #[must_use]
    pub fn target(&self) -> Target {
        match self {
            Device::Cpu(cpu) => Target::Cpu { threads: cpu.threads.current_num_threads() },
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Target::Cuda,
            Device::Meta(meta) => meta.target,
        }
    }

    /// Whether kernels run here. On the planning device only their allocations do.
    #[must_use]
    pub fn launches(&self) -> bool {
        !matches!(self, Device::Meta(_))
    }

    /// Whether the target is a CPU.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        matches!(self.target(), Target::Cpu { .. })
    }

    /// Worker threads of the target; 1 for a GPU, which has none.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        match self.target() {
            Target::Cpu { threads } => threads,
            #[cfg(feature = "cuda")]
            Target::Cuda => 1,
        }
    }

    /// Whether both handles name one device.
    #[must_use]
    pub fn same(&self, other: &Device) -> bool {
        Arc::ptr_eq(self.ledger(), other.ledger())
    }

    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        match self {
            Device::Cpu(cpu) => &cpu.ledger,
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => &cuda.ledger,
            Device::Meta(meta) => &meta.ledger,
        }
    }

    /// Live and peak bytes by purpose.
    #[must_use]
    pub fn memory(&self) -> MemoryStats {
        self.ledger().stats()
    }

    /// Starts new peaks at what is live now.
    pub fn reset_peak(&self) {
        self.ledger().reset_peak();
    }

    /// The most bytes that this process ever held of a GPU's memory, with what its pool rounds up and keeps and with
    /// workspaces of libraries; `None` on a CPU, and where the driver does not say.
    #[must_use]
    pub fn held_peak_bytes(&self) -> Option<usize> {
        match self {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => Some(cuda.context().memory_info().ok()?.held_peak),
            _ => None,
        }
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the bytes overflow, [`Error::OutOfMemory`] if the system refuses them.
    pub fn alloc(&self, shape: impl Into<Shape>, dtype: DType, purpose: Purpose) -> Result<Tensor> {
        Tensor::new(self, shape.into(), dtype, purpose, Contents::Zeros)
    }

    /// A tensor with arbitrary contents, for kernels that write every scalar. Builds with debug
    /// assertions fill it with NaN, so that a scalar that was not written shows.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub fn alloc_unwritten(&self, shape: impl Into<Shape>, dtype: DType, purpose: Purpose) -> Result<Tensor> {
        Tensor::new(self, shape.into(), dtype, purpose, Contents::Arbitrary)
    }

    /// Memory for a tensor, or `None` if the host refuses it: a freed buffer of this size where one
    /// waits. Freed buffers go back to the system where live and waiting ones would exceed the peak.
    pub(crate) fn storage(
        &self,
        precision: Precision,
        len: usize,
        bytes: usize,
        contents: Contents,
    ) -> Result<Option<Storage>> {
        let cpu = match self {
            Device::Cpu(cpu) => cpu,
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => return cuda.storage(bytes, contents).map(Some),
            Device::Meta(_) => return Ok(Some(Storage::Planned)),
        };
        let waiting = cpu.freed().take(precision, len);
        let mut storage = match waiting {
            Some(mut storage) => {
                if contents == Contents::Zeros {
                    storage.fill_zero();
                }
                storage
            }
            None => {
                cpu.freed().shrink(cpu.room().saturating_sub(bytes));
                let fresh = Storage::zeros(precision, len).or_else(|| {
                    cpu.freed().shrink(0);
                    Storage::zeros(precision, len)
                });
                let Some(fresh) = fresh else { return Ok(None) };
                fresh
            }
        };
        if contents == Contents::Arbitrary && cfg!(debug_assertions) {
            storage.poison();
        }
        Ok(Some(storage))
    }

    /// Takes the memory of a tensor that is no more.
    pub(crate) fn recycle(&self, storage: Storage) {
        if let Device::Cpu(cpu) = self {
            cpu.freed().put(storage, cpu.room());
        }
    }

    /// Scratch of `len` accumulators of `dtype`'s accumulation precision for each worker thread,
    /// counted as [`Purpose::Workspace`] while it lives.
    #[must_use]
    pub fn scratch(&self, len: usize, bytes_each: usize) -> Scratch {
        Scratch::new(self, len, bytes_each)
    }

    /// Runs `work` inside the device's thread pool; on the planning device it is not run.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Option<T> {
        match self {
            Device::Cpu(cpu) => Some(cpu.threads.install(work)),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Some(work()),
            Device::Meta(_) => None,
        }
    }
}
