//! Fast Fourier transforms by cuFFT: plans are made once per shape and share work areas.

#![allow(unsafe_code, reason = "calls to cuFFT")]

use crate::libraries::{self, Library};
use crate::{Context, Error, Result, Span};
use cufft_sys::{CUFFT_FORWARD, CUFFT_INVERSE, Cufft, cudaDataType, cufftHandle, cufftResult, cufftType};
use halfmode_precision::Precision;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

/// What goes in and comes out. Complex scalars are pairs (re, im).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FftKind {
    /// `x` `[batch, n_1, …, n_d]` real to its spectrum `[batch, n_1, …, n_d / 2 + 1]`, with `exp(-2πi kn/N)`.
    RealToComplex,
    /// Such a spectrum to `x`, with `exp(+2πi kn/N)`. **It destroys its input.**
    ComplexToReal,
    /// Complex to complex, both `[batch, n_1, …, n_d]`, with `exp(-2πi kn/N)`.
    Forward,
    /// Complex to complex, with `exp(+2πi kn/N)`.
    Inverse,
}

/// A batch of transforms over all axes but the first, without any factor: a transform there and back multiplies by
/// the number of points.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FftPlan {
    /// What goes in and comes out.
    pub kind: FftKind,
    /// The format of what is stored on both sides. Halves take sizes that are powers of two.
    pub precision: Precision,
    /// `n_1` to `n_d`, `d` from 1 to 3.
    pub sizes: Vec<usize>,
    /// Transforms.
    pub batch: usize,
}

impl FftPlan {
    /// Checks what the library would refuse without a reason.
    fn check(&self) -> Result<()> {
        let FftPlan { precision, sizes, .. } = self;
        let refuse = |problem: String| Err(Error::FftShape { what: self.describe(), problem });
        if !(1..=3).contains(&sizes.len()) {
            return refuse(format!("{} axes; it takes 1 to 3", sizes.len()));
        }
        if self.numel(true).zip(self.numel(false)).is_none() || sizes.contains(&0) {
            return refuse("an axis is empty or too long".to_owned());
        }
        match sizes.iter().find(|it| precision.is_half() && !it.is_power_of_two()) {
            Some(size) => refuse(format!(
                "cuFFT takes {precision} only in powers of two, and {size} is none; store f32 for this transform"
            )),
            None => Ok(()),
        }
    }

    fn describe(&self) -> String {
        let FftPlan { kind, precision, sizes, batch } = self;
        format!("{batch} x {sizes:?} {precision} {kind:?}")
    }

    /// Scalars of the input or output in memory; `None` where the numbers overflow.
    fn numel(&self, is_input: bool) -> Option<usize> {
        let half_axis = match (self.kind, is_input) {
            (FftKind::RealToComplex, true) | (FftKind::ComplexToReal, false) => None,
            (FftKind::Forward | FftKind::Inverse, _) => Some(false),
            (FftKind::RealToComplex, false) | (FftKind::ComplexToReal, true) => Some(true),
        };
        let scalars = self.batch.checked_mul(if half_axis.is_none() { 1 } else { 2 })?;
        let (last, others) = self.sizes.split_last()?;
        let last = if half_axis == Some(true) { last / 2 + 1 } else { *last };
        // The library counts in signed numbers of 64 bits.
        let bytes = scalars.checked_mul(self.precision.bytes())?;
        let bytes = others.iter().chain([&last]).try_fold(bytes, |n, it| n.checked_mul(*it));
        bytes.filter(|it| i64::try_from(*it).is_ok()).map(|it| it / self.precision.bytes())
    }

    /// The plan that both directions of a complex transform share.
    fn key(&self) -> FftPlan {
        let kind = if self.kind == FftKind::Inverse { FftKind::Forward } else { self.kind };
        FftPlan { kind, ..self.clone() }
    }

