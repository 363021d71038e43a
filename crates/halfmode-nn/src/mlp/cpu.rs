//! The pointwise perceptron on the CPU: tiles of points whose hidden layer never leaves the cache.

use super::{Channels, Layout, Plan};
use crate::Result;
use crate::dense_weights::{transpose_weight, widen_weights};
use crate::partial::{Partial, part_ranges, split_sums};
use crate::pointwise::accumulators;
use crate::rows::{add_bias, add_column_sums, scale_by};
use halfmode_tensor::{Device, Mat, MatMut, Real, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;
use std::ops::Range;

/// Points per tile.
const TILE: usize = 128;

impl Layout {
    /// Points of one batch entry of a field whose channels are last.
    fn rows<'a>(&self, x: View<'a>, (b, points): &(usize, Range<usize>)) -> View<'a> {
        let start = (b * self.points() + points.start) * self.channels;
        x.slice(start..start + points.len() * self.channels)
    }

    /// Widens points of one batch entry into `tile`; rows of the tile are `stride` apart. Channels
    /// first come out as columns, so the tile is described by (row, col) strides.
    fn load<R: Real>(&self, x: View<'_>, (b, points): (usize, Range<usize>), tile: &mut [R]) {
        match self.channels_at {
            Channels::Last => {
                let len = points.len() * self.channels;
                self.rows(x, &(b, points)).widen(&mut tile[..len]);
            }
            Channels::First => {
                for c in 0..self.channels {
                    let start = (b * self.channels + c) * self.points() + points.start;
                    x.slice(start..start + points.len()).widen(&mut tile[c * points.len()..(c + 1) * points.len()]);
                }
            }
        }
    }

    /// Points of one batch entry as accumulators: borrowed where the field stores them so, else widened into
    /// `tile` as [`Layout::load`] does.
    fn loaded<'a, R: Real>(&self, x: View<'a>, at: (usize, Range<usize>), tile: &'a mut [R]) -> &'a [R] {
        if self.channels_at == Channels::Last
            && let Some(rows) = R::direct(self.rows(x, &at))
        {
            return rows;
        }
        let len = at.1.len() * self.channels;
        self.load(x, at, tile);
        &tile[..len]
    }

    /// (row, col) strides of a loaded tile of `n` points.
    fn strides(&self, n: usize, channels: usize) -> (usize, usize) {
        match self.channels_at {
            Channels::Last => (channels, 1),
            Channels::First => (1, n),
        }
    }

    /// Mutable pieces of the field, one list per (batch entry, tile of points), in that order.
    fn tiles_mut<'a>(&self, x: ViewMut<'a>) -> Vec<Vec<ViewMut<'a>>> {
        let n_tiles = self.points().div_ceil(TILE);
        match self.channels_at {
            Channels::Last => {
                let entries = x.chunks((self.points() * self.channels).max(1));
                entries
                    .into_iter()
                    .flat_map(|entry| entry.chunks(TILE * self.channels))
                    .map(|piece| vec![piece])
                    .collect()
            }
            Channels::First => {
                let mut tiles: Vec<Vec<ViewMut<'a>>> = (0..self.batch * n_tiles).map(|_| Vec::new()).collect();
                for (row, line) in x.chunks(self.points().max(1)).into_iter().enumerate() {
                    for (tile, piece) in line.chunks(TILE).into_iter().enumerate() {
                        tiles[row / self.channels * n_tiles + tile].push(piece);
                    }
                }
                tiles
            }
        }
    }
}

