//! What can go wrong in a solve.

use halfmode_precision::Precision;
use halfmode_tensor::Shape;

/// What can go wrong in a solve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
    /// The field failed, or the tape that it ran on.
    #[error(transparent)]
    Autograd(#[from] halfmode_autograd::Error),
    /// The time points are no grid.
    #[error("time points must be finite, at least two, and all rise or all fall: {problem} at point {point}")]
    Times {
        /// What does not fit.
        problem: &'static str,
        /// Where.
        point: usize,
    },
    /// The field's velocity has another shape than the state.
    #[error("the field returned shape {found} for a state of shape {expected}; a velocity has the state's shape")]
    Velocity {
        /// The state's shape.
        expected: Shape,
        /// The velocity's.
        found: Shape,
    },
    /// The field has another number of velocities than the state has tensors.
    #[error("the field returned {found} velocities for a state of {expected} tensors")]
    Leaves {
        /// Tensors of the state.
        expected: usize,
        /// Velocities.
        found: usize,
    },
    /// The state is complex.
    #[error("the state is complex; solve for real and imaginary parts as channels of a real state")]
    ComplexState,
    /// A sum would be formed in too narrow a format.
    #[error("{what} in {found} loses what {needs} holds; use {needs}")]
    TooNarrow {
        /// Which sum.
        what: &'static str,
        /// Its format.
        found: Precision,
        /// The narrowest that will do.
        needs: Precision,
    },
    /// The state or a slope left the range of its format, or the field returned NaN.
    #[error(
        "the velocity is not finite in step {step} of {n_steps}, near t = {time}; \
             use a wider format for the velocity, smaller steps, or a bounded field"
    )]
    NonFiniteVelocity {
        /// The step, from 0.
        step: usize,
        /// Steps of the solve.
        n_steps: usize,
        /// Where the step begins.
        time: f64,
    },
    /// The relative tolerance is below what the velocity's rounding lets an error estimate see.
    #[error(
        "rtol {rtol:e} is below {floor:.2e}, four roundings of a velocity in {velocity}; \
             use a larger rtol or a wider format for the velocity"
    )]
    ToleranceBelowFloor {
        /// What was asked for.
        rtol: f64,
        /// The smallest that makes sense.
        floor: f64,
        /// The velocity's format.
        velocity: Precision,
    },
    /// Not a single state fits into the budget.
    #[error("a state takes {needs} bytes and the budget is {bytes}; give it at least one state")]
    Budget {
        /// The budget.
        bytes: usize,
        /// One state.
        needs: usize,
    },
    /// A method that is taken back, with a storage that is not for it, or the other way round.
    #[error("{method} does not go with {storage}; use OdeOptions::reversible, or another of the two")]
    Reversal {
        /// The method.
        method: &'static str,
        /// The storage, or what else stands against it.
        storage: &'static str,
    },
    /// A lattice that no f64 can hold.
    #[error("lattice_bits is {lattice_bits}; an f64 has room for 1 to 51")]
    Lattice {
        /// Binary digits behind the point.
        lattice_bits: u32,
    },
    /// A state or a velocity that steps cannot be taken back from.
    #[error(
        "the state or its velocity is not within {most:e} in step {step} of {n_steps}, near t = {time}; \
             use fewer lattice_bits, or states of about 1"
    )]
    BeyondLattice {
        /// The step, from 0.
        step: usize,
        /// Steps of the solve.
        n_steps: usize,
        /// Where the step begins.
        time: f64,
        /// The largest value that the lattice allows.
        most: f64,
    },
    /// Taking the steps back did not lead to where they began.
    #[error(
        "the field gave other numbers on the way back, so its steps cannot be taken back; \
             make it deterministic, or store states"
    )]
    Irreversible,
    /// Tolerances are not finite or negative.
    #[error("rtol {rtol} and atol {atol} must be finite and not negative")]
    Tolerance {
        /// Relative.
        rtol: f64,
        /// Absolute.
        atol: f64,
    },
    /// A method without an error estimate was to choose its steps.
    #[error("{method} has no error estimate to choose steps by; use bosh3, dopri5 or tsit5")]
    NoEstimate {
        /// The method.
        method: &'static str,
    },
    /// More steps than allowed.
    #[error("{max_steps} steps were tried and t = {time} reached; use larger tolerances or more steps")]
    TooManySteps {
        /// The limit.
        max_steps: usize,
        /// How far the solve came.
        time: f64,
    },
    /// The step length fell to the rounding of the time.
    #[error(
        "at t = {time} a step of {length:e} still misses rtol {rtol:e}; \
             the field may be stiff, discontinuous or not finite there"
    )]
    StepTooSmall {
        /// Where.
        time: f64,
        /// The last length.
        length: f64,
        /// The tolerance.
        rtol: f64,
    },
    /// A number of the adjoint's scaling is outside its range.
    #[error("scaling of the adjoint: {field} {why}")]
    Scaling {
        /// The field of [`ScaleConfig`](crate::ScaleConfig).
        field: &'static str,
        /// What it must be.
        why: &'static str,
    },
    /// The adjoint or a gradient is not finite at any scale that may be tried.
    #[error(
        "the adjoint is not finite in step {step} of {n_steps}, after {attempts} tries down to scale {scale}; \
             reduce the loss or its scale, or use bf16 or f32 for the velocity"
    )]
    NonFiniteAdjoint {
        /// The step, from 0 at the beginning of the solve.
        step: usize,
        /// Steps of the solve.
        n_steps: usize,
        /// The last scale.
        scale: f64,
        /// Tries of this step.
        attempts: u32,
    },
}

impl Error {
    /// The error as an op reports it to the tape.
    #[must_use]
    pub fn in_op(self, op: &'static str) -> halfmode_autograd::Error {
        match self {
            Error::Tensor(err) => err.into(),
            Error::Autograd(err) => err,
            other => halfmode_autograd::Error::Op { op, source: Box::new(other) },
        }
    }
}