    /// Formats of input and output, and that of the arithmetic.
    fn formats(&self) -> [cudaDataType; 3] {
        use cudaDataType as D;
        let (real, complex) = match self.precision {
            Precision::F64 => (D::CUDA_R_64F, D::CUDA_C_64F),
            Precision::F32 => (D::CUDA_R_32F, D::CUDA_C_32F),
            Precision::Bf16 => (D::CUDA_R_16BF, D::CUDA_C_16BF),
            Precision::F16 => (D::CUDA_R_16F, D::CUDA_C_16F),
        };
        match self.kind {
            FftKind::RealToComplex => [real, complex, complex],
            FftKind::ComplexToReal => [complex, real, complex],
            FftKind::Forward | FftKind::Inverse => [complex; 3],
        }
    }
}

/// A plan of the library.
#[derive(Clone, Copy)]
struct Made {
    handle: cufftHandle,
    scratch: usize,
}

/// The library, and the plans and work areas of a context.
pub(crate) struct Fft {
    library: Cufft,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plans: HashMap<FftPlan, Made>,
    /// Address and bytes. An area is never given back: recorded launches hold its address.
    areas: Vec<(u64, usize)>,
}

impl Drop for Fft {
    fn drop(&mut self) {
        for (_, Made { handle, .. }) in self.state.get_mut().unwrap_or_else(PoisonError::into_inner).plans.drain() {
            // SAFETY: the plan is this value's own. Errors have nobody to go to.
            let _ = unsafe { (self.library.cufftDestroy)(handle) };
        }
    }
}

impl Fft {
    pub(crate) fn new(context: &Context) -> Result<Self> {
        let path = libraries::load(Library::Cufft, context.roots())?;
        // SAFETY: NVIDIA's library of the version that its name says.
        let library = unsafe { Cufft::load(Path::new(&path)) }
            .map_err(|err| Error::Library { library: Library::Cufft, tried: vec![err.to_string()] })?;
        Ok(Fft { library, state: Mutex::default() })
    }

    /// The plan of a shape, made at its first use.
    fn plan(&self, state: &mut State, plan: &FftPlan, context: &Context) -> Result<Made> {
        let key = plan.key();
        if let Some(made) = state.plans.get(&key) {
            return Ok(*made);
        }
        let mut handle = 0;
        // SAFETY: the argument is a number that the call writes.
        check("cufftCreate", plan, unsafe { (self.library.cufftCreate)(&mut handle) })?;
        match self.make(handle, state, &key, context) {
            Ok(scratch) => {
                state.plans.insert(key, Made { handle, scratch });
                Ok(Made { handle, scratch })
            }
            Err(err) => {
                // SAFETY: the handle was just made.
                let _ = unsafe { (self.library.cufftDestroy)(handle) };
                Err(err)
            }
        }
    }

    fn make(&self, handle: cufftHandle, state: &mut State, plan: &FftPlan, context: &Context) -> Result<usize> {
        let Cufft {
            cufftSetAutoAllocation,
            cufftSetStream,
            cufftMakePlanMany64,
            cufftXtMakePlanMany,
            cufftSetWorkArea,
            ..
        } = self.library;
        // SAFETY: handle and stream are alive.
        check("cufftSetAutoAllocation", plan, unsafe { cufftSetAutoAllocation(handle, 0) })?;
        // SAFETY: as above; the plan is destroyed before the stream.
        check("cufftSetStream", plan, unsafe { cufftSetStream(handle, context.stream().cast()) })?;
        let mut sizes: Vec<i64> = plan.sizes.iter().map(|it| *it as i64).collect();
        let (rank, sizes, batch) = (sizes.len() as i32, sizes.as_mut_ptr(), plan.batch as i64);
        // Without strides the arrays lie one behind the other, which is the only layout that halves may have.
        let none = null_mut();
        let mut scratch = 0;
        match library_type(plan) {
            // SAFETY: `sizes` has `rank` numbers, and the call writes `scratch`.
            Some(kind) => check("cufftMakePlanMany64", plan, unsafe {
                cufftMakePlanMany64(handle, rank, sizes, none, 1, 0, none, 1, 0, kind, batch, &mut scratch)
            })?,
            None => {
                let [from, to, inside] = plan.formats();
                // SAFETY: as above.
                check("cufftXtMakePlanMany", plan, unsafe {
                    let work = &mut scratch;
                    cufftXtMakePlanMany(handle, rank, sizes, none, 1, 0, from, none, 1, 0, to, batch, work, inside)
                })?;
            }
        }
        if scratch > 0 {
            let area = match state.areas.iter().find(|(_, bytes)| *bytes >= scratch) {
                Some((address, _)) => *address,
                None => {
                    let address = context.take(scratch)?;
                    state.areas.push((address, scratch));
                    address
                }
            };
            // SAFETY: the area has the bytes that the plan asks for and lives as long as the context; plans use it
            // one after the other, in the order of the one stream.
            check("cufftSetWorkArea", plan, unsafe { cufftSetWorkArea(handle, area as *mut c_void) })?;
        }
        Ok(scratch)
    }

