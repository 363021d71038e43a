//! Which algorithm an axis uses: a cost model, not a measurement, so that plans are reproducible.

/// How one axis is transformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Products with the cosines and sines of the kept modes.
    Matrix,
    /// A fast transform of the whole axis, of which the kept modes are stored.
    Fft,
}

/// What the lines of an axis hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AxisKind {
    /// n real points, modes 0..k: the last axis of real data.
    Real,
    /// n complex points, modes -k/2..k - k/2.
    Complex,
}

/// Seconds per multiply-add pair in a matrix product (110 GFLOP/s, one core with AVX-512).
const SECONDS_PER_FLOP: f64 = 1.0 / 110e9;
/// Seconds per n log2 n of one complex line, gathered and scattered (measured with pruned rustfft:
/// 60 us for both directions of a 128 x 128 real field on the same core).
const SECONDS_PER_FFT_POINT: f64 = 0.4e-9;

/// The cheaper algorithm for lines of `n` points of which `k` modes are kept.
#[must_use]
pub(crate) fn choose(kind: AxisKind, n: usize, k: usize) -> Algorithm {
    let (n, k) = (n as f64, k as f64);
    // Products with the even and odd parts of a line; on a complex axis of two frequencies at once.
    let (flops, lines) = match kind {
        AxisKind::Real => (2.0 * n * k, 0.6),
        AxisKind::Complex => (2.0 * n * k, 1.0),
    };
    let fft = lines * SECONDS_PER_FFT_POINT * n * n.log2().max(1.0);
    if flops * SECONDS_PER_FLOP <= fft { Algorithm::Matrix } else { Algorithm::Fft }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_modes_take_the_matrix_and_many_take_the_fft() {
        for n in [64, 128, 421, 1024] {
            assert_eq!(choose(AxisKind::Complex, n, n / 32 + 1), Algorithm::Matrix);
            assert_eq!(choose(AxisKind::Real, n, 17), Algorithm::Matrix);
        }
        assert_eq!(choose(AxisKind::Complex, 1024, 1024), Algorithm::Fft);
        assert_eq!(choose(AxisKind::Real, 1024, 513), Algorithm::Fft);
    }
}
