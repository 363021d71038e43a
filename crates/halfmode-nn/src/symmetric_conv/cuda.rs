//! The symmetric layer on a GPU, for halves: products on tensor cores, and passes over the hidden field between them.

use super::SymmetricConv;
use crate::Result;
use crate::conv2d::cuda::{Finish, Halves, TileSums};
use crate::cuda_rows::stored;
use crate::pointwise::storage;
use halfmode_autograd::Cx;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, define};
use halfmode_tensor::{Purpose, Tensor};

const KERNELS: Source = Source { name: "symmetric_conv", text: include_str!("../../kernels/symmetric_conv.cu") };

/// Threads of a block of a pass over a field, and of one that sums parts.
const THREADS: usize = 256;
const SUM_THREADS: usize = 1024;
/// Channels that a block's threads take at most, and points of a thread at least.
const MAX_CHANNELS: usize = 2048;
const ROWS_PER_THREAD: usize = 8;
/// Samples: blocks along an axis of a grid.
const MAX_BATCH: usize = 65_535;
/// Blocks of all samples at most, so that few parts are summed.
const BLOCKS: usize = 1056;

/// The layer's kernels for one size.
pub(super) struct Fused<'a> {
    cx: &'a Cx,
    /// `K`, and `K^T` from its image.
    forward: Halves,
    transposed: Halves,
}

impl<'a> Fused<'a> {
    /// Where the kernels serve the policy's storage, these channels and windows; elsewhere the composition runs.
    pub(super) fn new(layer: SymmetricConv, cx: &'a Cx, [x, w, b]: [&Tensor; 3]) -> Result<Option<Self>> {
        let precision = cx.policy.pointwise.storage;
        let [forward, transposed] = layer.sizes(x, w, b)?;
        let small = [forward, transposed].iter().all(|it| it.check().is_ok());
        if !small || forward.c_y > MAX_CHANNELS || forward.batch > MAX_BATCH {
            return Ok(None);
        }
        let of = |sizes| Halves::new(sizes, precision).filter(Halves::convolves);
        let both = of(forward).zip(of(transposed));
        Ok(both.map(|(forward, transposed)| Fused { cx, forward, transposed }))
    }

    /// Channels of the hidden field.
    fn channels(&self) -> usize {
        self.forward.sizes.c_y
    }

    fn field(&self, like: &Tensor, purpose: Purpose) -> Result<Tensor> {
        Ok(self.cx.device.alloc_unwritten(like.shape().clone(), storage(self.cx), purpose)?)
    }

    fn launch(&self, entry: &str, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        let Some(cuda) = self.cx.device.as_cuda() else { return Ok(()) };
        let defines = [define("T", self.cx.policy.pointwise.storage)];
        Ok(cuda.launch(KERNELS, &defines, entry, grid, args)?)
    }

    /// Two numbers per sample and channel from sums over `halves`' tiles.
    fn finish(&self, entry: &str, parts: &Tensor, purpose: Purpose) -> Result<Tensor> {
        let (sizes, [t1, t2]) = (self.forward.sizes, self.forward.tile()?.extents());
        let dtype = DType::real(Precision::F32);
        let mut out = self.cx.device.alloc_unwritten([sizes.batch, 2, sizes.c_y], dtype, purpose)?;
        if self.cx.device.as_cuda().is_some() {
            let grid = Grid { blocks: [sizes.batch, sizes.c_y.div_ceil(32), 1], threads: SUM_THREADS, shared: 0 };
            let numbers = [sizes.y[0], sizes.y[1], t1, t2, sizes.c_y].map(|n| Arg::I32(n as i32));
            let args = [&[parts.input()?, out.output()?][..], &numbers].concat();
            self.launch(entry, grid, &args)?;
        }
        Ok(out)
    }

