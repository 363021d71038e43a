#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch_norm;
mod complex;
mod composed;
mod conv2d;
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
mod pool;
mod relu;
mod resize;
mod row_map;
mod rows;
mod spectral_conv;
mod symmetric_conv;
mod tanh_mlp;

pub use batch_norm::{BatchNorm, BatchStatistics};
pub use complex::{JoinComplex, SplitComplex};
pub use conv2d::{Conv2d, ConvKind, conv2d_reference};
pub use embed::{Embed, ExtraChannels};
pub use error::Error;
pub use fno_block::{Activation, ComposedBlock, FnoBlock, Stabilizer};
pub use mlp::{Channels, GridEmbedding, PointwiseMlp};
pub use mode_select::SelectModes;
pub use module::Module;
pub use norm::{FieldNorm, NormKind};
pub use param::{Init, ParamLayout, ParamRole, ParamSpec, Parameter, Params};
pub use planar::PlanarFlow;
pub use pointwise::{Add, ChannelBias, ChannelGate, Gelu, Linear, Negate, Subtract, Tanh};
pub use pool::AveragePool;
pub use relu::Relu;
pub use resize::{FourierResample, Interpolate, Margin};
pub use spectral_conv::{FftNorm, ModeProduct, SpectralConv};
pub use symmetric_conv::SymmetricConv;
pub use tanh_mlp::{TanhMlp, TimeColumn};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
