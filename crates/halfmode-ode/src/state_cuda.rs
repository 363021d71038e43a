//! What a solver does to whole states, on a GPU.

use crate::kernels::{StepKernels, SumFormats};
use crate::solve::OdeSolve;
use crate::{Error, Result, Tableau};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const KERNELS: Source = Source { name: "state", text: include_str!("../kernels/state.cu") };

/// Terms that one launch sums.
const TERMS: usize = 8;

fn defines(from: Precision, term: Precision, to: Precision) -> [String; 5] {
    let accumulate = if [from, term, to].contains(&Precision::F64) { Precision::F64 } else { Precision::F32 };
    [define("S", from), define("Q", term), define("R", term), define("T", to), define("A", accumulate)]
}

/// How many terms a sum has, whether there is one outside, and whether a factor is the first term's alone.
fn sums_of(n_terms: usize, has_base: bool, of_first: bool) -> [String; 3] {
    [define("N", n_terms), define("BASE", i32::from(has_base)), define("FIRST", i32::from(of_first))]
}

/// Whether one launch can form this sum: all terms but the first are of one format.
pub(crate) fn combines(base: Option<&Tensor>, terms: &[(f64, &Tensor)], formats: SumFormats) -> bool {
    let Some((_, last)) = terms.last() else { return false };
    let alike = terms.iter().skip(1).all(|it| it.1.precision() == last.precision());
    let mut all = terms.iter().map(|it| it.1).chain(base).map(Tensor::precision);
    let double = formats.to == Precision::F64 || all.any(|it| it == Precision::F64);
    let sums = if double { Precision::F64 } else { Precision::F32 };
    terms.len() <= TERMS && alike && sums == formats.sums
}

