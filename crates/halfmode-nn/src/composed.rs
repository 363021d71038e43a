//! The readable composition of an FNO block: the reference of the fused kernels.

use crate::fno_block::{Activation, BlockInputs, FnoBlock, Stabilizer};
use crate::pointwise::{Add, ChannelBias, ChannelGate, Gelu, Linear, Tanh};
use crate::spectral_conv::SpectralConv;
use crate::{Error, Result};
use halfmode_autograd::{Cx, Tape, Var};
use halfmode_tensor::Tensor;
use std::sync::Arc;

/// The block as a user of small ops would write it.
fn compose(
    block: &FnoBlock,
    tape: &mut Tape,
    x: &Var,
    spectral: &Var,
    dense: &[Var],
) -> halfmode_autograd::Result<Var> {
    let [bias, skip, w1, b1, w2, b2, gate] = dense else {
        return Err(halfmode_autograd::Error::Arity { op: "fno_block", expected: 7, found: dense.len() });
    };
    let act = |tape: &mut Tape, v: Var| match block.activation {
        Activation::Gelu => tape.apply(Gelu, &[&v]),
        Activation::None => Ok(v),
    };
    let stabilised = match block.stabilizer {
        Stabilizer::Tanh => tape.apply(Tanh, &[x])?,
        Stabilizer::None => x.clone(),
    };
    let y = tape.apply(SpectralConv::new(Arc::clone(&block.transform)), &[&stabilised, spectral])?;
    let y = tape.apply(ChannelBias, &[&y, bias])?;
    let s1 = tape.apply(Linear, &[x, skip])?;
    let z = tape.apply(Add, &[&y, &s1])?;
    let z = act(tape, z)?;
    let h = tape.apply(Linear, &[&z, w1])?;
    let h = tape.apply(ChannelBias, &[&h, b1])?;
    let h = tape.apply(Gelu, &[&h])?;
    let u = tape.apply(Linear, &[&h, w2])?;
    let u = tape.apply(ChannelBias, &[&u, b2])?;
    let s2 = tape.apply(ChannelGate, &[x, gate])?;
    let u = tape.apply(Add, &[&u, &s2])?;
    act(tape, u)
}

fn lift(err: halfmode_autograd::Error) -> Error {
    match err {
        halfmode_autograd::Error::Tensor(err) => Error::Tensor(err),
        other => Error::Composed { message: other.to_string() },
    }
}

pub(crate) fn block_forward(block: &FnoBlock, cx: &Cx, inputs: &BlockInputs<'_>) -> Result<(Tensor, Option<Tensor>)> {
    let mut tape = Tape::new(Cx { save: false, ..cx.clone() });
    let [x, spectral] = [inputs.x, inputs.spectral].map(|it| tape.constant(it.clone()));
    let dense = inputs.dense.map(|it| tape.constant(it.clone()));
    let y = compose(block, &mut tape, &x, &spectral, &dense).map_err(lift)?;
    Ok((y.into_value(), None))
}

pub(crate) fn block_backward(block: &FnoBlock, cx: &Cx, inputs: &BlockInputs<'_>, grad: Tensor) -> Result<Vec<Tensor>> {
    let mut tape = Tape::new(Cx { save: true, ..cx.clone() });
    let [x, spectral] = [inputs.x, inputs.spectral].map(|it| tape.leaf(it.clone()));
    let dense = inputs.dense.map(|it| tape.leaf(it.clone()));
    let y = compose(block, &mut tape, &x, &spectral, &dense).map_err(lift)?;
    let mut grads: Vec<Option<Tensor>> = vec![None; 2 + dense.len()];
    let keep = &mut |id: halfmode_autograd::LeafId, grad| {
        grads[id.0] = Some(grad);
        Ok(())
    };
    tape.backward_from(vec![(y, grad)], keep).map_err(lift)?;
    let missing = || Error::Composed { message: "an input got no gradient".to_owned() };
    grads.into_iter().map(|grad| grad.ok_or_else(missing)).collect()
}
