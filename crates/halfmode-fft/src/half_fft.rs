//! A fast transform that really computes in half: the reference for error studies.

use half::f16;
use num_complex::Complex;
use rustfft::FftPlanner;

/// Transforms each length-`n` line of `values` in place with every butterfly and twiddle rounded to
/// binary16, as a half FFT on a GPU does: the error grows with log2 n, and sums overflow at 65504.
/// Unnormalised; e^(-i theta) if `forward`. Slow: no vector path. Does nothing for `n == 0`.
pub fn true_half_fft(values: &mut [Complex<f16>], n: usize, forward: bool) {
    if n == 0 {
        return;
    }
    let mut planner = FftPlanner::<f16>::new();
    let plan = if forward { planner.plan_fft_forward(n) } else { planner.plan_fft_inverse(n) };
    for line in values.chunks_exact_mut(n) {
        plan.process(line);
    }
}
