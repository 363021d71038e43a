//! Normalisation on a GPU: statistics and everything between storage and storage in f64, sums in a fixed order.

use super::Dims;
use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const NORM: Source = Source { name: "norm", text: include_str!("../../kernels/norm.cu") };

/// Threads of a block: the kernels' number.
const THREADS: usize = 256;
/// Blocks that the rows of all samples are cut into at most, and rows of a thread at least.
const BLOCKS: usize = 1056;
const ROWS_PER_THREAD: usize = 8;

impl Dims {
    /// Sets of values that share statistics.
    fn n_groups(&self) -> usize {
        self.batch * if self.per_channel { self.c } else { 1 }
    }

    /// Values of a group.
    fn values(&self) -> usize {
        self.rows * if self.per_channel { 1 } else { self.c }
    }

    /// Blocks that the rows of a sample are cut into. They depend on sizes alone, so that a sum has one order.
    fn parts(&self) -> usize {
        let per_block = ROWS_PER_THREAD * THREADS / self.c.clamp(1, THREADS);
        self.rows.div_ceil(per_block).clamp(1, (BLOCKS / self.batch.max(1)).max(1))
    }

    fn grid(&self) -> Grid {
        Grid { blocks: [self.batch * self.parts(), self.c.div_ceil(THREADS), 1], threads: THREADS, shared: 0 }
    }

    /// Rows, channels, parts, and whether channels have statistics of their own: what kernels are told.
    fn sizes(&self) -> [Arg<'static>; 4] {
        let [c, parts, per_channel] = [self.c, self.parts(), self.per_channel.into()].map(|n| Arg::I32(n as i32));
        [count(self.rows), c, parts, per_channel]
    }

    fn is_empty(&self) -> bool {
        self.batch * self.rows * self.c == 0
    }
}

fn double(device: &Device, shape: &[usize]) -> Result<Tensor> {
    Ok(device.alloc_unwritten(shape, DType::real(Precision::F64), Purpose::Workspace)?)
}

fn widened(x: &Tensor) -> Result<Tensor> {
    Ok(x.cast(Precision::F64, Purpose::Workspace)?)
}

fn optional(x: Option<&Tensor>) -> Result<Arg<'_>> {
    Ok(x.map_or(Ok(Arg::Null), Tensor::input)?)
}

fn defines([x, g, y]: [&Tensor; 3]) -> [String; 3] {
    [define("S", x.precision()), define("G", g.precision()), define("T", y.precision())]
}

/// Mean, reciprocal deviation and variance of every group, `[3, groups]`.
pub(crate) fn statistics(device: &Device, dims: &Dims, x: &Tensor) -> Result<Tensor> {
    let mut parts = double(device, &[dims.batch, dims.parts(), 2, dims.c])?;
    let mut stats = double(device, &[3, dims.n_groups()])?;
    if let Some(cuda) = device.as_cuda().filter(|_| !dims.is_empty()) {
        let [rows, c, n_parts, per_channel] = dims.sizes();
        let defines = defines([x; 3]);
        let args = [x.input()?, parts.output()?, rows, c, n_parts, per_channel];
        cuda.launch(NORM, &defines, "moments", dims.grid(), &args)?;
        let args = [x.input()?, parts.input()?, stats.output()?, rows, c, n_parts, per_channel];
        cuda.launch(NORM, &defines, "statistics", Grid::row(dims.n_groups(), THREADS), &args)?;
    }
    Ok(stats)
}

/// The same of given mean and variance per channel.
pub(crate) fn given(device: &Device, [mean, var]: [&Tensor; 2]) -> Result<Tensor> {
    let (mean, var, c) = (widened(mean)?, widened(var)?, mean.numel());
    let mut stats = double(device, &[3, c])?;
    if let Some(cuda) = device.as_cuda().filter(|_| c > 0) {
        let defines = defines([&stats; 3]);
        let args = [mean.input()?, var.input()?, stats.output()?, Arg::I32(c as i32)];
        cuda.launch(NORM, &defines, "given_statistics", cuda.grid(c), &args)?;
    }
    Ok(stats)
}

/// Mean and unbiased variance per channel of a batch; of an empty one zeros.
pub(crate) fn observed(device: &Device, dims: &Dims, stats: &Tensor, dtype: DType) -> Result<[Tensor; 2]> {
    let dtype64 = DType::real(Precision::F64);
    let make = || match dims.is_empty() {
        true => device.alloc([dims.c], dtype64, Purpose::State),
        false => device.alloc_unwritten([dims.c], dtype64, Purpose::State),
    };
    let (mut mean, mut var) = (make()?, make()?);
    if let Some(cuda) = device.as_cuda().filter(|_| !dims.is_empty()) {
        let unbiased = dims.rows as f64 / dims.rows.saturating_sub(1).max(1) as f64;
        let args = [stats.input()?, mean.output()?, var.output()?, Arg::F64(unbiased), Arg::I32(dims.c as i32)];
        cuda.launch(NORM, &defines([stats; 3]), "batch_moments", cuda.grid(dims.c), &args)?;
    }
    Ok([mean.cast(dtype.precision, Purpose::State)?, var.cast(dtype.precision, Purpose::State)?])
}

