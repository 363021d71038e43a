//! Functions of jets, tile by tile: a tile holds the same elements of the value and of every tangent.

use crate::Result;
use crate::pointwise::on_the_host;
use halfmode_precision::DType;
use halfmode_tensor::{Device, Purpose, Real, Shape, Tensor, ViewMut};
use rayon::prelude::*;

/// Elements of a tile.
const TILE: usize = 512;

/// The stacked rows of a tile, each `len` long.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, R> {
    pub(super) all: &'a [R],
    pub(super) len: usize,
}

impl<'a, R> Rows<'a, R> {
    /// The value.
    pub(super) fn value(&self) -> &'a [R] {
        &self.all[..self.len]
    }

    /// The tangents.
    pub(super) fn tangents(&self) -> std::slice::ChunksExact<'a, R> {
        self.all[self.len..].chunks_exact(self.len)
    }
}

/// A jet of `shape`, rows of `n` elements each, that `work` writes from the same elements of every row of `inputs`.
pub(super) fn map_jets<R: Real, const N: usize>(
    device: &Device,
    inputs: [&Tensor; N],
    (shape, dtype, n): (&Shape, DType, usize),
    work: impl Fn([Rows<'_, R>; N], &mut [R]) + Sync,
) -> Result<Tensor> {
    on_the_host(device)?;
    let mut out = device.alloc_unwritten(shape.clone(), dtype, Purpose::Activation)?;
    let rows = |x: &Tensor| x.numel() / n.max(1);
    let n_rows: usize = inputs.iter().map(|x| rows(x)).sum();
    let scratch = device.scratch(TILE * (n_rows + 2 * rows(&out)), R::PRECISION.bytes());
    if device.launches() && out.numel() > 0 {
        let views = inputs.map(Tensor::view);
        let views: Vec<_> = views.into_iter().collect::<std::result::Result<_, _>>()?;
        let mut tasks: Vec<Vec<ViewMut<'_>>> = (0..n.div_ceil(TILE)).map(|_| Vec::new()).collect();
        for row in out.view_mut()?.chunks(n) {
            row.chunks(TILE).into_iter().zip(&mut tasks).for_each(|(piece, task)| task.push(piece));
        }
        device.run(|| {
            tasks.into_par_iter().enumerate().for_each(|(idx, mut pieces)| {
                scratch.with::<R, _>(|scratch| {
                    let (first, len) = (idx * TILE, pieces[0].len());
                    let (out, mut rest) = scratch.split_at_mut(pieces.len() * len);
                    let tiles = std::array::from_fn(|idx| {
                        let view = views[idx];
                        let n_rows = view.len() / n;
                        let (own, left) = std::mem::take(&mut rest).split_at_mut(n_rows * len);
                        rest = left;
                        for (row, own) in own.chunks_exact_mut(len).enumerate() {
                            view.slice(row * n + first..row * n + first + len).widen(own);
                        }
                        Rows { all: own, len }
                    });
                    work(tiles, out);
                    pieces.iter_mut().zip(out.chunks_exact(len)).for_each(|(piece, out)| piece.narrow(out));
                });
            });
        });
    }
    Ok(out)
}
