//! Which precision each quantity of a solve has.

use crate::{Error, Result};
use halfmode_precision::{Precision, PrecisionPolicy};
use std::sync::Arc;

/// How the running state is summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSum {
    /// In one number of this format. A half format loses steps that are small against the state: the error then grows
    /// with their number.
    Plain(Precision),
    /// In two numbers of this format, the second holding what the first cannot (a compensated sum).
    Compensated(Precision),
}

impl StateSum {
    /// The format of the numbers.
    #[must_use]
    pub const fn precision(self) -> Precision {
        match self {
            StateSum::Plain(precision) | StateSum::Compensated(precision) => precision,
        }
    }
}

/// The precision of every quantity of a solve: what is stored, and apart from it what sums are formed in.
///
/// | quantity | precision |
/// | --- | --- |
/// | velocity, stage inputs, cotangents of stages | `velocity.pointwise.storage`, one rounding each |
/// | slope sums and step length times slope | `accumulate` |
/// | state from step to step | `state` |
/// | states kept for backward | `stored` |
/// | outputs, incoming cotangents, adjoint, sums of gradients | `accumulate` |
/// | times and step lengths | f64 |
#[derive(Clone, Debug, PartialEq)]
pub struct OdePrecision {
    /// What the field computes in. Parameters are used as they are given; `halfmode_nn::Params` makes the copies that
    /// this policy wants.
    pub velocity: Arc<PrecisionPolicy>,
    /// Sums over stages and steps: f32 or f64.
    pub accumulate: Precision,
    /// The running state.
    pub state: StateSum,
    /// States kept for backward: the points at which the adjoint linearises.
    pub stored: Precision,
}

impl OdePrecision {
    /// Velocity as `policy` says, sums and state in its accumulation precision, states stored as it saves.
    #[must_use]
    pub fn new(policy: PrecisionPolicy) -> Self {
        let accumulate = policy.pointwise.accumulate;
        let (state, stored) = (StateSum::Plain(accumulate), policy.saved);
        OdePrecision { velocity: Arc::new(policy), accumulate, state, stored }
    }

    /// Velocity and stored states in a half format, state and sums in f32: the published method.
    #[must_use]
    pub fn mixed(format: Precision) -> Self {
        OdePrecision::new(PrecisionPolicy::mixed(format))
    }

    /// f32 throughout.
    #[must_use]
    pub fn full() -> Self {
        OdePrecision::new(PrecisionPolicy::full())
    }

    /// f64 throughout.
    #[must_use]
    pub fn double() -> Self {
        OdePrecision::new(PrecisionPolicy::double())
    }

    /// What stage inputs and cotangents are rounded to.
    #[must_use]
    pub fn velocity_storage(&self) -> Precision {
        self.velocity.pointwise.storage
    }

    /// Checks that no sum is formed below its terms.
    ///
    /// # Errors
    /// [`Error::TooNarrow`], naming the sum.
    pub fn validate(&self) -> Result<()> {
        let needs = self.velocity_storage().accumulate();
        if self.accumulate.bytes() < needs.bytes() {
            return Err(Error::TooNarrow { what: "a sum over stages", found: self.accumulate, needs });
        }
        let state = self.state.precision();
        if state.bytes() > self.accumulate.bytes() {
            return Err(Error::TooNarrow { what: "a sum over stages", found: self.accumulate, needs: state });
        }
        Ok(())
    }
}
