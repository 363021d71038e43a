//! What a tensor stores: a domain and a precision, two independent axes.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How one real scalar is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// bfloat16: 8 significand bits, the range of binary32.
    Bf16,
    /// IEEE binary16: 11 significand bits, largest value 65504.
    F16,
}

impl Precision {
    /// All storage precisions, widest first.
    pub const ALL: [Precision; 4] = [Precision::F64, Precision::F32, Precision::Bf16, Precision::F16];

    /// Bytes per real scalar.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Precision::F64 => 8,
            Precision::F32 => 4,
            Precision::Bf16 | Precision::F16 => 2,
        }
    }

    /// The precision in which sums over stored values of this precision are formed: f64 for
    /// f64, f32 for everything else.
    #[must_use]
    pub const fn accumulate(self) -> Precision {
        match self {
            Precision::F64 => Precision::F64,
            _ => Precision::F32,
        }
    }

    /// Whether this is one of the two 16-bit formats.
    #[must_use]
    pub const fn is_half(self) -> bool {
        matches!(self, Precision::Bf16 | Precision::F16)
    }

    /// The name used in configuration files, reports and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F64 => "f64",
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Whether an element is one real scalar or an interleaved (re, im) pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// One scalar per element.
    Real,
    /// Two scalars per element, real part first.
    Complex,
}

impl Domain {
    /// Real scalars per element.
    #[must_use]
    pub const fn scalars(self) -> usize {
        match self {
            Domain::Real => 1,
            Domain::Complex => 2,
        }
    }
}

/// What a tensor stores. The two axes are independent: there is no `ComplexBf16` special case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DType {
    /// Real, or interleaved complex.
    pub domain: Domain,
    /// Storage of each real scalar.
    pub precision: Precision,
}

impl DType {
    /// A real type.
    #[must_use]
    pub const fn real(precision: Precision) -> Self {
        DType { domain: Domain::Real, precision }
    }

    /// An interleaved complex type.
    #[must_use]
    pub const fn complex(precision: Precision) -> Self {
        DType { domain: Domain::Complex, precision }
    }

    /// Bytes per element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.domain.scalars() * self.precision.bytes()
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.domain {
            Domain::Real => f.pad(self.precision.name()),
            Domain::Complex => f.pad(match self.precision {
                Precision::F64 => "cf64",
                Precision::F32 => "cf32",
                Precision::Bf16 => "cbf16",
                Precision::F16 => "cf16",
            }),
        }
    }
}
