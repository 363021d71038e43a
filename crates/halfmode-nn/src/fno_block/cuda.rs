//! The FNO block on a GPU: transforms and dense layers as matrix products, one pass over the rows between them.
//!
//! Nothing of the pre-activation is kept: the backward pass finds it again from the spectrum.

use super::{Activation, BlockInputs, FnoBlock, Stabilizer};
use crate::cuda_rows::RowKernels;
use crate::mode_mix::{mode_mix_bwd, mode_mix_fwd};
use crate::spectral_conv::Scales;
use crate::{Error, Result};
use halfmode_autograd::Cx;
use halfmode_fft::Weights;
use halfmode_precision::DType;
use halfmode_tensor::{Purpose, Tensor};

/// What both passes need.
struct Block<'a> {
    block: &'a FnoBlock,
    cx: &'a Cx,
    x: &'a Tensor,
    spectral: &'a Tensor,
    rows: RowKernels<'a>,
    scales: Scales,
}

impl<'a> Block<'a> {
    fn new(block: &'a FnoBlock, cx: &'a Cx, inputs: &BlockInputs<'a>) -> Result<Self> {
        block.transform.check_field(inputs.x)?;
        let storage = cx.policy.pointwise.storage;
        let params = inputs.dense[0].precision();
        for tensor in inputs.dense {
            if tensor.precision() != params {
                return Err(Error::Tensor(halfmode_tensor::Error::OnGpu));
            }
        }
        let rows = inputs.x.numel() / inputs.channels().max(1);
        Ok(Block {
            block,
            cx,
            x: inputs.x,
            spectral: inputs.spectral,
            rows: RowKernels { device: &cx.device, storage, params, rows },
            scales: Scales::new(&block.transform, &block.transform),
        })
    }

    fn act(&self) -> bool {
        self.block.activation == Activation::Gelu
    }

    fn tanh(&self) -> bool {
        self.block.stabilizer == Stabilizer::Tanh
    }

    /// The input in the storage of fields, which is what it is but for the first block of some policies.
    fn x(&self) -> Result<Tensor> {
        Ok(self.x.cast(self.rows.storage, Purpose::Workspace)?)
    }

    /// The spectrum of the input.
    fn analyse(&self, purpose: Purpose) -> Result<Tensor> {
        let x = self.x()?;
        let x = if self.tanh() { self.rows.tanh(&x)? } else { x };
        let (scales, storage) = (&self.scales.forward.to_modes, self.cx.policy.transform.storage);
        Ok(self.block.transform.to_modes(&x, Weights::Plain, scales, storage, purpose)?)
    }

    /// `F^-1 (R x_hat) + W_skip x`: the pre-activation without its bias.
    fn pre_activation(&self, x: &Tensor, x_hat: &Tensor, skip: &Tensor) -> Result<Tensor> {
        let mix = self.cx.policy.contraction.storage;
        let y_hat = mode_mix_fwd(&self.cx.device, x_hat, self.spectral, mix, Purpose::Workspace)?;
        let scales = &self.scales.forward.to_grid;
        let transform = &self.block.transform;
        let mut z = transform.to_grid(&y_hat, Weights::Doubled, scales, self.rows.storage, Purpose::Workspace)?;
        self.rows.linear(x, skip, &mut z, 1.0)?;
        Ok(z)
    }

    fn field(&self, channels: usize, purpose: Purpose) -> Result<Tensor> {
        let dtype = DType::real(self.rows.storage);
        Ok(self.cx.device.alloc_unwritten([self.rows.rows, channels], dtype, purpose)?)
    }
}

pub(super) fn forward(block: &FnoBlock, cx: &Cx, inputs: &BlockInputs<'_>) -> Result<(Tensor, Option<Tensor>)> {
    let this = Block::new(block, cx, inputs)?;
    let [bias, skip, w1, b1, w2, b2, gate] = inputs.dense;
    let (rows, c, h) = (this.rows, inputs.channels(), inputs.hidden());
    let x_hat = this.analyse(if cx.save { Purpose::Saved } else { Purpose::Workspace })?;
    let x = this.x()?;
    let mut z = this.pre_activation(&x, &x_hat, skip)?;
    let x_hat = cx.save.then_some(x_hat);
    rows.bias_act_assign(&mut z, Some(bias), this.act())?;
    let mut m = this.field(h, Purpose::Workspace)?;
    rows.linear(&z, w1, &mut m, 0.0)?;
    rows.bias_act_assign(&mut m, Some(b1), true)?;
    let mut u = this.field(c, Purpose::Workspace)?;
    rows.linear(&m, w2, &mut u, 0.0)?;
    drop((z, m));
    let dtype = DType::real(rows.storage);
    let mut y = cx.device.alloc_unwritten(inputs.x.shape().clone(), dtype, Purpose::Activation)?;
    rows.gate_act([&u, &x], [b2, gate], this.act(), &mut y)?;
    Ok((y, x_hat))
}

