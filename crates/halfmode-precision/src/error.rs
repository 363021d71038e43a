//! The error type of this crate.

use crate::{Format, OpPrecision, Precision};
use thiserror::Error as ThisError;

/// Everything that can go wrong in this crate.
#[derive(Clone, Debug, PartialEq, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// A value does not fit a format and the caller asked for an error.
    #[error("{value:e} is beyond the largest value of {format}, {max:e}; scale it down or store it wider", max = .format.max())]
    Overflow {
        /// The format that was rounded to.
        format: Format,
        /// The value before rounding.
        value: f64,
    },
    /// A name that is not one of a fixed set.
    #[error("unknown {kind} `{name}`; use one of {expected}")]
    UnknownName {
        /// What was named, for example `preset`.
        kind: &'static str,
        /// The name that was given.
        name: String,
        /// The names that exist, separated by commas.
        expected: &'static str,
    },
    /// The half format of a policy is not a 16-bit one.
    #[error("format `{format}` is not a half format; use f16 or bf16, or preset = \"full\" to train in f32")]
    FormatNotHalf {
        /// The format that was given.
        format: Precision,
    },
    /// Sums would be formed in fewer bits than f32, or than their terms have.
    #[error("{op}: sums of {storage} in {accumulate} lose bits; use accumulate = \"{needed}\"", needed = .storage.accumulate())]
    AccumulateTooNarrow {
        /// The op kind of the policy.
        op: &'static str,
        /// How its operands are stored.
        storage: Precision,
        /// The accumulation that was asked for.
        accumulate: Precision,
    },
    /// A kind of op that no kernel computes in this format.
    #[error("{op} = {found}: no kernel computes like that beside these dense layers; use {op} = {served}")]
    NotServed {
        /// The op kind of the policy.
        op: &'static str,
        /// What was asked for.
        found: OpPrecision,
        /// What there is.
        served: OpPrecision,
    },
    /// One policy names both f64 and a 16-bit format.
    #[error(
        "{double} is f64 and {half} is {format}; no kernel joins the two: use f32 instead of f64, or f64 everywhere"
    )]
    DoubleWithHalf {
        /// A field that is f64.
        double: String,
        /// A field that is 16 bits wide.
        half: String,
        /// The 16-bit format of `half`.
        format: Precision,
    },
    /// A master copy that holds no more than the weights do.
    #[error(
        "a {master} master copy of {weights} weights adds nothing; drop the master copy or use f16 or bf16 weights"
    )]
    MasterNotWider {
        /// The precision of the master copy.
        master: Precision,
        /// The precision of the compute copy.
        weights: Precision,
    },
    /// A key of `saved_overrides` does not name one tensor of one op.
    #[error("saved_overrides: `{key}` is not of the form \"op.role\", for example \"spectral_conv.x_hat\"")]
    SavedKey {
        /// The key that was given.
        key: String,
    },
    /// A number of the loss scale is not a positive power of two, so scaling would round.
    #[error("loss scale: {field} = {value} is not a power of two; use for example {nearest}")]
    NotPowerOfTwo {
        /// The field of the scaler's configuration.
        field: &'static str,
        /// The value that was given.
        value: f64,
        /// A power of two near it.
        nearest: f64,
    },
    /// A number of the loss scale lies outside its legal range.
    #[error("loss scale: {field} = {value} must lie in {low} ..= {high}")]
    ScalerRange {
        /// The field of the scaler's configuration or state.
        field: &'static str,
        /// The value that was given.
        value: f64,
        /// The smallest legal value.
        low: f64,
        /// The largest legal value.
        high: f64,
    },
    /// Gradients are still not finite at the smallest loss scale.
    #[error(
        "gradients are not finite at the smallest loss scale (scale {scale}, minimum {min}, {n_skipped} steps skipped so far); the run has diverged: lower the learning rate, enable the stabiliser, or use bf16"
    )]
    ScaleFloor {
        /// The loss scale of the failing step.
        scale: f64,
        /// The smallest scale that the configuration allows.
        min: f64,
        /// Steps skipped in the whole run, the failing one included.
        n_skipped: u64,
    },
    /// A grid on which the error experiment cannot run.
    #[error(
        "cannot measure errors on a grid of {m} points per axis in {d} dimensions; use 1 to 2^30 points in at least one dimension"
    )]
    Grid {
        /// The number of dimensions.
        d: u32,
        /// Points per axis.
        m: usize,
    },
}
