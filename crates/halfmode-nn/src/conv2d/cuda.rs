//! Convolutions on a GPU: halves with channels in eights on tensor cores, f32 with channels in fours as `singles.rs` has
//! it, anything else, such as very large windows, by a kernel for all.

use super::cpu::Correlation;
use super::patches::{BESIDE, DEPTH, ROW, Tile, tile_columns};
use super::singles::Singles;
use super::{Conv2d, ConvKind};
use crate::Result;
use crate::cuda_rows::{RowKernels, stored};
use crate::pointwise::{rows_of, storage};
use halfmode_autograd::Cx;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};

const ANY: Source = Source { name: "conv2d", text: include_str!("../../kernels/conv2d.cu") };
const HALVES: Source = Source { name: "conv2d_halves", text: include_str!("../../kernels/conv2d_halves.cu") };

/// Threads of a block; rows and columns of the tiles without tensor cores.
const THREADS: usize = 256;
const TILE: usize = 64;
/// Blocks that sums over all points are split among, and points of a split at least: one order of sums on every GPU.
const BLOCKS: usize = 264;
const POINTS: usize = 256;

/// What becomes of sums before they are stored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Finish<'a> {
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) rectifies: bool,
    pub(crate) negates: bool,
}

/// What is summed over the points of each tile and sample beside the convolution.
pub(crate) enum TileSums<'a> {
    Nothing,
    /// Moments of what is stored.
    Moments(&'a mut Tensor),
    /// What is stored, and its products with the norm of a field of these statistics.
    Products {
        hidden: &'a Tensor,
        stats: &'a Tensor,
        parts: &'a mut Tensor,
    },
}

/// A correlation on tensor cores.
#[derive(Clone, Copy)]
pub(crate) struct Halves {
    pub(crate) sizes: Correlation,
    precision: Precision,
    /// Tiles of the convolution; `None` for windows too large.
    tile: Option<Tile>,
}

