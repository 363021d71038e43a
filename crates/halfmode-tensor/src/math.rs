//! The transcendental functions of the models, branch-free so that loops over them vectorise.
//!
//! The f32 versions are polynomials fitted for this crate (least squares re-weighted towards the
//! minimax error); their errors against double precision are asserted below. Multiplies are fused
//! with adds by name, so the bits are the same on every processor. Nothing divides: a division
//! takes as long as sixteen multiplies. The f64 versions call the standard library and `libm`.

const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;
/// 1.5 * 2^23: adding it rounds a small number to an integer that then sits in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Horner's rule, lowest coefficient first.
#[inline(always)]
fn poly<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    let mut idx = N - 1;
    while idx > 0 {
        idx -= 1;
        sum = sum.mul_add(x, coefficients[idx]);
    }
    sum
}

/// 1/x for normal x between 2^-125 and 2^125. Relative error 1.2e-7.
#[inline(always)]
fn reciprocal_f32(x: f32) -> f32 {
    // The difference of exponents, and a line for the mantissa: within 13 %.
    let mut r = f32::from_bits(0x7ef3_11c7_u32.wrapping_sub(x.to_bits()));
    // Each turn leaves the cube of the error.
    for _ in 0..2 {
        let e = (-x).mul_add(r, 1.0);
        r = r.mul_add(e.mul_add(e, e), r);
    }
    r
}

/// e^x for x <= 88; flushes to about 1e-38 below -87. Relative error 2e-7.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let q = poly(r, [0.5, 0.166_665_18, 0.041_666_206, 0.008_368_89, 0.001_395_049_2]);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (1.0 + (r * r).mul_add(q, r)) * scale
}

/// gelu as polynomials of degree 6 in the distance from the nearest of 32 points, 3/8 apart.
///
/// Fitted once, in double precision, through the Chebyshev points of each piece. Point `i`, between -16
/// and 15, is in column `i mod 32`: the low bits of `i` are the index.
pub(crate) struct GeluTable {
    /// Coefficients, lowest power first.
    pub(crate) coefficients: [[f32; 32]; 7],
}

impl GeluTable {
    /// Points per unit, and the distance between points.
    pub(crate) const PER_UNIT: f32 = 8.0 / 3.0;
    pub(crate) const STEP: f32 = 0.375;
    /// Where the pieces end, short of the ties between two points: from here on gelu(x) is x, or 0, within 2e-8.
    pub(crate) const FIRST: f32 = -6.1875 + 1e-3;
    pub(crate) const LAST: f32 = 5.8125 - 1e-3;

    pub(crate) fn get() -> &'static GeluTable {
        static TABLE: std::sync::LazyLock<GeluTable> = std::sync::LazyLock::new(GeluTable::fit);
        &TABLE
    }

    fn fit() -> GeluTable {
        const N: usize = 7;
        let mut table = GeluTable { coefficients: [[0.0; 32]; N] };
        let half = f64::from(Self::STEP) / 2.0;
        for point in -16i32..16 {
            let centre = f64::from(point) * f64::from(Self::STEP);
            // Newton's divided differences through the Chebyshev points, then powers of the distance.
            let at: [f64; N] = std::array::from_fn(|i| {
                // The middle one is exactly 0, so that gelu(0) is.
                if 2 * i + 1 == N { 0.0 } else { half * (std::f64::consts::PI * (i as f64 + 0.5) / N as f64).cos() }
            });
            let mut differences = at.map(|r| gelu_both_f64(centre + r).0);
            for order in 1..N {
                for i in (order..N).rev() {
                    differences[i] = (differences[i] - differences[i - 1]) / (at[i] - at[i - order]);
                }
            }
            let mut powers = [0.0; N];
            for i in (0..N).rev() {
                for power in (1..N).rev() {
                    powers[power] = powers[power - 1] - at[i] * powers[power];
                }
                powers[0] = differences[i] - at[i] * powers[0];
            }
            for (power, value) in powers.into_iter().enumerate() {
                table.coefficients[power][point.rem_euclid(32) as usize] = value as f32;
            }
        }
        table
    }

    /// (gelu(x), gelu'(x)). A NaN stays a NaN.
    #[inline(always)]
    pub(crate) fn both(&self, x: f32) -> (f32, f32) {
        let shifted = x.mul_add(Self::PER_UNIT, ROUND);
        let column = (shifted.to_bits() & 31) as usize;
        let r = (shifted - ROUND).mul_add(-Self::STEP, x);
        let (mut value, mut slope) = (self.coefficients[6][column], 0.0f32);
        for power in (0..6).rev() {
            slope = slope.mul_add(r, value);
            value = value.mul_add(r, self.coefficients[power][column]);
        }
        if (Self::FIRST..Self::LAST).contains(&x) {
            (value, slope)
        } else if 0.0 > x {
            (0.0, 0.0)
        } else {
            (x, x.mul_add(0.0, 1.0))
        }
    }
}

