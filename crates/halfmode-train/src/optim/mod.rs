//! Optimisers and what is done to gradients before them.

mod adamw;
mod clip;

pub use adamw::{AdamW, AdamWConfig, AdamWKind, Moments};
pub use clip::{GradStats, clip_factor, grad_stats};
