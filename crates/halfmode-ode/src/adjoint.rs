//! The sweep back through the steps: adjoint, gradients and the scale between them.

use crate::kernels::{StepKernels, SumFormats, max_abs};
use crate::step::{Needs, Pullback, Span, State, Stepper};
use crate::{AdjointScaler, AdjointScaling, Error, PeerScaler, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Tensor};

/// The rule of the scale, with what it remembers.
enum Rule {
    Fixed(f64),
    Safe,
    Dynamic(AdjointScaler),
    Peer(PeerScaler),
}

impl Rule {
    fn checks(&self) -> bool {
        !matches!(self, Rule::Fixed(_))
    }
}

/// The gradient that comes in from outside at a time point.
pub(crate) struct Incoming {
    pub(crate) point: usize,
    pub(crate) cotangent: Option<Tensor>,
}

/// What has been found so far on the way back.
pub(crate) struct Adjoint<'a> {
    stepper: &'a Stepper<'a>,
    rule: Rule,
    needs: Needs,
    /// The gradient by the state at the point reached; `None`: zero.
    a: Option<Tensor>,
    /// Its largest value, where that is known.
    known: Option<f64>,
    params: Vec<Option<Tensor>>,
    times: Vec<f64>,
    n_steps: usize,
    /// Something was not finite under [`AdjointScaling::Safe`]: all gradients will be infinite.
    spoilt: Option<Tensor>,
    last_scale: f64,
}

/// Gradients by the first state, the times and the parameters.
pub(crate) type Gradients = (Option<Tensor>, Option<Tensor>, Vec<Option<Tensor>>);

impl<'a> Adjoint<'a> {
    pub(crate) fn new(stepper: &'a Stepper<'a>, scaling: &AdjointScaling, needs: Needs, n_points: usize) -> Self {
        let velocity = stepper.precision.velocity_storage();
        let rule = match *scaling {
            AdjointScaling::Fixed { exponent } => Rule::Fixed(f64::from(exponent).exp2()),
            AdjointScaling::Safe => Rule::Safe,
            AdjointScaling::Dynamic(config) => Rule::Dynamic(AdjointScaler::new(config, velocity)),
            AdjointScaling::Peer => Rule::Peer(PeerScaler::new(velocity)),
        };
        let (params, times) = (vec![None; stepper.params.len()], vec![0.0; n_points]);
        Adjoint {
            stepper,
            rule,
            needs,
            a: None,
            known: None,
            params,
            times,
            n_steps: n_points - 1,
            spoilt: None,
            last_scale: 1.0,
        }
    }

    fn sums(&self, purpose: Purpose) -> SumFormats {
        let accumulate = self.stepper.precision.accumulate;
        SumFormats { sums: accumulate, to: accumulate, purpose }
    }

    fn failure(&self, step: usize, attempts: u32) -> Error {
        Error::NonFiniteAdjoint { step, n_steps: self.n_steps, scale: self.last_scale, attempts }
    }

    /// Adds the gradient that comes in at a time point.
    pub(crate) fn add(&mut self, incoming: Incoming) -> Result<()> {
        let Some(cotangent) = incoming.cotangent else { return Ok(()) };
        if let Rule::Peer(scaler) = &mut self.rule
            && scaler.scale().is_none()
        {
            // The peer rounds the cotangent to the velocity's format and starts from that at the last time.
            let rounded = cotangent.cast(self.stepper.precision.velocity_storage(), Purpose::Activation)?;
            if scaler.start(max_abs(&rounded)?, rounded.shape()).is_none() {
                return Err(self.failure(incoming.point.saturating_sub(1), 0));
            }
        }
        self.known = None;
        self.a = Some(match self.a.take() {
            // A copy, so that the caller's gradient stays as it is.
            None => self.stepper.device.combine(None, &[(1.0, &cotangent)], self.sums(Purpose::Activation))?,
            Some(a) => self.stepper.device.combine(Some(&a), &[(1.0, &cotangent)], self.sums(Purpose::Activation))?,
        });
        Ok(())
    }

    /// The largest value of the adjoint, where the rule wants to know it. `None`: there is nothing to do in this step.
    fn largest(&mut self, step: usize, a: &Tensor) -> Result<Option<f64>> {
        if !self.rule.checks() {
            return Ok(Some(1.0));
        }
        let largest = self.known.map_or_else(|| max_abs(a), Ok)?;
        if largest.is_finite() {
            return Ok(if largest > 0.0 || matches!(self.rule, Rule::Peer(_)) { Some(largest) } else { None });
        }
        match self.rule {
            Rule::Safe => {
                self.spoilt = Some(a.clone());
                Ok(None)
            }
            _ => Err(self.failure(step, 0)),
        }
    }

    fn scale(&mut self, largest: f64) -> f64 {
        self.last_scale = match &mut self.rule {
            Rule::Fixed(scale) => *scale,
            Rule::Safe => 1.0,
            Rule::Dynamic(scaler) => scaler.scale(largest),
            Rule::Peer(scaler) => scaler.scale().unwrap_or(1.0),
        };
        self.last_scale
    }

