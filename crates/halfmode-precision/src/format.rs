//! Floating-point formats as rounding models on f64 values.

use crate::{Error, Precision};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A binary floating-point format, as a set of representable values and a rounding to it.
///
/// [`Precision`] says how tensors are stored; a `Format` says what rounding does, also for
/// formats in which nothing is stored: TF32 (what tensor cores read of f32 operands) and the two
/// FP8 formats of the OCP specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// The significand of f16 with the exponents of f32.
    Tf32,
    /// The upper 16 bits of f32.
    Bf16,
    /// IEEE binary16.
    F16,
    /// FP8 with 4 exponent bits: largest value 448, no infinity, one NaN per sign.
    E4m3,
    /// FP8 with 5 exponent bits: largest value 57344, with infinities.
    E5m2,
}

/// What rounding does with a value beyond the largest finite one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overflow {
    /// An infinity of the same sign; NaN for [`Format::E4m3`], which has no infinity.
    ToInf,
    /// The largest finite value of the same sign, for infinite inputs too.
    Saturate,
    /// [`Error::Overflow`], for infinite inputs too.
    Error,
}

impl Format {
    /// All formats, in the order of their declaration.
    pub const ALL: [Format; 7] =
        [Format::F64, Format::F32, Format::Tf32, Format::Bf16, Format::F16, Format::E4m3, Format::E5m2];

    /// Bits of the significand, the hidden one included.
    #[must_use]
    pub const fn significand_bits(self) -> u32 {
        match self {
            Format::F64 => 53,
            Format::F32 => 24,
            Format::Tf32 | Format::F16 => 11,
            Format::Bf16 => 8,
            Format::E4m3 => 4,
            Format::E5m2 => 3,
        }
    }

    /// Exponent of the smallest normal value.
    const fn min_exponent(self) -> i32 {
        match self {
            Format::F64 => -1022,
            Format::F32 | Format::Tf32 | Format::Bf16 => -126,
            Format::F16 | Format::E5m2 => -14,
            Format::E4m3 => -6,
        }
    }

    /// Distance from 1 to the next larger value, `2^(1 - significand_bits)`.
    #[must_use]
    pub const fn eps(self) -> f64 {
        pow2(1 - self.significand_bits() as i32)
    }

    /// Largest relative error of rounding a value in the normal range, `eps / 2`.
    #[must_use]
    pub const fn unit_roundoff(self) -> f64 {
        0.5 * self.eps()
    }

    /// Largest finite value.
    #[must_use]
    pub const fn max(self) -> f64 {
        match self {
            Format::F64 => f64::MAX,
            Format::F32 => f32::MAX as f64,
            // (2 - eps) 2^127, eps of the format.
            Format::Tf32 | Format::Bf16 => (2.0 - self.eps()) * pow2(127),
            Format::F16 => 65504.0,
            Format::E4m3 => 448.0,
            Format::E5m2 => 57344.0,
        }
    }

    /// Smallest positive value with a full significand.
    #[must_use]
    pub const fn min_normal(self) -> f64 {
        pow2(self.min_exponent())
    }

    /// Smallest positive value.
    #[must_use]
    pub const fn min_subnormal(self) -> f64 {
        pow2(self.min_exponent() + 1 - self.significand_bits() as i32)
    }

    /// Whether the format has infinities.
    #[must_use]
    pub const fn has_inf(self) -> bool {
        !matches!(self, Format::E4m3)
    }

    /// The storage precision of the same values, if tensors are stored in this format.
    #[must_use]
    pub const fn storage(self) -> Option<Precision> {
        match self {
            Format::F64 => Some(Precision::F64),
            Format::F32 => Some(Precision::F32),
            Format::Bf16 => Some(Precision::Bf16),
            Format::F16 => Some(Precision::F16),
            Format::Tf32 | Format::E4m3 | Format::E5m2 => None,
        }
    }

    /// The nearest value of the format, ties to the even significand, subnormals included.
    ///
    /// Values beyond the range become infinite, NaN for [`Format::E4m3`]: this is
    /// [`Overflow::ToInf`]. The sign of zero and NaN are kept.
    #[must_use]
    pub fn round(self, x: f64) -> f64 {
        if let Some(y) = self.round_in_range(x) {
            y
        } else if self.has_inf() {
            f64::INFINITY.copysign(x)
        } else {
            f64::NAN
        }
    }

