//! Normalisation on the CPU: samples in parallel, tiles of rows that stay in cache, sums of a tile in the
//! accumulator and of tiles in f64.

use super::{Dims, EPS};
use crate::Result;
use crate::rows::{add_column_sums, add_gated};
use halfmode_tensor::{Device, Real, Tensor, View, with_real};
use rayon::prelude::*;

/// Rows of a tile.
const TILE: usize = 64;

/// Per channel: the accumulator nearest to the mean, what the mean is above it, and the reciprocal deviation.
pub(crate) struct Statistics<R> {
    pub(crate) centre: Vec<R>,
    pub(crate) above: Vec<f64>,
    pub(crate) rstd: Vec<f64>,
}

impl Dims {
    /// Values that share statistics, as sums over channels: each channel's own, or that of all.
    fn shared(&self, mut sums: Vec<f64>) -> Vec<f64> {
        if !self.per_channel {
            let all = sums.iter().sum::<f64>();
            sums.fill(all);
        }
        sums
    }

    fn n_shared(&self) -> f64 {
        (self.rows * if self.per_channel { 1 } else { self.c }) as f64
    }

    pub(crate) fn sample(&self, b: usize) -> std::ops::Range<usize> {
        b * self.rows * self.c..(b + 1) * self.rows * self.c
    }

    /// Column sums of what `add` makes of every tile.
    pub(crate) fn sums<R: Real>(&self, x: View<'_>, tile: &mut [R], mut add: impl FnMut(&[R], &mut [R])) -> Vec<f64> {
        let (mut sums, mut part) = (vec![0.0; self.c], vec![R::ZERO; self.c]);
        for start in (0..x.len()).step_by(TILE * self.c) {
            let rows = x.slice(start..(start + TILE * self.c).min(x.len())).widened(tile);
            part.fill(R::ZERO);
            add(rows, &mut part);
            sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part.to_f64());
        }
        sums
    }

    pub(crate) fn statistics<R: Real>(&self, x: View<'_>, tile: &mut [R]) -> Statistics<R> {
        let n = self.n_shared();
        let sums = self.shared(self.sums(x, tile, add_column_sums));
        let mean: Vec<f64> = sums.into_iter().map(|sum| sum / n).collect();
        let centre: Vec<R> = mean.iter().map(|&mean| R::from_f64(mean)).collect();
        let above: Vec<f64> = mean.iter().zip(&centre).map(|(mean, centre)| mean - centre.to_f64()).collect();
        let squares = self.shared(self.sums(x, tile, |rows, sums| add_squares(rows, &centre, sums)));
        let var = squares.iter().zip(&above).map(|(squares, above)| squares / n - above * above);
        let rstd = var.map(|var| 1.0 / (var.max(0.0) + EPS).sqrt()).collect();
        Statistics { centre, above, rstd }
    }
}

/// `sums[c] += sum over rows of (x[row, c] - centre[c])^2`
fn add_squares<R: Real>(x: &[R], centre: &[R], sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for row in x.chunks_exact(centre.len()) {
                for ((sum, x), centre) in sums.iter_mut().zip(row).zip(centre) {
                    let d = *x - *centre;
                    *sum += d * d;
                }
            }
        },
    );
}

/// `sums[c] += sum over rows of g[row, c] (x[row, c] - centre[c])`
pub(crate) fn add_products<R: Real>(x: &[R], g: &[R], centre: &[R], sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (x, g) in x.chunks_exact(centre.len()).zip(g.chunks_exact(centre.len())) {
                for ((sum, (x, g)), centre) in sums.iter_mut().zip(x.iter().zip(g)).zip(centre) {
                    *sum += *g * (*x - *centre);
                }
            }
        },
    );
}

pub(super) fn forward(
    device: &Device,
    dims: &Dims,
    x: &Tensor,
    affine: Option<[&Tensor; 2]>,
    y: &mut Tensor,
) -> Result<()> {
    let accumulate = y.precision().accumulate();
    let scratch = device.scratch(2 * TILE * dims.c, accumulate.bytes());
    if !device.launches() {
        return Ok(());
    }
    let weights =
        affine.map(|it| Ok::<_, crate::Error>([it[0].to_vec::<f64>()?, it[1].to_vec::<f64>()?])).transpose()?;
    let x = x.view()?;
    let tasks = y.view_mut()?.chunks((dims.rows * dims.c).max(1));
    device.run(|| {
        with_real!(accumulate, R => tasks.into_par_iter().enumerate().for_each(|(b, mut y)| {
            scratch.with::<R, _>(|scratch| {
                let (tile, out) = scratch.split_at_mut(TILE * dims.c);
                let x = x.slice(dims.sample(b));
                let it = dims.statistics::<R>(x, tile);
                // y = (x - centre) factor + shift
                let (mut factor, mut shift) = (Vec::with_capacity(dims.c), Vec::with_capacity(dims.c));
                for c in 0..dims.c {
                    let [w, b] = weights.as_ref().map_or([1.0, 0.0], |[w, b]| [w[c], b[c]]);
                    factor.push(R::from_f64(it.rstd[c] * w));
                    shift.push(R::from_f64(b - it.above[c] * it.rstd[c] * w));
                }
                for start in (0..x.len()).step_by(TILE * dims.c) {
                    let range = start..(start + TILE * dims.c).min(x.len());
                    let rows = x.slice(range.clone()).widened(tile);
                    y.slice_mut(range).fill(out, |y| scale_rows(rows, &it.centre, [&factor, &shift], y));
                }
            });
        }));
    });
    Ok(())
}

