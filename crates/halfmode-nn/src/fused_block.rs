//! The FNO block on the CPU: one pass over the field per stage, everything between in tiles that
//! stay in cache.
//!
//! Forward: rows to half-transformed rows (tanh on the way), columns, mode mix, columns back, then
//! one pass that finishes the inverse rows, adds skip and bias, and runs the channel MLP with its
//! gate. Backward: the last pass again from the saved spectrum, its adjoint, and the same stages in
//! the other direction. The gradient of the input overwrites the gradient of the output.

use crate::Result;
use crate::fno_block::{Activation, BlockInputs, FnoBlock, Stabilizer};
use crate::mlp::widen_weights;
use crate::mode_mix::{mode_mix_bwd, mode_mix_fwd};
use crate::partial::{Partial, part_ranges, split_sums};
use crate::rows::{
    add, add_bias, add_column_sums, add_gated, add_tanh_grad, gate_grads, linear, linear_grad_w, linear_grad_x,
    scale_by,
};
use crate::spectral_conv::Scales;
use halfmode_autograd::Cx;
use halfmode_fft::{Axis, AxisReal, Weights};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Real, Rows, RowsMut, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

/// Points that a tile of lines aims at.
const TILE_POINTS: usize = 128;

/// Sizes of one call.
struct Dims {
    /// Channels and hidden channels of the MLP.
    c: usize,
    h: usize,
    /// Lines along the last axis, points of a line, mode rows of a half-transformed line.
    lines: usize,
    n: usize,
    k2: usize,
    /// Lines per tile.
    group: usize,
    act: bool,
    tanh: bool,
    axis_scratch: usize,
    accumulate: Precision,
}

impl Dims {
    fn new(block: &FnoBlock, inputs: &BlockInputs<'_>) -> Result<Self> {
        let (batch, c) = block.transform.check_field(inputs.x)?;
        let grid = &block.transform.config().grid;
        let axis = last_axis(block);
        let n = axis.n();
        Ok(Dims {
            c,
            h: inputs.hidden(),
            lines: batch * grid[..grid.len() - 1].iter().product::<usize>(),
            n,
            k2: axis.mode_rows(),
            group: (TILE_POINTS / n).max(1),
            act: block.activation == Activation::Gelu,
            tanh: block.stabilizer == Stabilizer::Tanh,
            axis_scratch: axis.scratch_len(c),
            // The tiles hold rows of the transform beside dense layers, and its tables are of this type alone.
            accumulate: block.transform.config().accumulate,
        })
    }

    /// Scalars of a line of the field, and of a half-transformed line.
    fn line(&self) -> usize {
        self.n * self.c
    }

    fn half_line(&self) -> usize {
        self.k2 * self.c
    }

    /// Scalars of a tile with `channels` channels.
    fn tile(&self, channels: usize) -> usize {
        self.group * self.n * channels
    }
}

fn last_axis(block: &FnoBlock) -> &Axis {
    let axes = block.transform.axes();
    &axes[axes.len() - 1]
}

/// The dense parameters as accumulators.
struct Dense<'a, R> {
    bias: &'a [R],
    skip: &'a [R],
    w1: &'a [R],
    b1: &'a [R],
    w2: &'a [R],
    b2: &'a [R],
    gate: &'a [R],
}

impl<'a, R: Real> Dense<'a, R> {
    fn new(wide: &'a [Tensor]) -> Result<Self> {
        let slice = |idx: usize| -> Result<&'a [R]> { Ok(R::direct(wide[idx].view()?).unwrap_or_default()) };
        Ok(Dense {
            bias: slice(0)?,
            skip: slice(1)?,
            w1: slice(2)?,
            b1: slice(3)?,
            w2: slice(4)?,
            b2: slice(5)?,
            gate: slice(6)?,
        })
    }
}

/// One axis stage of a line with its scale.
struct RowStage<'a> {
    axis: &'a Axis,
    weights: Weights,
    scale: f64,
}