    /// The nearest value of the format, ties to the even significand, with a rule for overflow.
    ///
    /// A value overflows when rounding it with an unbounded exponent gives more than
    /// [`Format::max`], so for f16 from 65520 on. NaN stays NaN under every rule.
    ///
    /// # Errors
    /// [`Error::Overflow`] under [`Overflow::Error`].
    pub fn round_with(self, x: f64, overflow: Overflow) -> Result<f64, Error> {
        match (self.round_in_range(x), overflow) {
            (Some(y), _) => Ok(y),
            (None, Overflow::ToInf) => Ok(self.round(x)),
            (None, Overflow::Saturate) => Ok(self.max().copysign(x)),
            (None, Overflow::Error) => Err(Error::Overflow { format: self, value: x }),
        }
    }

    /// The nearest value with as many significand bits, ties to even, at any exponent: a
    /// format without range limits, as the error theory assumes.
    ///
    /// Exact for all values that are normal in f64. NaN and infinities are kept.
    #[must_use]
    pub fn round_significand(self, x: f64) -> f64 {
        let n_dropped = 53 - self.significand_bits();
        if n_dropped == 0 || !x.is_finite() {
            return x;
        }
        let bits = x.to_bits();
        let last_kept = (bits >> n_dropped) & 1;
        let half_minus_one = (1u64 << (n_dropped - 1)) - 1;
        // A carry out of the significand raises the exponent, which is the right result.
        f64::from_bits(((bits + half_minus_one + last_kept) >> n_dropped) << n_dropped)
    }

    /// Rounds, or returns `None` on overflow. NaN counts as in range.
    fn round_in_range(self, x: f64) -> Option<f64> {
        let y = if x.abs() >= self.min_normal() {
            self.round_significand(x)
        } else {
            // Below the normal range the spacing is constant. Both products are exact: the
            // spacing is a power of two, and f64 itself needs no rounding here.
            let spacing = self.min_subnormal();
            if self == Format::F64 { x } else { (x * (1.0 / spacing)).round_ties_even() * spacing }
        };
        (y.is_nan() || y.abs() <= self.max()).then_some(y)
    }

    /// The name used in configuration files, reports and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Format::F64 => "f64",
            Format::F32 => "f32",
            Format::Tf32 => "tf32",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::E4m3 => "e4m3",
            Format::E5m2 => "e5m2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Format::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| Error::UnknownName {
            kind: "format",
            name: name.to_owned(),
            expected: "f64, f32, tf32, bf16, f16, e4m3, e5m2",
        })
    }
}

impl From<Precision> for Format {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F64 => Format::F64,
            Precision::F32 => Format::F32,
            Precision::Bf16 => Format::Bf16,
            Precision::F16 => Format::F16,
        }
    }
}

