//! The likelihood of a flow on a GPU.

use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, count, define};
use halfmode_tensor::{Purpose, Tensor};

const KERNELS: Source = Source { name: "gaussian_nll", text: include_str!("../../../kernels/gaussian_nll.cu") };

fn sizes(z: &Tensor) -> [Arg<'static>; 2] {
    let d = z.shape().last().copied().unwrap_or(1);
    [count(z.numel() / d.max(1)), Arg::I32(d as i32)]
}

/// A tensor in this precision: itself where it is.
fn in_precision(x: &Tensor, to: Precision) -> Result<Tensor> {
    Ok(if x.precision() == to { x.clone() } else { x.cast(to, Purpose::Workspace)? })
}

pub(super) fn forward(cuda: &CudaDevice, z: &Tensor, gained: &Tensor) -> Result<Tensor> {
    let to = z.precision().accumulate();
    let mut loss = z.device().alloc_unwritten([1], DType::real(to), Purpose::Activation)?;
    let gained = in_precision(gained, to)?;
    let tensors = [z.input()?, gained.input()?, loss.output()?];
    let args = [&tensors[..], &sizes(z)].concat();
    cuda.launch(KERNELS, &[define("T", z.precision())], "nll", Grid::row(1, 256), &args)?;
    Ok(loss)
}

/// Gradients by points and gain.
pub(super) fn backward(cuda: &CudaDevice, z: &Tensor, seed: &Tensor) -> Result<[Tensor; 2]> {
    let to = z.precision().accumulate();
    let n = z.numel() / z.shape().last().copied().unwrap_or(1).max(1);
    let unwritten = |shape: &[usize]| z.device().alloc_unwritten(shape, DType::real(to), Purpose::Activation);
    let [mut gz, mut gained] = [unwritten(z.shape())?, unwritten(&[n, 1])?];
    let seed = in_precision(seed, to)?;
    let tensors = [z.input()?, seed.input()?, gz.output()?, gained.output()?];
    let args = [&tensors[..], &sizes(z)].concat();
    cuda.launch(KERNELS, &[define("T", z.precision())], "nll_gradient", cuda.grid(z.numel()), &args)?;
    Ok([gz, gained])
}
