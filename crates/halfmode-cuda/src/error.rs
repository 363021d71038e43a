//! What can go wrong with a GPU.

use crate::Library;
use std::path::PathBuf;

/// What can go wrong with a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library is not installed, or not where it is looked for.
    #[error("{} was not found; it is needed for {}; tried {}", library.file_name(), library.purpose(), list(tried))]
    Library {
        /// The library.
        library: Library,
        /// Names and paths that were tried, and what the loader said to the last.
        tried: Vec<String>,
    },
    /// The driver is older than the toolkit that this build was made for.
    #[error("the NVIDIA driver supports CUDA {}.{}, but 13.0 or newer is needed", found / 1000, found % 1000 / 10)]
    OldDriver {
        /// What `cuDriverGetVersion` says.
        found: i32,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}: the driver reports {n_devices}")]
    Ordinal {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        n_devices: usize,
    },
    /// A call to the driver failed.
    #[error("{call} failed: {name} ({text})")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's description.
        text: String,
    },
    /// The device has too little memory.
    #[error("the GPU has no room for {bytes} bytes: {free} of {total} bytes are free, {held} are held by this process")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
        /// Free bytes of the device.
        free: usize,
        /// All bytes of the device.
        total: usize,
        /// Bytes that this context holds.
        held: usize,
    },
    /// A kernel does not compile.
    #[error("kernel file {file} does not compile for {arch}: {log}")]
    Compile {
        /// The source's name.
        file: String,
        /// The architecture.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// A call to the run-time compiler failed.
    #[error("{call} failed: {code}")]
    Nvrtc {
        /// The call.
        call: &'static str,
        /// The compiler's error code.
        code: String,
    },
    /// The headers that kernels include were not found.
    #[error("cuda_fp16.h was not found; kernels include it; tried {}", list(tried))]
    Headers {
        /// Folders that were tried.
        tried: Vec<String>,
    },
    /// A call to the matrix library failed.
    #[error("{call} failed for {what}: {code}")]
    Blas {
        /// The call.
        call: &'static str,
        /// The product.
        what: String,
        /// The library's error code.
        code: String,
    },
    /// A call to the transform library failed.
    #[error("{call} failed for {what}: {code}")]
    Fft {
        /// The call.
        call: &'static str,
        /// The transforms.
        what: String,
        /// The library's error code.
        code: String,
    },
    /// The transform library does not take such a shape.
    #[error("transforms {what}: {problem}")]
    FftShape {
        /// The transforms.
        what: String,
        /// What it does not take, and what to do instead.
        problem: String,
    },
    /// Arguments of a launch do not fit the kernel.
    #[error("kernel {kernel}: {problem}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// What does not fit.
        problem: String,
    },
    /// Bytes of the host were to be written to memory of a graph while it is recorded: replays would not write them.
    #[error("{n_bytes} bytes of the host cannot be written while a graph is recorded: run the work once before")]
    Recording {
        /// How many.
        n_bytes: usize,
    },
    /// A copy would leave its buffer.
    #[error("bytes {offset} to {end} are outside of a buffer of {len} bytes")]
    Range {
        /// First byte.
        offset: usize,
        /// Byte after the last.
        end: usize,
        /// Bytes of the buffer.
        len: usize,
    },
    /// A compiled kernel could not be kept on disk.
    #[error("the kernel cache {path} could not be used: {why}")]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
}

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;

fn list(tried: &[String]) -> String {
    if tried.is_empty() { "nothing".to_owned() } else { tried.join(", ") }
}
