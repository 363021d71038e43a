//! The FNO block on the CPU: one pass over the field per stage, everything between in tiles that
//! stay in cache.
//!
//! Forward: rows to half-transformed rows (tanh on the way), columns, mode mix, columns back, then
//! one pass that finishes the inverse rows, adds skip and bias, and runs the channel MLP with its
//! gate. Backward: the last pass again from the saved spectrum, its adjoint, and the same stages in
//! the other direction. The gradient of the input overwrites the gradient of the output.

use crate::Result;
use crate::dense_weights::{transpose_weight, widen_weights};
use crate::fno_block::{Activation, BlockInputs, FnoBlock, Stabilizer};
use crate::mode_mix::{mode_mix_bwd, mode_mix_fwd};
use crate::partial::{Partial, part_ranges, split_sums};
use crate::pointwise::accumulators;
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
use std::ops::Range;

/// Points of a tile of the dense layers, whose operands so fit into the nearest cache.
const TILE_POINTS: usize = 64;

/// Sizes of one call.
struct Dims {
    /// Channels and hidden channels of the MLP.
    c: usize,
    h: usize,
    /// Lines along the last axis, points of a line, mode rows of a half-transformed line.
    lines: usize,
    n: usize,
    k2: usize,
    /// Lines that are transformed together, and points that go through the dense layers together.
    group: usize,
    points: usize,
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
        let lines = batch * grid[..grid.len() - 1].iter().product::<usize>();
        let group = (TILE_POINTS / n).clamp(1, lines.max(1));
        Ok(Dims {
            c,
            h: inputs.hidden(),
            lines,
            n,
            k2: axis.mode_rows(),
            group,
            points: TILE_POINTS.min(group * n),
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

    /// Scalars of the lines that are transformed together.
    fn group_len(&self) -> usize {
        self.group * self.line()
    }

    /// Scalars of a tile of points with `channels` channels.
    fn tile(&self, channels: usize) -> usize {
        self.points * channels
    }

    /// Cuts a group of lines of `len` scalars into tiles of points.
    fn tiles(&self, len: usize) -> impl Iterator<Item = Range<usize>> {
        let tile = self.tile(self.c);
        (0..len).step_by(tile.max(1)).map(move |start| start..(start + tile).min(len))
    }
}

fn last_axis(block: &FnoBlock) -> &Axis {
    let axes = block.transform.axes();
    &axes[axes.len() - 1]
}

/// The dense parameters as accumulators, and the transposes of skip, first and second weight.
struct DenseWeights {
    wide: Vec<Tensor>,
    transposed: [Tensor; 3],
}

impl DenseWeights {
    fn new(accumulate: Precision, dense: &[&Tensor; 7]) -> Result<Self> {
        let wide = widen_weights(accumulate, dense)?;
        let transposed = [transpose_weight(&wide[1])?, transpose_weight(&wide[2])?, transpose_weight(&wide[4])?];
        Ok(DenseWeights { wide, transposed })
    }
}

/// Their scalars; `_t` is transposed.
struct Dense<'a, R> {
    bias: &'a [R],
    skip: &'a [R],
    skip_t: &'a [R],
    w1: &'a [R],
    w1_t: &'a [R],
    b1: &'a [R],
    w2: &'a [R],
    w2_t: &'a [R],
    b2: &'a [R],
    gate: &'a [R],
}

impl<'a, R: Real> Dense<'a, R> {
    fn new(weights: &'a DenseWeights) -> Result<Self> {
        let scalars = |w: &'a Tensor| accumulators::<R>("fno_block", "weight", w);
        let (wide, [skip_t, w1_t, w2_t]) = (&weights.wide, &weights.transposed);
        Ok(Dense {
            bias: scalars(&wide[0])?,
            skip: scalars(&wide[1])?,
            skip_t: scalars(skip_t)?,
            w1: scalars(&wide[2])?,
            w1_t: scalars(w1_t)?,
            b1: scalars(&wide[3])?,
            w2: scalars(&wide[4])?,
            w2_t: scalars(w2_t)?,
            b2: scalars(&wide[5])?,
            gate: scalars(&wide[6])?,
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
    let scratch_len = dims.group_len() + dims.axis_scratch.max(2 * dims.tile(dims.c) + dims.tile(dims.h));
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    let wide = DenseWeights::new(dims.accumulate, &inputs.dense)?;
    if cx.device.launches() {
        let (x_view, z_view) = (inputs.x.view()?, z.view()?);
        let rows = RowStage { axis: last_axis(block), weights: Weights::Doubled, scale: last(&scales.forward.to_grid) };
        let tasks = y.view_mut()?.chunks(dims.group_len());
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

/// `z = F_rows^-1 Z` for a group of lines.
fn lines_to_grid<R: AxisReal>(
    dims: &Dims,
    rows: &RowStage<'_>,
    z_view: View<'_>,
    first: usize,
    z: &mut [R],
    scratch: &mut [R],
) {
    for (idx, line) in z.chunks_exact_mut(dims.line()).enumerate() {
        let start = (first + idx) * dims.half_line();
        rows.to_grid(z_view.slice(start..start + dims.half_line()), line, dims.c, scratch);
    }
}

/// Adds the rest of the pre-activation to `z`: bias and `W_skip x`.
fn add_skip<R: Real>(dims: &Dims, w: &Dense<'_, R>, x: &[R], z: &mut [R]) {
    linear(x, w.skip_t, z, (dims.c, dims.c), R::ONE);
    add_bias(z, w.bias);
}

/// The last pass of the forward block over a group of lines.
fn finish_rows<R: AxisReal>(
    dims: &Dims,
    rows: &RowStage<'_>,
    w: &Dense<'_, R>,
    (x_view, z_view): (View<'_>, View<'_>),
    first: usize,
    out: &mut ViewMut<'_>,
    scratch: &mut [R],
) {
    let (z, scratch) = scratch.split_at_mut(dims.group_len());
    let z = &mut z[..out.len()];
    lines_to_grid(dims, rows, z_view, first, z, scratch);
    let x_view = x_view.slice(first * dims.line()..first * dims.line() + out.len());
    for range in dims.tiles(out.len()) {
        finish_points(dims, w, x_view.slice(range.clone()), &mut z[range.clone()], &mut out.slice_mut(range), scratch);
    }
}

/// What follows the inverse transform, for a tile of points; `z` is used up.
fn finish_points<R: Real>(
    dims: &Dims,
    w: &Dense<'_, R>,
    x: View<'_>,
    z: &mut [R],
    out: &mut ViewMut<'_>,
    scratch: &mut [R],
) {
    let hidden_len = z.len() / dims.c * dims.h;
    let (x_tile, scratch) = scratch.split_at_mut(dims.tile(dims.c));
    let (u, scratch) = scratch.split_at_mut(dims.tile(dims.c));
    let m = &mut scratch[..hidden_len];
    let x = x.widened(x_tile);
    add_skip(dims, w, x, z);
    if dims.act {
        R::gelu(z);
    }
    linear(z, w.w1_t, m, (dims.c, dims.h), R::ZERO);
    add_bias(m, w.b1);
    R::gelu(m);
    out.fill(u, |u| {
        linear(m, w.w2_t, u, (dims.h, dims.c), R::ZERO);
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
    let scratch_len = dims.group_len() + dims.axis_scratch.max(5 * dims.tile(c) + 3 * dims.tile(h));
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    let wide = DenseWeights::new(dims.accumulate, &inputs.dense)?;
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
                        row_gradient_group(dims, (&synthesis, &adjoint), &w, (x_view, z_view), first, out, &mut sums, scratch);
                    }
                });
            }));
        });
    }
    let shapes: Vec<&[usize]> = inputs.dense.iter().map(|w| &w.shape()[..]).collect();
    with_real!(dims.accumulate, R => partial.finish::<R>(&cx.device, &shapes))
}

