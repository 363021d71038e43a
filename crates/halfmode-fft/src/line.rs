//! One-dimensional fast transforms behind functions that leak no generic planner.

use halfmode_tensor::Real;
use num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use rustfft::{Fft, FftPlanner};
use std::sync::Arc;

/// An accumulator that fast transforms exist for: f32 and f64.
pub trait Scalar: Real + rustfft::FftNum + bytemuck::Pod {}
impl Scalar for f32 {}
impl Scalar for f64 {}

/// The fast transforms of one line length.
#[derive(Clone)]
pub(crate) struct Line<R> {
    forward: Arc<dyn Fft<R>>,
    inverse: Arc<dyn Fft<R>>,
    to_complex: Arc<dyn RealToComplex<R>>,
    to_real: Arc<dyn ComplexToReal<R>>,
    n: usize,
}

impl<R> std::fmt::Debug for Line<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Line({})", self.n)
    }
}

impl<R: Scalar> Line<R> {
    pub(crate) fn new(n: usize) -> Self {
        let (mut complex, mut real) = (FftPlanner::new(), RealFftPlanner::new());
        Line {
            forward: complex.plan_fft_forward(n),
            inverse: complex.plan_fft_inverse(n),
            to_complex: real.plan_fft_forward(n),
            to_real: real.plan_fft_inverse(n),
            n,
        }
    }

    /// Scalars of scratch that the methods below need.
    pub(crate) fn scratch_len(&self) -> usize {
        let scratch = self
            .forward
            .get_inplace_scratch_len()
            .max(self.inverse.get_inplace_scratch_len())
            .max(self.to_complex.get_scratch_len())
            .max(self.to_real.get_scratch_len());
        2 * (scratch + self.n + self.n / 2 + 1)
    }

    /// Transforms a complex line in place; e^(-i theta) if `forward`.
    pub(crate) fn complex(&self, forward: bool, line: &mut [Complex<R>], scratch: &mut [Complex<R>]) {
        if forward {
            self.forward.process_with_scratch(line, &mut scratch[..self.forward.get_inplace_scratch_len()]);
        } else {
            self.inverse.process_with_scratch(line, &mut scratch[..self.inverse.get_inplace_scratch_len()]);
        }
    }

    /// Real points to half spectrum; `points` is overwritten.
    pub(crate) fn to_half(&self, points: &mut [R], half: &mut [Complex<R>], scratch: &mut [Complex<R>]) {
        let scratch = &mut scratch[..self.to_complex.get_scratch_len()];
        // The lengths come from this plan, the only thing that this call can refuse.
        let outcome = self.to_complex.process_with_scratch(points, half, scratch);
        debug_assert!(outcome.is_ok());
    }

    /// Half spectrum to real points; `half` is overwritten. Imaginary parts of the mean and the
    /// Nyquist frequency are ignored, as the matrices do.
    pub(crate) fn to_points(&self, half: &mut [Complex<R>], points: &mut [R], scratch: &mut [Complex<R>]) {
        half[0].im = R::ZERO;
        if self.n.is_multiple_of(2) {
            half[self.n / 2].im = R::ZERO;
        }
        let scratch = &mut scratch[..self.to_real.get_scratch_len()];
        let outcome = self.to_real.process_with_scratch(half, points, scratch);
        debug_assert!(outcome.is_ok());
    }
}
