//! What a solver does to whole states.

use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Elementwise, Purpose, Real, Tensor};

/// Sums over stages and steps. The default bodies are compositions of tensor operations that every device has; a
/// device overrides them with one pass.
pub(crate) trait StepKernels {
    /// `base + sum_j factor_j term_j`: the sum over `j` first, then one addition, all in `sums`, rounded once to `to`.
    /// Terms with factor zero are not read. Without a base and terms there is nothing to sum: `terms` has one then.
    fn combine(&self, base: Option<&Tensor>, terms: &[(f64, &Tensor)], formats: SumFormats) -> Result<Tensor> {
        let SumFormats { sums, to, purpose } = formats;
        let mut sum: Option<Tensor> = None;
        for (factor, term) in terms.iter().filter(|(factor, _)| *factor != 0.0) {
            let mut scaled = own(term, sums)?;
            scaled.scale_assign(*factor)?;
            match &mut sum {
                Some(sum) => sum.add_assign(&scaled)?,
                None => sum = Some(scaled),
            }
        }
        let sum = match (sum, base) {
            (Some(mut sum), Some(base)) => {
                sum.add_assign(base)?;
                sum
            }
            (Some(sum), None) => sum,
            (None, Some(base)) => own(base, sums)?,
            (None, None) => own(terms[0].1, sums).and_then(|mut it| {
                it.scale_assign(0.0)?;
                Ok(it)
            })?,
        };
        Ok(if sum.precision() == to && sum.purpose() == purpose { sum } else { moved(&sum, to, purpose)? })
    }
}

/// The formats of a sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SumFormats {
    /// What the sum is formed in.
    pub(crate) sums: Precision,
    /// What the result is stored in.
    pub(crate) to: Precision,
    /// What the result is for.
    pub(crate) purpose: Purpose,
}

impl SumFormats {
    /// An intermediate value.
    pub(crate) fn new(sums: Precision, to: Precision) -> Self {
        SumFormats { sums, to, purpose: Purpose::Activation }
    }
}

/// The values in a buffer of its own.
fn own(x: &Tensor, precision: Precision) -> Result<Tensor> {
    moved(x, precision, Purpose::Activation)
}

fn moved(x: &Tensor, precision: Precision, purpose: Purpose) -> Result<Tensor> {
    Ok(if x.precision() == precision { x.copy(purpose)? } else { x.cast(precision, purpose)? })
}

/// As [`StepKernels::combine`]; the base, if there is one, is the last input.
struct Combine<'a> {
    factors: &'a [f64],
    has_base: bool,
}

impl Elementwise for Combine<'_> {
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        if let Some(&factor) = self.factors.first() {
            let factor = R::from_f64(factor);
            out.iter_mut().for_each(|sum| *sum *= factor);
        }
        for (factor, term) in self.factors.iter().zip(inputs).skip(1) {
            let factor = R::from_f64(*factor);
            out.iter_mut().zip(*term).for_each(|(sum, term)| *sum += factor * *term);
        }
        if let (true, [.., base]) = (self.has_base && !self.factors.is_empty(), inputs) {
            out.iter_mut().zip(*base).for_each(|(sum, base)| *sum += *base);
        }
    }
}

/// The composed bodies, for devices without one of their own.
struct Composed;
impl StepKernels for Composed {}

impl StepKernels for Device {
    fn combine(&self, base: Option<&Tensor>, terms: &[(f64, &Tensor)], formats: SumFormats) -> Result<Tensor> {
        let SumFormats { sums, to, purpose } = formats;
        let (factors, mut inputs): (Vec<f64>, Vec<&Tensor>) = terms.iter().filter(|it| it.0 != 0.0).copied().unzip();
        #[cfg(feature = "cuda")]
        if matches!(self.target(), halfmode_tensor::Target::Cuda) {
            let terms: Vec<(f64, &Tensor)> = factors.iter().copied().zip(inputs.iter().copied()).collect();
            if crate::state_cuda::combines(base, &terms, formats) {
                return crate::state_cuda::combine(self, base, &terms, None, formats);
            }
        }
        inputs.extend(base);
        if !self.is_cpu() || inputs.is_empty() {
            return Composed.combine(base, terms, formats);
        }
        let function = Combine { factors: &factors, has_base: base.is_some() };
        // The accumulator follows the format of the result, unless sums are wider.
        let direct = if to.accumulate() == sums { to } else { sums };
        let sum = Tensor::elementwise("combine", &function, &inputs, DType::real(direct), purpose)?;
        Ok(sum.cast(to, purpose)?)
    }
}

/// Scalars of a tile in double precision.
const TILE: usize = 512;

