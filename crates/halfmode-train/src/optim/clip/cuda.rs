//! The sum of squares of all gradients on a GPU: two launches, and one number that the host reads.

use crate::Result;
use crate::optim::adamw::format;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const GRAD_STATS: Source = Source { name: "grad_stats", text: include_str!("../../../kernels/grad_stats.cu") };

/// Threads of a block, as in the kernel.
const THREADS: usize = 256;
/// Blocks of the first pass. Fixed, so that the sum has one order.
const BLOCKS: usize = 512;
/// Scalars that a block adds at a time, as in the kernel.
const CHUNK: usize = 8192;
/// Words of a tensor in the table of a launch.
const WORDS: usize = 4;

/// The sum of squares of tensors of one GPU, or 0 on its plan.
pub(super) fn sum_squares(device: &Device, grads: &[&Tensor]) -> Result<f64> {
    let numbers = |shape: [usize; 2]| device.alloc_unwritten(shape, DType::real(Precision::F64), Purpose::Workspace);
    let (mut table, mut parts, mut sum) = (numbers([grads.len(), WORDS])?, numbers([1, BLOCKS])?, numbers([1, 1])?);
    let Some(cuda) = device.as_cuda() else { return Ok(0.0) };
    let (mut words, mut n_chunks) = (Vec::with_capacity(grads.len() * WORDS), 0);
    for grad in grads.iter().filter(|grad| grad.numel() > 0) {
        let n = grad.numel() * grad.dtype().domain.scalars();
        words.extend([n_chunks as u64, grad.address()?, n as u64, u64::from(format(grad.precision()).cast_unsigned())]);
        n_chunks += n.div_ceil(CHUNK);
    }
    if n_chunks == 0 {
        return Ok(0.0);
    }
    table.upload_words(&words)?;
    let defines = [define("BLOCKS", BLOCKS)];
    let n_tensors = Arg::I32((words.len() / WORDS) as i32);
    let args = [table.input()?, n_tensors, count(n_chunks), parts.output()?];
    cuda.launch(GRAD_STATS, &defines, "sum_parts", Grid::row(BLOCKS, THREADS), &args)?;
    let args = [parts.input()?, sum.output()?];
    cuda.launch(GRAD_STATS, &defines, "sum_all", Grid::row(1, THREADS), &args)?;
    Ok(sum.to_vec::<f64>()?[0])
}