    /// Blocks of a pass over the hidden field, for each sample, and the sizes that its kernels are told.
    fn pass(&self) -> (Grid, [Arg<'static>; 2]) {
        let (sizes, rows) = (self.forward.sizes, THREADS / (self.channels() / 8));
        let parts = sizes.n_points().div_ceil(rows * ROWS_PER_THREAD).clamp(1, (BLOCKS / sizes.batch).max(1));
        let grid = Grid { blocks: [parts, sizes.batch, 1], threads: THREADS, shared: 0 };
        (grid, [sizes.n_points(), sizes.c_y].map(|n| Arg::I32(n as i32)))
    }

    /// `y`, `hidden` and the statistics of the latter.
    pub(super) fn run(&self, [x, w, b]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        let (cx, device) = (self.cx, &self.cx.device);
        let (x, w) = (stored(cx, x)?, stored(cx, w)?);
        let alloc =
            |halves: &Halves| device.alloc_unwritten(halves.sizes.output_shape(), storage(cx), Purpose::Activation);
        let mut hidden = alloc(&self.forward)?;
        let mut parts = self.forward.parts(device)?;
        let finish = Finish { bias: Some(b), rectifies: true, negates: false };
        let sums = TileSums::Moments(&mut parts);
        self.forward.convolve(device, [&x, &w], false, finish, &mut hidden, sums)?;
        let stats = self.finish("finish_moments", &parts, Purpose::Saved)?;
        drop(parts);
        let mut normed = self.field(&hidden, Purpose::Workspace)?;
        if device.as_cuda().is_some() {
            let (grid, sizes) = self.pass();
            let args = [hidden.input()?, stats.input()?, normed.output()?, sizes[0], sizes[1]];
            self.launch("normalise", grid, &args)?;
        }
        let mut y = alloc(&self.transposed)?;
        let finish = Finish { negates: true, ..Finish::default() };
        self.transposed.convolve(device, [&normed, &w], true, finish, &mut y, TileSums::Nothing)?;
        Ok([y, hidden, stats])
    }

    /// Gradients of `x`, `w` and `b`.
    pub(super) fn pull_back(&self, [x, w, hidden, g]: [&Tensor; 4], stats: &Tensor) -> Result<Vec<Tensor>> {
        let (cx, device) = (self.cx, &self.cx.device);
        let (x_like, shape) = (x.shape().clone(), w.shape().clone());
        let [x, w, hidden, g] = [stored(cx, x)?, stored(cx, w)?, stored(cx, hidden)?, stored(cx, g)?];
        // The transpose of -K^T is -K.
        let mut inner = self.field(&hidden, Purpose::Workspace)?;
        let mut parts = self.forward.parts(device)?;
        let finish = Finish { negates: true, ..Finish::default() };
        let sums = TileSums::Products { hidden: &hidden, stats, parts: &mut parts };
        self.forward.convolve(device, [&g, &w], false, finish, &mut inner, sums)?;
        let means = self.finish("finish_sums", &parts, Purpose::Workspace)?;
        drop(parts);
        let mut turned = self.field(&hidden, Purpose::Workspace)?;
        let (grid, sizes) = self.pass();
        let n_parts = grid.blocks[0] * grid.blocks[1];
        let dtype = DType::real(Precision::F32);
        let mut parts = device.alloc_unwritten([n_parts, self.channels()], dtype, Purpose::Workspace)?;
        let mut grad_b = device.alloc_unwritten([self.channels()], dtype, Purpose::Grad)?;
        if device.as_cuda().is_some() {
            let tensors = [inner.output()?, hidden.input()?, stats.input()?, means.input()?, turned.output()?];
            let args = [&tensors[..], &[parts.output()?, sizes[0], sizes[1]]].concat();
            self.launch("norm_backward", grid, &args)?;
            let args = [parts.input()?, grad_b.output()?, Arg::I32(n_parts as i32), sizes[1]];
            self.launch("sum_parts", Grid::row(self.channels().div_ceil(32), SUM_THREADS), &args)?;
        }
        drop((parts, means, hidden));
        // -K^T n has the weight's gradient <-n, K g>.
        let grad_w = self.forward.weight_gradient(device, &shape, &[[&x, &inner], [&g, &turned]])?;
        drop((x, g, turned));
        let mut gx = device.alloc_unwritten(x_like, storage(cx), Purpose::Activation)?;
        self.transposed.convolve(device, [&inner, &w], true, Finish::default(), &mut gx, TileSums::Nothing)?;
        Ok(vec![gx, grad_w, grad_b.cast(cx.policy.pointwise.accumulate, Purpose::Grad)?])
    }
}
