//! The perceptron on the CPU. Rows go through all layers tile by tile while they are in cache. Products take the
//! columns of their right operand in panels, which lie in one piece and stay in the first cache; gradients of weights
//! are formed panel by panel over all rows, so that nothing is summed twice and no thread waits for another.

use super::{Layer, NAME};
use crate::Result;
use crate::pointwise::{accumulators, rows_of};
use crate::rows::add_bias;
use halfmode_precision::DType;
use halfmode_tensor::{Device, Mat, MatMut, Purpose, Real, Tensor, ViewMut};
use rayon::prelude::*;

/// Rows of a tile. Fixed, so that no result depends on the number of threads: small products may be summed otherwise.
const TILE: usize = 128;
/// Rows of a weight's gradient that a task brings out of panels.
const BLOCK: usize = 32;
/// Columns of a panel: two vector registers.
const PANEL: usize = 32;
/// Rows of a panel that are summed at once: 32 KiB of f32.
const DEPTH: usize = 256;

/// First columns and widths of the panels of a matrix.
fn panels(c: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..c).step_by(PANEL).map(move |first| (first, PANEL.min(c - first)))
}

/// The columns of every weight in panels, `[layer][panel][c_out][width]`, without those of the time.
fn packed<R: Real>(device: &Device, layers: &[Layer<'_>]) -> Result<Tensor> {
    let n_scalars: usize = layers.iter().map(|it| it.c_out * it.c_in).sum();
    let mut out = device.alloc_unwritten([n_scalars], DType::real(R::PRECISION), Purpose::Workspace)?;
    let mut tasks = Vec::new();
    if device.launches() {
        let mut rest = out.view_mut()?;
        let mut rest = R::direct_mut(&mut rest).unwrap_or_default();
        for layer in layers {
            let w = layer.w.view()?;
            for (first, width) in panels(layer.c_in) {
                let (panel, after) = rest.split_at_mut(layer.c_out * width);
                rest = after;
                tasks.push((w, layer.stride, first, width, panel));
            }
        }
        device.run(|| {
            tasks.into_par_iter().for_each(|(w, stride, first, width, panel)| {
                for (row, panel) in panel.chunks_exact_mut(width).enumerate() {
                    w.slice(row * stride + first..row * stride + first + width).widen(panel);
                }
            });
        });
    }
    Ok(out)
}

/// `x := tanh(x + b)`, or without the tanh.
fn finish<R: Real>(x: &mut [R], b: &[R], last: bool) {
    add_bias(x, b);
    if !last {
        R::tanh(x);
    }
}

pub(super) fn forward<R: Real>(
    device: &Device,
    layers: &[Layer<'_>],
    x: &Tensor,
    t: f64,
    hidden: &mut [Tensor],
    y: &mut Tensor,
) -> Result<()> {
    let (n_rows, c) = rows_of(x);
    let widest = layers.iter().map(|it| it.c_out.max(it.c_in)).max().unwrap_or(1);
    let scratch = device.scratch(2 * TILE * widest, R::PRECISION.bytes());
    let widened = |layer: &Layer<'_>| layer.w.cast(R::PRECISION, Purpose::Workspace);
    let weights = layers.iter().map(widened).collect::<std::result::Result<Vec<_>, _>>()?;
    if !device.launches() || y.numel() == 0 {
        return Ok(());
    }
    let x_view = x.view()?;
    let mut operands = Vec::with_capacity(layers.len());
    for (idx, (layer, w)) in layers.iter().zip(&weights).enumerate() {
        let (w, mut b) = (accumulators::<R>(NAME, "weight", w)?, layer.b.to_vec::<R>()?);
        if idx == 0 && layer.stride > layer.c_in {
            let t = R::from_f64(t);
            b.iter_mut().zip(w.chunks_exact(layer.stride)).for_each(|(b, row)| *b += t * row[layer.c_in]);
        }
        operands.push((w, b));
    }
    let c_last = layers.last().map_or(1, |it| it.c_out);
    // What each tile writes: the layers that are kept, and the last one.
    let y_tiles = y.view_mut()?.chunks(TILE * c_last);
    let mut tasks: Vec<Vec<ViewMut<'_>>> = y_tiles.iter().map(|_| Vec::with_capacity(layers.len())).collect();
    for (hidden, layer) in hidden.iter_mut().zip(layers) {
        let tiles = hidden.view_mut()?.chunks(TILE * layer.c_out);
        tasks.iter_mut().zip(tiles).for_each(|(task, tile)| task.push(tile));
    }
    tasks.iter_mut().zip(y_tiles).for_each(|(task, y)| task.push(y));
    let product = |layer: &Layer<'_>, (w, b): &(&[R], Vec<R>), from: &[R], out: &mut [R], last: bool| {
        let n = out.len() / layer.c_out;
        for (first, width) in panels(layer.c_out) {
            // The panel of the transpose is transposed inside the product, into one piece.
            let panel = Mat { data: &w[first * layer.stride..], row: 1, col: layer.stride };
            let target = MatMut { data: &mut out[first..], row: layer.c_out, col: 1 };
            let rows = Mat::rows(from, layer.c_in);
            R::gemm((n, width, layer.c_in), rows, panel, target, R::ZERO, R::ONE);
        }
        finish(out, b, last);
    };
    device.run(|| {
        tasks.into_par_iter().enumerate().for_each(|(tile, mut kept)| {
            scratch.with::<R, _>(|scratch| {
                let (mut buffer, mut other) = scratch.split_at_mut(TILE * widest);
                let start = tile * TILE;
                let n = TILE.min(n_rows - start);
                let x = x_view.slice(start * c..(start + n) * c);
                // What a layer reads is in a tensor or, where that stores other numbers or there is none, in the buffer.
                let mut stored = R::direct(x);
                if stored.is_none() {
                    x.widen(&mut buffer[..n * c]);
                }
                let not_kept = layers.len() - kept.len();
                let mut kept = kept.iter_mut();
                for (idx, (layer, operands)) in layers.iter().zip(&operands).enumerate() {
                    let (from, last) = (stored.unwrap_or(&buffer[..n * layer.c_in]), idx + 1 == layers.len());
                    match if idx >= not_kept { kept.next() } else { None } {
                        Some(out) => {
                            out.fill(other, |out| product(layer, operands, from, out, last));
                            stored = R::direct(out.as_view());
                        }
                        None => {
                            product(layer, operands, from, &mut other[..n * layer.c_out], last);
                            stored = None;
                        }
                    }
                    std::mem::swap(&mut buffer, &mut other);
                }
            });
        });
    });
    Ok(())
}

/// The way back through all layers.
pub(super) struct Backward<'a> {
    pub(super) layers: &'a [Layer<'a>],
    pub(super) x: &'a Tensor,
    pub(super) hidden: &'a [Tensor],
    pub(super) t: f64,
}