impl RowStage<'_> {
    /// A line of the field, as stored, to its half-transformed line.
    fn to_modes<R: AxisReal>(&self, line: View<'_>, modes: ViewMut<'_>, channels: usize, scratch: &mut [R]) {
        let (line, mut modes) = (Rows { view: line, stride: channels }, RowsMut::Strided(modes, channels));
        self.axis.to_modes(line, &mut modes, channels, (self.weights, self.scale), scratch);
    }

    /// A half-transformed line, as stored, to a line of the field.
    fn to_grid<R: AxisReal>(&self, modes: View<'_>, line: &mut [R], channels: usize, scratch: &mut [R]) {
        let modes = Rows { view: modes, stride: channels };
        let mut line = RowsMut::Strided(R::view_mut(line), channels);
        self.axis.to_grid(modes, &mut line, channels, (self.weights, self.scale), scratch);
    }
}

fn last(scales: &[f64]) -> f64 {
    scales.last().copied().unwrap_or(1.0)
}

pub(crate) fn forward(block: &FnoBlock, cx: &Cx, inputs: &BlockInputs<'_>) -> Result<(Tensor, Option<Tensor>)> {
    let dims = Dims::new(block, inputs)?;
    let scales = Scales::new(&block.transform, &block.transform);
    let (spectral, mix) = (cx.policy.transform.storage, cx.policy.contraction.storage);
    let t = analyse(block, cx, inputs.x, &dims, last(&scales.forward.to_modes))?;
    let purpose = if cx.save { Purpose::Saved } else { Purpose::Workspace };
    let x_hat = block.transform.columns_to_modes(t, &scales.forward.to_modes, spectral, purpose)?;
    let y_hat = mode_mix_fwd(&cx.device, &x_hat, inputs.spectral, mix, Purpose::Workspace)?;
    let x_hat = cx.save.then_some(x_hat);
    let z = block.transform.columns_to_grid(&y_hat, &scales.forward.to_grid, spectral)?;
    drop(y_hat);

    let mut y = cx.device.alloc_unwritten(
        inputs.x.shape().clone(),
        DType::real(cx.policy.pointwise.storage),
        Purpose::Activation,
    )?;
    let scratch_len = 3 * dims.tile(dims.c) + dims.tile(dims.h) + dims.axis_scratch;
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    let wide = widen_weights(dims.accumulate, &inputs.dense)?;
    if cx.device.launches() {
        let (x_view, z_view) = (inputs.x.view()?, z.view()?);
        let rows = RowStage { axis: last_axis(block), weights: Weights::Doubled, scale: last(&scales.forward.to_grid) };
        let tasks = y.view_mut()?.chunks(dims.group * dims.line());
        with_real!(dims.accumulate, R => {
            let w = Dense::<R>::new(&wide)?;
            cx.device.run(|| tasks.into_par_iter().enumerate().for_each(|(idx, mut out)| {
                scratch.with::<R, _>(|scratch| {
                    let first = idx * dims.group;
                    finish_rows(&dims, &rows, &w, (x_view, z_view), first, &mut out, scratch);
                });
            }));
        });
    }
    Ok((y, x_hat))
}

/// Half-transformed rows of `tanh x`, or of `x`.
fn analyse(block: &FnoBlock, cx: &Cx, x: &Tensor, dims: &Dims, scale: f64) -> Result<Tensor> {
    let batch = x.shape()[0];
    let shape = block.transform.half_transformed_shape(batch, dims.c);
    let mut t = cx.device.alloc_unwritten(shape, DType::real(cx.policy.transform.storage), Purpose::Workspace)?;
    let scratch = cx.device.scratch(dims.line() + dims.axis_scratch, dims.accumulate.bytes());
    if cx.device.launches() {
        let x_view = x.view()?;
        let rows = RowStage { axis: last_axis(block), weights: Weights::Plain, scale };
        let tasks = t.view_mut()?.chunks(dims.half_line());
        let tanh = dims.tanh;
        cx.device.run(|| {
            with_real!(dims.accumulate, R => tasks.into_par_iter().enumerate().for_each(|(idx, out)| {
                scratch.with::<R, _>(|scratch| {
                    let (line, scratch) = scratch.split_at_mut(dims.line());
                    let mut x = x_view.slice(idx * dims.line()..(idx + 1) * dims.line());
                    if tanh {
                        x.widen(line);
                        <R as Real>::tanh(line);
                        x = R::view(line);
                    }
                    rows.to_modes(x, out, dims.c, scratch);
                });
            }));
        });
    }
    Ok(t)
}

