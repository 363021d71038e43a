//! The perceptron on the CPU. Rows go through all layers tile by tile while they are in cache. Products take the
//! columns of their right operand in panels, which lie in one piece and stay in the first cache; gradients of weights
//! are formed panel by panel over all rows, so that nothing is summed twice and no thread waits for another.

use super::Layer;
use crate::Result;
use crate::pointwise::rows_of;
use crate::rows::{add_bias, add_column_sums};
use halfmode_precision::DType;
use halfmode_tensor::{Device, Mat, MatMut, Purpose, Real, Tensor, ViewMut};
use rayon::prelude::*;

/// Rows of a tile.
const TILE: usize = 128;
/// Columns of a panel: two vector registers.
const PANEL: usize = 32;
/// Rows of a panel that are summed at once: 32 KiB of f32.
const DEPTH: usize = 256;

/// First columns and widths of the panels of a matrix.
fn panels(c: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..c).step_by(PANEL).map(move |first| (first, PANEL.min(c - first)))
}

/// A weight's columns in panels, `[panel][c_out][width]`, without that of the time.
fn packed<R: Real>(layer: &Layer<'_>) -> Result<Vec<R>> {
    let w = layer.w.view()?;
    let mut own = vec![R::ZERO; w.len()];
    let w = w.widened(&mut own);
    let mut out = Vec::with_capacity(layer.c_out * layer.c_in);
    for (first, width) in panels(layer.c_in) {
        w.chunks_exact(layer.stride).for_each(|row| out.extend_from_slice(&row[first..first + width]));
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
    let widest = layers.iter().map(|it| it.c_out.max(it.c_in)).max().unwrap_or(1);
    let scratch = device.scratch(2 * TILE * widest, R::PRECISION.bytes());
    if !device.launches() || y.numel() == 0 {
        return Ok(());
    }
    let (x_view, c) = (x.view()?, rows_of(x).1);
    let mut operands = Vec::with_capacity(layers.len());
    for (idx, layer) in layers.iter().enumerate() {
        let (w, mut b) = (layer.w.to_vec::<R>()?, layer.b.to_vec::<R>()?);
        if idx == 0 && layer.stride > layer.c_in {
            let t = R::from_f64(t);
            b.iter_mut().zip(w.chunks_exact(layer.stride)).for_each(|(b, row)| *b += t * row[layer.c_in]);
        }
        operands.push((w, b));
    }
    let c_last = layers.last().map_or(1, |it| it.c_out);
    let mut tasks: Vec<(ViewMut<'_>, Vec<ViewMut<'_>>)> =
        y.view_mut()?.chunks(TILE * c_last).into_iter().map(|y| (y, Vec::new())).collect();
    for (hidden, layer) in hidden.iter_mut().zip(layers) {
        let tiles = hidden.view_mut()?.chunks(TILE * layer.c_out);
        tasks.iter_mut().zip(tiles).for_each(|(task, tile)| task.1.push(tile));
    }
    device.run(|| {
        tasks.into_par_iter().enumerate().for_each(|(tile, (mut y, kept))| {
            scratch.with::<R, _>(|scratch| {
                let (mut from, mut to) = scratch.split_at_mut(TILE * widest);
                let n = y.len() / c_last;
                let start = tile * TILE * c;
                x_view.slice(start..start + n * c).widen(&mut from[..n * c]);
                let mut kept = kept.into_iter();
                for (idx, (layer, (w, b))) in layers.iter().zip(&operands).enumerate() {
                    let out = &mut to[..n * layer.c_out];
                    for (first, width) in panels(layer.c_out) {
                        // The panel of the transpose is transposed inside the product, into one piece.
                        let panel = Mat { data: &w[first * layer.stride..], row: 1, col: layer.stride };
                        let target = MatMut { data: &mut out[first..], row: layer.c_out, col: 1 };
                        let rows = Mat::rows(&from[..n * layer.c_in], layer.c_in);
                        R::gemm((n, width, layer.c_in), rows, panel, target, R::ZERO, R::ONE);
                    }
                    finish(out, b, idx + 1 == layers.len());
                    if let Some(mut kept) = kept.next() {
                        kept.narrow(out);
                    }
                    std::mem::swap(&mut from, &mut to);
                }
                y.narrow(&from[..n * c_last]);
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
        if !device.launches() || n_rows == 0 {
            return Ok(inner);
        }
        let weights = self.layers.iter().map(packed::<R>).collect::<Result<Vec<_>>>()?;
        let (g_view, c_last) = (g.view()?, rows_of(g).1);
        let hidden = self.hidden.iter().map(Tensor::view).collect::<std::result::Result<Vec<_>, _>>()?;
        let mut tasks: Vec<(ViewMut<'_>, Vec<ViewMut<'_>>)> =
            gx.view_mut()?.chunks(TILE * c).into_iter().map(|gx| (gx, Vec::new())).collect();
        for (inner, layer) in inner.iter_mut().zip(self.layers) {
            let tiles = inner.view_mut()?.chunks(TILE * layer.c_out);
            tasks.iter_mut().zip(tiles).for_each(|(task, tile)| task.1.push(tile));
        }
        device.run(|| {
            tasks.into_par_iter().enumerate().for_each(|(tile, (mut gx, mut inner))| {
                scratch.with::<R, _>(|scratch| {
                    let (n, first) = (gx.len() / c, tile * TILE);
                    let (last, wide) = scratch.split_at_mut(TILE * c);
                    let mut rest: &mut [ViewMut<'_>] = &mut inner;
                    if let Some(own) = rest.last_mut().and_then(R::direct_mut) {
                        g_view.slice(first * c_last..(first + n) * c_last).widen(own);
                    }
                    for (idx, (layer, w)) in self.layers.iter().zip(&weights).enumerate().rev() {
                        let Some((own, before)) = rest.split_last_mut() else { return };
                        rest = before;
                        let Some(own) = R::direct_mut(own) else { return };
                        let out = match rest.last_mut().and_then(R::direct_mut) {
                            Some(out) => out,
                            None => &mut last[..n * c],
                        };
                        for ((start, width), panel) in panels(layer.c_in).zip(w.chunks(PANEL * layer.c_out)) {
                            let target = MatMut { data: &mut out[start..], row: layer.c_in, col: 1 };
                            let dims = (n, width, layer.c_out);
                            R::gemm(
                                dims,
                                Mat::rows(own, layer.c_out),
                                Mat::rows(panel, width),
                                target,
                                R::ZERO,
                                R::ONE,
                            );
                        }
                        match idx.checked_sub(1) {
                            Some(below) => {
                                let range = first * layer.c_in..(first + n) * layer.c_in;
                                tanh_slope(out, hidden[below].slice(range).widened(&mut *wide));
                            }
                            None => gx.narrow(out),
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
                    sum.fill(R::ZERO);
                    for start in (0..n_rows).step_by(DEPTH) {
                        let n = DEPTH.min(n_rows - start);
                        for (row, panel) in panel.chunks_exact_mut(width).enumerate().take(n) {
                            let at = (start + row) * layer.c_in + first;
                            input.slice(at..at + width).widen(panel);
                        }
                        let rows = Mat { data: &g[start * layer.c_out..], row: 1, col: layer.c_out };
                        let (panel, target) = (Mat::rows(panel, width), MatMut::rows(&mut *sum, width));
                        R::gemm((layer.c_out, width, n), rows, panel, target, R::ONE, R::ONE);
                    }
                });
            });
        });
        // From panels to rows, with the time's column behind them.
        let sums = sums.view()?;
        let mut from = R::direct(sums).unwrap_or_default();
        for ((layer, g), grads) in self.layers.iter().zip(g).zip(grads.chunks_exact_mut(2)) {
            let [grad_w, grad_b] = grads else { continue };
            let (mut grad_w, mut grad_b) = (grad_w.view_mut()?, grad_b.view_mut()?);
            let (Some(grad_w), Some(grad_b)) = (R::direct_mut(&mut grad_w), R::direct_mut(&mut grad_b)) else {
                continue;
            };
            add_column_sums(g, grad_b);
            for (first, width) in panels(layer.c_in) {
                let (panel, after) = from.split_at(layer.c_out * width);
                from = after;
                for (row, panel) in grad_w.chunks_exact_mut(layer.stride).zip(panel.chunks_exact(width)) {
                    row[first..first + width].copy_from_slice(panel);
                }
            }
            if layer.stride > layer.c_in {
                let t = R::from_f64(self.t);
                grad_w.chunks_exact_mut(layer.stride).zip(&*grad_b).for_each(|(row, b)| row[layer.c_in] = t * *b);
            }
        }
        Ok(grads)
    }
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
