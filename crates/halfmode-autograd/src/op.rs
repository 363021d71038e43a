//! The contract of a differentiable block.

use crate::{Error, Result, Saved};
use halfmode_precision::PrecisionPolicy;
use halfmode_tensor::{Device, Tensor};
use smallvec::SmallVec;
use std::sync::Arc;

/// Where and in which formats ops run.
#[derive(Clone, Debug)]
pub struct Cx {
    /// The device of all tensors.
    pub device: Device,
    /// The formats of each kind of op.
    pub policy: Arc<PrecisionPolicy>,
    /// Whether a backward pass will follow. Without one, ops keep nothing.
    pub save: bool,
}

impl Cx {
    /// A context for a forward and backward pass.
    #[must_use]
    pub fn new(device: &Device, policy: &Arc<PrecisionPolicy>) -> Self {
        Cx { device: device.clone(), policy: Arc::clone(policy), save: true }
    }

    /// The same device and formats for inference: nothing is saved.
    #[must_use]
    pub fn inference(device: &Device, policy: &Arc<PrecisionPolicy>) -> Self {
        Cx { save: false, ..Cx::new(device, policy) }
    }
}

/// What an op returns: one tensor as a rule, several for kernels that write more than one thing.
pub type Outputs = SmallVec<[Tensor; 2]>;

/// A differentiable block: any number of inputs, one or more outputs, no tape inside.
pub trait Op: std::fmt::Debug {
    /// The name in reports, policies and errors.
    fn name(&self) -> &'static str;

    /// Computes the outputs and what backward will need; when `cx.save` is false the latter is
    /// dropped unread, so nothing should be computed for it.
    ///
    /// # Errors
    /// Whatever the op cannot do with these inputs.
    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)>;

    /// The vector-Jacobian product. `grads[i]` is the gradient of output `i` (`None`: zero) and
    /// may be taken; `needs[i]` tells whether input `i` wants a gradient. Returns one entry per
    /// input.
    ///
    /// # Errors
    /// Whatever the op cannot do with these gradients.
    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;

    /// The inputs as an array of the length that the op takes.
    ///
    /// # Errors
    /// [`Error::Arity`] if there are more or fewer.
    fn expect_inputs<'a, const N: usize>(&self, inputs: &[&'a Tensor]) -> Result<[&'a Tensor; N]>
    where
        Self: Sized,
    {
        inputs.try_into().map_err(|_| Error::Arity { op: self.name(), expected: N, found: inputs.len() })
    }
}