/// `y = (x - mean) rstd`, times weight plus bias where there are any.
pub(crate) fn normalise(
    device: &Device,
    dims: &Dims,
    [x, stats]: [&Tensor; 2],
    affine: Option<[&Tensor; 2]>,
    y: &mut Tensor,
) -> Result<()> {
    let affine = affine.map(|[w, b]| Ok::<_, crate::Error>([widened(w)?, widened(b)?])).transpose()?;
    let Some(cuda) = device.as_cuda().filter(|_| !dims.is_empty()) else { return Ok(()) };
    let [w, b] = affine.as_ref().map_or([None; 2], |[w, b]| [Some(w), Some(b)]);
    let [rows, c, n_parts, per_channel] = dims.sizes();
    let (defines, groups) = (defines([x, x, y]), Arg::I32(dims.n_groups() as i32));
    let args = [x.input()?, stats.input()?, optional(w)?, optional(b)?, y.output()?];
    let args = [&args[..], &[rows, c, n_parts, per_channel, groups]].concat();
    Ok(cuda.launch(NORM, &defines, "normalise", dims.grid(), &args)?)
}

/// The adjoint of [`normalise`] and, unless they are `given`, of the statistics: writes the gradient of `x` and, where
/// asked for, those of weight and bias: zeros for an empty batch.
pub(crate) fn adjoint(
    device: &Device,
    dims: &Dims,
    [x, g, stats]: [&Tensor; 3],
    given: bool,
    weight: Option<&Tensor>,
    gx: &mut Tensor,
    grads: Option<[&mut Tensor; 2]>,
) -> Result<()> {
    if dims.is_empty() {
        for grad in grads.into_iter().flatten() {
            *grad = device.alloc(grad.shape().clone(), grad.dtype(), Purpose::Grad)?;
        }
        return Ok(());
    }
    let weight = weight.map(widened).transpose()?;
    let mut parts = double(device, &[dims.batch, dims.parts(), 2, dims.c])?;
    let mut sums = double(device, &[2, dims.n_groups()])?;
    let wide = || double(device, &[dims.c]);
    let wide = if grads.is_some() { Some([wide()?, wide()?]) } else { None };
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let (defines, groups) = (defines([x, g, gx]), Arg::I32(dims.n_groups() as i32));
    let [rows, c, n_parts, per_channel] = dims.sizes();
    let args = [x.input()?, g.input()?, stats.input()?, parts.output()?, rows, c, n_parts, per_channel, groups];
    cuda.launch(NORM, &defines, "backward_sums", dims.grid(), &args)?;
    let w = optional(weight.as_ref())?;
    let args = [parts.input()?, w, sums.output()?, c, n_parts, per_channel];
    cuda.launch(NORM, &defines, "group_sums", Grid::row(dims.n_groups(), THREADS), &args)?;
    let share = if given { 0.0 } else { 1.0 / dims.values() as f64 };
    let args = [x.input()?, g.input()?, stats.input()?, sums.input()?, w, gx.output()?, Arg::F64(share)];
    let args = [&args[..], &[rows, c, n_parts, per_channel, groups]].concat();
    cuda.launch(NORM, &defines, "normalise_backward", dims.grid(), &args)?;
    if let (Some(grads), Some([mut grad_w, mut grad_b])) = (grads, wide) {
        let n = count(dims.batch * dims.parts());
        let args = [parts.input()?, grad_w.output()?, grad_b.output()?, c, n];
        cuda.launch(NORM, &defines, "parameter_sums", Grid::row(dims.c, THREADS), &args)?;
        for (grad, wide) in grads.into_iter().zip([grad_w, grad_b]) {
            cuda.convert(&wide, grad)?;
        }
    }
    Ok(())
}

pub(super) fn forward(
    device: &Device,
    dims: &Dims,
    x: &Tensor,
    affine: Option<[&Tensor; 2]>,
    y: &mut Tensor,
) -> Result<()> {
    let stats = statistics(device, dims, x)?;
    normalise(device, dims, [x, &stats], affine, y)
}

pub(super) fn backward(
    device: &Device,
    dims: &Dims,
    [x, g]: [&Tensor; 2],
    weight: Option<&Tensor>,
    gx: &mut Tensor,
    grads: Option<[&mut Tensor; 2]>,
) -> Result<()> {
    let stats = statistics(device, dims, x)?;
    adjoint(device, dims, [x, g, &stats], false, weight, gx, grads)
}
