//! What a solver does to whole states, on a GPU.

use crate::Result;
use crate::kernels::SumFormats;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const KERNELS: Source = Source { name: "state", text: include_str!("../kernels/state.cu") };

/// Terms that one launch sums.
const TERMS: usize = 8;

fn defines(from: Precision, term: Precision, to: Precision) -> [String; 4] {
    let accumulate = if [from, term, to].contains(&Precision::F64) { Precision::F64 } else { Precision::F32 };
    [define("S", from), define("R", term), define("T", to), define("A", accumulate)]
}

/// Whether one launch can form this sum.
pub(crate) fn combines(base: Option<&Tensor>, terms: &[(f64, &Tensor)], formats: SumFormats) -> bool {
    let Some((_, first)) = terms.first() else { return false };
    let precision = first.precision();
    let wide = |it: Precision| it == Precision::F64;
    let double = wide(formats.to) || wide(precision) || base.is_some_and(|it| wide(it.precision()));
    let sums = if double { Precision::F64 } else { Precision::F32 };
    terms.len() <= TERMS && terms.iter().all(|it| it.1.precision() == precision) && sums == formats.sums
}

/// See [`crate::kernels::StepKernels::combine`].
pub(crate) fn combine(
    device: &Device,
    base: Option<&Tensor>,
    terms: &[(f64, &Tensor)],
    formats: SumFormats,
) -> Result<Tensor> {
    let first = terms[0].1;
    let n = first.numel();
    let mut out = device.alloc_unwritten(first.shape().clone(), DType::real(formats.to), formats.purpose)?;
    let Some(cuda) = device.as_cuda() else { return Ok(out) };
    let mut defines = defines(base.unwrap_or(first).precision(), first.precision(), formats.to).to_vec();
    defines.extend([define("N", terms.len()), define("BASE", i32::from(base.is_some()))]);
    let mut args = vec![base.map_or(Ok(Arg::Null), Tensor::input)?];
    for idx in 0..TERMS {
        args.push(terms.get(idx).map_or(Ok(Arg::Null), |it| it.1.input())?);
    }
    args.extend((0..TERMS).map(|idx| Arg::F64(terms.get(idx).map_or(0.0, |it| it.0))));
    args.extend([out.output()?, count(n)]);
    cuda.launch(KERNELS, &defines, "combine", cuda.grid(n), &args)?;
    Ok(out)
}

/// Largest absolute value in single precision; infinite if a value is not finite.
pub(crate) fn largest(cuda: &CudaDevice, x: &Tensor) -> Result<f64> {
    let mut most = x.device().alloc([1], DType::real(Precision::F32), Purpose::Workspace)?;
    let defines = sum_defines(x.precision(), x.precision());
    let args = [x.input()?, most.output()?, count(x.numel())];
    cuda.launch(KERNELS, &defines, "largest", cuda.grid(x.numel()), &args)?;
    Ok(most.to_vec::<f64>()?.first().copied().unwrap_or(0.0))
}

fn sum_defines(from: Precision, to: Precision) -> Vec<String> {
    let mut defines = defines(from, from, to).to_vec();
    defines.extend([define("N", 1), define("BASE", 0)]);
    defines
}

/// A time on the device. The host does not wait, and what is recorded keeps it.
pub(crate) fn time(cuda: &CudaDevice, device: &Device, t: f64) -> Result<Tensor> {
    let mut out = device.alloc_unwritten([1], DType::real(Precision::F64), Purpose::Activation)?;
    let args = [out.output()?, Arg::F64(t)];
    cuda.launch(KERNELS, &sum_defines(Precision::F64, Precision::F64), "set", Grid::row(1, 1), &args)?;
    Ok(out)
}

/// Writes rows of channels with the time behind them.
pub(crate) fn append_time(cuda: &CudaDevice, y: &Tensor, time: &Tensor, out: &mut Tensor) -> Result<()> {
    let channels = out.shape().last().copied().unwrap_or(1) - 1;
    let mut defines = defines(y.precision(), time.precision(), out.precision()).to_vec();
    defines.extend([define("N", 1), define("BASE", 0)]);
    let (n, rows) = (out.numel(), count(out.numel() / (channels + 1)));
    let args = [y.input()?, time.input()?, out.output()?, rows, Arg::I32(channels as i32)];
    Ok(cuda.launch(KERNELS, &defines, "append_time", cuda.grid(n), &args)?)
}

/// Writes the rows of a gradient without that of the time.
pub(crate) fn drop_time(cuda: &CudaDevice, grad: &Tensor, out: &mut Tensor) -> Result<()> {
    let channels = grad.shape().last().copied().unwrap_or(1) - 1;
    let (n, rows) = (out.numel(), count(grad.numel() / (channels + 1)));
    let defines = sum_defines(grad.precision(), out.precision());
    let args = [grad.input()?, out.output()?, rows, Arg::I32(channels as i32)];
    Ok(cuda.launch(KERNELS, &defines, "drop_time", cuda.grid(n), &args)?)
}

/// Writes the sum of the time's gradients over rows.
pub(crate) fn sum_time(cuda: &CudaDevice, grad: &Tensor, out: &mut Tensor) -> Result<()> {
    let channels = grad.shape().last().copied().unwrap_or(1) - 1;
    let rows = count(grad.numel() / (channels + 1));
    let defines = sum_defines(grad.precision(), out.precision());
    let args = [grad.input()?, out.output()?, rows, Arg::I32(channels as i32)];
    Ok(cuda.launch(KERNELS, &defines, "sum_time", Grid::row(1, 256), &args)?)
}
