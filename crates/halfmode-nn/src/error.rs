//! What can go wrong in a layer.

use halfmode_tensor::Shape;

/// What can go wrong in a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
    /// A transform failed.
    #[error(transparent)]
    Fft(#[from] halfmode_fft::Error),
    /// An operand has the wrong shape.
    #[error("{op}: expected shape {expected} for `{operand}`, found {found}")]
    Shape {
        /// The layer.
        op: &'static str,
        /// The operand.
        operand: &'static str,
        /// What it needs.
        expected: Shape,
        /// What it got.
        found: Shape,
    },
    /// A kernel is larger than the field with its padding.
    #[error(
        "{op}: nothing is left of a field of {} x {} points under a kernel of {} x {} with padding {} and {}: use a \
         smaller kernel or another padding",
        field[0], field[1], kernel[0], kernel[1], padding[0], padding[1]
    )]
    Kernel {
        /// The layer.
        op: &'static str,
        /// Extents of the kernel.
        kernel: [usize; 2],
        /// Zeros before and after the field along each axis.
        padding: [usize; 2],
        /// Extents of the field.
        field: [usize; 2],
    },
    /// The readable composition of an op failed.
    #[error("in the composed op: {message}")]
    Composed {
        /// What it said.
        message: String,
    },
    /// A parameter was given another number of values than it has.
    #[error("parameter `{name}` has {expected} real scalars, found {found}")]
    Parameter {
        /// Its name.
        name: String,
        /// Scalars it has.
        expected: usize,
        /// Values given.
        found: usize,
    },
}

impl Error {
    /// The error as an op reports it to the tape.
    #[must_use]
    pub fn in_op(self, op: &'static str) -> halfmode_autograd::Error {
        match self {
            Error::Tensor(err) => err.into(),
            other => halfmode_autograd::Error::Op { op, source: Box::new(other) },
        }
    }
}
