//! Losses as ops, and the same errors as plain functions for evaluation.

mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod evaluate;
mod field_loss;
mod fields;
mod gaussian_nll;
mod grid_differences;
mod h1;
mod lp;
mod squared_error;

pub use cross_entropy::CrossEntropy;
pub use evaluate::{relative_h1, relative_l2};
pub use fields::Reduction;
pub use gaussian_nll::GaussianNll;
pub use h1::H1Loss;
pub use lp::LpLoss;
pub use squared_error::SquaredError;
