//! Axes: from data to a range, from a range to ticks, from a value to a position.

use super::number::compact;

/// How values are laid out along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum YAxis {
    /// Equal distances for equal differences.
    Linear,
    /// Equal distances for equal ratios; values that are not positive are left out.
    #[default]
    Log10,
    /// As `Log10`, with ticks at powers of two: for loss scales.
    Log2,
}

/// A labelled place on an axis.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tick {
    /// Position along the axis, 0 to 1.
    pub(super) at: f64,
    pub(super) label: String,
}

/// An axis with its range, in transformed values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    kind: YAxis,
    low: f64,
    high: f64,
}

impl Axis {
    /// The axis that shows all drawable `values` with a margin of `margin` of the range at both
    /// ends; without any, an axis from 0 to 1 (1 to 10, 1 to 2).
    pub(super) fn new(kind: YAxis, values: impl Iterator<Item = f64>, margin: f64) -> Self {
        let range = values.filter_map(|it| transform(kind, it)).fold(None, |range, it| {
            let (low, high): (f64, f64) = range.unwrap_or((it, it));
            Some((low.min(it), high.max(it)))
        });
        let (low, high) = range.unwrap_or((0.0, 1.0));
        // Closer than this and the ticks between would be rounding errors.
        let width = high - low;
        let magnitude = low.abs().max(high.abs());
        if width <= 1e-9 * magnitude || width == 0.0 {
            let half = match kind {
                YAxis::Linear => {
                    if magnitude > 0.0 {
                        0.1 * magnitude
                    } else {
                        0.5
                    }
                }
                YAxis::Log10 => 0.1,
                YAxis::Log2 => 1.0,
            };
            return Self { kind, low: low - half, high: high + half };
        }
        Self { kind, low: low - margin * width, high: high + margin * width }
    }

    /// Where `value` stands, 0 to 1 for what is in range; `None` for what cannot be drawn.
    pub(super) fn position(&self, value: f64) -> Option<f64> {
        transform(self.kind, value).map(|it| self.fraction(it))
    }

    fn fraction(&self, transformed: f64) -> f64 {
        (transformed - self.low) / (self.high - self.low)
    }

    /// About `count` ticks at round values.
    pub(super) fn ticks(&self, count: usize) -> Vec<Tick> {
        match self.kind {
            YAxis::Linear => {
                let values = round_values(self.low, self.high, count);
                values.into_iter().map(|it| self.tick(it, compact(it, 6))).collect()
            }
            YAxis::Log10 => self.log10_ticks(count),
            YAxis::Log2 => {
                let whole = self.whole_steps(count).into_iter();
                whole.map(|it| Tick { at: self.fraction(f64::from(it)), label: power_of_two(it) }).collect()
            }
        }
    }

    fn log10_ticks(&self, count: usize) -> Vec<Tick> {
        let decades = self.high - self.low;
        let multiples: &[f64] = if decades > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let values: Vec<f64> = if decades > 3.0 {
            self.whole_steps(count).into_iter().map(|it| 10_f64.powi(it)).collect()
        } else {
            let exponents = self.low.floor() as i32..=self.high.ceil() as i32;
            exponents.flat_map(|exponent| multiples.iter().map(move |it| it * 10_f64.powi(exponent))).collect()
        };
        let in_range = |it: &f64| self.position(*it).is_some_and(|at| (0.0..=1.0).contains(&at));
        let mut values: Vec<f64> = values.into_iter().filter(in_range).collect();
        if values.len() < 3 {
            // Less than a decade: round values, unevenly spaced.
            values = round_values(10_f64.powf(self.low), 10_f64.powf(self.high), count);
            values.retain(in_range);
        }
        values.into_iter().map(|it| self.tick(it, compact(it, 6))).collect()
    }

    /// Whole numbers in range, thinned to about `count`.
    fn whole_steps(&self, count: usize) -> Vec<i32> {
        let (low, high) = (self.low.ceil() as i32, self.high.floor() as i32);
        let stride = ((self.high - self.low) / count as f64).ceil().max(1.0) as i32;
        (low.div_euclid(stride) * stride..=high).step_by(stride as usize).filter(|it| *it >= low).collect()
    }

    fn tick(&self, value: f64, label: String) -> Tick {
        Tick { at: self.position(value).unwrap_or(0.0), label }
    }
}

/// The value as the axis counts it; `None` for what it cannot show.
fn transform(kind: YAxis, value: f64) -> Option<f64> {
    // Beyond the bound, differences and margins would overflow.
    let drawable = value.abs() <= 1e300;
    match kind {
        YAxis::Linear => drawable.then_some(value),
        YAxis::Log10 => (drawable && value > 0.0).then(|| value.log10()),
        YAxis::Log2 => (drawable && value > 0.0).then(|| value.log2()),
    }
}

/// Multiples of 1, 2 or 5 times a power of ten between two values, about `count` of them.
fn round_values(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count.max(1) as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|it| it * power).into_iter().find(|it| *it >= rough).unwrap_or(rough);
    if !(step.is_finite() && step > 0.0) {
        return vec![low];
    }
    let first = (low / step).ceil();
    // `+ 0.0` turns −0 into 0.
    let values = (0..4 * count).map(|it| (first + it as f64) * step + 0.0);
    values.take_while(|it| *it <= high + 1e-9 * step).collect()
}

fn power_of_two(exponent: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let raised =
        exponent.unsigned_abs().to_string().bytes().map(|it| DIGITS[usize::from(it - b'0')]).collect::<String>();
    format!("2{}{raised}", if exponent < 0 { "⁻" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(kind: YAxis, values: &[f64]) -> Vec<String> {
        Axis::new(kind, values.iter().copied(), 0.0).ticks(5).into_iter().map(|it| it.label).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(labels(YAxis::Linear, &[0.0, 15.0]), ["0", "5", "10", "15"]);
        assert_eq!(labels(YAxis::Linear, &[-1.0, 1.0]), ["-1", "-0.5", "0", "0.5", "1"]);
        assert_eq!(labels(YAxis::Log10, &[0.01, 1.0]), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(labels(YAxis::Log10, &[1e-8, 1.0]), ["1e-8", "1e-6", "0.0001", "0.01", "1"]);
        assert_eq!(labels(YAxis::Log10, &[0.031, 0.039]), ["0.032", "0.034", "0.036", "0.038"]);
        assert_eq!(labels(YAxis::Log2, &[0.5, 8.0]), ["2⁻¹", "2⁰", "2¹", "2²", "2³"]);
    }

    #[test]
    fn any_data_give_a_usable_axis() {
        let sets: [&[f64]; 9] = [
            &[],
            &[0.0],
            &[7.0, 7.0],
            &[f64::NAN, f64::INFINITY],
            &[1e300, -1e300],
            &[f64::MAX, f64::MIN],
            &[5e-324, 1e-300],
            &[1e15, 1e15 + 0.125],
            &[-3.0, -2.0],
        ];
        for kind in [YAxis::Linear, YAxis::Log10, YAxis::Log2] {
            for set in sets {
                let axis = Axis::new(kind, set.iter().copied(), 0.05);
                assert!(axis.high > axis.low && (axis.high - axis.low).is_finite(), "{kind:?} {set:?}");
                assert!(axis.ticks(5).len() <= 20);
                for value in set {
                    let at = axis.position(*value).unwrap_or(0.5);
                    assert!((0.0..=1.0).contains(&at), "{kind:?} {set:?} {at}");
                }
            }
        }
    }
}
