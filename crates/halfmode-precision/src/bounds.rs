//! Discretisation and rounding errors of Fourier coefficients: bounds, and their measurement.
//!
//! The coefficient of `v` at the frequency `w` is the integral of `v(x) exp(2πi⟨w, x⟩)` over the
//! unit cube in `d` dimensions. A Riemann sum on `n = m^d` points, each at the corner of its cell
//! nearest the origin, misses it by the discretisation error. Rounding `v` and the exponential at
//! each point before the exact sum changes the sum by the precision error.

use crate::{Error, Format};
use std::f64::consts::{PI, SQRT_2, TAU};

/// Errors of one Fourier coefficient, from [`measure`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Distance of the Riemann sum from the integral.
    pub disc: f64,
    /// Distance of the sum of rounded factors from the sum of exact ones.
    pub prec: f64,
}

/// Bound on the discretisation error of every `v` with `|v| <= sup` and the Lipschitz constant
/// `lipschitz`, at a frequency of Euclidean length `w_norm`:
/// `√d (lipschitz + 2π w_norm sup) n^(-1/d)`.
#[must_use]
pub fn discretisation_upper(d: u32, n: f64, lipschitz: f64, w_norm: f64, sup: f64) -> f64 {
    let d = f64::from(d);
    d.sqrt() * (lipschitz + TAU * w_norm * sup) * n.powf(-1.0 / d)
}

/// [`discretisation_upper`] with the mean distance within a cell in the place of the largest,
/// which makes it smaller by `√3`.
#[must_use]
pub fn discretisation_upper_mean(d: u32, n: f64, lipschitz: f64, w_norm: f64, sup: f64) -> f64 {
    discretisation_upper(d, n, lipschitz, w_norm, sup) / 3f64.sqrt()
}

/// The rate `√d sup n^(-2/d)` below which the worst discretisation error does not fall, with the
/// theorem's unnamed constant set to 1.
///
/// It is conservative: the worst error of functions that are not periodic decays as `n^(-1/d)`.
#[must_use]
pub fn discretisation_lower(d: u32, n: f64, sup: f64) -> f64 {
    let d = f64::from(d);
    d.sqrt() * sup * n.powf(-2.0 / d)
}

/// Bound on the precision error of every `v` with `|v| <= sup`, for any grid and frequency.
///
/// With `eps` and the smallest value `a` of the format it is
/// `sup (eps + eps²/4) + a (1 + √2 sup)(1 + eps/2) / 2 + a² / √8`: the relative error of a product
/// of two rounded factors, and the absolute errors `a/2` of `v` and of each of the two parts of
/// the exponential below the normal range. Infinite if `sup` is beyond the format's range.
#[must_use]
pub fn precision_bound(format: Format, sup: f64) -> f64 {
    if format.round(sup).is_finite() {
        let (eps, a) = (format.eps(), format.min_subnormal());
        let relative = sup * (eps + 0.25 * eps * eps);
        relative + 0.5 * a * (1.0 + SQRT_2 * sup) * (1.0 + 0.5 * eps) + a * a / 8f64.sqrt()
    } else {
        f64::INFINITY
    }
}

