//! Convolutions of f32 on a GPU, for channels in fours: in TF32 on tensor cores where the policy says so, else without.

use super::cpu::Correlation;
use super::cuda::{add_splits, n_splits, split_sums};
use super::patches::{BESIDE, DEPTH, ROW, Tile, tile_columns};
use crate::Result;
use halfmode_autograd::Cx;
use halfmode_precision::{Compute, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, define};
use halfmode_tensor::{Device, Shape, Tensor};

const KERNELS: Source = Source { name: "conv2d_singles", text: include_str!("../../kernels/conv2d_singles.cu") };

/// Threads of a block.
const THREADS: usize = 256;

/// A correlation of f32 numbers.
#[derive(Clone, Copy)]
pub(super) struct Singles<'a> {
    device: &'a Device,
    compute: Compute,
    sizes: Correlation,
    /// A block's points; `None` where the convolution is left to the kernel for all, as windows are too large, or fields so
    /// small that three quarters of their tiles would be empty.
    tile: Option<Tile>,
}

impl<'a> Singles<'a> {
    /// Where the kernels serve these operands.
    pub(super) fn new(cx: &'a Cx, sizes: Correlation, operands: &[&Tensor]) -> Option<Self> {
        let single = operands.iter().all(|it| it.precision() == Precision::F32);
        let fits = [sizes.c_x, sizes.c_y].iter().all(|&c| c > 0 && c.is_multiple_of(4));
        let filled = |tile: &Tile| sizes.n_tiles(*tile) * tile.rows() <= 4 * sizes.n_points();
        let tile = sizes.tile(tile_columns(sizes.c_y)).filter(filled);
        let serves = single && fits && !sizes.is_empty();
        serves.then_some(Singles { device: &cx.device, compute: cx.policy.compute, sizes, tile })
    }

    /// Whether the convolution is served, too.
    pub(super) fn convolves(&self) -> bool {
        self.tile.is_some()
    }

    /// Channels of a tile.
    fn columns(&self) -> usize {
        tile_columns(self.sizes.c_y)
    }

    fn defines(&self, turned: bool) -> [String; 3] {
        let tf32 = self.compute == Compute::Tf32;
        [("TF32", usize::from(tf32)), ("TN", self.columns()), ("TURNED", usize::from(turned))]
            .map(|(name, it)| define(name, it))
    }

    /// Writes `y`; `turned` reads the weight as that of the transpose.
    pub(super) fn convolve(
        &self,
        [x, w]: [&Tensor; 2],
        turned: bool,
        bias: Option<&Tensor>,
        y: &mut Tensor,
    ) -> Result<()> {
        let Some(cuda) = self.device.as_cuda() else { return Ok(()) };
        let (columns, tile) = (self.columns(), self.tile.ok_or(halfmode_tensor::Error::OnGpu)?);
        let n_tiles = self.sizes.n_tiles(tile);
        let blocks = [self.sizes.batch * n_tiles, self.sizes.c_y.div_ceil(columns), 1];
        let bias = bias.map_or(Ok(Arg::Null), Tensor::input)?;
        let mut args = vec![x.input()?, w.input()?, bias, y.output()?];
        args.extend(self.sizes.numbers());
        args.extend(tile.numbers(n_tiles));
        let shared = self.sizes.shared(tile, columns, turned);
        let grid = Grid { blocks, threads: THREADS, shared };
        Ok(cuda.launch(KERNELS, &self.defines(turned), "convolve", grid, &args)?)
    }

    /// The gradient by the weight of `<image, K field>`.
    pub(super) fn weight_gradient(&self, shape: &Shape, [field, image]: [&Tensor; 2]) -> Result<Tensor> {
        let (columns, rows) = (self.columns(), if self.columns() == 64 { 192 } else { 128 });
        let tiles = [self.sizes.n_places().div_ceil(rows), self.sizes.c_y.div_ceil(columns)];
        let splits = n_splits(tiles, self.sizes.batch * self.sizes.n_points());
        let (mut sums, mut out) = split_sums(self.device, splits, shape, Precision::F32)?;
        let Some(cuda) = self.device.as_cuda() else { return Ok(out) };
        let mut args = vec![field.input()?, image.input()?, sums.output()?, Arg::I32(self.sizes.batch as i32)];
        args.extend(self.sizes.numbers());
        let shared = DEPTH * ROW * (rows + columns + 2 * BESIDE);
        let grid = Grid { blocks: [tiles[0], tiles[1], splits], threads: THREADS, shared };
        cuda.launch(KERNELS, &self.defines(false), "weight_gradient", grid, &args)?;
        add_splits(cuda, Precision::F32, &sums, splits, &mut out)?;
        Ok(out)
    }
}
