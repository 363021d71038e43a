//! Dynamic loss scaling as a pure state machine.

use crate::Error;
use serde::{Deserialize, Serialize};

/// The numbers of a [`DynamicScaler`].
///
/// Scales and factors are powers of two, so that scaling a gradient and undoing it are exact.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScalerConfig {
    /// Scale of the first step.
    pub init: f64,
    /// Finite steps in a row after which the scale grows.
    pub growth_interval: u32,
    /// Factor of growth, above 1.
    pub growth_factor: f64,
    /// Factor after a step that is not finite, below 1.
    pub backoff_factor: f64,
    /// Smallest scale; a step that is not finite here is an error.
    pub min: f64,
    /// Largest scale; growth stops here.
    pub max: f64,
}

impl ScalerConfig {
    /// Starts at 65536, doubles after 2000 finite steps, halves otherwise, stays in 1 ..= 2^24.
    pub const DEFAULT: ScalerConfig = ScalerConfig {
        init: 65536.0,
        growth_interval: 2000,
        growth_factor: 2.0,
        backoff_factor: 0.5,
        min: 1.0,
        max: 16_777_216.0,
    };

    /// Checks that all scales and factors are powers of two and in order.
    ///
    /// # Errors
    /// [`Error::NotPowerOfTwo`] or [`Error::ScalerRange`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        power_of_two("init", self.init)?;
        power_of_two("growth_factor", self.growth_factor)?;
        power_of_two("backoff_factor", self.backoff_factor)?;
        power_of_two("min", self.min)?;
        power_of_two("max", self.max)?;
        in_range("min", self.min, 0.0, self.max)?;
        in_range("init", self.init, self.min, self.max)?;
        in_range("growth_factor", self.growth_factor, 2.0, f64::MAX)?;
        in_range("backoff_factor", self.backoff_factor, 0.0, 0.5)?;
        in_range("growth_interval", f64::from(self.growth_interval), 1.0, f64::from(u32::MAX))
    }
}

impl Default for ScalerConfig {
    fn default() -> Self {
        ScalerConfig::DEFAULT
    }
}

/// What to do with the optimiser step whose gradients were just examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Step {
    /// The gradients are finite: unscale and apply them.
    Apply,
    /// The gradients are not finite: leave the weights and the optimiser as they are.
    Skip,
}

/// Everything a [`DynamicScaler`] remembers; stored in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalerState {
    /// Scale of the next step.
    pub scale: f64,
    /// Finite steps in a row since the scale last changed.
    pub n_finite: u32,
    /// Steps skipped in the whole run.
    pub n_skipped: u64,
    /// How often the scale grew.
    pub n_growths: u64,
    /// How often the scale shrank.
    pub n_backoffs: u64,
}

/// Chooses the loss scale of each step from whether earlier gradients were finite.
///
/// The loss is multiplied by [`scale`](DynamicScaler::scale) before the backward pass, and the
/// gradients are divided by it after. Each step ends with one [`update`](DynamicScaler::update).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicScaler {
    config: ScalerConfig,
    state: ScalerState,
}

impl DynamicScaler {
    /// A scaler before its first step.
    ///
    /// # Errors
    /// As [`ScalerConfig::validate`].
    pub fn new(config: ScalerConfig) -> Result<Self, Error> {
        let state = ScalerState { scale: config.init, n_finite: 0, n_skipped: 0, n_growths: 0, n_backoffs: 0 };
        Self::from_state(config, state)
    }

    /// A scaler that goes on exactly where `state` was taken.
    ///
    /// # Errors
    /// As [`ScalerConfig::validate`], and the same errors if `state` does not fit `config`.
    pub fn from_state(config: ScalerConfig, state: ScalerState) -> Result<Self, Error> {
        config.validate()?;
        power_of_two("scale", state.scale)?;
        in_range("scale", state.scale, config.min, config.max)?;
        in_range("n_finite", f64::from(state.n_finite), 0.0, f64::from(config.growth_interval - 1))?;
        Ok(DynamicScaler { config, state })
    }

