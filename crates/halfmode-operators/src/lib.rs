#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod field;
mod fno;
mod fno_config;
mod fno_layer;

pub use error::Error;
pub use fno::Fno;
pub use fno_config::{FnoConfig, Norm, Numbers, PositionalEmbedding, Skip, StabilizerKind};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
