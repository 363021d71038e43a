//! Learning rates over epochs.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the learning rate changes from epoch to epoch, with PyTorch's meaning of the same names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Schedule {
    /// It does not.
    #[default]
    Constant,
    /// `lr₀ · gamma^⌊epoch / step_size⌋`
    Step {
        /// Epochs between two steps, at least 1.
        step_size: u64,
        /// Factor of a step.
        #[serde(default = "default::factor")]
        gamma: f64,
    },
    /// `eta_min + (lr₀ − eta_min) (1 + cos(π · epoch / t_max)) / 2`
    Cosine {
        /// Epochs from the first learning rate to the last; 0 in a configuration: all of the training,
        /// see [`Schedule::over`].
        #[serde(default)]
        t_max: u64,
        /// The last learning rate.
        #[serde(default)]
        eta_min: f64,
    },
    /// Multiplies by `factor` after more than `patience` epochs in a row without a metric that is
    /// lower than the best by more than the share `threshold`.
    Plateau {
        /// Factor of a reduction, below 1.
        #[serde(default = "default::factor")]
        factor: f64,
        /// Epochs without improvement that are borne.
        #[serde(default = "default::patience")]
        patience: u64,
        /// Share of the best metric that counts as an improvement.
        #[serde(default = "default::threshold")]
        threshold: f64,
        /// Epochs after a reduction in which nothing is counted.
        #[serde(default)]
        cooldown: u64,
        /// Lowest learning rate.
        #[serde(default)]
        min_lr: f64,
    },
}

/// PyTorch's defaults.
mod default {
    pub(super) fn factor() -> f64 {
        0.1
    }
    pub(super) fn patience() -> u64 {
        10
    }
    pub(super) fn threshold() -> f64 {
        1e-4
    }
}

/// A reduction by less than this is not made, as in PyTorch.
const SMALLEST_REDUCTION: f64 = 1e-8;

impl Schedule {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the field.
    pub fn validate(&self) -> Result<()> {
        let check = |legal: bool, setting, value, expected| {
            if legal { Ok(()) } else { Err(Error::Setting { setting, value, expected }) }
        };
        let at_least_0 = |value: f64| value.is_finite() && value >= 0.0;
        match *self {
            Schedule::Constant => Ok(()),
            Schedule::Step { step_size, gamma } => {
                check(step_size > 0, "step_size", step_size as f64, "at least one epoch")?;
                check(gamma.is_finite() && gamma > 0.0, "gamma", gamma, "a positive factor")
            }
            Schedule::Cosine { t_max, eta_min } => {
                check(t_max > 0, "t_max", t_max as f64, "at least one epoch")?;
                check(at_least_0(eta_min), "eta_min", eta_min, "a learning rate")
            }
            Schedule::Plateau { factor, threshold, min_lr, .. } => {
                check((0.0..1.0).contains(&factor), "factor", factor, "a factor below 1")?;
                check(at_least_0(threshold), "threshold", threshold, "a share")?;
                check(at_least_0(min_lr), "min_lr", min_lr, "a learning rate")
            }
        }
    }

    /// The schedule of a training of `epochs`: a cosine without a length of its own takes all of it.
    #[must_use]
    pub fn over(self, epochs: u64) -> Self {
        match self {
            Schedule::Cosine { t_max: 0, eta_min } => Schedule::Cosine { t_max: epochs.max(1), eta_min },
            other => other,
        }
    }

    /// Whether [`Scheduler::end_epoch`] needs a metric.
    #[must_use]
    pub fn follows_metric(&self) -> bool {
        matches!(self, Schedule::Plateau { .. })
    }
}

/// Everything that a [`Scheduler`] remembers; stored in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulerState {
    /// Epochs that have ended.
    pub epoch: u64,
    /// Learning rate of the next epoch.
    pub learning_rate: f64,
    /// The lowest metric so far; `None` before the first.
    pub best: Option<f64>,
    /// Epochs since then.
    pub n_bad_epochs: u64,
    /// Epochs of cooldown that are left.
    pub cooldown: u64,
}

