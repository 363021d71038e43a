//! The FNO block on a GPU: transforms and dense layers as matrix products, one pass over the rows between them.
//!
//! Nothing of the pre-activation is kept: the backward pass finds it again from the spectrum.

use super::cuda_points::{Adjoint, Points};
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
            rows: RowKernels::new(cx, rows, params),
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

    /// `F^-1 (R x_hat)`: the spectral part of the pre-activation.
    fn spectral_part(&self, x_hat: &Tensor) -> Result<Tensor> {
        let mix = self.cx.policy.contraction.storage;
        let y_hat = mode_mix_fwd(&self.cx.device, x_hat, self.spectral, mix, Purpose::Workspace)?;
        let scales = &self.scales.forward.to_grid;
        let transform = &self.block.transform;
        Ok(transform.to_grid(&y_hat, Weights::Doubled, scales, self.rows.storage, Purpose::Workspace)?)
    }

    /// The kernels that take a point through all dense layers, where they fit.
    fn points(&self, inputs: &BlockInputs<'_>) -> Option<Points<'a>> {
        Points::new(self.rows, (inputs.channels(), inputs.hidden()), self.act())
    }

    fn field(&self, channels: usize, purpose: Purpose) -> Result<Tensor> {
        let dtype = DType::real(self.rows.storage);
        Ok(self.cx.device.alloc_unwritten([self.rows.rows, channels], dtype, purpose)?)
    }

    /// The adjoint of everything after the inverse transform, layer by layer.
    fn dense_gradients(&self, inputs: &BlockInputs<'_>, x: &Tensor, s: Tensor, grad: Tensor) -> Result<DenseGrads> {
        let [bias, skip, w1, b1, w2, b2, gate] = inputs.dense;
        let (rows, c, h) = (self.rows, inputs.channels(), inputs.hidden());
        // The forward pass again, up to where the gradient comes in.
        let mut z_pre = s;
        rows.linear(x, skip, &mut z_pre, 1.0)?;
        let z = rows.bias_act(&z_pre, Some(bias), self.act(), Purpose::Workspace)?;
        let mut m_pre = self.field(h, Purpose::Workspace)?;
        rows.linear(&z, w1, &mut m_pre, 0.0)?;
        let m = rows.bias_act(&m_pre, Some(b1), true, Purpose::Workspace)?;
        let mut u = self.field(c, Purpose::Workspace)?;
        rows.linear(&m, w2, &mut u, 0.0)?;

        let mut g = grad;
        let dtype = DType::real(rows.storage);
        let mut gx = self.cx.device.alloc_unwritten(inputs.x.shape().clone(), dtype, Purpose::Activation)?;
        let [g_b2, g_gate] = rows.gate_act_backward([&u, x], [b2, gate], self.act(), [&mut g, &mut gx])?;
        drop(u);
        let g_w2 = rows.linear_grad_w(&g, &m, w2.shape())?;
        drop(m);
        let mut gm = self.field(h, Purpose::Workspace)?;
        rows.linear_grad_x(&g, w2, &mut gm, 0.0)?;
        let g_b1 = rows.bias_act_backward(&m_pre, b1, &mut gm, true)?;
        drop(m_pre);
        let g_w1 = rows.linear_grad_w(&gm, &z, w1.shape())?;
        drop(z);
        // The gradient of z takes the place of that of u.
        rows.linear_grad_x(&gm, w1, &mut g, 0.0)?;
        drop(gm);
        let g_bias = rows.bias_act_backward(&z_pre, bias, &mut g, self.act())?;
        drop(z_pre);
        let g_skip = rows.linear_grad_w(&g, x, skip.shape())?;
        rows.linear_grad_x(&g, skip, &mut gx, 1.0)?;
        let params = [g_bias, g_skip, g_w1, g_b1, g_w2, g_b2, g_gate];
        Ok(DenseGrads { gx, gz: g, params })
    }
}

/// Gradients of the dense parameters, of the input through the skips, and of the pre-activation.
struct DenseGrads {
    gx: Tensor,
    gz: Tensor,
    params: [Tensor; 7],
}

pub(super) fn forward(block: &FnoBlock, cx: &Cx, inputs: &BlockInputs<'_>) -> Result<(Tensor, Option<Tensor>)> {
    let this = Block::new(block, cx, inputs)?;
    let [bias, skip, w1, b1, w2, b2, gate] = inputs.dense;
    let (rows, c, h) = (this.rows, inputs.channels(), inputs.hidden());
    let x_hat = this.analyse(if cx.save { Purpose::Saved } else { Purpose::Workspace })?;
    let x = this.x()?;
    let mut z = this.spectral_part(&x_hat)?;
    let x_hat = cx.save.then_some(x_hat);
    let dtype = DType::real(rows.storage);
    let y = || cx.device.alloc_unwritten(inputs.x.shape().clone(), dtype, Purpose::Activation);
    if let Some(points) = this.points(inputs) {
        let mut y = y()?;
        points.forward(&z, &x, inputs.dense, &mut y)?;
        return Ok((y, x_hat));
    }
    rows.linear(&x, skip, &mut z, 1.0)?;
    rows.bias_act_assign(&mut z, Some(bias), this.act())?;
    let mut m = this.field(h, Purpose::Workspace)?;
    rows.linear(&z, w1, &mut m, 0.0)?;
    rows.bias_act_assign(&mut m, Some(b1), true)?;
    let mut u = this.field(c, Purpose::Workspace)?;
    rows.linear(&m, w2, &mut u, 0.0)?;
    drop((z, m));
    let mut y = y()?;
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
    let [_, skip, w1, _, w2, _, _] = inputs.dense;
    let rows = this.rows;
    let x_hat = x_hat.map_or_else(|| this.analyse(Purpose::Workspace), Ok)?;
    let x = this.x()?;

    let fits = grad.precision() == rows.storage;
    let grad = match grad {
        grad if fits && grad.is_unshared() => grad,
        grad if fits => grad.copy(Purpose::Activation)?,
        grad => grad.cast(rows.storage, Purpose::Activation)?,
    };
    let s = this.spectral_part(&x_hat)?;
    let dense = match this.points(inputs) {
        Some(points) => {
            let adjoint = points.backward(s, &x, grad, inputs.dense)?;
            let g_w2 = rows.linear_grad_w(&adjoint.g, &adjoint.m, w2.shape())?;
            let g_w1 = rows.linear_grad_w(&adjoint.gm, &adjoint.z, w1.shape())?;
            let g_skip = rows.linear_grad_w(&adjoint.gz, &x, skip.shape())?;
            let Adjoint { gz, gx, g_bias, g_b1, g_b2, g_gate, .. } = adjoint;
            DenseGrads { gx, gz, params: [g_bias, g_skip, g_w1, g_b1, g_w2, g_b2, g_gate] }
        }
        None => this.dense_gradients(inputs, &x, s, grad)?,
    };
    let DenseGrads { mut gx, gz: g, params } = dense;

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
    Ok([gx, g_spectral].into_iter().chain(params).collect())
}