/// `z = F_rows^-1 Z + bias + W_skip x` for a tile of lines.
#[allow(clippy::too_many_arguments, reason = "one kernel with many operands")]
fn pre_activation<R: AxisReal>(
    dims: &Dims,
    rows: &RowStage<'_>,
    w: &Dense<'_, R>,
    z_view: View<'_>,
    (first, n_lines): (usize, usize),
    x: &[R],
    z: &mut [R],
    scratch: &mut [R],
) {
    for (idx, line) in z.chunks_exact_mut(dims.line()).enumerate().take(n_lines) {
        let start = (first + idx) * dims.half_line();
        rows.to_grid(z_view.slice(start..start + dims.half_line()), line, dims.c, scratch);
    }
    linear(x, w.skip, z, (dims.c, dims.c), R::ONE);
    add_bias(z, w.bias);
}

/// The last pass of the forward block over a tile of lines.
fn finish_rows<R: AxisReal>(
    dims: &Dims,
    rows: &RowStage<'_>,
    w: &Dense<'_, R>,
    (x_view, z_view): (View<'_>, View<'_>),
    first: usize,
    out: &mut ViewMut<'_>,
    scratch: &mut [R],
) {
    let len = out.len();
    let n_lines = len / dims.line();
    let hidden_len = n_lines * dims.n * dims.h;
    let (x, scratch) = scratch.split_at_mut(dims.tile(dims.c));
    let (z, scratch) = scratch.split_at_mut(dims.tile(dims.c));
    let (u, scratch) = scratch.split_at_mut(dims.tile(dims.c));
    let (m, scratch) = scratch.split_at_mut(dims.tile(dims.h));
    let (z, u, m) = (&mut z[..len], &mut u[..len], &mut m[..hidden_len]);
    let x = x_view.slice(first * dims.line()..first * dims.line() + len).widened(x);
    pre_activation(dims, rows, w, z_view, (first, n_lines), x, z, scratch);
    if dims.act {
        R::gelu(z);
    }
    linear(z, w.w1, m, (dims.c, dims.h), R::ZERO);
    add_bias(m, w.b1);
    R::gelu(m);
    out.fill(u, |u| {
        linear(m, w.w2, u, (dims.h, dims.c), R::ZERO);
        add_bias(u, w.b2);
        add_gated(u, w.gate, x);
        if dims.act {
            R::gelu(u);
        }
    });
}

pub(crate) fn backward(
    block: &FnoBlock,
    cx: &Cx,
    inputs: &BlockInputs<'_>,
    x_hat: Option<Tensor>,
    grad: Tensor,
) -> Result<Vec<Tensor>> {
    let dims = Dims::new(block, inputs)?;
    let scales = Scales::new(&block.transform, &block.transform);
    let (spectral, mix) = (cx.policy.transform.storage, cx.policy.contraction.storage);
    let x_hat = match x_hat {
        Some(x_hat) => x_hat,
        None => {
            let t = analyse(block, cx, inputs.x, &dims, last(&scales.forward.to_modes))?;
            block.transform.columns_to_modes(t, &scales.forward.to_modes, spectral, Purpose::Workspace)?
        }
    };
    let y_hat = mode_mix_fwd(&cx.device, &x_hat, inputs.spectral, mix, Purpose::Workspace)?;
    let z = block.transform.columns_to_grid(&y_hat, &scales.forward.to_grid, spectral)?;
    drop(y_hat);

    // The gradient of the input takes the place of the gradient of the output.
    let mut gx = if grad.is_unshared() { grad } else { grad.copy(Purpose::Activation)? };
    let half_shape = block.transform.half_transformed_shape(inputs.x.shape()[0], dims.c);
    let mut gz = cx.device.alloc_unwritten(half_shape, DType::real(spectral), Purpose::Workspace)?;
    let dense_grads = row_gradients(block, cx, inputs, &dims, &scales, (&z, &mut gx, &mut gz))?;
    drop(z);

    let g_hat = block.transform.columns_to_modes(gz, &scales.backward.to_modes, spectral, Purpose::Workspace)?;
    let (gx_hat, g_spectral) = mode_mix_bwd(&cx.device, (&x_hat, inputs.spectral), &g_hat, scales.weight_factor, mix)?;
    drop((g_hat, x_hat));
    let gt = block.transform.columns_to_grid(&gx_hat, &scales.backward.to_grid, spectral)?;
    drop(gx_hat);
    add_analysis_grad(block, cx, inputs.x, &dims, last(&scales.backward.to_grid), &gt, &mut gx)?;
    Ok([gx, g_spectral].into_iter().chain(dense_grads).collect())
}