#[allow(clippy::too_many_arguments, reason = "one kernel with many operands")]
fn row_gradient_group<R: AxisReal>(
    dims: &Dims,
    (synthesis, adjoint): (&RowStage<'_>, &RowStage<'_>),
    w: &Dense<'_, R>,
    (x_view, z_view): (View<'_>, View<'_>),
    first: usize,
    (gx_out, gz_out): (&mut ViewMut<'_>, &mut ViewMut<'_>),
    sums: &mut [&mut [R]],
    scratch: &mut [R],
) {
    let (z, scratch) = scratch.split_at_mut(dims.group_len());
    let z = &mut z[..gx_out.len()];
    lines_to_grid(dims, synthesis, z_view, first, z, scratch);
    let x_view = x_view.slice(first * dims.line()..first * dims.line() + z.len());
    for range in dims.tiles(z.len()) {
        let mut gx = gx_out.slice_mut(range.clone());
        point_gradients(dims, w, x_view.slice(range.clone()), &mut z[range], &mut gx, sums, scratch);
    }
    for (idx, gz) in z.chunks_exact(dims.line()).enumerate() {
        let modes = gz_out.slice_mut(idx * dims.half_line()..(idx + 1) * dims.half_line());
        adjoint.to_modes(R::view(gz), modes, dims.c, scratch);
    }
}

