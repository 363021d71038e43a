//! The mode contraction `y_hat[b, k, o] = sum_i x_hat[b, k, i] w[k, i, o]`, complex, mode by mode.
//!
//! Spectra are split complex, `[batch, (re, im), modes, channels]`; weights `[modes, c_in, (re | im)
//! c_out]`. For one mode the rows (b, re) and (b, im) of the spectrum times that row-major weight
//! block give all four real products in one matrix product; the combination happens in the
//! accumulator before the one rounding. The reference is the complex einsum of
//! `halfmode-contract`; a test binds the two.

use crate::{Error, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Mat, MatMut, Purpose, Real, Shape, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

/// Weight scalars that a block of modes holds, so that it stays in cache.
const BLOCK_SCALARS: usize = 32 * 1024;

#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    modes: usize,
    c_in: usize,
    c_out: usize,
    /// Modes per task.
    block: usize,
}

impl Dims {
    fn of(x_hat: &Tensor, w: &Tensor) -> Result<Self> {
        let shape = x_hat.shape();
        let c_in = shape.last().copied().unwrap_or(0);
        let modes = if shape.len() > 3 { shape[2..shape.len() - 1].iter().product() } else { 0 };
        let c_out = w.shape().last().copied().unwrap_or(0) / 2;
        let expected = Shape::from([modes, c_in, 2 * c_out]);
        if *w.shape() != expected || c_out == 0 {
            return Err(Error::Shape { op: "mode_mix", operand: "weight", expected, found: w.shape().clone() });
        }
        let block = (BLOCK_SCALARS / (2 * c_in * c_out).max(1)).clamp(1, 16);
        Ok(Dims { batch: shape[0], modes, c_in, c_out, block })
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

/// `y_hat = x_hat w`.
///
/// # Shapes
/// - `x_hat`: `[batch, (re, im), k_1, …, k_d, c_in]`
/// - `w`: `[modes, c_in, 2 c_out]`
/// - returns `[batch, (re, im), k_1, …, k_d, c_out]`, stored in `storage`
pub(crate) fn mode_mix_fwd(
    device: &Device,
    x_hat: &Tensor,
    w: &Tensor,
    storage: Precision,
    purpose: Purpose,
) -> Result<Tensor> {
    let dims = Dims::of(x_hat, w)?;
    let mut extents = x_hat.shape().to_vec();
    if let Some(channels) = extents.last_mut() {
        *channels = dims.c_out;
    }
    let mut y_hat = device.alloc(extents, DType::real(storage), purpose)?;
    let accumulate = storage.accumulate();
    let Dims { c_in, c_out, block, .. } = dims;
    let rows = dims.rows();
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
    Ok(y_hat)
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

/// The adjoints: `(grad_x_hat, grad_w)`, the latter in the accumulator's precision and multiplied by
/// `weight_factor` (the known ratio between the transforms' scales of the two passes).
pub(crate) fn mode_mix_bwd(
    device: &Device,
    (x_hat, w): (&Tensor, &Tensor),
    grad: &Tensor,
    weight_factor: f64,
    storage: Precision,
) -> Result<(Tensor, Tensor)> {
    let dims = Dims::of(x_hat, w)?;
    let accumulate = storage.accumulate();
    let mut grad_x = device.alloc(x_hat.shape().clone(), DType::real(storage), Purpose::Workspace)?;
    let mut grad_w = device.alloc(w.shape().clone(), DType::real(accumulate), Purpose::Grad)?;
    let Dims { c_in, c_out, block, .. } = dims;
    let rows = dims.rows();
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
    Ok((grad_x, grad_w))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Values without a pattern that blocks or channels could share.
    fn tensor(device: &Device, shape: &[usize], precision: Precision, seed: usize) -> Tensor {
        let n = shape.iter().product::<usize>();
        let values: Vec<f64> =
            (0..n).map(|i| 2.0 * ((i + 1) as f64 * 0.754_877_666 + seed as f64 * 0.1).fract() - 1.0).collect();
        Tensor::from_slice(device, &values, shape, precision, Purpose::Workspace).unwrap()
    }

    fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        assert!(got.len() == want.len() && error <= tolerance, "{name}: relative error {error:.3e}");
    }

    /// Forward and both adjoints against dense complex loops, around the edges of blocks of modes.
    fn check(batch: usize, modes: usize, c_in: usize, c_out: usize) {
        let device = Device::cpu(2).unwrap();
        let x = tensor(&device, &[batch, 2, modes, c_in], Precision::F64, 1);
        let w = tensor(&device, &[modes, c_in, 2 * c_out], Precision::F64, 2);
        let g = tensor(&device, &[batch, 2, modes, c_out], Precision::F64, 3);
        let factor = 0.375;
        let y = mode_mix_fwd(&device, &x, &w, Precision::F64, Purpose::Workspace).unwrap();
        let (gx, gw) = mode_mix_bwd(&device, (&x, &w), &g, factor, Precision::F64).unwrap();
        let [x, w, g, y, gx, gw] = [&x, &w, &g, &y, &gx, &gw].map(|it| it.to_vec::<f64>().unwrap());
        let (mut want_y, mut want_gx, mut want_gw) = (vec![0.0; y.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
        for entry in 0..batch {
            for k in 0..modes {
                for i in 0..c_in {
                    for o in 0..c_out {
                        let at_x = |part: usize| ((entry * 2 + part) * modes + k) * c_in + i;
                        let at_y = |part: usize| ((entry * 2 + part) * modes + k) * c_out + o;
                        let at_w = |part: usize| (k * c_in + i) * 2 * c_out + part * c_out + o;
                        let (a, b) = (x[at_x(0)], x[at_x(1)]);
                        let (c, d) = (w[at_w(0)], w[at_w(1)]);
                        let (p, q) = (g[at_y(0)], g[at_y(1)]);
                        want_y[at_y(0)] += a * c - b * d;
                        want_y[at_y(1)] += a * d + b * c;
                        want_gx[at_x(0)] += p * c + q * d;
                        want_gx[at_x(1)] += q * c - p * d;
                        want_gw[at_w(0)] += factor * (a * p + b * q);
                        want_gw[at_w(1)] += factor * (a * q - b * p);
                    }
                }
            }
        }
        let name = format!("batch {batch}, modes {modes}, channels {c_in} to {c_out}");
        // Sums of at most a few hundred products in f64, with room for two digits of cancellation.
        assert_close(&format!("y: {name}"), &y, &want_y, 1e-13);
        assert_close(&format!("grad x: {name}"), &gx, &want_gx, 1e-13);
        assert_close(&format!("grad w: {name}"), &gw, &want_gw, 1e-13);
    }

    #[test]
    fn agrees_with_dense_complex_loops() {
        for modes in [1, 15, 16, 17, 33] {
            for (c_in, c_out) in [(1, 1), (3, 5), (7, 2), (1, 9), (33, 31)] {
                for batch in [1, 2, 3] {
                    check(batch, modes, c_in, c_out);
                }
            }
        }
        // Weights of one mode beyond a block's scalars, so blocks of one mode; and blocks of four.
        check(1, 3, 131, 127);
        check(2, 5, 61, 67);
    }

    /// In every storage against double precision: one rounding of each result, sums in f32.
    #[test]
    fn stored_results_are_rounded_once() {
        let device = Device::cpu(3).unwrap();
        for (precision, tolerance) in
            [(Precision::F32, 2f64.powi(-23)), (Precision::Bf16, 2f64.powi(-8)), (Precision::F16, 2f64.powi(-11))]
        {
            let x = tensor(&device, &[2, 2, 19, 3], precision, 4);
            let w = tensor(&device, &[19, 3, 10], precision, 5);
            let [x_wide, w_wide] = [&x, &w].map(|it| it.cast(Precision::F64, Purpose::Workspace).unwrap());
            let got = mode_mix_fwd(&device, &x, &w, precision, Purpose::Workspace).unwrap();
            assert_eq!(got.precision(), precision);
            let want = mode_mix_fwd(&device, &x_wide, &w_wide, Precision::F64, Purpose::Workspace).unwrap();
            assert_close(precision.name(), &got.to_vec::<f64>().unwrap(), &want.to_vec::<f64>().unwrap(), tolerance);
            let (_, grad_w) = mode_mix_bwd(&device, (&x, &w), &got, 1.0, precision).unwrap();
            assert_eq!(grad_w.precision(), Precision::F32);
        }
    }
}