/// The adjoint of the last forward pass: reads the output's gradient from `gx` and leaves the
/// gradient through the skips there; writes the half-transformed gradient of the spectral branch to
/// `gz`; returns the gradients of the dense parameters.
fn row_gradients(
    block: &FnoBlock,
    cx: &Cx,
    inputs: &BlockInputs<'_>,
    dims: &Dims,
    scales: &Scales,
    (z, gx, gz): (&Tensor, &mut Tensor, &mut Tensor),
) -> Result<Vec<Tensor>> {
    let (c, h) = (dims.c, dims.h);
    let lens = [c, c * c, h * c, h, c * h, c, c];
    let parts = part_ranges(dims.lines, dims.group);
    let mut partial = Partial::new(&cx.device, parts.len(), dims.accumulate, &lens)?;
    let scratch_len = 6 * dims.tile(c) + 3 * dims.tile(h) + dims.axis_scratch;
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    let wide = widen_weights(dims.accumulate, &inputs.dense)?;
    if cx.device.launches() {
        let (x_view, z_view) = (inputs.x.view()?, z.view()?);
        let axis = last_axis(block);
        let synthesis = RowStage { axis, weights: Weights::Doubled, scale: last(&scales.forward.to_grid) };
        let adjoint = RowStage { axis, weights: Weights::Doubled, scale: last(&scales.backward.to_modes) };
        let per_part = parts.first().map_or(1, ExactSizeIterator::len);
        let gx_parts = gx.view_mut()?.chunks(per_part * dims.line());
        let gz_parts = gz.view_mut()?.chunks(per_part * dims.half_line());
        let tasks: Vec<_> = parts.iter().zip(gx_parts).zip(gz_parts).zip(partial.parts()?).collect();
        with_real!(dims.accumulate, R => {
            let w = Dense::<R>::new(&wide)?;
            cx.device.run(|| tasks.into_par_iter().for_each(|(((range, mut gx), mut gz), mut sums)| {
                scratch.with::<R, _>(|scratch| {
                    let mut sums = split_sums::<R>(&mut sums, &lens);
                    for first in range.clone().step_by(dims.group) {
                        let n_lines = dims.group.min(range.end - first);
                        let local = first - range.start;
                        let mut gx = gx.slice_mut(local * dims.line()..(local + n_lines) * dims.line());
                        let mut gz = gz.slice_mut(local * dims.half_line()..(local + n_lines) * dims.half_line());
                        let out = (&mut gx, &mut gz);
                        row_gradient_tile(dims, (&synthesis, &adjoint), &w, (x_view, z_view), first, out, &mut sums, scratch);
                    }
                });
            }));
        });
    }
    let shapes: Vec<&[usize]> = inputs.dense.iter().map(|w| &w.shape()[..]).collect();
    with_real!(dims.accumulate, R => partial.finish::<R>(&cx.device, &shapes))
}