    /// Ends a step: records whether its gradients were finite and sets the scale of the next.
    ///
    /// - Finite: [`Step::Apply`]. After `growth_interval` finite steps in a row the scale grows,
    ///   up to `max`.
    /// - Not finite: [`Step::Skip`]. The scale shrinks, down to `min`.
    ///
    /// # Errors
    /// [`Error::ScaleFloor`] if the step is not finite and the scale is `min` already. The step
    /// is counted as skipped and the scale stays.
    pub fn update(&mut self, found_inf: bool) -> Result<Step, Error> {
        let ScalerConfig { growth_interval, growth_factor, backoff_factor, min, max, .. } = self.config;
        let state = &mut self.state;
        if !found_inf {
            state.n_finite += 1;
            if state.n_finite >= growth_interval {
                state.n_finite = 0;
                if state.scale < max {
                    state.scale = (state.scale * growth_factor).min(max);
                    state.n_growths += 1;
                }
            }
            return Ok(Step::Apply);
        }
        state.n_finite = 0;
        state.n_skipped += 1;
        if state.scale <= min {
            return Err(Error::ScaleFloor { scale: state.scale, min, n_skipped: state.n_skipped });
        }
        state.scale = (state.scale * backoff_factor).max(min);
        state.n_backoffs += 1;
        Ok(Step::Skip)
    }

    /// The factor on the loss of the next step, a power of two.
    #[must_use]
    pub const fn scale(&self) -> f64 {
        self.state.scale
    }

    /// Steps skipped in the whole run.
    #[must_use]
    pub const fn n_skipped(&self) -> u64 {
        self.state.n_skipped
    }

    /// How often the scale grew.
    #[must_use]
    pub const fn n_growths(&self) -> u64 {
        self.state.n_growths
    }