/// `2^e` for `-1074 <= e <= 1023`.
const fn pow2(e: i32) -> f64 {
    debug_assert!(e >= -1074 && e <= 1023);
    if e >= -1022 { f64::from_bits(((e + 1023) as u64) << 52) } else { f64::from_bits(1u64 << (e + 1074)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn next_random(state: &mut u64) -> u64 {
        // splitmix64
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Equal bits, or both NaN.
    fn same(a: f64, b: f64) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    /// All finite values that are not negative, in order, so that the index is the bit pattern
    /// and its parity is that of the significand. Decoded from (exponent, fraction) fields.
    fn table(format: Format) -> Vec<f64> {
        let fraction_bits = format.significand_bits() - 1;
        let (bias, n_patterns) = match format {
            Format::E4m3 => (7, 0x7f),         // 0x7f is NaN
            Format::E5m2 => (15, 0x7c),        // infinity
            Format::F16 => (15, 0x7c00),       // infinity
            Format::Bf16 => (127, 0x7f80),     // infinity
            Format::Tf32 => (127, 0xff << 10), // infinity
            Format::F32 | Format::F64 => panic!("too many values"),
        };
        (0..n_patterns)
            .map(|pattern: u32| {
                let (exponent, fraction) = (pattern >> fraction_bits, pattern & ((1 << fraction_bits) - 1));
                let scale = |e: i32| 2f64.powi(e - bias - fraction_bits as i32);
                match exponent {
                    0 => f64::from(fraction) * scale(1),
                    _ => f64::from((1 << fraction_bits) + fraction) * scale(exponent as i32),
                }
            })
            .collect()
    }

    /// Rounds by search among all values; `None` on overflow.
    fn nearest(table: &[f64], x: f64) -> Option<f64> {
        let above = table.partition_point(|&v| v < x.abs());
        let last = table.len() - 1;
        let magnitude = if above == 0 {
            table[0]
        } else {
            // The value that would follow the largest one, with an unbounded exponent.
            let next = if above > last { 2.0 * table[last] - table[last - 1] } else { table[above] };
            let below = table[above - 1];
            let (to_below, to_next) = (x.abs() - below, next - x.abs());
            let up = to_next < to_below || (to_next <= to_below && above % 2 == 0);
            if !up {
                below
            } else if above > last {
                return None;
            } else {
                next
            }
        };
        Some(magnitude.copysign(x))
    }

    const SMALL: [Format; 5] = [Format::Tf32, Format::Bf16, Format::F16, Format::E4m3, Format::E5m2];

    #[test]
    fn every_f16_and_bf16_pattern_round_trips() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits).to_f64();
            assert!(same(Format::F16.round(x), x), "f16 {bits:#06x}");
            let x = bf16::from_bits(bits).to_f64();
            assert!(same(Format::Bf16.round(x), x), "bf16 {bits:#06x}");
        }
    }

    #[test]
    fn f32_values_round_as_the_half_crate_does() {
        let mut state = 1;
        let check = |x: f32| {
            let (f16_want, bf16_want) = (f16::from_f32(x).to_f64(), bf16::from_f32(x).to_f64());
            assert!(same(Format::F16.round(f64::from(x)), f16_want), "f16 of {x:e}");
            assert!(same(Format::Bf16.round(f64::from(x)), bf16_want), "bf16 of {x:e}");
        };
        for _ in 0..400_000 {
            let bits = next_random(&mut state);
            // Any f32, and one whose exponent is near the range of f16.
            check(f32::from_bits(bits as u32));
            let exponent = 127 - 28 + (bits >> 32) as u32 % 48;
            check(f32::from_bits((bits as u32 & 0x807f_ffff) | (exponent << 23)));
        }
        // The midpoints of neighbouring f16, and the f32 beside them.
        for bits in 0..0x7c00u16 {
            let (a, b) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let middle = if b.is_finite() { 0.5 * (a + b) } else { 65520.0 };
            for x in [middle.next_down(), middle, middle.next_up()] {
                check(x);
                check(-x);
            }
        }
    }

    #[test]
    fn f64_values_round_to_the_nearest_of_all_values() {
        let mut state = 2;
        for format in SMALL {
            let table = table(format);
            let check = |x: f64| {
                let want = nearest(&table, x);
                let saturated = want.unwrap_or(format.max().copysign(x));
                assert!(same(format.round_with(x, Overflow::Saturate).unwrap(), saturated), "{format} of {x:e}");
                let error = format.round_with(x, Overflow::Error);
                assert_eq!(error.ok(), want, "{format} of {x:e}");
                let inf = if format == Format::E4m3 { f64::NAN } else { f64::INFINITY.copysign(x) };
                assert!(same(format.round(x), want.unwrap_or(inf)), "{format} of {x:e}");
            };
            let (low, high) = (format.min_subnormal().log2() - 3.0, format.max().log2() + 3.0);
            for _ in 0..20_000 {
                let random = next_random(&mut state);
                let exponent = low + (high - low) * (random >> 40) as f64 / (1u64 << 24) as f64;
                let x = exponent.exp2() * (1.0 + (random & 0xff_ffff) as f64 / (1u64 << 24) as f64);
                check(x);
                check(-x);
                let any = f64::from_bits(random);
                if any.is_finite() {
                    check(any);
                }
            }
            for pair in table.windows(2) {
                let middle = 0.5 * (pair[0] + pair[1]);
                for x in [pair[0], middle.next_down(), middle, middle.next_up()] {
                    check(x);
                }
            }
            check(f64::MAX);
            check(f64::from_bits(1));
        }
    }

    #[test]
    fn f32_and_f64_round_as_the_machine_does() {
        let mut state = 3;
        for _ in 0..200_000 {
            let x = f64::from_bits(next_random(&mut state));
            assert!(same(Format::F64.round(x), x));
            let bits = next_random(&mut state);
            let exponent = 1023 - 152 + (bits >> 52) % 290;
            for x in [x, f64::from_bits((bits & !(0x7ff << 52)) | (exponent << 52))] {
                assert!(same(Format::F32.round(x), f64::from(x as f32)), "{x:e}");
            }
        }
    }

    #[test]
    fn facts_agree_with_the_enumerated_values() {
        for format in SMALL {
            let table = table(format);
            let normal = table.partition_point(|&v| v < format.min_normal());
            assert!(same(table[1], format.min_subnormal()), "{format}");
            assert!(same(table[normal], format.min_normal()), "{format}");
            assert_eq!(normal, 1 << (format.significand_bits() - 1), "{format}");
            assert!(same(table[table.len() - 1], format.max()), "{format}");
            let one = table.partition_point(|&v| v < 1.0);
            assert!(same(table[one + 1] - 1.0, format.eps()), "{format}");
        }
    }

    #[test]
    fn facts_agree_with_rust_and_the_half_crate() {
        let facts = |f: Format| [f.eps(), f.max(), f.min_normal(), f.min_subnormal()].map(f64::to_bits);
        let want = |values: [f64; 4]| values.map(f64::to_bits);
        assert_eq!(facts(Format::F64), want([f64::EPSILON, f64::MAX, f64::MIN_POSITIVE, f64::from_bits(1)]));
        let f32_facts = [f32::EPSILON, f32::MAX, f32::MIN_POSITIVE, f32::from_bits(1)];
        assert_eq!(facts(Format::F32), want(f32_facts.map(f64::from)));
        let f16_facts = [f16::EPSILON, f16::MAX, f16::MIN_POSITIVE, f16::from_bits(1)];
        assert_eq!(facts(Format::F16), want(f16_facts.map(f16::to_f64)));
        let bf16_facts = [bf16::EPSILON, bf16::MAX, bf16::MIN_POSITIVE, bf16::from_bits(1)];
        assert_eq!(facts(Format::Bf16), want(bf16_facts.map(bf16::to_f64)));
        for format in Format::ALL {
            assert!(same(2.0 * format.unit_roundoff(), format.eps()));
        }
    }

    #[test]
    fn fp8_ranges_are_those_of_the_ocp_specification() {
        let facts = |f: Format| [f.max(), f.min_normal(), f.min_subnormal()].map(f64::to_bits);
        assert_eq!(facts(Format::E4m3), [448.0, 2f64.powi(-6), 2f64.powi(-9)].map(f64::to_bits));
        assert_eq!(facts(Format::E5m2), [57344.0, 2f64.powi(-14), 2f64.powi(-16)].map(f64::to_bits));
        assert_eq!(table(Format::E4m3).len() + table(Format::E5m2).len(), 127 + 124);
        assert!(same(Format::E4m3.round(464.0), 448.0), "the tie goes to the even significand");
        assert!(Format::E4m3.round(464.1).is_nan());
        assert!(same(Format::E5m2.round(-61440.0), f64::NEG_INFINITY));
    }

    #[test]
    fn values_that_are_not_finite_follow_the_overflow_rule() {
        for format in Format::ALL {
            for overflow in [Overflow::ToInf, Overflow::Saturate, Overflow::Error] {
                assert!(format.round_with(f64::NAN, overflow).unwrap().is_nan());
            }
            let saturated = format.round_with(f64::NEG_INFINITY, Overflow::Saturate).unwrap();
            assert!(same(saturated, -format.max()));
            let error = format.round_with(f64::INFINITY, Overflow::Error);
            assert_eq!(error, Err(Error::Overflow { format, value: f64::INFINITY }));
            assert_eq!(format.round(f64::INFINITY).is_nan(), !format.has_inf());
            assert!(same(format.round(-0.0), -0.0));
        }
    }

    #[test]
    fn significand_rounding_has_no_range() {
        assert!(same(Format::E4m3.round_significand(1e30), 13.0 * 2f64.powi(96)));
        assert!(same(Format::F16.round_significand(3e-40), round_by_scaling(3e-40, 11)));
        assert!(same(Format::F16.round_significand(f64::MAX), f64::INFINITY));
        assert!(Format::F16.round_significand(f64::NAN).is_nan());
        let mut state = 4;
        for _ in 0..10_000 {
            let x = f64::from_bits(next_random(&mut state));
            for format in SMALL {
                // Inside the normal range it is rounding.
                if x.abs() >= format.min_normal() && x.abs() <= format.max() {
                    assert!(same(format.round_significand(x), format.round(x)));
                }
                if x.is_normal() && x.abs() < 1e300 {
                    let error = (format.round_significand(x) - x).abs();
                    assert!(error <= format.unit_roundoff() * x.abs());
                }
            }
        }
    }

    fn round_by_scaling(x: f64, n_bits: i32) -> f64 {
        let spacing = 2f64.powi(x.abs().log2().floor() as i32 + 1 - n_bits);
        (x / spacing).round_ties_even() * spacing
    }

    #[test]
    fn names_round_trip() {
        for format in Format::ALL {
            assert_eq!(format.name().parse::<Format>(), Ok(format));
            assert_eq!(serde_json::to_string(&format).unwrap(), format!("\"{format}\""));
            assert!(format.storage().is_none_or(|precision| Format::from(precision) == format));
        }
        let message = "fp8".parse::<Format>().unwrap_err().to_string();
        assert_eq!(message, "unknown format `fp8`; use one of f64, f32, tf32, bf16, f16, e4m3, e5m2");
    }
}
