#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bounds;
mod config;
mod dtype;
mod error;
mod format;
mod loss_scale;
mod op_precision;
mod policy;
mod preset;
mod range;
mod scaler;

pub use config::PrecisionConfig;
pub use dtype::{DType, Domain, Precision};
pub use error::Error;
pub use format::{Format, Overflow};
pub use loss_scale::LossScale;
pub use op_precision::OpPrecision;
pub use policy::PrecisionPolicy;
pub use preset::{Compute, Preset};
pub use range::RangeStats;
pub use scaler::{DynamicScaler, ScalerConfig, ScalerState, Step};
