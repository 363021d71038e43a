#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod blas;
mod buffer;
mod compile;
mod context;
mod error;
mod fft;
mod graph;
mod kernel;
mod libraries;
mod pinned;
mod pool;
mod profile;
mod timer;

pub use blas::{Compute, Matmul, Operand, Scalar};
pub use buffer::{Buffer, Span};
pub use compile::{Compiled, Source, compile, compiler_version};
pub use context::{Context, DeviceInfo, MemoryInfo, n_devices};
pub use error::{Error, Result};
pub use fft::{FftKind, FftPlan};
pub use graph::Graph;
pub use kernel::{Arg, Grid, Kernel};
pub use libraries::{Library, Roots, load};
pub use pinned::Pinned;
pub use profile::Spent;
pub use timer::Timer;