/// A factor that only the device knows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum By<'a> {
    /// The scale of a step, of all terms.
    Scale(&'a ChosenScale),
    /// The same, of the first term alone.
    ScaleOfFirst(&'a ChosenScale),
    /// One over it.
    Inverse(&'a ChosenScale),
}

impl<'a> By<'a> {
    fn arg(self) -> Result<Arg<'a>> {
        Ok(match self {
            By::Scale(it) | By::ScaleOfFirst(it) => it.scale.input()?,
            By::Inverse(it) => it.inverse.input()?,
        })
    }
}

/// A power of two that the device chose, and one over it.
#[derive(Clone, Debug)]
pub(crate) struct ChosenScale {
    scale: Tensor,
    inverse: Tensor,
}

impl ChosenScale {
    /// The scale that takes the largest value of some tensors to `target`, with bounds of its exponent.
    pub(crate) fn of(
        cuda: &CudaDevice,
        device: &Device,
        tensors: &[&Tensor],
        target: f64,
        [least, most]: [i32; 2],
    ) -> Result<Self> {
        let f64s = |len: usize| device.alloc([len], DType::real(Precision::F64), Purpose::Workspace);
        let (mut largest, mut scale, mut inverse) = (f64s(1)?, f64s(1)?, f64s(1)?);
        for x in tensors {
            let args = [x.input()?, largest.output()?, count(x.numel())];
            let defines = sum_defines(x.precision(), x.precision());
            cuda.launch(KERNELS, &defines, "largest", cuda.grid(x.numel()), &args)?;
        }
        let bounds = [Arg::F64(target), Arg::I32(least), Arg::I32(most)];
        let args = [&[largest.input()?, scale.output()?, inverse.output()?][..], &bounds].concat();
        let defines = sum_defines(Precision::F32, Precision::F32);
        cuda.launch(KERNELS, &defines, "choose_scale", Grid::row(1, 1), &args)?;
        Ok(ChosenScale { scale, inverse })
    }
}

/// `scale factor own + sum_j factor_j later_j`
pub(crate) fn combine_scaled(
    device: &Device,
    ((factor, own), scale): ((f64, &Tensor), &ChosenScale),
    later: &[(f64, &Tensor)],
    formats: SumFormats,
) -> Result<Tensor> {
    let terms: Vec<(f64, &Tensor)> = std::iter::once((factor, own)).chain(later.iter().copied()).collect();
    if combines(None, &terms, formats) {
        return combine(device, None, &terms, Some(By::ScaleOfFirst(scale)), formats);
    }
    let scaled = SumFormats { to: formats.sums, ..formats };
    let own = combine(device, None, &[(factor, own)], Some(By::Scale(scale)), scaled)?;
    let terms: Vec<(f64, &Tensor)> = std::iter::once((1.0, &own)).chain(later.iter().copied()).collect();
    device.combine(None, &terms, formats)
}

/// See [`crate::kernels::StepKernels::combine`]; the sum of the terms is multiplied by `by`, or the first term is.
pub(crate) fn combine(
    device: &Device,
    base: Option<&Tensor>,
    terms: &[(f64, &Tensor)],
    by: Option<By<'_>>,
    formats: SumFormats,
) -> Result<Tensor> {
    let first = terms[0].1;
    let n = first.numel();
    let mut out = device.alloc_unwritten(first.shape().clone(), DType::real(formats.to), formats.purpose)?;
    let Some(cuda) = device.as_cuda() else { return Ok(out) };
    let last = terms.last().map_or(first, |it| it.1);
    let types =
        [("S", base.unwrap_or(first)), ("Q", first), ("R", last)].map(|(name, it)| define(name, it.precision()));
    let mut defines = types.to_vec();
    defines.extend([define("T", formats.to), define("A", formats.sums)]);
    let of_first = matches!(by, Some(By::ScaleOfFirst(_)));
    defines.extend(sums_of(terms.len(), base.is_some(), of_first));
    let mut args = vec![base.map_or(Ok(Arg::Null), Tensor::input)?];
    for idx in 0..TERMS {
        args.push(terms.get(idx).map_or(Ok(Arg::Null), |it| it.1.input())?);
    }
    args.extend((0..TERMS).map(|idx| Arg::F64(terms.get(idx).map_or(0.0, |it| it.0))));
    args.extend([by.map_or(Ok(Arg::Null), By::arg)?, out.output()?, count(n)]);
    cuda.launch(KERNELS, &defines, "combine", cuda.grid(n.div_ceil(4)), &args)?;
    Ok(out)
}

/// See `LatticeSum` of the leapfrog: `[sign, factor, spacing, most]`.
pub(crate) fn lattice_sum(base: Option<&Tensor>, term: &Tensor, numbers: [f64; 4]) -> Result<Tensor> {
    let device = term.device();
    let mut out = device.alloc_unwritten(term.shape().clone(), DType::real(Precision::F64), Purpose::Activation)?;
    let Some(cuda) = device.as_cuda() else { return Ok(out) };
    let mut defines = defines(Precision::F64, term.precision(), Precision::F64).to_vec();
    defines.extend(sums_of(1, base.is_some(), false));
    let mut args = vec![base.map_or(Ok(Arg::Null), Tensor::input)?, term.input()?];
    args.extend(numbers.map(Arg::F64));
    args.extend([out.output()?, count(term.numel())]);
    cuda.launch(KERNELS, &defines, "lattice_sum", cuda.grid(term.numel()), &args)?;
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
    defines.extend(sums_of(1, false, false));
    defines
}

/// A time on the device. The host does not wait, and what is recorded keeps it.
pub(crate) fn time(cuda: &CudaDevice, device: &Device, t: f64) -> Result<Tensor> {
    let mut out = device.alloc_unwritten([1], DType::real(Precision::F64), Purpose::Activation)?;
    let args = [out.output()?, Arg::F64(t)];
    cuda.launch(KERNELS, &sum_defines(Precision::F64, Precision::F64), "set", Grid::row(1, 1), &args)?;
    Ok(out)
}

/// Numbers of one launch of `set_some`.
const SOME: usize = 16;

/// Numbers on the device: arguments of launches, so that the host does not wait and what is recorded keeps them.
pub(crate) fn upload_f64s(device: &Device, values: &[f64]) -> Result<Tensor> {
    let mut out = device.alloc_unwritten([values.len()], DType::real(Precision::F64), Purpose::Workspace)?;
    let Some(cuda) = device.as_cuda() else { return Ok(out) };
    for (idx, some) in values.chunks(SOME).enumerate() {
        let mut args = vec![out.output()?, Arg::I32((idx * SOME) as i32), Arg::I32(some.len() as i32)];
        args.extend((0..SOME).map(|i| Arg::F64(some.get(i).copied().unwrap_or(0.0))));
        cuda.launch(KERNELS, &sum_defines(Precision::F64, Precision::F64), "set_some", Grid::row(1, SOME), &args)?;
    }
    Ok(out)
}

/// Writes rows of channels with the time behind them.
pub(crate) fn append_time(cuda: &CudaDevice, y: &Tensor, time: &Tensor, out: &mut Tensor) -> Result<()> {
    let channels = out.shape().last().copied().unwrap_or(1) - 1;
    let mut defines = defines(y.precision(), time.precision(), out.precision()).to_vec();
    defines.extend(sums_of(1, false, false));
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

/// What a kernel left in a word, unless the host must not wait because a step is recorded.
pub(crate) fn left_word(device: &Device, word: &Tensor) -> Result<Option<i64>> {
    match device.as_cuda() {
        Some(cuda) if !cuda.context().is_recording() => {
            Ok(word.to_vec::<f64>()?.first().map(|it| it.to_bits().cast_signed()))
        }
        _ => Ok(None),
    }
}

impl OdeSolve {
    /// Books a solve of all steps in kernels. In `status` these leave the first step after which a state was not finite,
    /// its number taken off the largest integer.
    pub(crate) fn settle(&self, device: &Device, status: &Tensor, times: &[f64]) -> Result<()> {
        let n_steps = times.len() - 1;
        if let Some(word) = left_word(device, status)?.filter(|it| *it > 0) {
            let step = (i64::from(i32::MAX) - (word & 0xffff_ffff)) as usize;
            return Err(Error::NonFiniteVelocity { step, n_steps, time: times[step.min(n_steps)] });
        }
        self.options.record.note(|record| {
            record.n_steps = n_steps;
            record.grid = times.to_vec();
            record.n_velocities += n_steps * self.options.method.tableau().n_stages();
        });
        Ok(())
    }
}

impl Tableau {
    /// The coefficients as definitions of a kernel.
    pub(crate) fn defines(&self) -> Vec<String> {
        let Tableau { a, b, c, .. } = self;
        let mut defines = vec![define("STAGES", self.n_stages())];
        for (j, row) in a.iter().enumerate() {
            defines.extend(row.iter().enumerate().map(|(m, a)| define(&format!("A{j}{m}"), format!("{a:?}"))));
        }
        defines.extend(b.iter().enumerate().map(|(j, b)| define(&format!("B{j}"), format!("{b:?}"))));
        defines.extend(c.iter().enumerate().skip(1).map(|(j, c)| define(&format!("C{j}"), format!("{c:?}"))));
        defines
    }
}