/// Calls with the values of tensors of one size in double precision, tile by tile and in order; on a CPU without copies of
/// the whole.
fn each_tile<const N: usize>(tensors: [&Tensor; N], mut work: impl FnMut([&[f64]; N])) -> Result<()> {
    if !tensors.iter().all(|it| it.device().is_cpu()) {
        let values = tensors.iter().map(|it| it.to_vec::<f64>()).collect::<std::result::Result<Vec<_>, _>>()?;
        work(std::array::from_fn(|idx| values[idx].as_slice()));
        return Ok(());
    }
    let views = tensors.iter().map(|it| it.view()).collect::<std::result::Result<Vec<_>, _>>()?;
    let len = views.iter().map(|it| it.len()).min().unwrap_or(0);
    let mut tiles = [[0.0; TILE]; N];
    for start in (0..len).step_by(TILE) {
        let mut pieces: [&[f64]; N] = [&[]; N];
        for ((piece, view), tile) in pieces.iter_mut().zip(&views).zip(&mut tiles) {
            *piece = view.slice(start..(start + TILE).min(len)).widened(tile);
        }
        work(pieces);
    }
    Ok(())
}

/// `sum a_i b_i`, in double precision.
pub(crate) fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    let mut sum = 0.0;
    if a.device().launches() {
        each_tile([a, b], |[a, b]| a.iter().zip(b).for_each(|(a, b)| sum += a * b))?;
    }
    Ok(sum)
}

/// Largest absolute value; infinite if a value is not finite. Where nothing is computed: 1.
pub(crate) fn max_abs(x: &Tensor) -> Result<f64> {
    if !x.device().launches() {
        return Ok(1.0);
    }
    #[cfg(feature = "cuda")]
    if let Some(cuda) = x.device().as_cuda() {
        return crate::state_cuda::largest(cuda, x);
    }
    let larger = |largest: f64, x: &f64| if x.is_finite() { largest.max(x.abs()) } else { f64::INFINITY };
    let mut largest = 0.0;
    each_tile([x], |[x]| largest = x.iter().fold(largest, larger))?;
    Ok(largest)
}

/// Sum of squares of an error over what it may be, `atol + rtol max(|y|, |z|)`, in double precision; not finite if
/// something is not, a state too. `noise` is what an error may be from rounding alone; its square is taken off that of
/// the error.
pub(crate) fn error_sum(error: &Tensor, states: [&Tensor; 2], (rtol, atol): (f64, f64), noise: f64) -> Result<f64> {
    let share = |error: f64, y: f64, z: f64| {
        if !(y.is_finite() && z.is_finite()) {
            return f64::INFINITY;
        }
        let beyond = if error.is_finite() { (error * error - noise * noise).max(0.0).sqrt() } else { f64::INFINITY };
        let allowed = atol + rtol * y.abs().max(z.abs());
        if beyond == 0.0 { 0.0 } else { beyond / allowed }
    };
    let mut sum = 0.0;
    each_tile([error, states[0], states[1]], |[error, y, z]| {
        for (error, (y, z)) in error.iter().zip(y.iter().zip(z)) {
            sum += share(*error, *y, *z).powi(2);
        }
    })?;
    Ok(sum)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;
    use Precision::{Bf16, F16, F32, F64};

    /// The one-pass sum and the composed one agree bit for bit: both form the same sums in the same order.
    #[test]
    fn one_pass_is_the_composition() {
        let device = Device::cpu(2).unwrap();
        for (stored, sums, to) in [(F16, F32, F16), (Bf16, F32, F32), (F32, F64, F32), (F64, F64, F64)] {
            let tensor = |seed: usize| {
                let values: Vec<f64> = (0..5000).map(|i| ((i * 37 + seed * 11) % 1009) as f64 / 97.0 - 5.0).collect();
                Tensor::from_slice(&device, &values, [5000], stored, Purpose::Activation).unwrap()
            };
            let [base, x, y, z] = [1, 2, 3, 4].map(tensor);
            let terms = [(0.1, &x), (0.0, &y), (-0.37, &z)];
            for (base, terms) in [(Some(&base), &terms[..]), (None, &terms), (Some(&base), &[]), (None, &terms[1..2])] {
                let formats = SumFormats { sums, to, purpose: Purpose::Grad };
                let (one, many) =
                    (device.combine(base, terms, formats).unwrap(), Composed.combine(base, terms, formats).unwrap());
                assert_eq!((one.precision(), one.purpose()), (to, Purpose::Grad));
                assert_eq!(one.to_vec::<f64>().unwrap(), many.to_vec::<f64>().unwrap(), "{stored} {sums} {to}");
            }
        }
    }

    #[test]
    fn the_largest_value_of_what_is_not_finite_is_infinite() {
        let device = Device::cpu(1).unwrap();
        let largest = |values: &[f64]| {
            max_abs(&Tensor::from_slice(&device, values, [values.len()], F32, Purpose::Activation).unwrap()).unwrap()
        };
        assert!((largest(&[1.0, -3.0, 2.0]) - 3.0).abs() < f64::EPSILON);
        assert!(largest(&[1.0, f64::NAN]).is_infinite() && largest(&[f64::NEG_INFINITY, 1.0]).is_infinite());
    }
}
