//! A convolutional field whose weights are piecewise constant in time.

use crate::VectorField;
use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::{Init, ParamSpec, SymmetricConv};

/// Extent of the kernel.
const KERNEL: usize = 3;

/// `f(t, y) = -K_i^T N(relu(K_i y + b_i))` with 3 x 3 convolutions `K_i` and the norm `N` of every channel of every
/// sample; `i` counts equal intervals of the time from 0 to 1.
///
/// Parameters: `w.0` `[channels, channels, 3, 3]`, `b.0` `[channels]`, `w.1`, … Only the interval that a time is in
/// gets a gradient from it. The first layers of all intervals are meant to start alike: see
/// [`ConvNode::params`](crate::ConvNode::params).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvField {
    /// Channels of the state.
    pub channels: usize,
    /// Intervals of the time from 0 to 1.
    pub n_intervals: usize,
}

impl ConvField {
    /// The interval in which a time is; times before 0 and from 1 on belong to the first and the last. A time that is
    /// the start of an interval but for rounding belongs to it.
    fn interval(&self, t: f64) -> usize {
        let at = t * self.n_intervals as f64;
        let start = at.round();
        let at = if (at - start).abs() <= 4.0 * f64::EPSILON * start.abs() { start } else { at };
        // The cast saturates: below zero is zero.
        (at as usize).min(self.n_intervals.saturating_sub(1))
    }
}

impl VectorField for ConvField {
    fn param_specs(&self) -> Vec<ParamSpec> {
        let c = self.channels;
        let interval = |i: usize| {
            let weight = ParamSpec::convolution(format!("w.{i}"), [c, c, KERNEL, KERNEL], Init::Normal { std: 0.1 });
            [weight, ParamSpec::real(format!("b.{i}"), &[c], Init::Zeros)]
        };
        (0..self.n_intervals).flat_map(interval).collect()
    }

    /// `y` is `[batch, n_1, n_2, channels]`.
    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        let time = t.value().to_vec::<f64>()?.first().copied().unwrap_or(0.0);
        self.velocity_at(tape, time, t, y, params)
    }

    fn velocity_at(&self, tape: &mut Tape, time: f64, _: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        let (first, expected) = (2 * self.interval(time), 2 * self.n_intervals);
        match params.get(first..first + 2) {
            Some([w, b]) => tape.apply(SymmetricConv { padding: [KERNEL / 2; 2] }, &[y, w, b]),
            _ => Err(halfmode_autograd::Error::Arity { op: "conv_field", expected, found: params.len() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `i / n * n` is below `i` for 15 of 22, for one.
    #[test]
    fn the_points_of_a_grid_begin_its_intervals() {
        for n_intervals in 1..200 {
            let field = ConvField { channels: 1, n_intervals };
            let (n, h) = (n_intervals as f64, 1.0 / n_intervals as f64);
            for i in 0..n_intervals {
                let t = i as f64 / n;
                assert_eq!([t, t + 0.5 * h].map(|t| field.interval(t)), [i; 2], "{i} of {n}");
                assert_eq!(field.interval(t + h), (i + 1).min(n_intervals - 1), "the end of {i} of {n}");
            }
            assert_eq!([-0.5, 1.0, 7.0].map(|t| field.interval(t)), [0, n_intervals - 1, n_intervals - 1]);
        }
    }
}
