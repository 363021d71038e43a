//! What a plan should be good at.

use crate::{Error, Result};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

/// How the order of pairwise products is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Greedy: the pair with the smallest result first, among pairs that share a label. Outer
    /// products are formed only when nothing shares a label. Ties: fewer multiplies, then the
    /// lower operand numbers.
    Memory,
    /// Greedy: the pair with the fewest multiplies first, among pairs that share a label. Ties:
    /// the smaller result, then the lower operand numbers.
    Flops,
    /// The best of all binary trees for an objective, up to
    /// [`crate::MAX_EXACT_OPERANDS`] operands.
    Exact(Objective),
}

/// What the exact search minimises over all binary trees.
#[derive(Clone, Copy, Debug)]
pub enum Objective {
    /// `total elements of all results + mu * multiplies`; ties: fewer multiplies.
    Weighted {
        /// Elements that one multiply is worth; finite, at least 0.
        mu: f64,
    },
    /// Multiplies; ties: fewer total elements.
    Multiplies,
    /// Elements of the biggest result; ties: fewer total elements.
    Peak,
}

impl Objective {
    /// The fewest elements in all results together.
    pub const TOTAL: Objective = Objective::Weighted { mu: 0.0 };
}

impl Policy {
    /// The weight of [`Policy::balanced`]: 256 multiplies are worth one stored element. On the
    /// layers of the planning table it stays within 10 % of the fewest multiplies where the memory
    /// order saves little, and takes an order between the two where that saves much (30 % fewer
    /// elements for 3.2 times the multiplies).
    pub const BALANCED_MU: f64 = 1.0 / 256.0;

    /// Exact with `total + mu * multiplies` at the default weight.
    #[must_use]
    pub const fn balanced() -> Self {
        Policy::Exact(Objective::Weighted { mu: Self::BALANCED_MU })
    }

    /// Checks the weight.
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Policy::Exact(Objective::Weighted { mu }) if !mu.is_finite() || mu < 0.0 => Err(Error::Weight { mu }),
            _ => Ok(()),
        }
    }
}

// Weights compare by their bits: a key of the cache needs equality, not arithmetic.
impl PartialEq for Objective {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Objective::Weighted { mu: a }, Objective::Weighted { mu: b }) => a.to_bits() == b.to_bits(),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

impl Eq for Objective {}

impl Hash for Objective {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        if let Objective::Weighted { mu } = self {
            mu.to_bits().hash(state);
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Memory => f.pad("memory"),
            Policy::Flops => f.pad("flops"),
            Policy::Exact(Objective::Weighted { mu }) => f.pad(&format!("exact total + {mu} * multiplies")),
            Policy::Exact(Objective::Multiplies) => f.pad("exact multiplies"),
            Policy::Exact(Objective::Peak) => f.pad("exact peak"),
        }
    }
}

/// The names of configuration files: `memory`, `flops`, `balanced`.
impl FromStr for Policy {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "memory" => Ok(Policy::Memory),
            "flops" => Ok(Policy::Flops),
            "balanced" => Ok(Policy::balanced()),
            _ => Err(Error::UnknownPolicy { name: name.to_owned() }),
        }
    }
}
