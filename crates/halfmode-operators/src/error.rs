//! What can go wrong with an operator.

use halfmode_tensor::Shape;

/// What can go wrong with an operator.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the configuration is out of range.
    #[error("model.{key} = {value}: {why}")]
    Config {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        why: &'static str,
    },
    /// An input does not have the model's number of axes or channels.
    #[error("input {found} does not fit: the model takes [batch, {in_channels}, {n_axes} spatial axes]")]
    Input {
        /// The input's shape.
        found: Shape,
        /// Channels that the model takes.
        in_channels: usize,
        /// Spatial axes that the model takes.
        n_axes: usize,
    },
    /// The grid resolves fewer modes than the model keeps.
    #[error(
        "a grid of {n} points on spatial axis {axis} resolves {resolved} modes, the model keeps {kept}: use a finer grid or fewer n_modes"
    )]
    Grid {
        /// The spatial axis.
        axis: usize,
        /// Its points.
        n: usize,
        /// What it resolves.
        resolved: usize,
        /// What the model keeps.
        kept: usize,
    },
    /// A transform could not be planned.
    #[error(transparent)]
    Fft(#[from] halfmode_fft::Error),
}

impl Error {
    pub(crate) fn in_op(self) -> halfmode_autograd::Error {
        halfmode_autograd::Error::Op { op: "fno", source: Box::new(self) }
    }
}