impl Backward<'_> {
    /// Writes the gradient by the input; returns that by what each layer gave before its tanh, `[rows, c_out]`.
    pub(super) fn rows<R: Real>(&self, device: &Device, g: &Tensor, gx: &mut Tensor) -> Result<Vec<Tensor>> {
        let (n_rows, c) = rows_of(self.x);
        let dtype = DType::real(R::PRECISION);
        let mut inner = Vec::with_capacity(self.layers.len());
        for layer in self.layers {
            inner.push(device.alloc_unwritten([n_rows, layer.c_out], dtype, Purpose::Workspace)?);
        }
        let widest = self.layers.iter().map(|it| it.c_in).max().unwrap_or(1);
        let scratch = device.scratch(TILE * (c + widest), R::PRECISION.bytes());
        let weights = packed::<R>(device, self.layers)?;
        if !device.launches() || n_rows == 0 {
            return Ok(inner);
        }
        let weights = accumulators::<R>(NAME, "weight", &weights)?;
        let (g_view, c_last) = (g.view()?, rows_of(g).1);
        let hidden = self.hidden.iter().map(Tensor::view).collect::<std::result::Result<Vec<_>, _>>()?;
        let mut tasks: Vec<(ViewMut<'_>, Vec<ViewMut<'_>>)> =
            gx.view_mut()?.chunks(TILE * c).into_iter().map(|gx| (gx, Vec::new())).collect();
        for (inner, layer) in inner.iter_mut().zip(self.layers) {
            let tiles = inner.view_mut()?.chunks(TILE * layer.c_out);
            tasks.iter_mut().zip(tiles).for_each(|(task, tile)| task.1.push(tile));
        }
        let product = |layer: &Layer<'_>, w: &[R], own: &[R], out: &mut [R]| {
            for ((start, width), panel) in panels(layer.c_in).zip(w.chunks(PANEL * layer.c_out)) {
                let target = MatMut { data: &mut out[start..], row: layer.c_in, col: 1 };
                let dims = (own.len() / layer.c_out, width, layer.c_out);
                R::gemm(dims, Mat::rows(own, layer.c_out), Mat::rows(panel, width), target, R::ZERO, R::ONE);
            }
        };
        device.run(|| {
            tasks.into_par_iter().enumerate().for_each(|(tile, (mut gx, mut inner))| {
                scratch.with::<R, _>(|scratch| {
                    let (n, first) = (gx.len() / c, tile * TILE);
                    let (last, wide) = scratch.split_at_mut(TILE * c);
                    let mut rest: &mut [ViewMut<'_>] = &mut inner;
                    if let Some(own) = rest.last_mut().and_then(R::direct_mut) {
                        g_view.slice(first * c_last..(first + n) * c_last).widen(own);
                    }
                    let mut weights = weights;
                    for (idx, layer) in self.layers.iter().enumerate().rev() {
                        let Some((own, before)) = rest.split_last_mut() else { return };
                        rest = before;
                        let Some(own) = R::direct_mut(own) else { return };
                        let (before, w) = weights.split_at(weights.len() - layer.c_out * layer.c_in);
                        weights = before;
                        match (rest.last_mut().and_then(R::direct_mut), idx.checked_sub(1)) {
                            (Some(out), Some(below)) => {
                                product(layer, w, own, out);
                                let range = first * layer.c_in..(first + n) * layer.c_in;
                                tanh_slope(out, hidden[below].slice(range).widened(&mut *wide));
                            }
                            _ => gx.fill(last, |out| product(layer, w, own, out)),
                        }
                    }
                });
            });
        });
        Ok(inner)
    }

    /// The gradients of weights and biases, layer by layer, from those that [`Backward::rows`] returned.
    pub(super) fn weights<R: Real>(&self, device: &Device, inner: &[Tensor]) -> Result<Vec<Tensor>> {
        let dtype = DType::real(R::PRECISION);
        let (n_rows, n_scalars) = (rows_of(self.x).0, self.layers.iter().map(|it| it.c_out * it.c_in).sum::<usize>());
        let mut grads = Vec::with_capacity(2 * self.layers.len());
        for layer in self.layers {
            grads.push(device.alloc_unwritten(layer.w.shape().clone(), dtype, Purpose::Grad)?);
            grads.push(device.alloc(layer.b.shape().clone(), dtype, Purpose::Grad)?);
        }
        let mut sums = device.alloc_unwritten([n_scalars], dtype, Purpose::Workspace)?;
        let scratch = device.scratch(DEPTH * PANEL, R::PRECISION.bytes());
        if !device.launches() {
            return Ok(grads);
        }
        let g = inner.iter().map(Tensor::view).collect::<std::result::Result<Vec<_>, _>>()?;
        let g: Vec<&[R]> = g.into_iter().filter_map(R::direct).collect();
        let mut sums_view = sums.view_mut()?;
        let (Some(mut rest), true) = (R::direct_mut(&mut sums_view), g.len() == self.layers.len()) else {
            return Ok(grads);
        };
        let mut tasks = Vec::new();
        for (idx, layer) in self.layers.iter().enumerate() {
            let input = if idx == 0 { self.x } else { &self.hidden[idx - 1] };
            for (first, width) in panels(layer.c_in) {
                let (sum, after) = rest.split_at_mut(layer.c_out * width);
                rest = after;
                tasks.push((input.view()?, layer, g[idx], first, width, sum));
            }
        }
        device.run(|| {
            tasks.into_par_iter().for_each(|(input, layer, g, first, width, sum)| {
                scratch.with::<R, _>(|panel| {
                    if n_rows == 0 {
                        sum.fill(R::ZERO);
                    }
                    for start in (0..n_rows).step_by(DEPTH) {
                        let keep = if start == 0 { R::ZERO } else { R::ONE };
                        let n = DEPTH.min(n_rows - start);
                        for (row, panel) in panel.chunks_exact_mut(width).enumerate().take(n) {
                            let at = (start + row) * layer.c_in + first;
                            input.slice(at..at + width).widen(panel);
                        }
                        let rows = Mat { data: &g[start * layer.c_out..], row: 1, col: layer.c_out };
                        let (panel, target) = (Mat::rows(panel, width), MatMut::rows(&mut *sum, width));
                        R::gemm((layer.c_out, width, n), rows, panel, target, keep, R::ONE);
                    }
                });
            });
        });
        // From panels to rows, with the time's column behind them.
        let sums = sums.view()?;
        let mut from = R::direct(sums).unwrap_or_default();
        let mut tasks = Vec::new();
        for ((layer, g), grads) in self.layers.iter().zip(g).zip(grads.chunks_exact_mut(2)) {
            let [grad_w, grad_b] = grads else { continue };
            let (own, after) = from.split_at(layer.c_out * layer.c_in);
            from = after;
            let blocks = grad_w.view_mut()?.chunks(BLOCK * layer.stride).into_iter();
            let blocks = blocks.zip(grad_b.view_mut()?.chunks(BLOCK)).enumerate();
            tasks.extend(blocks.map(|(idx, block)| (layer, g, own, idx * BLOCK, block)));
        }
        let t = R::from_f64(self.t);
        device.run(|| {
            tasks.into_par_iter().for_each(|(layer, g, from, start, (mut grad_w, mut grad_b))| {
                let (Some(grad_w), Some(grad_b)) = (R::direct_mut(&mut grad_w), R::direct_mut(&mut grad_b)) else {
                    return;
                };
                // Without rows there is nothing behind the first column.
                add_sums_of_columns(g.get(start..).unwrap_or_default(), layer.c_out, grad_b);
                for (first, width) in panels(layer.c_in) {
                    let panel = &from[first * layer.c_out + start * width..];
                    for (row, panel) in grad_w.chunks_exact_mut(layer.stride).zip(panel.chunks_exact(width)) {
                        row[first..first + width].copy_from_slice(panel);
                    }
                }
                if layer.stride > layer.c_in {
                    grad_w.chunks_exact_mut(layer.stride).zip(&*grad_b).for_each(|(row, b)| row[layer.c_in] = t * *b);
                }
            });
        });
        Ok(grads)
    }
}