impl Correlation {
    /// What kernels are told.
    pub(super) fn numbers(&self) -> Vec<Arg<'static>> {
        let ([x1, x2], [y1, y2], [k1, k2]) = (self.x, self.y, self.kernel);
        let mut numbers = [x1, x2, self.c_x, y1, y2, self.c_y, k1, k2].map(|n| Arg::I32(n as i32)).to_vec();
        numbers.extend(self.pad.map(|n| Arg::I32(n as i32)));
        numbers
    }

    pub(crate) fn n_points(&self) -> usize {
        self.y[0] * self.y[1]
    }

    /// Rows of a weight's gradient.
    pub(super) fn n_places(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.c_x
    }

    /// Kernels count points, the scalars of a sample and the way to the far end of a window in 32 bits; what is
    /// 2^24 rows away is outside to them.
    pub(crate) fn check(&self) -> Result<()> {
        let product = |factors: &[usize]| factors.iter().fold(1usize, |n, &factor| n.saturating_mul(factor));
        let ([x1, x2], [y1, y2], [k1, k2]) = (self.x, self.y, self.kernel);
        let [far1, far2] = [0, 1].map(|axis| self.pad[axis].unsigned_abs().saturating_add(self.kernel[axis]));
        let sizes = [
            product(&[self.batch, y1, y2]),
            product(&[x1, x2, self.c_x]),
            product(&[k1, k2, self.c_x]),
            product(&[far1, x2, self.c_x]),
            product(&[far2, self.c_x]),
            self.c_y,
        ];
        match sizes.iter().all(|&n| n < 1 << 30) && y1.max(k1) < 1 << 24 {
            true => Ok(()),
            false => Err(halfmode_tensor::Error::OnGpu.into()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batch * self.n_points() * self.c_y * self.c_x == 0
    }
}

impl Halves {
    /// Where the kernels serve this format and these channels.
    pub(crate) fn new(sizes: Correlation, precision: Precision) -> Option<Self> {
        let is_half = matches!(precision, Precision::F16 | Precision::Bf16);
        let fits = [sizes.c_x, sizes.c_y].iter().all(|&c| c > 0 && c.is_multiple_of(8));
        let tile = sizes.tile(tile_columns(sizes.c_y));
        (is_half && fits && sizes.batch > 0).then_some(Halves { sizes, precision, tile })
    }

    /// Whether the convolution is served, too.
    pub(crate) fn convolves(&self) -> bool {
        self.tile.is_some()
    }

    /// Channels of a tile.
    fn columns(&self) -> usize {
        tile_columns(self.sizes.c_y)
    }

    /// Points of a block.
    ///
    /// # Errors
    /// [`halfmode_tensor::Error::OnGpu`] where it does not convolve.
    pub(crate) fn tile(&self) -> Result<Tile> {
        self.tile.ok_or_else(|| halfmode_tensor::Error::OnGpu.into())
    }

    /// Tiles of all samples; a tile is of one.
    fn n_tiles(&self) -> Result<usize> {
        Ok(self.sizes.batch * self.sizes.n_tiles(self.tile()?))
    }

    /// Room for the sums of all tiles.
    pub(crate) fn parts(&self, device: &Device) -> Result<Tensor> {
        let dtype = DType::real(Precision::F32);
        Ok(device.alloc_unwritten([self.n_tiles()?, 3, self.sizes.c_y], dtype, Purpose::Workspace)?)
    }

    fn defines(&self, bias: Precision, turned: bool, sums: usize) -> Vec<String> {
        let types = [define("T", self.precision), define("P", bias)];
        let numbers = [define("TN", self.columns()), define("TURNED", usize::from(turned)), define("SUMS", sums)];
        types.into_iter().chain(numbers).collect()
    }

    /// Writes `y`; `turned` reads the weight as that of the transpose. All fields and the weight are halves.
    pub(crate) fn convolve(
        &self,
        device: &Device,
        [x, w]: [&Tensor; 2],
        turned: bool,
        finish: Finish<'_>,
        y: &mut Tensor,
        sums: TileSums<'_>,
    ) -> Result<()> {
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let (which, beside) = match sums {
            TileSums::Nothing => (0, [Arg::Null; 3]),
            TileSums::Moments(parts) => (1, [Arg::Null, Arg::Null, parts.output()?]),
            TileSums::Products { hidden, stats, parts } => (2, [hidden.input()?, stats.input()?, parts.output()?]),
        };
        let (columns, tile) = (self.columns(), self.tile()?);
        // Before it is stored, the tile is in the same place, and sums of its eighths of a warp behind it.
        let stored = tile.rows() * (columns + BESIDE) * self.precision.bytes();
        let sums = if which == 0 { 0 } else { 2 * 8 * THREADS * Precision::F32.bytes() };
        let shared = self.sizes.shared(tile, columns, turned).max(stored + sums);
        let blocks = [self.n_tiles()?, self.sizes.c_y.div_ceil(columns), 1];
        let bias = finish.bias.map_or(Ok(Arg::Null), Tensor::input)?;
        let mut args = vec![x.input()?, w.input()?, bias, y.output()?];
        args.extend(beside);
        args.extend(self.sizes.numbers());
        args.extend(tile.numbers(self.sizes.n_tiles(tile)));
        args.extend([finish.rectifies, finish.negates].map(|it| Arg::I32(it.into())));
        let defines = self.defines(finish.bias.map_or(self.precision, Tensor::precision), turned, which);
        Ok(cuda.launch(HALVES, &defines, "convolve", Grid { blocks, threads: THREADS, shared }, &args)?)
    }

    /// The gradient by the weight of the sum over pairs of `<image, K field>`, one or two of them, in f32.
    pub(crate) fn weight_gradient(&self, device: &Device, shape: &Shape, pairs: &[[&Tensor; 2]]) -> Result<Tensor> {
        let (columns, rows) = (self.columns(), if self.columns() == 64 { 192 } else { 128 });
        let tiles = [self.sizes.n_places().div_ceil(rows), self.sizes.c_y.div_ceil(columns)];
        let points = pairs.len() * self.sizes.batch * self.sizes.n_points();
        let splits = n_splits(tiles, points);
        let (mut sums, mut out) = split_sums(device, splits, shape, Precision::F32)?;
        let (Some(cuda), Some(first)) = (device.as_cuda(), pairs.first()) else { return Ok(out) };
        let both = [first, pairs.get(1).unwrap_or(first)];
        let mut args = both.into_iter().flatten().map(|it| it.input()).collect::<std::result::Result<Vec<_>, _>>()?;
        args.extend([sums.output()?, Arg::I32(pairs.len() as i32), Arg::I32(self.sizes.batch as i32)]);
        args.extend(self.sizes.numbers());
        let shared = DEPTH * ROW * (rows + columns + 2 * BESIDE);
        let grid = Grid { blocks: [tiles[0], tiles[1], splits], threads: THREADS, shared };
        cuda.launch(HALVES, &self.defines(self.precision, false, 0), "weight_gradient", grid, &args)?;
        add_splits(cuda, self.precision, &sums, splits, &mut out)?;
        Ok(out)
    }
}

/// Splits of so many points for a gradient of so many tiles of a weight.
pub(super) fn n_splits([down, across]: [usize; 2], points: usize) -> usize {
    (BLOCKS / (down * across)).clamp(1, points.div_ceil(POINTS))
}

/// Room for the gradients of all splits, and for their sum.
pub(super) fn split_sums(
    device: &Device,
    splits: usize,
    shape: &Shape,
    precision: Precision,
) -> Result<(Tensor, Tensor)> {
    let dtype = DType::real(precision);
    let sums = device.alloc_unwritten([splits, shape.numel()], dtype, Purpose::Workspace)?;
    Ok((sums, device.alloc_unwritten(shape.clone(), dtype, Purpose::Grad)?))
}

fn any(stored: Precision, weight: Precision, bias: Precision) -> [String; 3] {
    [define("T", stored), define("W", weight), define("P", bias)]
}

/// The gradients of all splits, summed.
pub(super) fn add_splits(
    cuda: &CudaDevice,
    stored: Precision,
    sums: &Tensor,
    splits: usize,
    out: &mut Tensor,
) -> Result<()> {
    let n = out.numel();
    let defines = any(stored, stored, stored);
    let args = [sums.input()?, out.output()?, Arg::I32(splits as i32), count(n)];
    Ok(cuda.launch(ANY, &defines, "sum_splits", cuda.grid(n), &args)?)
}

/// The gradient by the weight of `<image, K field>`, in accumulators.
fn weight_gradient(device: &Device, sizes: Correlation, shape: &Shape, [x, g]: [&Tensor; 2]) -> Result<Tensor> {
    let stored = x.precision();
    let tiles = [sizes.n_places().div_ceil(TILE), sizes.c_y.div_ceil(TILE)];
    let points = sizes.batch * sizes.n_points();
    let splits = (2 * BLOCKS / (tiles[0] * tiles[1]).max(1)).clamp(1, points.div_ceil(POINTS).max(1));
    let (mut sums, mut out) = split_sums(device, splits, shape, stored.accumulate())?;
    let Some(cuda) = device.as_cuda() else { return Ok(out) };
    let mut args = vec![x.input()?, g.input()?, sums.output()?, Arg::I32(sizes.batch as i32)];
    args.extend(sizes.numbers());
    let grid = Grid { blocks: [tiles[0], tiles[1], splits], threads: THREADS, shared: 0 };
    cuda.launch(ANY, &any(stored, stored, stored), "weight_gradient", grid, &args)?;
    add_splits(cuda, stored, &sums, splits, &mut out)?;
    Ok(out)
}

pub(super) fn run(
    conv: Conv2d,
    cx: &Cx,
    sizes: Correlation,
    [x, w]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    sizes.check()?;
    let turned = conv.kind == ConvKind::Transposed;
    let mut y = cx.device.alloc_unwritten(sizes.output_shape(), storage(cx), Purpose::Activation)?;
    let x = stored(cx, x)?;
    if let Some(halves) = Halves::new(sizes, x.precision()).filter(Halves::convolves) {
        let finish = Finish { bias, ..Finish::default() };
        halves.convolve(&cx.device, [&x, &stored(cx, w)?], turned, finish, &mut y, TileSums::Nothing)?;
        return Ok(y);
    }
    let operands: Vec<&Tensor> = [&x, w].into_iter().chain(bias).collect();
    if let Some(singles) = Singles::new(cx, sizes, &operands).filter(Singles::convolves) {
        singles.convolve([&x, w], turned, bias, &mut y)?;
        return Ok(y);
    }
    let Some(cuda) = cx.device.as_cuda() else { return Ok(y) };
    if sizes.is_empty() {
        return Ok(cx.device.alloc(sizes.output_shape(), storage(cx), Purpose::Activation)?);
    }
    let defines = any(x.precision(), w.precision(), bias.map_or(w.precision(), Tensor::precision));
    let bias = bias.map_or(Ok(Arg::Null), Tensor::input)?;
    let mut args = vec![x.input()?, w.input()?, bias, y.output()?, Arg::I32(sizes.batch as i32)];
    args.extend(sizes.numbers());
    args.push(Arg::I32(turned.into()));
    let blocks = [(sizes.batch * sizes.n_points()).div_ceil(TILE), sizes.c_y.div_ceil(TILE), 1];
    cuda.launch(ANY, &defines, "convolve", Grid { blocks, threads: THREADS, shared: 0 }, &args)?;
    Ok(y)
}

/// The gradient by the weight for a field and the gradient by its image.
pub(super) fn weight_of(cx: &Cx, sizes: Correlation, shape: &Shape, [field, image]: [&Tensor; 2]) -> Result<Tensor> {
    sizes.check()?;
    let (field, image) = (stored(cx, field)?, stored(cx, image)?);
    if sizes.is_empty() {
        return Ok(cx.device.alloc(shape.clone(), DType::real(field.precision().accumulate()), Purpose::Grad)?);
    }
    if let Some(halves) = Halves::new(sizes, field.precision()) {
        return halves.weight_gradient(&cx.device, shape, &[[&field, &image]]);
    }
    match Singles::new(cx, sizes, &[&field, &image]) {
        Some(singles) => singles.weight_gradient(shape, [&field, &image]),
        None => weight_gradient(&cx.device, sizes, shape, [&field, &image]),
    }
}

/// The sum of a gradient over all points.
pub(super) fn bias_of(cx: &Cx, g: &Tensor) -> Result<Tensor> {
    let (rows, channels) = rows_of(g);
    let kernels = RowKernels::new(cx, rows, cx.policy.pointwise.storage);
    kernels.column_sums((&stored(cx, g)?.into(), channels), &Shape::from([channels]))
}