/// `y[row, c] = (x[row, c] - centre[c]) factor[c] + shift[c]`
pub(crate) fn scale_rows<R: Real>(x: &[R], centre: &[R], [factor, shift]: [&[R]; 2], y: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (x, y) in x.chunks_exact(centre.len()).zip(y.chunks_exact_mut(centre.len())) {
                let terms = centre.iter().zip(factor.iter().zip(shift));
                for ((y, x), (centre, (factor, shift))) in y.iter_mut().zip(x).zip(terms) {
                    *y = (*x - *centre) * *factor + *shift;
                }
            }
        },
    );
}

pub(super) fn backward(
    device: &Device,
    dims: &Dims,
    [x, g]: [&Tensor; 2],
    weight: Option<&Tensor>,
    gx: &mut Tensor,
) -> Result<[Vec<f64>; 2]> {
    let c = dims.c;
    let accumulate = gx.precision().accumulate();
    let scratch = device.scratch(3 * TILE * c, accumulate.bytes());
    let mut sums = [vec![0.0; c], vec![0.0; c]];
    if !device.launches() {
        return Ok(sums);
    }
    let w = weight.map(|w| w.to_vec::<f64>()).transpose()?.unwrap_or_else(|| vec![1.0; c]);
    let (x, g) = (x.view()?, g.view()?);
    let tasks = gx.view_mut()?.chunks((dims.rows * c).max(1));
    let of_samples = device.run(|| {
        with_real!(accumulate, R => tasks.into_par_iter().enumerate().map(|(b, mut gx)| {
            scratch.with::<R, _>(|scratch| {
                let (x_tile, scratch) = scratch.split_at_mut(TILE * c);
                let (g_tile, out) = scratch.split_at_mut(TILE * c);
                let (x, g) = (x.slice(dims.sample(b)), g.slice(dims.sample(b)));
                let it = dims.statistics::<R>(x, x_tile);
                let g_sums = dims.sums(g, g_tile, add_column_sums::<R>);
                let mut start = 0;
                let products = dims.sums(x, x_tile, |rows, sums| {
                    let g = g.slice(start..start + rows.len()).widened(&mut *g_tile);
                    start += rows.len();
                    add_products(rows, g, &it.centre, sums);
                });
                // Sums of g x_hat.
                let g_x_hat: Vec<f64> =
                    (0..c).map(|i| it.rstd[i] * (products[i] - it.above[i] * g_sums[i])).collect();
                let weighted = |sums: &[f64]| dims.shared(sums.iter().zip(&w).map(|(sum, w)| sum * w).collect());
                let (sum, product) = (weighted(&g_sums), weighted(&g_x_hat));
                // gx = rstd (w g - sum / n - x_hat product / n), with x_hat = rstd (x - centre - above)
                let n = dims.n_shared();
                let slope: Vec<R> = (0..c).map(|i| R::from_f64(-it.rstd[i] * it.rstd[i] * product[i] / n)).collect();
                let factor: Vec<R> = (0..c).map(|i| R::from_f64(it.rstd[i] * w[i])).collect();
                let shift: Vec<R> = (0..c)
                    .map(|i| R::from_f64(it.rstd[i] * (it.rstd[i] * it.above[i] * product[i] - sum[i]) / n))
                    .collect();
                for start in (0..x.len()).step_by(TILE * c) {
                    let range = start..(start + TILE * c).min(x.len());
                    let (x, g) = (x.slice(range.clone()).widened(&mut *x_tile), g.slice(range.clone()).widened(&mut *g_tile));
                    gx.slice_mut(range).fill(out, |gx| {
                        scale_rows(x, &it.centre, [&slope, &shift], gx);
                        add_gated(gx, &factor, g);
                    });
                }
                [g_x_hat, g_sums]
            })
        }).collect::<Vec<_>>())
    });
    for of_sample in of_samples.unwrap_or_default() {
        for (sums, of_sample) in sums.iter_mut().zip(of_sample) {
            sums.iter_mut().zip(of_sample).for_each(|(sum, value)| *sum += value);
        }
    }
    Ok(sums)
}
