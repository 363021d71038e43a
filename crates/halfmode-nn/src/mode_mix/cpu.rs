//! The mode contraction on the CPU.
//!
//! For one mode the rows (b, re) and (b, im) of the spectrum times the row-major weight block give
//! all four real products in one matrix product; the combination happens in the accumulator before
//! the one rounding.

use super::Dims;
use crate::Result;
use halfmode_tensor::{Device, Mat, MatMut, Real, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

/// Weight scalars that a block of modes holds, so that it stays in cache.
const BLOCK_SCALARS: usize = 32 * 1024;

impl Dims {
    /// Modes per task.
    fn block(&self) -> usize {
        (BLOCK_SCALARS / (2 * self.c_in * self.c_out).max(1)).clamp(1, 16)
    }

    /// Rows of the spectra: (b, (re, im)).
    fn rows(&self) -> usize {
        2 * self.batch
    }

    fn weight_block(&self) -> usize {
        self.c_in * 2 * self.c_out
    }
}

/// Cuts `[rows, modes, channels]` into one list per block of modes of its pieces, row by row.
fn by_block<'a>(view: ViewMut<'a>, modes: usize, channels: usize, block: usize) -> Vec<Vec<ViewMut<'a>>> {
    let mut blocks: Vec<Vec<ViewMut<'a>>> = (0..modes.div_ceil(block)).map(|_| Vec::new()).collect();
    for row in view.chunks(modes * channels) {
        for (idx, piece) in row.chunks(block * channels).into_iter().enumerate() {
            blocks[idx].push(piece);
        }
    }
    blocks
}

/// Widens modes `first..first + n` of every row into `[rows, n, channels]`.
fn load_block<R: Real>(
    x: View<'_>,
    (rows, modes, channels): (usize, usize, usize),
    (first, n): (usize, usize),
    tile: &mut [R],
) {
    for row in 0..rows {
        let start = (row * modes + first) * channels;
        x.slice(start..start + n * channels).widen(&mut tile[row * n * channels..(row + 1) * n * channels]);
    }
}

pub(super) fn forward(device: &Device, dims: &Dims, [x_hat, w]: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
    let accumulate = y_hat.precision().accumulate();
    let Dims { c_in, c_out, .. } = *dims;
    let (rows, block) = (dims.rows(), dims.block());
    let (x_len, y_len) = (rows * block * c_in, rows * block * c_out);
    let scratch = device.scratch(x_len + y_len + rows * 2 * c_out + block * dims.weight_block(), accumulate.bytes());
    if device.launches() {
        let (x_view, w_view) = (x_hat.view()?, w.view()?);
        let tasks = by_block(y_hat.view_mut()?, dims.modes, c_out, block);
        device.run(|| {
            with_real!(accumulate, R => tasks.into_par_iter().enumerate().for_each(|(idx, mut pieces)| {
                scratch.with::<R, _>(|scratch| {
                    let first = idx * block;
                    let n = block.min(dims.modes - first);
                    let (x, scratch) = scratch.split_at_mut(x_len);
                    let (y, scratch) = scratch.split_at_mut(y_len);
                    let (products, w_tile) = scratch.split_at_mut(rows * 2 * c_out);
                    load_block(x_view, (rows, dims.modes, c_in), (first, n), x);
                    let w_len = dims.weight_block();
                    let w = w_view.slice(first * w_len..(first + n) * w_len).widened(w_tile);
                    for mode in 0..n {
                        let a = Mat { data: &x[mode * c_in..], row: n * c_in, col: 1 };
                        let b = Mat::rows(&w[mode * w_len..(mode + 1) * w_len], 2 * c_out);
                        R::gemm((rows, 2 * c_out, c_in), a, b, MatMut::rows(products, 2 * c_out), R::ZERO, R::ONE);
                        combine(products, y, (mode, n, c_out));
                    }
                    for (row, piece) in pieces.iter_mut().enumerate() {
                        piece.narrow(&y[row * n * c_out..(row + 1) * n * c_out]);
                    }
                });
            }));
        });
    }
    Ok(())
}

