//! Looking at the tensors that pass by while a tape runs.

use halfmode_tensor::Tensor;
use std::fmt;

/// What a tensor is to the op that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Output of this index.
    Output(usize),
    /// Kept for backward under this name.
    Saved(&'static str),
    /// The gradient of the input of this index.
    Gradient(usize),
}

/// A tensor that passes by.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// Which call of an op on this tape, counted from 0; forward and backward of one call share it.
    pub call: usize,
    /// The op's name.
    pub op: &'static str,
    /// What the tensor is to the op.
    pub role: Role,
    /// The tensor.
    pub tensor: &'a Tensor,
}

/// Whoever looks.
pub(crate) struct Watcher(pub(crate) Box<dyn FnMut(Sight<'_>)>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}
