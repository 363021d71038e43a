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
const ROUND: f32 = 12_582_912.0;

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

/// (Phi(x), e^(-x^2/2)): the normal distribution function and its unnormalised density.
#[inline(always)]
fn normal_f32(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    // Beyond 14 the density is 0 and so is the tail.
    let t = reciprocal_f32(if z < 1e30 { z } else { 1e30 }.mul_add(0.4, 1.0));
    // t * p(t) approximates e^(z^2) erfc(z) with relative error 3e-8.
    let p = poly(
        t,
        [
            0.225_512_03,
            0.228_339_85,
            0.189_423_73,
            0.238_716_97,
            -0.020_119_468,
            0.224_741_95,
            -0.029_888_092,
            -0.087_527_68,
            0.030_800_734,
        ],
    );
    let density = exp_f32(-0.5 * x * x);
    let tail = 0.5 * t * p * density;
    (if x >= 0.0 { 1.0 - tail } else { tail }, density)
}

/// x Phi(x), the Gaussian error linear unit in its exact (erf) form.
#[inline(always)]
pub(crate) fn gelu_f32(x: f32) -> f32 {
    x * normal_f32(x).0
}

/// (gelu(x), gelu'(x)).
#[inline(always)]
pub(crate) fn gelu_both_f32(x: f32) -> (f32, f32) {
    const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;
    let (phi, density) = normal_f32(x);
    (x * phi, (x * density).mul_add(FRAC_1_SQRT_2PI, phi))
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
            let (got, slope) = gelu_both_f32(x);
            assert!((f64::from(got) - want).abs() < 2e-7 * (1.0 + want.abs()), "{x}: {got} {want}");
            assert!((f64::from(slope) - want_slope).abs() < 3e-7, "{x}: {slope} {want_slope}");
            assert!((gelu_f32(x) - got).abs() <= f32::EPSILON * got.abs());
        }
        assert!(gelu_f32(f32::NAN).is_nan() && gelu_f32(f32::INFINITY) == f32::INFINITY);
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
