//! What can go wrong with a tensor.

use crate::{Purpose, Shape};
use halfmode_precision::DType;

/// What can go wrong with a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that should agree do not.
    #[error("{op}: expected shape {expected} for `{operand}`, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The operand that does not fit.
        operand: &'static str,
        /// What the operation needs.
        expected: Shape,
        /// What it got.
        found: Shape,
    },
    /// The number of axes is not what the operation needs.
    #[error("{op}: `{operand}` needs {expected} axes, found shape {found}")]
    Rank {
        /// The operation.
        op: &'static str,
        /// The operand that does not fit.
        operand: &'static str,
        /// How many axes the operation needs.
        expected: usize,
        /// What it got.
        found: Shape,
    },
    /// An index is beyond its axis.
    #[error("{op}: index {index} is out of range for an axis of {n}")]
    Index {
        /// The operation.
        op: &'static str,
        /// What was asked for.
        index: usize,
        /// Extent of the axis.
        n: usize,
    },
    /// The element type is not what the operation needs.
    #[error("{op}: `{operand}` is {found}, expected {expected}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The operand that does not fit.
        operand: &'static str,
        /// What the operation needs, in words.
        expected: &'static str,
        /// What it got.
        found: DType,
    },
    /// The data has another length than the shape says.
    #[error("{n_values} values cannot fill shape {shape}, which holds {expected} scalars")]
    Length {
        /// Values given.
        n_values: usize,
        /// The shape asked for.
        shape: Shape,
        /// Scalars that the shape holds.
        expected: usize,
    },
    /// Values were asked of a tensor that only plans.
    #[error("a tensor on the planning device has no values: run on the CPU to read them")]
    NoValues,
    /// The values are on a GPU, where the CPU's kernels cannot read them.
    #[cfg(feature = "cuda")]
    #[error("this operation has no GPU kernel yet: run it with --device cpu")]
    OnGpu,
    /// The values are not on a GPU.
    #[cfg(feature = "cuda")]
    #[error("a GPU kernel was given values that are not on a GPU")]
    NotOnGpu,
    /// Batches go to a GPU in another order or size than they were sent.
    #[cfg(feature = "cuda")]
    #[error("a feed of batches: {problem}")]
    Feed {
        /// What does not fit.
        problem: &'static str,
    },
    /// The GPU, its driver or its libraries.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] halfmode_cuda::Error),
    /// A shared buffer was to be written.
    #[error("the buffer is shared by {n_owners} tensors and cannot be written in place: copy it first")]
    Shared {
        /// Tensors that share the buffer.
        n_owners: usize,
    },
    /// Two tensors live on different devices.
    #[error("{op}: operands live on different devices")]
    Devices {
        /// The operation.
        op: &'static str,
    },
    /// The byte count of a shape does not fit the machine.
    #[error("shape {shape} of {dtype} overflows the address space")]
    TooLarge {
        /// The shape asked for.
        shape: Shape,
        /// Its element type.
        dtype: DType,
    },
    /// An allocation was refused.
    #[error("out of memory: {bytes} bytes for {purpose} ({shape} {dtype}); {live} bytes are live")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What they were for.
        purpose: Purpose,
        /// The shape asked for.
        shape: Shape,
        /// Its element type.
        dtype: DType,
        /// Bytes that the ledger counts as live.
        live: usize,
    },
    /// The thread pool of a device could not be started.
    #[error("could not start {threads} worker threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}
