//! Gates, biases and dense layers on a GPU.

use super::{rows_of, storage};
use crate::Result;
use crate::cuda_rows::{RowKernels, stored};
use halfmode_autograd::Cx;
use halfmode_tensor::{Purpose, Shape, Tensor};

/// The kernels of rows as long as `x` has channels.
fn kernels<'a>(cx: &'a Cx, x: &Tensor, w: &Tensor) -> RowKernels<'a> {
    RowKernels::new(cx, rows_of(x).0, w.precision())
}

pub(super) fn gate(cx: &Cx, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    kernels(cx, x, gate).gate(&stored(cx, x)?, gate, Purpose::Activation)
}

/// Gradients of field and gate.
pub(super) fn gate_backward(cx: &Cx, [g, x]: [&Tensor; 2], gate: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (g, x) = (stored(cx, g)?, stored(cx, x)?);
    let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
    let sums = kernels(cx, &x, gate).gate_backward([&g, &x], gate, &mut gx)?;
    Ok(vec![Some(gx), Some(sums)])
}

pub(super) fn bias(cx: &Cx, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    kernels(cx, x, bias).bias_act(&stored(cx, x)?, Some(bias), false, Purpose::Activation)
}

pub(super) fn bias_gradient(cx: &Cx, g: &Tensor, bias: &Tensor) -> Result<Tensor> {
    kernels(cx, g, bias).column_sums((&stored(cx, g)?.into(), rows_of(g).1), bias.shape())
}

pub(super) fn linear(cx: &Cx, x: &Tensor, w: &Tensor, shape: &Shape) -> Result<Tensor> {
    let mut y = cx.device.alloc_unwritten(shape.clone(), storage(cx), Purpose::Activation)?;
    kernels(cx, x, w).linear(&stored(cx, x)?, w, &mut y, 0.0)?;
    Ok(y)
}

/// Gradients of field and weight.
pub(super) fn linear_backward(cx: &Cx, [g, x]: [&Tensor; 2], w: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (g, x) = (stored(cx, g)?, stored(cx, x)?);
    let rows = kernels(cx, &x, w);
    let gw = rows.linear_grad_w(&g, &x, w.shape())?;
    let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
    rows.linear_grad_x(&g, w, &mut gx, 0.0)?;
    Ok(vec![Some(gx), Some(gw)])
}
