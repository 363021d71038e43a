//! Steps that a method chooses by its own error estimate.

use crate::kernels::{StepKernels, SumFormats, error_sum};
use crate::step::{Slope, Span, State, Stepper};
use crate::tableau::Embedded;
use crate::{Error, Method, OdePrecision, Result};
use halfmode_precision::Format;
use halfmode_tensor::Tensor;

/// Where steps begin and end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Steps {
    /// One step between any two time points.
    Grid,
    /// As many as the error estimate asks for, with an end at every time point. The steps that were accepted are the
    /// discrete solve that is differentiated; where they lie inside an interval is a constant. How many there will be is
    /// not known before: on the planning device an interval is one step, so that a plan says what a solve takes at least.
    Adaptive(StepControl),
}

/// The error that a step may have, and how steps follow from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepControl {
    /// Error relative to the state.
    pub rtol: f64,
    /// Error beside a state of zero.
    pub atol: f64,
    /// The first step's length; `None`: a hundredth of the time in which the state changes by itself.
    pub first_step: Option<f64>,
    /// Steps tried in one solve at most.
    pub max_steps: usize,
}

/// Share of the step that the estimate would allow.
const SAFETY: f64 = 0.9;
/// A step is at least and at most so many times the one before.
const SHRINK_AND_GROWTH: (f64, f64) = (0.2, 5.0);
/// Exponents of the error and of the one before, times the order: the PI controller of Gustafsson.
const PROPORTIONAL_INTEGRAL: (f64, f64) = (0.7, 0.4);
/// A velocity's rounding errors times this are the least relative tolerance: an estimate cannot see below.
const FLOOR: f64 = 4.0;

impl StepControl {
    /// These tolerances, a first step by itself, at most 10000 steps.
    #[must_use]
    pub const fn new(rtol: f64, atol: f64) -> Self {
        StepControl { rtol, atol, first_step: None, max_steps: 10_000 }
    }

    /// The smallest `rtol` for a velocity of this precision: four unit roundoffs, 2e-3 in f16.
    #[must_use]
    pub fn floor(precision: &OdePrecision) -> f64 {
        FLOOR * Format::from(precision.velocity_storage()).unit_roundoff()
    }

    fn validate(&self, precision: &OdePrecision) -> Result<()> {
        let floor = StepControl::floor(precision);
        // NaN is refused, too.
        if self.rtol.is_nan() || self.rtol < floor {
            let velocity = precision.velocity_storage();
            return Err(Error::ToleranceBelowFloor { rtol: self.rtol, floor, velocity });
        }
        if !(self.rtol.is_finite() && self.atol.is_finite()) || self.atol < 0.0 {
            return Err(Error::Tolerance { rtol: self.rtol, atol: self.atol });
        }
        Ok(())
    }
}

/// The controller of one solve.
pub(crate) struct Controller {
    control: StepControl,
    embedded: Embedded,
    /// The length of the next step, without its direction.
    length: Option<f64>,
    last_error: f64,
    first_slope: Option<Slope>,
    n_tried: usize,
}

impl Controller {
    pub(crate) fn new(control: StepControl, method: Method, precision: &OdePrecision) -> Result<Self> {
        control.validate(precision)?;
        let embedded = method.tableau().embedded.ok_or(Error::NoEstimate { method: method.tableau().name })?;
        let length = control.first_step.map(f64::abs).filter(|it| it.is_finite() && *it > 0.0);
        Ok(Controller { control, embedded, length, last_error: 1.0, first_slope: None, n_tried: 0 })
    }