    /// How often the scale shrank.
    #[must_use]
    pub const fn n_backoffs(&self) -> u64 {
        self.state.n_backoffs
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &ScalerConfig {
        &self.config
    }

    /// What a checkpoint must keep; see [`DynamicScaler::from_state`].
    #[must_use]
    pub const fn state(&self) -> ScalerState {
        self.state
    }
}

/// Refuses what is not a positive, normal power of two.
pub(crate) fn power_of_two(field: &'static str, value: f64) -> Result<(), Error> {
    const SIGNIFICAND: u64 = (1 << 52) - 1;
    if value.is_normal() && value > 0.0 && value.to_bits() & SIGNIFICAND == 0 {
        return Ok(());
    }
    let nearest =
        if value.is_normal() && value > 0.0 { value.log2().round().clamp(-1022.0, 1023.0).exp2() } else { 1.0 };
    Err(Error::NotPowerOfTwo { field, value, nearest })
}

fn in_range(field: &'static str, value: f64, low: f64, high: f64) -> Result<(), Error> {
    if (low..=high).contains(&value) { Ok(()) } else { Err(Error::ScalerRange { field, value, low, high }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: ScalerConfig =
        ScalerConfig { init: 8.0, growth_interval: 3, growth_factor: 2.0, backoff_factor: 0.5, min: 2.0, max: 16.0 };

    fn state(scale: f64, n_finite: u32, n_skipped: u64, n_growths: u64, n_backoffs: u64) -> ScalerState {
        ScalerState { scale, n_finite, n_skipped, n_growths, n_backoffs }
    }

    fn scaler_at(state: ScalerState) -> DynamicScaler {
        DynamicScaler::from_state(SMALL, state).unwrap()
    }

    #[test]
    fn starts_at_init() {
        assert_eq!(DynamicScaler::new(SMALL).unwrap().state(), state(8.0, 0, 0, 0, 0));
        let default = DynamicScaler::new(ScalerConfig::default()).unwrap();
        assert_eq!(default.scale().to_bits(), 65536f64.to_bits());
    }

    /// Every kind of transition: (before, found_inf, step, after).
    #[test]
    fn every_transition() {
        let cases = [
            ("finite, interval not over", state(8.0, 0, 0, 0, 0), false, Step::Apply, state(8.0, 1, 0, 0, 0)),
            ("finite, interval over: grow", state(8.0, 2, 0, 0, 0), false, Step::Apply, state(16.0, 0, 0, 1, 0)),
            ("finite, interval over at max", state(16.0, 2, 0, 1, 0), false, Step::Apply, state(16.0, 0, 0, 1, 0)),
            ("not finite: back off", state(8.0, 0, 0, 0, 0), true, Step::Skip, state(4.0, 0, 1, 0, 1)),
            ("not finite: the interval restarts", state(8.0, 2, 0, 0, 0), true, Step::Skip, state(4.0, 0, 1, 0, 1)),
            ("not finite: down to min", state(4.0, 1, 5, 2, 4), true, Step::Skip, state(2.0, 0, 6, 2, 5)),
            ("finite at min", state(2.0, 0, 6, 2, 5), false, Step::Apply, state(2.0, 1, 6, 2, 5)),
            ("growth from min", state(2.0, 2, 6, 2, 5), false, Step::Apply, state(4.0, 0, 6, 3, 5)),
        ];
        for (name, before, found_inf, step, after) in cases {
            let mut scaler = scaler_at(before);
            assert_eq!(scaler.update(found_inf), Ok(step), "{name}");
            assert_eq!(scaler.state(), after, "{name}");
        }
    }

    #[test]
    fn not_finite_at_the_floor_is_an_error_and_counted() {
        let mut scaler = scaler_at(state(2.0, 1, 6, 2, 5));
        let error = scaler.update(true);
        assert_eq!(error, Err(Error::ScaleFloor { scale: 2.0, min: 2.0, n_skipped: 7 }));
        assert_eq!(scaler.state(), state(2.0, 0, 7, 2, 5));
        assert_eq!(scaler.update(true), Err(Error::ScaleFloor { scale: 2.0, min: 2.0, n_skipped: 8 }));
        assert_eq!(scaler.update(false), Ok(Step::Apply), "a caller may go on");
    }

    #[test]
    fn large_factors_stop_at_the_limits() {
        let config = ScalerConfig { growth_factor: 16.0, backoff_factor: 0.0625, growth_interval: 1, ..SMALL };
        let mut scaler = DynamicScaler::new(config).unwrap();
        assert_eq!(scaler.update(false), Ok(Step::Apply));
        assert_eq!(scaler.state(), state(16.0, 0, 0, 1, 0));
        assert_eq!(scaler.update(true), Ok(Step::Skip));
        assert_eq!(scaler.state(), state(2.0, 0, 1, 1, 1));
    }

    #[test]
    fn a_failure_restarts_the_growth_interval() {
        let mut scaler = DynamicScaler::new(SMALL).unwrap();
        for found_inf in [false, false, true, false, false] {
            let _ = scaler.update(found_inf).unwrap();
        }
        assert_eq!((scaler.n_growths(), scaler.n_backoffs(), scaler.n_skipped()), (0, 1, 1));
        let _ = scaler.update(false).unwrap();
        assert_eq!(scaler.state(), state(8.0, 0, 1, 1, 1));
    }

    #[test]
    fn resuming_from_a_written_state_is_exact() {
        let found_inf = |step: usize| step % 7 == 3;
        let mut whole = DynamicScaler::new(SMALL).unwrap();
        let mut states = Vec::new();
        let mut steps = Vec::new();
        for step in 0..40 {
            states.push(serde_json::to_string(&whole.state()).unwrap());
            steps.push(whole.update(found_inf(step)).unwrap());
        }
        for (start, json) in states.iter().enumerate() {
            let state = serde_json::from_str(json).unwrap();
            let mut resumed = DynamicScaler::from_state(SMALL, state).unwrap();
            for (step, want) in steps.iter().enumerate().skip(start) {
                assert_eq!(resumed.update(found_inf(step)).as_ref(), Ok(want));
            }
            assert_eq!(resumed, whole, "from step {start}");
        }
    }

    #[test]
    fn illegal_configurations_name_the_field() {
        let not_power = |config: ScalerConfig| match config.validate() {
            Err(Error::NotPowerOfTwo { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(not_power(ScalerConfig { init: 3.0, ..SMALL }), "init");
        assert_eq!(not_power(ScalerConfig { growth_factor: 1.5, ..SMALL }), "growth_factor");
        assert_eq!(not_power(ScalerConfig { backoff_factor: 0.0, ..SMALL }), "backoff_factor");
        assert_eq!(not_power(ScalerConfig { min: -2.0, ..SMALL }), "min");
        assert_eq!(not_power(ScalerConfig { max: f64::INFINITY, ..SMALL }), "max");
        let out_of_range = |config: ScalerConfig| match config.validate() {
            Err(Error::ScalerRange { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(out_of_range(ScalerConfig { init: 1.0, ..SMALL }), "init");
        assert_eq!(out_of_range(ScalerConfig { init: 32.0, ..SMALL }), "init");
        assert_eq!(out_of_range(ScalerConfig { min: 32.0, ..SMALL }), "min");
        assert_eq!(out_of_range(ScalerConfig { growth_factor: 1.0, ..SMALL }), "growth_factor");
        assert_eq!(out_of_range(ScalerConfig { backoff_factor: 1.0, ..SMALL }), "backoff_factor");
        assert_eq!(out_of_range(ScalerConfig { growth_interval: 0, ..SMALL }), "growth_interval");
    }

    #[test]
    fn states_that_do_not_fit_are_refused() {
        assert!(DynamicScaler::from_state(SMALL, state(3.0, 0, 0, 0, 0)).is_err());
        assert!(DynamicScaler::from_state(SMALL, state(1.0, 0, 0, 0, 0)).is_err());
        assert!(DynamicScaler::from_state(SMALL, state(f64::NAN, 0, 0, 0, 0)).is_err());
        assert!(DynamicScaler::from_state(SMALL, state(8.0, 3, 0, 0, 0)).is_err());
    }
}
