//! What can go wrong with a transform.

use halfmode_tensor::Shape;

/// What can go wrong with a transform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
    /// The grid has an unsupported number of axes, or another number than the modes.
    #[error("a transform has 1 to 3 axes: the grid {grid} has {n_grid}, the modes {modes} have {n_modes}")]
    Axes {
        /// The grid asked for.
        grid: Shape,
        /// Its number of axes.
        n_grid: usize,
        /// The modes asked for.
        modes: Shape,
        /// Their number of axes.
        n_modes: usize,
    },
    /// An axis has no points or no modes.
    #[error("axis {axis} has {n} points and {k} modes; both must be at least 1")]
    Empty {
        /// The axis.
        axis: usize,
        /// Its points.
        n: usize,
        /// Its modes.
        k: usize,
    },
    /// More modes are to be kept than the axis resolves.
    #[error("axis {axis}: {k} modes asked for, {n} points resolve {limit}")]
    Modes {
        /// The axis.
        axis: usize,
        /// Its points.
        n: usize,
        /// The modes asked for.
        k: usize,
        /// The most it resolves.
        limit: usize,
    },
    /// A field or spectrum does not have the planned shape.
    #[error("{operand}: expected shape {expected}, found {found}")]
    Shape {
        /// Field or spectrum.
        operand: &'static str,
        /// The planned shape.
        expected: Shape,
        /// What was given.
        found: Shape,
    },
    /// A field is complex where the plan is real, or the other way round.
    #[error("{operand}: the transform was planned for {expected} data")]
    Domain {
        /// Field or spectrum.
        operand: &'static str,
        /// Real or complex.
        expected: &'static str,
    },
}
