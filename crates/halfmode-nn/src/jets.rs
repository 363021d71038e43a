//! First-order jets: a value and its tangents in several directions, stacked on a leading axis.
//!
//! A jet of a tensor `[…, c]` in `m` directions is a tensor `[1 + m, …, c]`: the value, then its derivatives along each
//! direction. Ops that act on the last axis alone and are linear, such as [`Linear`](crate::Linear), take jets as they
//! are; the others have a counterpart here. All are ordinary ops of the tape, so a reverse pass goes through tangents,
//! too: it gives gradients of divergences.
//!
//! With the unit vectors as directions the trace of a Jacobian is exact; with one direction of random signs it is
//! Hutchinson's estimate, whose mean is the trace.
//!
//! Complex operands, jets without channels or with fewer than two axes, and operands of other shapes than the jet's are
//! errors. So is a GPU (`OnGpu`): these ops have no kernels of their own there.

mod ends;
mod maps;
mod tile;

pub use ends::{JetBias, JetConstant, JetDivergence, JetStart, Tangents, random_signs};
pub use maps::{JetProduct, JetSoftplus, JetTanh};
