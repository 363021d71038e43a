//! One block of a Fourier neural operator as a single op.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_points;

use crate::{Error, composed, fused_block};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_fft::Transform;
use halfmode_tensor::{Device, Shape, Tensor};
use smallvec::smallvec;
use std::sync::Arc;

/// What happens to a block's input before its transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stabilizer {
    /// Nothing.
    None,
    /// tanh, which bounds the field before it is summed over points.
    Tanh,
}

/// The nonlinearity after each half of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU: every block but the last.
    Gelu,
    /// None: the last block.
    None,
}

/// A whole post-activation FNO block, the peer's default:
///
/// `z = act(K(tanh x) + bias + W_skip x)`, `y = act(w_2 gelu(w_1 z + b_1) + b_2 + gate x)`,
/// where `K` is the spectral convolution; the tanh is optional, both skips see the raw input.
///
/// # Shapes
/// - input 0, `x`: `[batch, n_1, …, n_d, c]`, real
/// - inputs 1 to 8: spectral weight `[modes, c, 2 c]`, `bias` `[c]`, `W_skip` `[c, c]`, `w_1` `[h, c]`, `b_1` `[h]`,
///   `w_2` `[c, h]`, `b_2` `[c]`, `gate` `[c]` (extents of 1 are allowed anywhere)
/// - output: the shape of `x`
///
/// # Saved for backward
/// `x` (role `fno_block.x`) and `x_hat` `[batch, (re, im), k_1, …, k_d, c]` (role `fno_block.x_hat`);
/// parameters are shared. Everything between is recomputed from the two.
///
/// # Errors
/// [`Error::Shape`] if channel or mode counts disagree, those of the transform for a wrong grid.
///
/// Source: neuraloperator's `FNOBlocks`, post-activation, without norm.
#[derive(Clone, Debug)]
pub struct FnoBlock {
    /// The planned transform of the block's grid.
    pub transform: Arc<Transform>,
    /// Before the transform.
    pub stabilizer: Stabilizer,
    /// After each half.
    pub activation: Activation,
}

/// Inputs of a block by name.
pub(crate) struct BlockInputs<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) spectral: &'a Tensor,
    /// bias, W_skip, w_1, b_1, w_2, b_2, gate
    pub(crate) dense: [&'a Tensor; 7],
}

/// Number of inputs.
pub(crate) const N_INPUTS: usize = 9;
/// Names of inputs 2 to 8.
const DENSE: [&str; 7] = ["bias", "skip", "w_1", "b_1", "w_2", "b_2", "gate"];

impl<'a> BlockInputs<'a> {
    fn new(inputs: &[&'a Tensor; N_INPUTS]) -> Self {
        let [x, spectral, dense @ ..] = *inputs;
        BlockInputs { x, spectral, dense }
    }

    pub(crate) fn channels(&self) -> usize {
        self.x.shape().last().copied().unwrap_or(0)
    }

    pub(crate) fn hidden(&self) -> usize {
        self.dense[2].shape().first().copied().unwrap_or(0)
    }

    fn check(&self) -> crate::Result<()> {
        let (c, h) = (self.channels(), self.hidden());
        let expected: [&[usize]; 7] = [&[c], &[c, c], &[h, c], &[h], &[c, h], &[c], &[c]];
        for ((operand, tensor), expected) in DENSE.into_iter().zip(self.dense).zip(expected) {
            if tensor.numel() != expected.iter().product::<usize>() || tensor.numel() == 0 {
                let (expected, found) = (Shape::new(expected), tensor.shape().clone());
                return Err(Error::Shape { op: "fno_block", operand, expected, found });
            }
        }
        Ok(())
    }
}

/// The kernels of a block. The default bodies are the readable composition of small ops; a device
/// overrides them with fused ones.
pub(crate) trait FnoBlockKernels {
    /// `(y, x_hat)`
    fn block_forward(
        &self,
        block: &FnoBlock,
        cx: &Cx,
        inputs: &BlockInputs<'_>,
    ) -> crate::Result<(Tensor, Option<Tensor>)> {
        composed::block_forward(block, cx, inputs)
    }