/// A schedule under way.
///
/// ```
/// use halfmode_train::{Schedule, Scheduler};
/// let mut scheduler = Scheduler::new(Schedule::Step { step_size: 2, gamma: 0.5 }, 8.0)?;
/// let rates: Vec<f64> = (0..5)
///     .map(|_| {
///         let rate = scheduler.learning_rate();
///         scheduler.end_epoch(None).map(|()| rate)
///     })
///     .collect::<Result<_, _>>()?;
/// assert_eq!(rates, [8.0, 8.0, 4.0, 4.0, 2.0]);
/// # Ok::<(), halfmode_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheduler {
    schedule: Schedule,
    base: f64,
    state: SchedulerState,
}

impl Scheduler {
    /// Before the first epoch, with the learning rate `base`.
    ///
    /// # Errors
    /// [`Error::Setting`] for `base` and as [`Schedule::validate`].
    pub fn new(schedule: Schedule, base: f64) -> Result<Self> {
        let state = SchedulerState { epoch: 0, learning_rate: base, best: None, n_bad_epochs: 0, cooldown: 0 };
        Scheduler::from_state(schedule, base, state)
    }

    /// Goes on where `state` was taken.
    ///
    /// # Errors
    /// As [`Scheduler::new`]; the state's learning rate must be one, too.
    pub fn from_state(schedule: Schedule, base: f64, state: SchedulerState) -> Result<Self> {
        schedule.validate()?;
        for value in [base, state.learning_rate] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::Setting { setting: "learning_rate", value, expected: "a learning rate" });
            }
        }
        Ok(Scheduler { schedule, base, state })
    }

    /// The learning rate of the epoch that runs or comes next.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.state.learning_rate
    }

    /// The schedule.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// What a checkpoint must keep.
    #[must_use]
    pub fn state(&self) -> SchedulerState {
        self.state
    }

    /// Ends an epoch; `metric` is what a plateau schedule follows, lower being better. One that is
    /// not a number counts as no improvement.
    ///
    /// # Errors
    /// [`Error::NoMetric`] if the schedule needs one.
    pub fn end_epoch(&mut self, metric: Option<f64>) -> Result<()> {
        let epoch = self.state.epoch + 1;
        match self.schedule {
            Schedule::Constant => {}
            Schedule::Step { step_size, gamma } => {
                self.state.learning_rate = self.base * gamma.powf((epoch / step_size) as f64);
            }
            Schedule::Cosine { t_max, eta_min } => {
                let phase = std::f64::consts::PI * epoch as f64 / t_max as f64;
                self.state.learning_rate = eta_min + (self.base - eta_min) * (0.5 * (1.0 + phase.cos()));
            }
            Schedule::Plateau { .. } => self.follow(metric.ok_or(Error::NoMetric)?),
        }
        self.state.epoch = epoch;
        Ok(())
    }

    fn follow(&mut self, metric: f64) {
        let Schedule::Plateau { factor, patience, threshold, cooldown, min_lr } = self.schedule else { return };
        let state = &mut self.state;
        let improved = metric.is_finite() && state.best.is_none_or(|best| metric < best * (1.0 - threshold));
        if improved {
            state.best = Some(metric);
            state.n_bad_epochs = 0;
        } else {
            state.n_bad_epochs += 1;
        }
        if state.cooldown > 0 {
            state.cooldown -= 1;
            state.n_bad_epochs = 0;
        }
        if state.n_bad_epochs > patience {
            let reduced = (state.learning_rate * factor).max(min_lr);
            if state.learning_rate - reduced > SMALLEST_REDUCTION {
                state.learning_rate = reduced;
            }
            state.cooldown = cooldown;
            state.n_bad_epochs = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, base: f64, metrics: &[f64]) -> Vec<f64> {
        let mut scheduler = Scheduler::new(schedule, base).unwrap();
        let rates = metrics.iter().map(|&metric| {
            scheduler.end_epoch(Some(metric)).unwrap();
            scheduler.learning_rate()
        });
        rates.collect()
    }

    fn plateau(patience: u64, threshold: f64, cooldown: u64, min_lr: f64) -> Schedule {
        Schedule::Plateau { factor: 0.5, patience, threshold, cooldown, min_lr }
    }

    #[test]
    fn constant_and_step() {
        assert_eq!(rates(Schedule::Constant, 0.3, &[0.0; 3]), [0.3; 3]);
        let step = Schedule::Step { step_size: 3, gamma: 0.5 };
        assert_eq!(rates(step, 1.0, &[0.0; 7]), [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]);
    }

    #[test]
    fn cosine_goes_to_its_minimum_and_back() {
        let got = rates(Schedule::Cosine { t_max: 4, eta_min: 1.0 }, 3.0, &[0.0; 8]);
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let want = [2.0 + half, 2.0, 2.0 - half, 1.0, 2.0 - half, 2.0, 2.0 + half, 3.0];
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 4.0 * f64::EPSILON, "{got} {want}");
        }
    }

    #[test]
    fn plateau_bears_patience_epochs() {
        // Best at once, then two bad epochs are borne and the third reduces.
        assert_eq!(rates(plateau(2, 0.0, 0, 0.0), 1.0, &[1.0; 7]), [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]);
        // A tenth better is needed; 0.91 is not enough, 0.89 is.
        assert_eq!(rates(plateau(0, 0.1, 0, 0.0), 1.0, &[1.0, 0.91, 0.89, 0.85]), [1.0, 0.5, 0.5, 0.25]);
        // In the two epochs of cooldown nothing is counted.
        assert_eq!(rates(plateau(0, 0.0, 2, 0.0), 1.0, &[1.0; 6]), [1.0, 0.5, 0.5, 0.5, 0.25, 0.25]);
        // The lowest rate holds, and NaN is no improvement.
        assert_eq!(rates(plateau(0, 0.0, 0, 0.4), 1.0, &[f64::NAN; 3]), [0.5, 0.4, 0.4]);
    }

    #[test]
    fn a_reduction_of_nothing_is_not_made() {
        let got = rates(plateau(0, 0.0, 0, 0.0), 1.5e-8, &[1.0; 3]);
        assert_eq!(got, [1.5e-8, 1.5e-8, 1.5e-8]);
    }

    #[test]
    fn a_plateau_without_a_metric_is_an_error() {
        let mut scheduler = Scheduler::new(plateau(0, 0.0, 0, 0.0), 1.0).unwrap();
        assert!(matches!(scheduler.end_epoch(None), Err(Error::NoMetric)));
        assert_eq!(scheduler.state().epoch, 0);
    }

    #[test]
    fn states_survive_json_bit_for_bit() {
        let schedules = [
            Schedule::Constant,
            Schedule::Step { step_size: 2, gamma: 0.3 },
            Schedule::Cosine { t_max: 7, eta_min: 1e-5 },
            plateau(1, 1e-4, 1, 1e-6),
        ];
        let metric = |epoch: u64| 1.0 / 3.0 + 0.1 * (epoch as f64).sin();
        for schedule in schedules {
            let mut whole = Scheduler::new(schedule, 0.1 + 0.2).unwrap();
            let mut resumed = whole;
            for epoch in 0..30 {
                whole.end_epoch(Some(metric(epoch))).unwrap();
                let text = serde_json::to_string(&resumed.state()).unwrap();
                let state = serde_json::from_str(&text).unwrap();
                resumed = Scheduler::from_state(schedule, 0.1 + 0.2, state).unwrap();
                resumed.end_epoch(Some(metric(epoch))).unwrap();
                assert_eq!(whole.state(), resumed.state());
            }
            let text = serde_json::to_string(&schedule).unwrap();
            assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule, "{text}");
        }
    }

    #[test]
    fn numbers_are_checked_and_defaults_are_torch_s() {
        let read = |text: &str| serde_json::from_str::<Schedule>(text);
        let want = Schedule::Plateau { factor: 0.1, patience: 10, threshold: 1e-4, cooldown: 0, min_lr: 0.0 };
        assert_eq!(read(r#"{"kind":"plateau"}"#).unwrap(), want);
        assert_eq!(read(r#"{"kind":"constant"}"#).unwrap(), Schedule::Constant);
        assert!(read(r#"{"kind":"step","step_size":5,"gama":0.5}"#).is_err());
        for schedule in [
            Schedule::Step { step_size: 0, gamma: 0.5 },
            Schedule::Step { step_size: 1, gamma: 0.0 },
            Schedule::Cosine { t_max: 0, eta_min: 0.0 },
            Schedule::Cosine { t_max: 1, eta_min: f64::NAN },
            Schedule::Plateau { factor: 1.0, patience: 0, threshold: 0.0, cooldown: 0, min_lr: 0.0 },
        ] {
            assert!(matches!(Scheduler::new(schedule, 1.0), Err(Error::Setting { .. })), "{schedule:?}");
        }
        assert!(Scheduler::new(Schedule::Constant, f64::INFINITY).is_err());
    }
}