    /// Launches a plan on addresses whose bytes were checked.
    fn run(&self, plan: &FftPlan, made: Made, from: u64, to: u64) -> Result<()> {
        let library = &self.library;
        let direction = match plan.kind {
            FftKind::RealToComplex | FftKind::Forward => CUFFT_FORWARD,
            FftKind::ComplexToReal | FftKind::Inverse => CUFFT_INVERSE,
        };
        use cufftType as T;
        let handle = made.handle;
        let (call, outcome) = match library_type(plan) {
            // SAFETY: the plan is alive and of this type; both addresses have its bytes and alignment. So for all.
            Some(T::CUFFT_R2C) => ("cufftExecR2C", unsafe { (library.cufftExecR2C)(handle, from as _, to as _) }),
            // SAFETY: as above.
            Some(T::CUFFT_C2R) => ("cufftExecC2R", unsafe { (library.cufftExecC2R)(handle, from as _, to as _) }),
            // SAFETY: as above.
            Some(T::CUFFT_D2Z) => ("cufftExecD2Z", unsafe { (library.cufftExecD2Z)(handle, from as _, to as _) }),
            // SAFETY: as above.
            Some(T::CUFFT_Z2D) => ("cufftExecZ2D", unsafe { (library.cufftExecZ2D)(handle, from as _, to as _) }),
            Some(T::CUFFT_C2C) => ("cufftExecC2C", {
                // SAFETY: as above.
                unsafe { (library.cufftExecC2C)(handle, from as _, to as _, direction) }
            }),
            Some(T::CUFFT_Z2Z) => ("cufftExecZ2Z", {
                // SAFETY: as above.
                unsafe { (library.cufftExecZ2Z)(handle, from as _, to as _, direction) }
            }),
            None => ("cufftXtExec", {
                // SAFETY: as above.
                unsafe { (library.cufftXtExec)(handle, from as _, to as _, direction) }
            }),
        };
        check(call, plan, outcome)
    }
}

/// The library's name of a single or double transform; the others are planned by their formats.
fn library_type(plan: &FftPlan) -> Option<cufftType> {
    use cufftType as T;
    Some(match (plan.precision, plan.kind) {
        (Precision::F32, FftKind::RealToComplex) => T::CUFFT_R2C,
        (Precision::F32, FftKind::ComplexToReal) => T::CUFFT_C2R,
        (Precision::F32, FftKind::Forward | FftKind::Inverse) => T::CUFFT_C2C,
        (Precision::F64, FftKind::RealToComplex) => T::CUFFT_D2Z,
        (Precision::F64, FftKind::ComplexToReal) => T::CUFFT_Z2D,
        (Precision::F64, FftKind::Forward | FftKind::Inverse) => T::CUFFT_Z2Z,
        (Precision::F16 | Precision::Bf16, _) => return None,
    })
}

fn check(call: &'static str, plan: &FftPlan, outcome: cufftResult) -> Result<()> {
    if outcome.is_success() {
        return Ok(());
    }
    Err(Error::Fft { call, what: plan.describe(), code: outcome.to_string() })
}

