#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch_norm;
mod complex;
mod composed;
#[cfg(feature = "cuda")]
mod cuda_boxes;
#[cfg(feature = "cuda")]
mod cuda_rows;
mod dense_weights;
mod embed;
mod error;
mod fno_block;
mod fused_block;
pub mod jets;
mod mlp;
mod mode_mix;
mod mode_scale;
mod mode_select;
mod module;
mod norm;
mod param;
mod partial;
mod planar;
mod pointwise;
mod resize;
mod row_map;
mod rows;
mod spectral_conv;

pub use batch_norm::{BatchNorm, BatchStatistics};
pub use complex::{JoinComplex, SplitComplex};
pub use embed::{Embed, ExtraChannels};
pub use error::Error;
pub use fno_block::{Activation, ComposedBlock, FnoBlock, Stabilizer};
pub use mlp::{Channels, GridEmbedding, PointwiseMlp};
pub use mode_select::SelectModes;
pub use module::Module;
pub use norm::{FieldNorm, NormKind};
pub use param::{Init, ParamLayout, ParamRole, ParamSpec, Parameter, Params};
pub use planar::PlanarFlow;
pub use pointwise::{Add, ChannelBias, ChannelGate, Gelu, Linear, Subtract, Tanh};
pub use resize::{FourierResample, Interpolate, Margin};
pub use spectral_conv::{FftNorm, ModeProduct, SpectralConv};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