    /// The next accepted step from `state`, towards `target` and not beyond.
    pub(crate) fn next(&mut self, stepper: &Stepper<'_>, state: &State, span: Span) -> Result<(Span, State)> {
        let (direction, room) = (span.length().signum(), span.length().abs());
        if !stepper.device.launches() {
            return Ok((span, stepper.advance(state, span.length(), &stepper.slopes(span, state, None)?)?));
        }
        let order = f64::from(self.embedded.order.min(stepper.tableau.order) + 1);
        let mut may_grow = true;
        loop {
            self.n_tried += 1;
            if self.n_tried > self.control.max_steps {
                return Err(Error::TooManySteps { max_steps: self.control.max_steps, time: span.from });
            }
            let length = self.length.map_or_else(|| self.first_length(stepper, state, span), Ok)?;
            if length < 16.0 * f64::EPSILON * span.from.abs().max(room) {
                return Err(Error::StepTooSmall { time: span.from, length, rtol: self.control.rtol });
            }
            // A last step that almost reaches the target goes there, exactly.
            let whole = length * 1.01 >= room;
            let to = if whole { span.to } else { span.from + direction * length };
            let tried = Span { from: span.from, to };
            let slopes = stepper.all_slopes(tried, state, self.first_slope.take())?;
            let next = stepper.advance(state, tried.length(), &slopes)?;
            let (whole_error, beyond_noise) = self.error(stepper, tried, (state, &next), &slopes)?;
            // An estimate that is mostly rounding does not say that larger steps do no harm.
            let error = beyond_noise.max(0.5 * whole_error);
            let (shrink, growth) = SHRINK_AND_GROWTH;
            if beyond_noise <= 1.0 {
                let (proportional, integral) = PROPORTIONAL_INTEGRAL;
                let factor =
                    SAFETY * error.max(1e-10).powf(-proportional / order) * self.last_error.powf(integral / order);
                let least = if error > 1.0 { 1.0 } else { shrink };
                let factor = factor.clamp(least, if may_grow { growth } else { 1.0 });
                // A step cut short by the target says little about the next one.
                self.length = Some(if whole { length.max(tried.length().abs() * factor) } else { length * factor });
                self.last_error = error.clamp(1e-4, 1.0);
                self.first_slope = if stepper.tableau.is_fsal() { slopes.into_iter().next_back() } else { None };
                return Ok((tried, next));
            }
            stepper.record.note(|record| record.n_rejected += 1);
            may_grow = false;
            let factor = if error.is_finite() { SAFETY * error.powf(-1.0 / order) } else { shrink };
            self.length = Some(tried.length().abs() * factor.clamp(shrink, 1.0));
            self.first_slope = slopes.into_iter().next();
        }
    }

    /// The root mean square over the whole state of errors over tolerances; `error` gives those of a tensor of it.
    fn norm(&self, states: (&State, &State), mut error: impl FnMut(usize) -> Result<(Tensor, f64)>) -> Result<f64> {
        let (mut sum, mut n) = (0.0, 0);
        for (idx, (before, after)) in states.0.iter().zip(states.1).enumerate() {
            let (error, noise) = error(idx)?;
            sum += error_sum(&error, [&before.high, &after.high], (self.control.rtol, self.control.atol), noise)?;
            n += error.numel();
        }
        Ok((sum / n.max(1) as f64).sqrt())
    }

    /// The error estimate over the tolerance: as it is, and what rounding of slopes does not explain.
    fn error(
        &self,
        stepper: &Stepper<'_>,
        span: Span,
        states: (&State, &State),
        slopes: &[Slope],
    ) -> Result<(f64, f64)> {
        let h = span.length();
        let pairs = || stepper.tableau.b.iter().zip(self.embedded.b);
        let weight: f64 = pairs().map(|(b, b_hat)| (b - b_hat).powi(2)).sum();
        let sums = stepper.precision.accumulate;
        let mut estimates = Vec::with_capacity(states.0.len());
        for idx in 0..states.0.len() {
            let leaf = slopes.iter().map(|slope| &slope[idx]);
            let terms: Vec<(f64, &Tensor)> = pairs().map(|(b, b_hat)| h * (b - b_hat)).zip(leaf).collect();
            let estimate = stepper.device.combine(None, &terms, SumFormats::new(sums, sums))?;
            // Rounding of slopes is no error that smaller steps would mend: twice its root mean square.
            let first = slopes.first().map_or(Ok(0.0), |slope| slope[idx].sum_squares())?;
            let slope = first / estimate.numel().max(1) as f64;
            let roundoff = Format::from(stepper.precision.leaf(idx).velocity).unit_roundoff();
            let noise = 2.0 * roundoff * h.abs() * (weight * slope).sqrt();
            estimates.push((estimate, if noise.is_finite() { noise } else { 0.0 }));
        }
        let whole = self.norm(states, |idx| Ok((estimates[idx].0.clone(), 0.0)))?;
        Ok((whole, self.norm(states, |idx| Ok(estimates[idx].clone()))?))
    }

    fn first_length(&mut self, stepper: &Stepper<'_>, state: &State, span: Span) -> Result<f64> {
        let slope = stepper.first_slope(span, state)?;
        let of_state = self.norm((state, state), |idx| Ok((state[idx].high.clone(), 0.0)))?;
        let of_slope = self.norm((state, state), |idx| Ok((slope[idx].clone(), 0.0)))?;
        if !state.iter().map(|it| &it.high).chain(&slope).all(Tensor::all_finite) {
            return Err(Error::NonFiniteVelocity { step: 0, n_steps: 0, time: span.from });
        }
        self.first_slope = Some(slope);
        let room = span.length().abs();
        // With atol = 0 a value that is 0 allows no error at all, so that the norm of its slope is infinite.
        let length = if of_slope > 0.0 { 0.01 * of_state / of_slope } else { room };
        Ok(if length > 0.0 { length.min(room) } else { 1e-3 * room })
    }
}