/// tanh x, relative error 3e-7; a NaN stays a NaN.
#[inline(always)]
pub(crate) fn tanh_f32(x: f32) -> f32 {
    let a = x.abs();
    let a = if a > 10.0 { 10.0 } else { a };
    let s = a * a;
    let near =
        (a * s).mul_add(poly(s, [-0.333_332_84, 0.133_314_91, -0.053_743_497, 0.020_650_586, -0.005_717_044_7]), a);
    let far = 2.0f32.mul_add(-reciprocal_f32(exp_f32(2.0 * a) + 1.0), 1.0);
    let size = if a < 0.625 { near } else { far };
    // NaN compares false, so it took neither clamp nor branch by its value: give it back.
    if x.is_nan() { x } else { size.copysign(x) }
}

/// gelu and its derivative in double precision.
#[inline]
pub(crate) fn gelu_both_f64(x: f64) -> (f64, f64) {
    const FRAC_1_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
    let phi = 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
    (x * phi, phi + x * FRAC_1_SQRT_2PI * (-0.5 * x * x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> impl Iterator<Item = f32> {
        (-200_000..=200_000).map(|i| i as f32 * 6e-5)
    }

    #[test]
    fn reciprocal_is_within_12e8_relative() {
        for x in (0..2_000_000u32).map(|i| f32::from_bits(0x0100_0000 + i * 1057)).filter(|x| *x < 4e37) {
            let error = f64::from(reciprocal_f32(x)) * f64::from(x) - 1.0;
            assert!(error.abs() < 1.2e-7, "{x:e}: {error:e}");
        }
    }

    #[test]
    fn exp_is_within_2e7_relative() {
        for x in (-86_999..=88_000).map(|i| i as f32 * 1e-3) {
            let want = f64::from(x).exp();
            assert!((f64::from(exp_f32(x)) / want - 1.0).abs() < 2e-7, "{x}");
        }
    }

    #[test]
    fn gelu_and_its_derivative_are_within_3e7() {
        for x in grid() {
            let (want, want_slope) = gelu_both_f64(f64::from(x));
            let (got, slope) = GeluTable::get().both(x);
            assert!((f64::from(got) - want).abs() < 2e-7 * (1.0 + want.abs()), "{x}: {got} {want}");
            assert!((f64::from(slope) - want_slope).abs() < 3e-7, "{x}: {slope} {want_slope}");
        }
        let gelu = |x: f32| GeluTable::get().both(x).0;
        assert!(gelu(f32::NAN).is_nan() && gelu(f32::INFINITY) == f32::INFINITY && gelu(f32::NEG_INFINITY) == 0.0);
        assert!(gelu(0.0) == 0.0 && gelu(3e38) >= 3e38 && GeluTable::get().both(f32::NAN).1.is_nan());
        // Small values keep their digits.
        for x in (1..60).map(|i| 2f32.powi(-i)) {
            assert!((f64::from(gelu(x)) / gelu_both_f64(f64::from(x)).0 - 1.0).abs() < 3e-7, "{x:e}");
        }
    }

    #[test]
    fn tanh_is_within_3e7_relative() {
        for x in grid().filter(|x| *x != 0.0) {
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh_f32(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert!(tanh_f32(f32::NAN).is_nan());
        assert!((tanh_f32(f32::NEG_INFINITY) + 1.0).abs() < 1e-6 && tanh_f32(-0.0).to_bits() == (-0.0f32).to_bits());
    }
}