/// Lets `work` write a tile, laid out as [`Layout::load`] leaves it, and rounds it into its pieces. One piece
/// of accumulators is written in place.
fn store<R: Real>(pieces: &mut [ViewMut<'_>], tile: &mut [R], work: impl FnOnce(&mut [R])) {
    if let [piece] = pieces {
        return piece.fill(tile, work);
    }
    work(tile);
    let mut start = 0;
    for piece in pieces {
        let len = piece.len();
        piece.narrow(&tile[start..start + len]);
        start += len;
    }
}

/// Writes the coordinates of points as the columns after `channels` of a tile.
fn embed<R: Real>(grid: &[usize], points: Range<usize>, tile: &mut [R], (row, col): (usize, usize), channels: usize) {
    for (idx, point) in points.enumerate() {
        let mut rest = point;
        for axis in (0..grid.len()).rev() {
            tile[idx * row + (channels + axis) * col] = R::from_f64((rest % grid[axis]) as f64 / grid[axis] as f64);
            rest /= grid[axis];
        }
    }
}

impl Plan {
    fn n_tiles(&self) -> usize {
        self.x.batch * self.x.points().div_ceil(TILE)
    }

    /// Batch entry and points of a tile.
    fn tile(&self, idx: usize) -> (usize, Range<usize>) {
        let (points, n_tiles) = (self.x.points(), self.x.points().div_ceil(TILE));
        let start = idx % n_tiles * TILE;
        (idx / n_tiles, start..(start + TILE).min(points))
    }

    /// A tile of the input with its coordinates, as accumulators.
    ///
    /// A channels-last tile is widened to rows of `c_first`; when coordinates follow, the rows are
    /// spread from the end so that nothing is overwritten before it has moved.
    fn load<'a, R: Real>(&self, x: View<'a>, at: (usize, Range<usize>), tile: &'a mut [R]) -> Mat<'a, R> {
        let (n, c) = (at.1.len(), self.x.channels);
        let (row, col) = self.x.strides(n, self.c_first);
        if self.c_first == c {
            return Mat { data: self.x.loaded(x, at, tile), row, col };
        }
        self.x.load(x, at.clone(), tile);
        if self.x.channels_at == Channels::Last {
            for row in (0..n).rev() {
                tile.copy_within(row * c..(row + 1) * c, row * self.c_first);
            }
        }
        embed(&self.x.grid, at.1, tile, (row, col), c);
        Mat { data: tile, row, col }
    }
}

/// The four weights as accumulators.
struct DenseWeights {
    wide: Vec<Tensor>,
    w1_t: Tensor,
    w2_t: Tensor,
}

impl DenseWeights {
    fn new(plan: &Plan, inputs: &[&Tensor; 5]) -> Result<Self> {
        let wide = widen_weights(plan.accumulate, &inputs[1..])?;
        Ok(DenseWeights { w1_t: transpose_weight(&wide[0])?, w2_t: transpose_weight(&wide[2])?, wide })
    }
}

/// Their scalars; `_t` is transposed.
struct Weights<'a, R> {
    w1: &'a [R],
    w1_t: &'a [R],
    w2_t: &'a [R],
    b1: &'a [R],
    w2: &'a [R],
    b2: &'a [R],
}

pub(super) fn forward(device: &Device, plan: &Plan, inputs: &[&Tensor; 5], y: &mut Tensor) -> Result<()> {
    let c_out = plan.y.channels;
    let scratch = device.scratch(TILE * (plan.c_first + plan.c_hidden + c_out), plan.accumulate.bytes());
    let wide = DenseWeights::new(plan, inputs)?;
    if device.launches() {
        let x_view = inputs[0].view()?;
        let tasks = plan.y.tiles_mut(y.view_mut()?);
        with_real!(plan.accumulate, R => {
            let w = weights::<R>(&wide)?;
            device.run(|| tasks.into_par_iter().enumerate().for_each(|(idx, mut pieces)| {
                scratch.with::<R, _>(|scratch| {
                    let at = plan.tile(idx);
                    let n = at.1.len();
                    let (x, scratch) = scratch.split_at_mut(TILE * plan.c_first);
                    let (h, y) = scratch.split_at_mut(TILE * plan.c_hidden);
                    let (h, y) = (&mut h[..n * plan.c_hidden], &mut y[..n * c_out]);
                    let x = plan.load(x_view, at, x);
                    hidden(plan, x, &w, h);
                    R::gelu(h);
                    let (row, col) = plan.y.strides(n, c_out);
                    store(&mut pieces, y, |y| {
                        let w2 = Mat::rows(w.w2_t, c_out);
                        let (h, out) = (Mat::rows(h, plan.c_hidden), MatMut { data: &mut *y, row, col });
                        R::gemm((n, c_out, plan.c_hidden), h, w2, out, R::ZERO, R::ONE);
                        match plan.y.channels_at {
                            Channels::Last => add_bias(y, w.b2),
                            Channels::First => y.chunks_exact_mut(n).zip(w.b2).for_each(|(y, b)| y.iter_mut().for_each(|y| *y += *b)),
                        }
                    });
                });
            }));
        });
    }
    Ok(())
}

pub(super) fn backward(
    device: &Device,
    plan: &Plan,
    inputs: &[&Tensor; 5],
    grad: Tensor,
    gx: Option<&mut Tensor>,
) -> Result<Vec<Tensor>> {
    let (c_out, c_first, c_hidden) = (plan.y.channels, plan.c_first, plan.c_hidden);
    let scratch_len = TILE * (2 * c_first + 3 * c_hidden + c_out);
    let scratch = device.scratch(scratch_len, plan.accumulate.bytes());
    let wide = DenseWeights::new(plan, inputs)?;
    let parts = part_ranges(plan.n_tiles(), 1);
    let lens = [c_hidden * c_first, c_hidden, c_out * c_hidden, c_out];
    let mut partial = Partial::new(device, parts.len(), plan.accumulate, &lens)?;
    if device.launches() {
        let (x_view, g_view) = (inputs[0].view()?, grad.view()?);
        let mut tiles = match gx {
            Some(gx) => plan.x.tiles_mut(gx.view_mut()?).into_iter().map(Some).collect(),
            None => (0..plan.n_tiles()).map(|_| None).collect::<Vec<_>>(),
        };
        let mut tasks = Vec::new();
        for (range, sums) in parts.iter().zip(partial.parts()?) {
            let rest = tiles.split_off(range.len().min(tiles.len()));
            tasks.push((range.clone(), std::mem::replace(&mut tiles, rest), sums));
        }
        with_real!(plan.accumulate, R => {
            let w = weights::<R>(&wide)?;
            device.run(|| tasks.into_par_iter().for_each(|(range, mut pieces, mut sums)| {
                scratch.with::<R, _>(|scratch| {
                    let mut sums = split_sums::<R>(&mut sums, &lens);
                    for (idx, pieces) in range.zip(&mut pieces) {
                        let at = plan.tile(idx);
                        backward_tile(plan, &w, (x_view, g_view), at, pieces.as_deref_mut(), &mut sums, scratch);
                    }
                });
            }));
        });
    }
    drop(grad);
    let shapes: Vec<&[usize]> = inputs[1..].iter().map(|w| &w.shape()[..]).collect();
    with_real!(plan.accumulate, R => partial.finish::<R>(device, &shapes))
}

