//! Which states wait for the way back, and what it costs to find the others again.

use crate::step::{Span, State, Stepper};
use crate::{Error, OdePrecision, Result, StateSum};
use halfmode_precision::Precision;

/// Which states a solve keeps for its backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// The state before each step, in the precision `stored`.
    #[default]
    Trajectory,
    /// The tapes of all stages, so that the way back computes no velocity again, and the state before each step, in the
    /// precision of the running state, for a step whose scale overflows. The gradient is that of the forward steps
    /// themselves: they are linearised where they were taken, before a state is rounded to `stored`. Where rounding
    /// changes nothing, as in double precision, it has the same bits as the others.
    Full,
    /// As many states as fit, in the precision of the running state; the others are computed again from these, in the
    /// order that repeats the fewest steps (binomial checkpointing). The gradient has the same bits.
    Budget {
        /// Bytes for states.
        bytes: usize,
    },
    /// The last state and its velocity alone, whatever the number of steps: the way back takes each step back, with the
    /// same bits. It goes with [`Method::AsynchronousLeapfrog`](crate::Method::AsynchronousLeapfrog) and only with it.
    ///
    /// Both are f64 numbers, multiples of `2^-lattice_bits`, and so is what a step adds to them: sums are exact, and
    /// subtracting undoes adding. States and velocities may be as large as `2^(52 - lattice_bits)`. The formats `state`
    /// and `stored` of [`OdePrecision`] are not asked.
    Reversible {
        /// Binary digits behind the point, 1 to 51.
        lattice_bits: u32,
    },
}

/// What a storage needs, known without a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoragePlan {
    /// States that are kept at once, at most.
    pub n_states: usize,
    /// Bytes of these; beside them lives what one step needs, and with [`Storage::Full`] what the field saves in all steps:
    /// the planning device prices that.
    pub peak_bytes: usize,
    /// Steps that the way back takes forward once more, to find states again.
    pub n_repeated: usize,
}

impl Storage {
    /// [`Storage::Reversible`] in steps of 2^-32, 2e-10: states and velocities up to 2^20, 1e6.
    pub const REVERSIBLE: Storage = Storage::Reversible { lattice_bits: 32 };

    /// What `n_steps` steps of a state of `numel` numbers need.
    ///
    /// # Errors
    /// [`Error::Budget`] if not a single state fits.
    pub fn plan(self, n_steps: usize, numel: usize, precision: &OdePrecision) -> Result<StoragePlan> {
        self.plan_tuple(n_steps, &[numel], precision)
    }

    /// The same for a state of several tensors of so many numbers each.
    ///
    /// # Errors
    /// Those of [`Storage::plan`].
    pub fn plan_tuple(self, n_steps: usize, numels: &[usize], precision: &OdePrecision) -> Result<StoragePlan> {
        if let Storage::Reversible { .. } = self {
            let peak_bytes = 2 * Precision::F64.bytes() * numels.iter().sum::<usize>();
            return Ok(StoragePlan { n_states: 1, peak_bytes, n_repeated: 0 });
        }
        Ok(match self.slots(numels, precision)? {
            None => {
                let stored = |(idx, numel): (usize, &usize)| numel * precision.leaf(idx).stored.bytes();
                let state = match self {
                    Storage::Full => state_bytes(numels, precision),
                    _ => numels.iter().enumerate().map(stored).sum(),
                };
                let peak_bytes = n_steps * state;
                StoragePlan { n_states: n_steps, peak_bytes, n_repeated: 0 }
            }
            Some(slots) => {
                let n_states = slots.min(n_steps);
                let peak_bytes = n_states * state_bytes(numels, precision);
                StoragePlan { n_states, peak_bytes, n_repeated: n_repeated(n_steps, slots) }
            }
        })
    }

    /// How many states may be kept; `None`: one per step.
    pub(crate) fn slots(self, numels: &[usize], precision: &OdePrecision) -> Result<Option<usize>> {
        let Storage::Budget { bytes } = self else { return Ok(None) };
        let needs = state_bytes(numels, precision).max(1);
        if bytes < needs { Err(Error::Budget { bytes, needs }) } else { Ok(Some(bytes / needs)) }
    }
}

fn state_bytes(numels: &[usize], precision: &OdePrecision) -> usize {
    let leaf = |(idx, numel): (usize, &usize)| {
        let state = precision.leaf(idx).state;
        let parts = if matches!(state, StateSum::Compensated(_)) { 2 } else { 1 };
        parts * numel * state.precision().bytes()
    };
    numels.iter().enumerate().map(leaf).sum()
}