#[allow(clippy::too_many_arguments, reason = "one kernel with many operands")]
fn row_gradient_tile<R: AxisReal>(
    dims: &Dims,
    (synthesis, adjoint): (&RowStage<'_>, &RowStage<'_>),
    w: &Dense<'_, R>,
    (x_view, z_view): (View<'_>, View<'_>),
    first: usize,
    (gx_out, gz_out): (&mut ViewMut<'_>, &mut ViewMut<'_>),
    sums: &mut [&mut [R]],
    scratch: &mut [R],
) {
    let [g_bias, g_skip, g_w1, g_b1, g_w2, g_b2, g_gate] = sums else { return };
    let (c, h) = (dims.c, dims.h);
    let len = gx_out.len();
    let n_lines = len / dims.line();
    let hidden_len = n_lines * dims.n * h;
    let (x, scratch) = scratch.split_at_mut(dims.tile(c));
    let (z, scratch) = scratch.split_at_mut(dims.tile(c));
    let (z_slope, scratch) = scratch.split_at_mut(dims.tile(c));
    let (u, scratch) = scratch.split_at_mut(dims.tile(c));
    let (g, scratch) = scratch.split_at_mut(dims.tile(c));
    let (gx, scratch) = scratch.split_at_mut(dims.tile(c));
    let (m, scratch) = scratch.split_at_mut(dims.tile(h));
    let (m_slope, scratch) = scratch.split_at_mut(dims.tile(h));
    let (gm, scratch) = scratch.split_at_mut(dims.tile(h));
    let (z, z_slope, u, g, gx) = (&mut z[..len], &mut z_slope[..len], &mut u[..len], &mut g[..len], &mut gx[..len]);
    let (m, m_slope, gm) = (&mut m[..hidden_len], &mut m_slope[..hidden_len], &mut gm[..hidden_len]);

    let x = x_view.slice(first * dims.line()..first * dims.line() + len).widened(x);
    pre_activation(dims, synthesis, w, z_view, (first, n_lines), x, z, scratch);
    if dims.act {
        R::gelu_both(z, z_slope);
    }
    linear(z, w.w1, m, (c, h), R::ZERO);
    add_bias(m, w.b1);
    R::gelu_both(m, m_slope);

    if dims.act {
        linear(m, w.w2, u, (h, c), R::ZERO);
        add_bias(u, w.b2);
        add_gated(u, w.gate, x);
        R::gelu_both(u, g);
        match R::direct(gx_out.as_view()) {
            Some(grad) => scale_by(g, grad),
            None => {
                gx_out.as_view().widen(u);
                scale_by(g, u);
            }
        }
    } else {
        gx_out.as_view().widen(g);
    }
    gx_out.fill(gx, |gx| {
        gate_grads(g, w.gate, x, gx, g_gate);
        linear_grad_w(g, m, g_w2, (h, c));
        add_column_sums(g, g_b2);
        linear_grad_x(g, w.w2, gm, (h, c), R::ZERO);
        scale_by(gm, m_slope);
        linear_grad_w(gm, z, g_w1, (c, h));
        add_column_sums(gm, g_b1);
        linear_grad_x(gm, w.w1, g, (c, h), R::ZERO);
        if dims.act {
            scale_by(g, z_slope);
        }
        add_column_sums(g, g_bias);
        linear_grad_w(g, x, g_skip, (c, c));
        linear_grad_x(g, w.skip, gx, (c, c), R::ONE);
    });
    for (idx, line) in g.chunks_exact(dims.line()).enumerate() {
        let modes = gz_out.slice_mut(idx * dims.half_line()..(idx + 1) * dims.half_line());
        adjoint.to_modes(R::view(line), modes, c, scratch);
    }
}

/// `gx += F_rows^T gt`, through the derivative of tanh where there is one.
fn add_analysis_grad(
    block: &FnoBlock,
    cx: &Cx,
    x: &Tensor,
    dims: &Dims,
    scale: f64,
    gt: &Tensor,
    gx: &mut Tensor,
) -> Result<()> {
    let scratch_len = 3 * dims.line() + dims.axis_scratch;
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    if cx.device.launches() {
        let (x_view, gt_view) = (x.view()?, gt.view()?);
        let rows = RowStage { axis: last_axis(block), weights: Weights::Plain, scale };
        let tasks = gx.view_mut()?.chunks(dims.line());
        let tanh = dims.tanh;
        cx.device.run(|| {
            with_real!(dims.accumulate, R => tasks.into_par_iter().enumerate().for_each(|(idx, mut out)| {
                scratch.with::<R, _>(|scratch| {
                    let (sum, scratch) = scratch.split_at_mut(dims.line());
                    let (g, scratch) = scratch.split_at_mut(dims.line());
                    let (t, scratch) = scratch.split_at_mut(dims.line());
                    let modes = gt_view.slice(idx * dims.half_line()..(idx + 1) * dims.half_line());
                    rows.to_grid(modes, g, dims.c, scratch);
                    out.update(sum, |sum| {
                        if tanh {
                            x_view.slice(idx * dims.line()..(idx + 1) * dims.line()).widen(t);
                            <R as Real>::tanh(t);
                            add_tanh_grad(sum, g, t);
                        } else {
                            add(sum, g);
                        }
                    });
                });
            }));
        });
    }
    Ok(())
}
