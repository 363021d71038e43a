//! Which precision each quantity of a solve has.

use crate::{Error, Result};
use halfmode_precision::{Precision, PrecisionPolicy};
use std::collections::BTreeMap;
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

/// The precision of one tensor of a state of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafPrecision {
    /// Stage inputs. The cotangent of a slope has the format in which the field gives that slope.
    pub velocity: Precision,
    /// The running state.
    pub state: StateSum,
    /// States kept for backward.
    pub stored: Precision,
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
///
/// On a GPU a solve of planar flows in one launch is wider than that: velocity, stage inputs and cotangents are f32 in
/// registers whatever `velocity` says, so that its adjoint needs no scale. It is not looked at, either: what is not finite
/// there arrives in the gradients.
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
    /// Tensors of a state of several, by their place, that depart from the above: a log-density that is kept in f32
    /// beside a half velocity, say.
    pub leaves: BTreeMap<usize, LeafPrecision>,
}

impl OdePrecision {
    /// Velocity as `policy` says, sums and state in its accumulation precision, states stored as it saves.
    #[must_use]
    pub fn new(policy: PrecisionPolicy) -> Self {
        let accumulate = policy.pointwise.accumulate;
        let (state, stored) = (StateSum::Plain(accumulate), policy.saved);
        OdePrecision { velocity: Arc::new(policy), accumulate, state, stored, leaves: BTreeMap::new() }
    }

    /// The same with the `idx`-th tensor of the state in the precision of sums throughout.
    #[must_use]
    pub fn wide_leaf(mut self, idx: usize) -> Self {
        let wide = self.accumulate;
        self.leaves.insert(idx, LeafPrecision { velocity: wide, state: StateSum::Plain(wide), stored: wide });
        self
    }

    /// The formats of the `idx`-th tensor of the state.
    #[must_use]
    pub fn leaf(&self, idx: usize) -> LeafPrecision {
        let (velocity, state, stored) = (self.velocity_storage(), self.state, self.stored);
        self.leaves.get(&idx).copied().unwrap_or(LeafPrecision { velocity, state, stored })
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
        let widest = |leaf: &LeafPrecision| [leaf.state.precision(), leaf.velocity.accumulate()];
        let formats = self.leaves.values().flat_map(widest).chain([self.state.precision()]);
        match formats.into_iter().find(|it| it.bytes() > self.accumulate.bytes()) {
            Some(needs) => Err(Error::TooNarrow { what: "a sum over stages", found: self.accumulate, needs }),
            None => Ok(()),
        }
    }
}