/// Steps that `c` states, the first included, can reverse when none is taken forward more than `r` times.
fn reach(c: usize, r: usize) -> usize {
    (1..=r).fold(1usize, |all, k| all.saturating_mul(c + k) / k)
}

/// Where to keep the next state on the way to the end of `n` steps, with `c` states, the first included: Griewank's
/// binomial rule.
fn split(n: usize, c: usize) -> usize {
    let r = (1..).find(|&r| reach(c, r) >= n).unwrap_or(1);
    let least = n.saturating_sub(reach(c - 1, r)).max(if r > 1 { reach(c, r - 2) } else { 1 });
    let most = reach(c, r - 1).min(n.saturating_sub(reach(c - 1, r - 1)));
    least.min(most).clamp(1, n - 1)
}

/// The states to keep between a kept one before step `from` and that before step `to`, `to` perhaps included.
pub(crate) fn positions(from: usize, to: usize, mut free: usize) -> Vec<usize> {
    let (mut at, mut found) = (from, Vec::new());
    while at < to && free > 0 {
        at += split(to + 1 - at, free + 1);
        found.push(at);
        free -= 1;
    }
    found
}

/// Steps that the way back takes forward.
fn n_repeated(n_steps: usize, slots: usize) -> usize {
    let last = n_steps.saturating_sub(1);
    let mut kept = vec![0];
    kept.extend(positions(0, last, slots - 1));
    let mut repeated = 0;
    for target in (0..n_steps).rev() {
        if let Some(&from) = kept.last() {
            repeated += target - from;
            kept.extend(positions(from, target, slots - kept.len()));
        }
        kept.pop_if(|at| *at == target);
    }
    repeated
}

/// The kept states, as the way back finds them.
pub(crate) struct Checkpoints<'a> {
    pub(crate) stepper: &'a Stepper<'a>,
    pub(crate) grid: &'a [f64],
    pub(crate) slots: usize,
    /// Steps before which a state is kept, and the states.
    pub(crate) kept: Vec<(usize, State)>,
}

impl Checkpoints<'_> {
    /// The state before step `target`; targets fall one by one from the last.
    pub(crate) fn state(&mut self, target: usize) -> Result<Option<State>> {
        let Some((from, state)) = self.kept.last().cloned() else { return Ok(None) };
        let wanted = positions(from, target, self.slots.saturating_sub(self.kept.len()));
        let mut state = state;
        for step in from..target {
            let span = Span { from: self.grid[step], to: self.grid[step + 1] };
            state = self.stepper.advance(&state, span.length(), &self.stepper.slopes(span, &state, None)?)?;
            if step + 1 < target && wanted.contains(&(step + 1)) {
                self.kept.push((step + 1, self.stepper.kept(&state)?));
            }
        }
        self.kept.pop_if(|(at, _)| *at == target);
        Ok(Some(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps taken forward at least, for all of `n` and `c` up to a bound, by trying every place: the first sweep
    /// included.
    fn least(n_max: usize, c_max: usize) -> Vec<Vec<usize>> {
        let mut cost: Vec<Vec<usize>> = vec![Vec::new(), (0..=n_max).map(|n| n * n.saturating_sub(1) / 2).collect()];
        for c in 2..=c_max {
            let mut row = vec![0, 0];
            for n in 2..=n_max {
                let best = (1..n).map(|m| m + cost[c - 1][n - m] + row[m]).min();
                row.push(best.unwrap_or(0));
            }
            cost.push(row);
        }
        cost
    }

    #[test]
    fn no_other_order_repeats_fewer_steps() {
        let least = least(80, 9);
        for (c, row) in least.iter().enumerate().skip(1) {
            for (n, want) in row.iter().enumerate().skip(1) {
                // The first sweep takes the steps to the last state that it keeps.
                let first = positions(0, n - 1, c - 1).last().copied().unwrap_or(0);
                assert_eq!(n_repeated(n, c) + first, *want, "{n} steps, {c} states");
            }
        }
    }

    #[test]
    fn a_state_for_each_step_repeats_nothing() {
        assert_eq!((n_repeated(100, 100), n_repeated(100, 1000), n_repeated(1, 1)), (0, 0, 0));
        // The square root's bargain and the logarithm's.
        assert!(n_repeated(400, 20) < 2 * 400 && n_repeated(4096, 12) < 4 * 4096);
    }
}