/// Measures both errors for `v(x) = x_1 ⋯ x_d`, the frequency `(1, …, 1)` and `m` points per axis.
///
/// Rounding keeps `format`'s significand and puts no limit on the range, as in the theory. The
/// coefficient is `(1 / 2πi)^d`. Time grows as `m^d`, memory as `m`.
///
/// # Errors
/// [`Error::Grid`] if `d` or `m` is zero, or if there are more than `2^30` points.
pub fn measure(d: u32, m: usize, format: Format) -> Result<Measured, Error> {
    const MAX_POINTS: usize = 1 << 30;
    let n = m.checked_pow(d).filter(|&n| d > 0 && n > 0 && n <= MAX_POINTS).ok_or(Error::Grid { d, m })?;
    let x = |k: usize| k as f64 / m as f64;
    let phase: Vec<Complex> = (0..m).map(|k| Complex::unit(TAU * x(k))).collect();

    // The exact sum is the d-th power of the one-dimensional one.
    let along_axis = Complex::sum((0..m).map(|k| phase[k].times(x(k) / m as f64)));
    let exact = Complex { re: 0.0, im: -1.0 / (2.0 * PI) };
    let disc = along_axis.power(d).minus(exact.power(d)).abs();

    // Rounding does not separate, but the exponential depends on the sum of the indices alone:
    // collect the values of v and their rounding errors by that sum.
    let mut sums = vec![(0.0, 0.0); m];
    let mut index = vec![0usize; d as usize];
    for _ in 0..n {
        let product: f64 = index.iter().map(|&k| k as f64).product();
        let v = product / n as f64;
        let rounded = format.round_significand(v);
        let sum = &mut sums[index.iter().sum::<usize>() % m];
        sum.0 += rounded;
        sum.1 += rounded - v;
        for k in &mut index {
            *k += 1;
            if *k < m {
                break;
            }
            *k = 0;
        }
    }
    let error = Complex::sum(sums.iter().zip(&phase).map(|(&(rounded, v_error), &exact)| {
        let q = Complex { re: format.round_significand(exact.re), im: format.round_significand(exact.im) };
        // q(v) q(φ) - v φ = q(v) (q(φ) - φ) + (q(v) - v) φ.
        q.minus(exact).times(rounded).plus(exact.times(v_error))
    }));
    Ok(Measured { disc, prec: error.abs() / n as f64 })
}

#[derive(Clone, Copy)]
struct Complex {
    re: f64,
    im: f64,
}

impl Complex {
    fn unit(angle: f64) -> Self {
        Complex { re: angle.cos(), im: angle.sin() }
    }

    fn plus(self, b: Self) -> Self {
        Complex { re: self.re + b.re, im: self.im + b.im }
    }

    fn minus(self, b: Self) -> Self {
        Complex { re: self.re - b.re, im: self.im - b.im }
    }

    fn times(self, b: f64) -> Self {
        Complex { re: self.re * b, im: self.im * b }
    }

    fn power(self, n: u32) -> Self {
        (0..n).fold(Complex { re: 1.0, im: 0.0 }, |p, _| Complex {
            re: p.re * self.re - p.im * self.im,
            im: p.re * self.im + p.im * self.re,
        })
    }

    fn sum(terms: impl Iterator<Item = Self>) -> Self {
        terms.fold(Complex { re: 0.0, im: 0.0 }, Complex::plus)
    }

    fn abs(self) -> f64 {
        self.re.hypot(self.im)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Format; 4] = [Format::F16, Format::Bf16, Format::E4m3, Format::E5m2];

    /// Half a unit in the last of two printed digits.
    fn assert_two_digits(what: &str, got: f64, want: f64) {
        let last_digit = 10f64.powf(want.log10().floor() - 1.0);
        assert!((got - want).abs() <= 0.5 * last_digit * (1.0 + 1e-9), "{what}: {got:e}, not {want:e}");
    }

    /// The table of section 2.5 of the reference on mixed-precision neural operators.
    #[test]
    fn measure_reproduces_the_reference_table() {
        let rows = [
            (1, 64, 7.81e-3, [1.9e-6, 3.8e-5, 1.3e-3, 2.1e-3]),
            (1, 1024, 4.88e-4, [8.7e-7, 2.3e-5, 4.1e-4, 1.4e-3]),
            (2, 64, 2.49e-3, [2.0e-7, 1.2e-5, 2.3e-4, 1.3e-4]),
            (2, 256, 6.22e-4, [6.3e-8, 1.3e-6, 5.7e-5, 1.3e-4]),
            (3, 64, 5.94e-4, [1.2e-7, 1.7e-6, 2.6e-5, 3.2e-5]),
            (3, 100, 3.80e-4, [1.7e-7, 2.5e-6, 1.2e-5, 4.2e-5]),
        ];
        for (d, m, disc, precs) in rows {
            for (format, prec) in FORMATS.into_iter().zip(precs) {
                let measured = measure(d, m, format).unwrap();
                // The table has three digits here; it rounds 5.935 up.
                assert!((measured.disc / disc - 1.0).abs() < 2e-3, "{d} {m}: {:e}", measured.disc);
                assert_two_digits(&format!("{d} {m} {format}"), measured.prec, prec);
            }
        }
    }