/// `re = rr - ii`, `im = ri + ir` for every batch entry of one mode.
fn combine<R: Real>(products: &[R], y: &mut [R], (mode, n, c_out): (usize, usize, usize)) {
    R::vectorised(
        #[inline(always)]
        || {
            for (b, four) in products.chunks_exact(4 * c_out).enumerate() {
                let (from_re, from_im) = four.split_at(2 * c_out);
                let (rr, ri) = from_re.split_at(c_out);
                let (ir, ii) = from_im.split_at(c_out);
                let re = &mut y[(2 * b * n + mode) * c_out..][..c_out];
                re.iter_mut().zip(rr.iter().zip(ii)).for_each(|(y, (rr, ii))| *y = *rr - *ii);
                let im = &mut y[((2 * b + 1) * n + mode) * c_out..][..c_out];
                im.iter_mut().zip(ri.iter().zip(ir)).for_each(|(y, (ri, ir))| *y = *ri + *ir);
            }
        },
    );
}

pub(super) fn backward(
    device: &Device,
    dims: &Dims,
    [x_hat, w, grad]: [&Tensor; 3],
    weight_factor: f64,
    [grad_x, grad_w]: [&mut Tensor; 2],
) -> Result<()> {
    let accumulate = grad_w.precision();
    let Dims { c_in, c_out, .. } = *dims;
    let (rows, block) = (dims.rows(), dims.block());
    let (x_len, g_len) = (rows * block * c_in, rows * block * c_out);
    let scratch_len = 2 * x_len + g_len + rows * 2 * c_out + block * dims.weight_block();
    let scratch = device.scratch(scratch_len, accumulate.bytes());
    if device.launches() {
        let (x_view, w_view, g_view) = (x_hat.view()?, w.view()?, grad.view()?);
        let x_tasks = by_block(grad_x.view_mut()?, dims.modes, c_in, block);
        let w_tasks = grad_w.view_mut()?.chunks(block * dims.weight_block());
        let tasks: Vec<_> = x_tasks.into_iter().zip(w_tasks).collect();
        device.run(|| {
            with_real!(accumulate, R => tasks.into_par_iter().enumerate().for_each(|(idx, (mut pieces, mut grad_w))| {
                scratch.with::<R, _>(|scratch| {
                    let first = idx * block;
                    let n = block.min(dims.modes - first);
                    let (x, scratch) = scratch.split_at_mut(x_len);
                    let (gx, scratch) = scratch.split_at_mut(x_len);
                    let (g, scratch) = scratch.split_at_mut(g_len);
                    let (pairs, w_tile) = scratch.split_at_mut(rows * 2 * c_out);
                    load_block(x_view, (rows, dims.modes, c_in), (first, n), x);
                    load_block(g_view, (rows, dims.modes, c_out), (first, n), g);
                    let w_len = dims.weight_block();
                    let w = w_view.slice(first * w_len..(first + n) * w_len).widened(w_tile);
                    let Some(grad_w) = R::direct_mut(&mut grad_w) else { return };
                    for mode in 0..n {
                        spread(g, pairs, (mode, n, c_out));
                        let d = Mat::rows(pairs, 2 * c_out);
                        let x_t = Mat { data: &x[mode * c_in..], row: 1, col: n * c_in };
                        let w_mode = mode * w_len..(mode + 1) * w_len;
                        let out = MatMut::rows(&mut grad_w[w_mode.clone()], 2 * c_out);
                        R::gemm((c_in, 2 * c_out, rows), x_t, d, out, R::ZERO, R::from_f64(weight_factor));
                        let out = MatMut { data: &mut gx[mode * c_in..], row: n * c_in, col: 1 };
                        R::gemm((rows, c_in, 2 * c_out), d, Mat::transposed(&w[w_mode], 2 * c_out), out, R::ZERO, R::ONE);
                    }
                    for (row, piece) in pieces.iter_mut().enumerate() {
                        piece.narrow(&gx[row * n * c_in..(row + 1) * n * c_in]);
                    }
                });
            }));
        });
    }
    Ok(())
}

/// Rows `[gr | gi]` for (b, re) and `[gi | -gr]` for (b, im) of one mode.
fn spread<R: Real>(g: &[R], pairs: &mut [R], (mode, n, c_out): (usize, usize, usize)) {
    R::vectorised(
        #[inline(always)]
        || {
            for (b, four) in pairs.chunks_exact_mut(4 * c_out).enumerate() {
                let re = &g[(2 * b * n + mode) * c_out..][..c_out];
                let im = &g[((2 * b + 1) * n + mode) * c_out..][..c_out];
                let (first, second) = four.split_at_mut(2 * c_out);
                first[..c_out].copy_from_slice(re);
                first[c_out..].copy_from_slice(im);
                second[..c_out].copy_from_slice(im);
                second[c_out..].iter_mut().zip(re).for_each(|(d, re)| *d = -*re);
            }
        },
    );
}
