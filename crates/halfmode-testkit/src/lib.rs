//! Tolerances, gradient checks and adjoint tests shared by the test suites.
//!
//! Used from `crates/*/tests/` and `tests/` only: an in-file test would see a second copy of its
//! own crate. Panics are how a test speaks, so they are allowed here.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test support")]

mod close;
mod devices;
mod golden;
mod gradcheck;
mod random;
mod sensitivity;

pub use close::{max_error, rel_l2, tol};
pub use devices::{devices, gpu};
pub use golden::Golden;
pub use gradcheck::{adjoint, gradcheck, run_op, slope, slopes};
pub use random::Rng;
pub use sensitivity::{distance, norm, sensitivity};