    #[test]
    fn one_dimensional_error_has_its_closed_form() {
        // v(x) = x: the real part is off by 1 / 2m, the imaginary part by about π / 6m².
        for m in [7usize, 64, 1000] {
            let m_real = m as f64;
            let sine = 1.0 / (2.0 * PI) - 0.5 / m_real / (PI / m_real).tan();
            let want = (0.5 / m_real).hypot(sine);
            let got = measure(1, m, Format::F64).unwrap();
            // Rounding errors of m terms of size at most 1 / m in f64.
            assert!((got.disc - want).abs() < 1e-15, "m = {m}: {:e}, not {want:e}", got.disc);
            assert!((sine / (PI / (6.0 * m_real * m_real)) - 1.0).abs() < 2.0 / m_real);
            assert!(got.prec <= 0.0, "f64 rounds nothing");
        }
    }

    #[test]
    fn measured_errors_obey_the_bounds() {
        for (d, m) in [(1, 1), (1, 2), (1, 37), (1, 512), (2, 5), (2, 100), (3, 11), (3, 32)] {
            let n = (m as f64).powi(d as i32);
            for format in Format::ALL {
                let Measured { disc, prec } = measure(d, m, format).unwrap();
                let w_norm = f64::from(d).sqrt();
                // The product of coordinates has sup 1 and Lipschitz constant √d.
                let upper = discretisation_upper_mean(d, n, w_norm, w_norm, 1.0);
                assert!(disc <= upper, "{d} {m}: {disc:e} above {upper:e}");
                assert!(upper < discretisation_upper(d, n, w_norm, w_norm, 1.0));
                let bound = precision_bound(format, 1.0);
                assert!(prec <= bound, "{d} {m} {format}: {prec:e} above {bound:e}");
            }
        }
    }

    #[test]
    fn precision_bound_holds_with_the_range_of_the_format() {
        // One point, the worst over many values and phases, subnormals included.
        for format in [Format::F16, Format::E4m3, Format::E5m2] {
            for sup in [1e-6, 1e-3, 0.3, 1.0, 400.0] {
                for i in 1..=200 {
                    let v = sup * f64::from(i) / 200.0;
                    let phase = Complex::unit(0.377 * f64::from(i));
                    let q = Complex { re: format.round(phase.re), im: format.round(phase.im) };
                    let error = q.times(format.round(v)).minus(phase.times(v)).abs();
                    assert!(error <= precision_bound(format, sup), "{format} {sup} {i}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn precision_bound_is_near_eps_and_infinite_beyond_the_range() {
        assert!((precision_bound(Format::F32, 3.0) / (3.0 * Format::F32.eps()) - 1.0).abs() < 1e-6);
        assert!(precision_bound(Format::F16, 65504.0).is_finite());
        assert!(precision_bound(Format::F16, 65520.0).is_infinite());
        assert!(precision_bound(Format::E4m3, 500.0).is_infinite());
    }

    #[test]
    fn million_points_in_three_dimensions_balance_half_precision() {
        // Section 2.4: n^(-2/d) is 1e-4 for 10^6 points in 3, 10^4 in 2 and 100 in 1 dimensions.
        for (d, n) in [(3, 1e6), (2, 1e4), (1, 1e2)] {
            let rate = discretisation_lower(d, n, 1.0) / f64::from(d).sqrt();
            assert!((rate / 1e-4 - 1.0).abs() < 1e-12, "{d}: {rate:e}");
        }
    }

    #[test]
    fn impossible_grids_are_refused() {
        for (d, m) in [(0, 4), (1, 0), (3, 1 << 20), (200, 2)] {
            assert_eq!(measure(d, m, Format::F16), Err(Error::Grid { d, m }));
        }
    }
}
