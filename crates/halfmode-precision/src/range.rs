//! What a format's range does to a set of values.

use crate::Format;

/// Counts of what happens to values that are rounded to a format.
///
/// Every value is counted once in `n`; the other counts are disjoint from each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RangeStats {
    /// The format that the values are rounded to.
    pub format: Format,
    /// All values.
    pub n: u64,
    /// Values that are zero before rounding.
    pub n_zero: u64,
    /// Values that are not zero and become zero.
    pub n_flushed: u64,
    /// Values that become subnormal, and so keep fewer significand bits.
    pub n_subnormal: u64,
    /// Values beyond the largest finite one, infinities included.
    pub n_overflow: u64,
    /// Values that are NaN before rounding.
    pub n_nan: u64,
    /// Largest magnitude before rounding, NaN left out; zero if there is none.
    pub absmax: f64,
}

impl RangeStats {
    /// No values yet.
    #[must_use]
    pub const fn new(format: Format) -> Self {
        RangeStats { format, n: 0, n_zero: 0, n_flushed: 0, n_subnormal: 0, n_overflow: 0, n_nan: 0, absmax: 0.0 }
    }

    /// Counts one value.
    pub fn push(&mut self, x: f64) {
        self.n += 1;
        if x.is_nan() {
            self.n_nan += 1;
            return;
        }
        let magnitude = x.abs();
        self.absmax = self.absmax.max(magnitude);
        // Of the finite values only those that overflow round to something not finite.
        let rounded = self.format.round(magnitude);
        if magnitude <= 0.0 {
            self.n_zero += 1;
        } else if !rounded.is_finite() {
            self.n_overflow += 1;
        } else if rounded <= 0.0 {
            self.n_flushed += 1;
        } else if rounded < self.format.min_normal() {
            self.n_subnormal += 1;
        }
    }

    /// Factors of two between the largest magnitude and the largest finite value,
    /// `log2(max / absmax)`: negative if something overflows, infinite if all values are zero.
    #[must_use]
    pub fn headroom_bits(&self) -> f64 {
        self.format.max().log2() - self.absmax.log2()
    }

    /// A count as a share of all values, zero if there are none.
    #[must_use]
    pub fn share(&self, count: u64) -> f64 {
        if self.n == 0 { 0.0 } else { count as f64 / self.n as f64 }
    }
}

impl Extend<f64> for RangeStats {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        for x in values {
            self.push(x);
        }
    }
}

impl Format {
    /// Counts what rounding to this format does to `values`.
    #[must_use]
    pub fn range_stats(self, values: impl Iterator<Item = f64>) -> RangeStats {
        let mut stats = RangeStats::new(self);
        stats.extend(values);
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_has_one_fate() {
        let values = [0.0, -0.0, 1e-9, -6e-8, 6e-5, 6.2e-5, 1.0, -65504.0, 65520.0, f64::NEG_INFINITY, f64::NAN];
        let stats = Format::F16.range_stats(values.into_iter());
        let want = RangeStats {
            format: Format::F16,
            n: 11,
            n_zero: 2,
            n_flushed: 1,
            n_subnormal: 2,
            n_overflow: 2,
            n_nan: 1,
            absmax: f64::INFINITY,
        };
        assert_eq!(stats, want);
        assert!((stats.share(stats.n_overflow) - 2.0 / 11.0).abs() < 1e-15);
    }

    #[test]
    fn overflow_is_counted_where_there_is_no_infinity() {
        let stats = Format::E4m3.range_stats([448.0, 464.0, 465.0, -1e9, f64::NAN].into_iter());
        assert_eq!((stats.n_overflow, stats.n_nan), (2, 1));
    }

    #[test]
    fn rounding_up_to_the_normal_range_is_not_subnormal() {
        let stats = Format::F16.range_stats([Format::F16.min_normal().next_down()].into_iter());
        assert_eq!(stats.n_subnormal, 0);
    }

    #[test]
    fn headroom_is_in_factors_of_two() {
        let headroom = |x: f64| Format::F16.range_stats([x].into_iter()).headroom_bits();
        assert!((headroom(65504.0 / 8.0) - 3.0).abs() < 1e-12);
        assert!((headroom(65504.0 * 4.0) + 2.0).abs() < 1e-12);
        assert!(headroom(0.0) > 1e9);
        assert!(RangeStats::new(Format::F16).share(0) <= 0.0);
    }
}
