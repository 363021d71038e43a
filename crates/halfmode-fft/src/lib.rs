#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod axis;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod half_fft;
mod line;
mod planner;
pub mod reference;
mod scale;
mod stage;
mod table;
mod transform;
mod waves;

pub use axis::{Axis, AxisReal, Weights};
pub use error::Error;
pub use half_fft::true_half_fft;
pub use line::Scalar;
pub use planner::{Algorithm, AxisKind};
pub use scale::HalfSafeScale;
pub use table::signed_frequency;
pub use transform::{Transform, TransformConfig};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