/// `sums[c] += sum over rows of g[row * stride + c]`; at most [`BLOCK`] columns.
fn add_sums_of_columns<R: Real>(g: &[R], stride: usize, sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            let mut lanes = [R::ZERO; BLOCK];
            let n = sums.len();
            if n == BLOCK {
                for row in g.chunks(stride) {
                    lanes.iter_mut().zip(&row[..BLOCK]).for_each(|(sum, g)| *sum += *g);
                }
            } else {
                for row in g.chunks(stride) {
                    lanes.iter_mut().zip(&row[..n]).for_each(|(sum, g)| *sum += *g);
                }
            }
            sums.iter_mut().zip(lanes).for_each(|(sum, lane)| *sum += lane);
        },
    );
}

/// `g := g (1 - h^2)`
pub(super) fn tanh_slope<R: Real>(g: &mut [R], h: &[R]) {
    R::vectorised(
        #[inline(always)]
        || g.iter_mut().zip(h).for_each(|(g, h)| *g *= R::ONE - *h * *h),
    );
}

/// The gradient by the time: that by the first layer's bias, through the weights of the time.
pub(super) fn time_slope(layer: &Layer<'_>, grad_b: &Tensor) -> Result<f64> {
    let (w, b) = (layer.w.to_vec::<f64>()?, grad_b.to_vec::<f64>()?);
    Ok(w.chunks_exact(layer.stride).zip(b).map(|(row, b)| row[layer.c_in] * b).sum())
}