    /// Passes through one step, from `state` at its beginning.
    pub(crate) fn step(&mut self, step: usize, span: Span, state: &State) -> Result<()> {
        let (Some(a), None) = (self.a.clone(), &self.spoilt) else { return Ok(()) };
        let Some(largest) = self.largest(step, &a)? else { return Ok(()) };
        let (stepper, record) = (self.stepper, self.stepper.record);
        let mut attempts = 0;
        let (scale, pullback) = loop {
            let scale = self.scale(largest);
            let linearised = stepper.linearise(span, state, self.needs)?;
            let slopes = linearised.slopes.clone();
            let scaled = stepper.device.combine(None, &[(scale, &a)], self.sums(Purpose::Activation))?;
            record.note(|record| record.n_vjps += 1);
            attempts += 1;
            if let Some(it) = stepper.pull_back(span, linearised, &scaled, self.needs, self.rule.checks())? {
                break (scale, it);
            }
            // A velocity that is not finite is nothing that a smaller scale mends.
            if !slopes.iter().all(Tensor::all_finite) {
                return Err(Error::NonFiniteVelocity { step, n_steps: self.n_steps, time: span.from });
            }
            let again = match &mut self.rule {
                Rule::Dynamic(scaler) => scaler.shrink(attempts),
                Rule::Peer(scaler) => {
                    scaler.shrink();
                    attempts < PeerScaler::MAX_ATTEMPTS
                }
                Rule::Fixed(_) => false,
                Rule::Safe => {
                    self.spoilt = Some(a);
                    return Ok(());
                }
            };
            if !again {
                return Err(self.failure(step, attempts));
            }
            record.note(|record| record.n_retries += 1);
        };
        if self.rule.checks() {
            record.note(|record| record.scales.push(scale));
        }
        record.note(|record| record.most_tries = record.most_tries.max(attempts as usize));
        self.accumulate(step, span.length(), scale, &a, pullback)?;
        self.grow(attempts - 1)
    }

    /// `a += (h/S) v_y`, and so on.
    fn accumulate(&mut self, step: usize, h: f64, scale: f64, a: &Tensor, pullback: Pullback) -> Result<()> {
        let (device, factor) = (self.stepper.device, h / scale);
        let terms: Vec<(f64, &Tensor)> = pullback.stages.iter().map(|w| (factor, w)).collect();
        self.a = Some(device.combine(Some(a), &terms, self.sums(Purpose::Activation))?);
        self.known = None;
        let formats = self.sums(Purpose::Grad);
        for (sum, term) in self.params.iter_mut().zip(pullback.params) {
            let Some(term) = term else { continue };
            *sum = Some(device.combine(sum.as_ref(), &[(factor, &term)], formats)?);
        }
        let (time, length, slope) = (pullback.time / scale, pullback.length / scale, pullback.slope / scale);
        self.times[step] += h * (time - length) - slope;
        self.times[step + 1] += h * length + slope;
        Ok(())
    }

    /// Tells the rule how a step went.
    fn grow(&mut self, retries: u32) -> Result<()> {
        if !matches!(self.rule, Rule::Dynamic(_) | Rule::Peer(_)) {
            return Ok(());
        }
        let largest = self.a.as_ref().map_or(Ok(0.0), max_abs)?;
        self.known = Some(largest);
        match &mut self.rule {
            Rule::Dynamic(scaler) => scaler.accept(retries, largest),
            Rule::Peer(scaler) if retries == 0 && scaler.wants_growth(largest) => scaler.grow(),
            _ => {}
        }
        Ok(())
    }

    /// Every gradient, unscaled; of the times, those at `marks`.
    pub(crate) fn finish(mut self, marks: &[usize]) -> Result<Gradients> {
        let device = self.stepper.device;
        let accumulate = self.stepper.precision.accumulate;
        if self.rule.checks() {
            let finite = self.a.iter().chain(self.params.iter().flatten()).all(Tensor::all_finite);
            if !finite || !self.times.iter().all(|it| it.is_finite()) {
                match self.rule {
                    Rule::Safe => self.spoilt = self.a.clone(),
                    _ => return Err(self.failure(0, 0)),
                }
            }
        }
        if self.needs.params && self.spoilt.is_none() {
            // A parameter that nothing reached has a gradient, too: zero.
            for (sum, param) in self.params.iter_mut().zip(self.stepper.params).filter(|(sum, _)| sum.is_none()) {
                *sum = Some(device.alloc(param.shape().clone(), DType::real(accumulate), Purpose::Grad)?);
            }
        }
        if let Some(y0) = &self.spoilt {
            let infinite = |like: &Tensor| {
                let values = vec![f64::INFINITY; like.numel()];
                Tensor::from_slice(device, &values, like.shape().clone(), accumulate, Purpose::Grad)
            };
            self.params =
                self.stepper.params.iter().map(|it| infinite(it).map(Some)).collect::<std::result::Result<_, _>>()?;
            self.a = Some(infinite(y0)?);
            self.times.fill(f64::INFINITY);
        }
        let times: Vec<f64> = marks.iter().filter_map(|&idx| self.times.get(idx).copied()).collect();
        let times =
            self.needs.time.then(|| Tensor::from_slice(device, &times, [times.len()], Precision::F64, Purpose::Grad));
        Ok((self.a, times.transpose()?, self.params))
    }
}
