//! Comparison with derived tolerances.

use halfmode_precision::{Format, Precision};

/// The relative error (2-norm) that a sum of `n_terms` products stored in `precision` may have:
/// `c eps(storage) + c' eps(acc) sqrt(n_terms)`.
///
/// The first term is the handful of roundings on the way to memory, `c = 4` times the unit
/// roundoff (independent errors of a few stored operands add as squares; 4 leaves a factor of
/// about 2 over what is seen). The second is accumulation, where rounding errors of a sum grow as
/// the root of its length, `c' = 4` again.
#[must_use]
pub fn tol(precision: Precision, n_terms: usize) -> f64 {
    let storage = Format::from(precision).unit_roundoff();
    let accumulate = Format::from(precision.accumulate()).unit_roundoff();
    4.0 * storage + 4.0 * accumulate * (n_terms as f64).sqrt()
}

/// `|got - want|_2 / |want|_2`; infinite if lengths differ or something is not finite.
#[must_use]
pub fn rel_l2(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() || got.iter().chain(want).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let error: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    if error == 0.0 { 0.0 } else { (error / norm.max(f64::MIN_POSITIVE)).sqrt() }
}

/// Largest absolute difference and where it is.
#[must_use]
pub fn max_error(got: &[f64], want: &[f64]) -> (f64, usize) {
    let errors = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    errors.enumerate().fold((0.0, 0), |worst, (idx, e)| if e > worst.0 || e.is_nan() { (e, idx) } else { worst })
}

/// Asserts that two sequences agree to a relative 2-norm error, naming the worst element.
#[macro_export]
macro_rules! assert_close {
    ($name:expr, $got:expr, $want:expr, $tol:expr) => {{
        let (got, want): (&[f64], &[f64]) = (&$got, &$want);
        let (error, tol) = ($crate::rel_l2(got, want), $tol);
        if !(error <= tol) {
            let (worst, idx) = $crate::max_error(got, want);
            panic!(
                "{}: relative error {error:.3e} > {tol:.3e}; lengths {} and {}; worst at {idx}: got {:?}, want {:?}, off by {worst:.3e}",
                $name, got.len(), want.len(), got.get(idx), want.get(idx),
            );
        }
    }};
}