    /// Gradients of all inputs.
    fn block_backward(
        &self,
        block: &FnoBlock,
        cx: &Cx,
        inputs: &BlockInputs<'_>,
        x_hat: Option<Tensor>,
        grad: Tensor,
    ) -> crate::Result<Vec<Tensor>> {
        drop(x_hat);
        composed::block_backward(block, cx, inputs, grad)
    }
}

/// The default bodies, for the test that binds the two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Composed;
impl FnoBlockKernels for Composed {}

impl FnoBlockKernels for Device {
    fn block_forward(
        &self,
        block: &FnoBlock,
        cx: &Cx,
        inputs: &BlockInputs<'_>,
    ) -> crate::Result<(Tensor, Option<Tensor>)> {
        match self.target() {
            halfmode_tensor::Target::Cpu { .. } => fused_block::forward(block, cx, inputs),
            #[cfg(feature = "cuda")]
            halfmode_tensor::Target::Cuda => cuda::forward(block, cx, inputs),
        }
    }

    fn block_backward(
        &self,
        block: &FnoBlock,
        cx: &Cx,
        inputs: &BlockInputs<'_>,
        x_hat: Option<Tensor>,
        grad: Tensor,
    ) -> crate::Result<Vec<Tensor>> {
        match self.target() {
            halfmode_tensor::Target::Cpu { .. } => fused_block::backward(block, cx, inputs, x_hat, grad),
            #[cfg(feature = "cuda")]
            halfmode_tensor::Target::Cuda => cuda::backward(block, cx, inputs, x_hat, grad),
        }
    }
}

impl FnoBlock {
    /// The same block run by the readable composition of small ops: slower, keeps nothing but its
    /// input, and says what the fused kernels must compute.
    #[must_use]
    pub fn composed(self) -> ComposedBlock {
        ComposedBlock(self)
    }

    fn forward_with(
        &self,
        kernels: &dyn FnoBlockKernels,
        cx: &Cx,
        inputs: &[&Tensor],
    ) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let inputs: [&Tensor; N_INPUTS] = self.expect_inputs(inputs)?;
        let named = BlockInputs::new(&inputs);
        let run = || {
            named.check()?;
            kernels.block_forward(self, cx, &named)
        };
        let (y, x_hat) = run().map_err(|err: Error| err.in_op(self.name()))?;
        let mut saved = Saved::new(self.name()).keep(cx, "x", named.x)?;
        if let Some(x_hat) = &x_hat {
            saved = saved.keep(cx, "x_hat", x_hat)?;
        }
        saved = saved.share(cx, "spectral", named.spectral);
        for (role, tensor) in DENSE.into_iter().zip(named.dense) {
            saved = saved.share(cx, role, tensor);
        }
        Ok((smallvec![y], saved))
    }

    fn backward_with(
        &self,
        kernels: &dyn FnoBlockKernels,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let x = saved.take("x")?;
        let x_hat = saved.take("x_hat").ok();
        let spectral = saved.take("spectral")?;
        let dense = DENSE.map(|role| saved.take(role));
        let [bias, skip, w1, b1, w2, b2, gate] = dense;
        let (bias, skip, w1, b1, w2, b2, gate) = (bias?, skip?, w1?, b1?, w2?, b2?, gate?);
        let Some(grad) = grads[0].take() else { return Ok(vec![None; N_INPUTS]) };
        let inputs = BlockInputs { x: &x, spectral: &spectral, dense: [&bias, &skip, &w1, &b1, &w2, &b2, &gate] };
        let grads = kernels.block_backward(self, cx, &inputs, x_hat, grad).map_err(|err| err.in_op(self.name()))?;
        Ok(grads.into_iter().map(Some).collect())
    }
}

impl Op for FnoBlock {
    fn name(&self) -> &'static str {
        "fno_block"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        self.forward_with(&cx.device, cx, inputs)
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        self.backward_with(&cx.device, cx, saved, grads)
    }
}

/// [`FnoBlock`] run by the readable composition of small ops; see [`FnoBlock::composed`].
#[derive(Clone, Debug)]
pub struct ComposedBlock(FnoBlock);

impl Op for ComposedBlock {
    fn name(&self) -> &'static str {
        "fno_block"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        self.0.forward_with(&Composed, cx, inputs)
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        self.0.backward_with(&Composed, cx, saved, grads)
    }
}