impl Context {
    /// Launches transforms after everything launched so far.
    ///
    /// # Errors
    /// [`Error::Library`] without cuFFT, [`Error::FftShape`] for a shape that it does not take, [`Error::Launch`] if
    /// input or output leave their spans or overlap, [`Error::Fft`].
    pub fn fft(&self, plan: &FftPlan, input: Span<'_>, output: Span<'_>) -> Result<()> {
        plan.check()?;
        let refuse = |problem: String| {
            Err(Error::Launch { kernel: "fft".to_owned(), problem: format!("{problem}: {}", plan.describe()) })
        };
        let mut ranges = [(0, 0); 2];
        for ((range, span), is_input) in ranges.iter_mut().zip([input, output]).zip([true, false]) {
            let name = if is_input { "input" } else { "output" };
            // Checked above: the bytes are a number.
            let bytes = plan.numel(is_input).unwrap_or(usize::MAX).saturating_mul(plan.precision.bytes());
            if bytes > span.len() {
                return refuse(format!("{name} of {bytes} bytes leaves its {} bytes", span.len()));
            }
            if !span.buffer.context().same(self) {
                return refuse(format!("{name} is of another device"));
            }
            // A complex scalar is read at once.
            if !span.address().is_multiple_of(2 * plan.precision.bytes() as u64) {
                return refuse(format!("{name} is not aligned"));
            }
            *range = (span.address(), span.address() + bytes as u64);
        }
        let [(from, from_end), (to, to_end)] = ranges;
        if plan.batch == 0 {
            return Ok(());
        }
        if from < to_end && to < from_end {
            return refuse("input and output overlap".to_owned());
        }
        let fft = self.fft_library()?;
        self.bind()?;
        let mut state = fft.state.lock().unwrap_or_else(PoisonError::into_inner);
        let made = fft.plan(&mut state, plan, self)?;
        self.timed(|| format!("fft {}", plan.describe()), || fft.run(plan, made, from, to))
    }

    /// Bytes of the work area that such transforms use while they run; plans share it.
    ///
    /// # Errors
    /// Those of [`Context::fft`].
    pub fn fft_scratch_bytes(&self, plan: &FftPlan) -> Result<usize> {
        plan.check()?;
        if plan.batch == 0 {
            return Ok(0);
        }
        let fft = self.fft_library()?;
        self.bind()?;
        let mut state = fft.state.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(fft.plan(&mut state, plan, self)?.scratch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(kind: FftKind, precision: Precision, sizes: &[usize]) -> FftPlan {
        FftPlan { kind, precision, sizes: sizes.to_vec(), batch: 3 }
    }

    #[test]
    fn halves_take_powers_of_two() {
        for precision in [Precision::F16, Precision::Bf16] {
            assert_eq!(plan(FftKind::Forward, precision, &[8, 64]).check(), Ok(()));
            let err = plan(FftKind::RealToComplex, precision, &[8, 12]).check().unwrap_err();
            let text = err.to_string();
            assert!(text.contains("powers of two, and 12 is none") && text.contains("store f32"), "{text}");
        }
        assert_eq!(plan(FftKind::RealToComplex, Precision::F32, &[7, 13, 1]).check(), Ok(()));
    }

    #[test]
    fn shapes_that_are_none_are_refused() {
        let refused = |sizes: &[usize]| plan(FftKind::Forward, Precision::F64, sizes).check().is_err();
        assert!(refused(&[]) && refused(&[2, 2, 2, 2]) && refused(&[4, 0]) && refused(&[usize::MAX, 2]));
        assert!(refused(&[1 << 60]) && !refused(&[1 << 40]));
        let huge = FftPlan { batch: usize::MAX, ..plan(FftKind::Forward, Precision::F64, &[4]) };
        assert!(huge.check().is_err());
    }

    #[test]
    fn both_sides_are_counted_in_scalars() {
        let numel = |kind| {
            let plan = plan(kind, Precision::F32, &[5, 8]);
            (plan.numel(true), plan.numel(false))
        };
        assert_eq!(numel(FftKind::RealToComplex), (Some(120), Some(150)));
        assert_eq!(numel(FftKind::ComplexToReal), (Some(150), Some(120)));
        assert_eq!(numel(FftKind::Inverse), (Some(240), Some(240)));
    }
}