pub(super) fn backward(
    block: &FnoBlock,
    cx: &Cx,
    inputs: &BlockInputs<'_>,
    x_hat: Option<Tensor>,
    grad: Tensor,
) -> Result<Vec<Tensor>> {
    let this = Block::new(block, cx, inputs)?;
    let [bias, skip, w1, b1, w2, b2, gate] = inputs.dense;
    let (rows, c, h) = (this.rows, inputs.channels(), inputs.hidden());
    let x_hat = x_hat.map_or_else(|| this.analyse(Purpose::Workspace), Ok)?;
    let x = this.x()?;

    // The forward pass again, up to where the gradient comes in.
    let z_pre = this.pre_activation(&x, &x_hat, skip)?;
    let z = rows.bias_act(&z_pre, Some(bias), this.act(), Purpose::Workspace)?;
    let mut m_pre = this.field(h, Purpose::Workspace)?;
    rows.linear(&z, w1, &mut m_pre, 0.0)?;
    let m = rows.bias_act(&m_pre, Some(b1), true, Purpose::Workspace)?;
    let mut u = this.field(c, Purpose::Workspace)?;
    rows.linear(&m, w2, &mut u, 0.0)?;

    let fits = grad.precision() == rows.storage;
    let mut g = match grad {
        grad if fits && grad.is_unshared() => grad,
        grad if fits => grad.copy(Purpose::Activation)?,
        grad => grad.cast(rows.storage, Purpose::Activation)?,
    };
    let dtype = DType::real(rows.storage);
    let mut gx = cx.device.alloc_unwritten(inputs.x.shape().clone(), dtype, Purpose::Activation)?;
    let [g_b2, g_gate] = rows.gate_act_backward([&u, &x], [b2, gate], this.act(), [&mut g, &mut gx])?;
    drop(u);
    let g_w2 = rows.linear_grad_w(&g, &m, w2.shape())?;
    drop(m);
    let mut gm = this.field(h, Purpose::Workspace)?;
    rows.linear_grad_x(&g, w2, &mut gm, 0.0)?;
    let g_b1 = rows.bias_act_backward(&m_pre, b1, &mut gm, true)?;
    drop(m_pre);
    let g_w1 = rows.linear_grad_w(&gm, &z, w1.shape())?;
    drop(z);
    // The gradient of z takes the place of that of u.
    rows.linear_grad_x(&gm, w1, &mut g, 0.0)?;
    drop(gm);
    let g_bias = rows.bias_act_backward(&z_pre, bias, &mut g, this.act())?;
    drop(z_pre);
    let g_skip = rows.linear_grad_w(&g, &x, skip.shape())?;
    rows.linear_grad_x(&g, skip, &mut gx, 1.0)?;

    let (spectral, mix) = (cx.policy.transform.storage, cx.policy.contraction.storage);
    let (transform, scales) = (&block.transform, &this.scales.backward);
    let g = g.reshape(inputs.x.shape().clone())?;
    let g_hat = transform.to_modes(&g, Weights::Doubled, &scales.to_modes, spectral, Purpose::Workspace)?;
    drop(g);
    let (gx_hat, g_spectral) =
        mode_mix_bwd(&cx.device, (&x_hat, inputs.spectral), &g_hat, this.scales.weight_factor, mix)?;
    drop((g_hat, x_hat));
    let gs = transform.to_grid(&gx_hat, Weights::Plain, &scales.to_grid, rows.storage, Purpose::Workspace)?;
    drop(gx_hat);
    rows.add_input_gradient(&gs, &x, &mut gx, this.tanh())?;
    Ok(vec![gx, g_spectral, g_bias, g_skip, g_w1, g_b1, g_w2, g_b2, g_gate])
}
