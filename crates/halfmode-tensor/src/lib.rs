#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
mod cuda_feed;
mod device;
mod edges;
mod error;
mod features;
mod fold;
mod gemm;
mod ledger;
mod math;
mod ops;
mod real;
mod scratch;
mod shape;
mod simd;
mod storage;
mod tensor;
pub mod tiles;
mod view;

pub use device::{CpuDevice, Device, MetaDevice, Target};
pub use error::Error;
pub use features::uses_avx512;
pub use fold::{add_sub, add_sub_in_place, even_rows, fold_rows, narrow_add_sub, odd_rows, unfold_rows};
pub use gemm::{Mat, MatMut};
pub use ledger::{Ledger, MemoryStats, Purpose, Usage};
pub use ops::Elementwise;
pub use real::Real;
pub use scratch::Scratch;
pub use shape::Shape;
pub use tensor::Tensor;
pub use view::{Rows, RowsMut, View, ViewMut};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