/// The adjoint of [`finish_points`]: `z` becomes its own gradient.
fn point_gradients<R: Real>(
    dims: &Dims,
    w: &Dense<'_, R>,
    x: View<'_>,
    z: &mut [R],
    gx_out: &mut ViewMut<'_>,
    sums: &mut [&mut [R]],
    scratch: &mut [R],
) {
    let [g_bias, g_skip, g_w1, g_b1, g_w2, g_b2, g_gate] = sums else { return };
    let (c, h) = (dims.c, dims.h);
    let (len, hidden_len) = (z.len(), z.len() / c * h);
    let (x_tile, scratch) = scratch.split_at_mut(dims.tile(c));
    let (z_slope, scratch) = scratch.split_at_mut(dims.tile(c));
    let (u, scratch) = scratch.split_at_mut(dims.tile(c));
    let (g, scratch) = scratch.split_at_mut(dims.tile(c));
    let (gx, scratch) = scratch.split_at_mut(dims.tile(c));
    let (m, scratch) = scratch.split_at_mut(dims.tile(h));
    let (m_slope, scratch) = scratch.split_at_mut(dims.tile(h));
    let (z_slope, u, g, gx) = (&mut z_slope[..len], &mut u[..len], &mut g[..len], &mut gx[..len]);
    let (m, m_slope, gm) = (&mut m[..hidden_len], &mut m_slope[..hidden_len], &mut scratch[..hidden_len]);

    let x = x.widened(x_tile);
    add_skip(dims, w, x, z);
    if dims.act {
        R::gelu_both(z, z_slope);
    }
    linear(z, w.w1_t, m, (c, h), R::ZERO);
    add_bias(m, w.b1);
    R::gelu_both(m, m_slope);

    if dims.act {
        linear(m, w.w2_t, u, (h, c), R::ZERO);
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
        linear_grad_x(gm, w.w1, z, (c, h), R::ZERO);
        if dims.act {
            scale_by(z, z_slope);
        }
        add_column_sums(z, g_bias);
        linear_grad_w(z, x, g_skip, (c, c));
        linear_grad_x(z, w.skip, gx, (c, c), R::ONE);
    });
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
    let scratch_len = dims.line() + dims.axis_scratch.max(2 * dims.tile(dims.c));
    let scratch = cx.device.scratch(scratch_len, dims.accumulate.bytes());
    if cx.device.launches() {
        let (x_view, gt_view) = (x.view()?, gt.view()?);
        let rows = RowStage { axis: last_axis(block), weights: Weights::Plain, scale };
        let tasks = gx.view_mut()?.chunks(dims.line());
        let tanh = dims.tanh;
        cx.device.run(|| {
            with_real!(dims.accumulate, R => tasks.into_par_iter().enumerate().for_each(|(idx, mut out)| {
                scratch.with::<R, _>(|scratch| {
                    let (g, scratch) = scratch.split_at_mut(dims.line());
                    let modes = gt_view.slice(idx * dims.half_line()..(idx + 1) * dims.half_line());
                    rows.to_grid(modes, g, dims.c, scratch);
                    let x = x_view.slice(idx * dims.line()..(idx + 1) * dims.line());
                    let (sum, t) = scratch.split_at_mut(dims.tile(dims.c));
                    for range in dims.tiles(dims.line()) {
                        let (g, t) = (&g[range.clone()], &mut t[..range.len()]);
                        out.slice_mut(range.clone()).update(sum, |sum| {
                            if tanh {
                                x.slice(range).widen(t);
                                <R as Real>::tanh(t);
                                add_tanh_grad(sum, g, t);
                            } else {
                                add(sum, g);
                            }
                        });
                    }
                });
            }));
        });
    }
    Ok(())
}
