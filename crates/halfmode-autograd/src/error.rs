//! What can go wrong on the tape.

/// What can go wrong on the tape.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
    /// An op of another crate failed; the source says how.
    #[error("{op}: {source}")]
    Op {
        /// The op.
        op: &'static str,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A variable of one tape was given to another.
    #[error("{op}: input {input} was recorded on another tape")]
    ForeignVar {
        /// The op it was given to.
        op: &'static str,
        /// Its position among the inputs.
        input: usize,
    },
    /// Backward was asked of a value that depends on no tracked leaf.
    #[error("nothing to differentiate: the loss depends on no tracked leaf")]
    Untracked,
    /// The loss is not a single number.
    #[error("backward starts from one number, found shape {found}")]
    NotScalar {
        /// The shape of what was given.
        found: halfmode_tensor::Shape,
    },
    /// A role that backward needs was not saved by forward.
    #[error("{op}: forward saved no `{role}`")]
    MissingRole {
        /// The op.
        op: &'static str,
        /// What it looked for.
        role: &'static str,
    },
    /// An op got another number of inputs than it takes.
    #[error("{op}: takes {expected} inputs, found {found}")]
    Arity {
        /// The op.
        op: &'static str,
        /// How many it takes.
        expected: usize,
        /// How many it got.
        found: usize,
    },
}