/// `h = w_1 x + b_1`
fn hidden<R: Real>(plan: &Plan, x: Mat<'_, R>, w: &Weights<'_, R>, h: &mut [R]) {
    let n = h.len() / plan.c_hidden;
    R::gemm(
        (n, plan.c_hidden, plan.c_first),
        x,
        Mat::rows(w.w1_t, plan.c_hidden),
        MatMut::rows(h, plan.c_hidden),
        R::ZERO,
        R::ONE,
    );
    add_bias(h, w.b1);
}

fn backward_tile<R: Real>(
    plan: &Plan,
    w: &Weights<'_, R>,
    (x_view, g_view): (View<'_>, View<'_>),
    at: (usize, Range<usize>),
    pieces: Option<&mut [ViewMut<'_>]>,
    sums: &mut [&mut [R]],
    scratch: &mut [R],
) {
    let (c_out, c_first, c_hidden, n) = (plan.y.channels, plan.c_first, plan.c_hidden, at.1.len());
    let (x, scratch) = scratch.split_at_mut(TILE * c_first);
    let (gx, scratch) = scratch.split_at_mut(TILE * c_first);
    let (h, scratch) = scratch.split_at_mut(TILE * c_hidden);
    let (slope, scratch) = scratch.split_at_mut(TILE * c_hidden);
    let (gh, gy) = scratch.split_at_mut(TILE * c_hidden);
    let (h, slope, gh, gy) =
        (&mut h[..n * c_hidden], &mut slope[..n * c_hidden], &mut gh[..n * c_hidden], &mut gy[..n * c_out]);
    let x = plan.load(x_view, at.clone(), x);
    hidden(plan, x, w, h);
    R::gelu_both(h, slope);
    let gy = plan.y.loaded(g_view, at, gy);
    let (gy_row, gy_col) = plan.y.strides(n, c_out);
    let gy_mat = Mat { data: gy, row: gy_row, col: gy_col };
    let gy_t = Mat { data: gy, row: gy_col, col: gy_row };
    let [gw1, gb1, gw2, gb2] = sums else { return };
    R::gemm((c_out, c_hidden, n), gy_t, Mat::rows(h, c_hidden), MatMut::rows(gw2, c_hidden), R::ONE, R::ONE);
    match plan.y.channels_at {
        Channels::Last => add_column_sums(gy, gb2),
        Channels::First => {
            gy.chunks_exact(n).zip(gb2.iter_mut()).for_each(|(gy, sum)| gy.iter().for_each(|g| *sum += *g))
        }
    }
    R::gemm((n, c_hidden, c_out), gy_mat, Mat::rows(w.w2, c_hidden), MatMut::rows(gh, c_hidden), R::ZERO, R::ONE);
    scale_by(gh, slope);
    R::gemm((c_hidden, c_first, n), Mat::transposed(gh, c_hidden), x, MatMut::rows(gw1, c_first), R::ONE, R::ONE);
    add_column_sums(gh, gb1);
    if let Some(pieces) = pieces {
        // Only the data channels: coordinates want no gradient.
        let c = plan.x.channels;
        let (row, col) = plan.x.strides(n, c);
        store(pieces, &mut gx[..n * c], |gx| {
            let w1 = Mat { data: w.w1, row: c_first, col: 1 };
            let out = MatMut { data: gx, row, col };
            R::gemm((n, c, c_hidden), Mat::rows(gh, c_hidden), w1, out, R::ZERO, R::ONE);
        });
    }
}

fn weights<R: Real>(w: &DenseWeights) -> Result<Weights<'_, R>> {
    let scalars = |w| accumulators::<R>("pointwise_mlp", "weight", w);
    let [w1, b1, w2, b2] = [0, 1, 2, 3].map(|idx| scalars(&w.wide[idx]));
    Ok(Weights { w1: w1?, w1_t: scalars(&w.w1_t)?, w2_t: scalars(&w.w2_t)?, b1: b1?, w2: w2?, b2: b2? })
}
