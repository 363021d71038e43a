//! The sweep back through the steps: adjoint, gradients and the scale between them.

use crate::kernels::{StepKernels, SumFormats, max_abs};
use crate::step::{Linearised, Needs, Pullback, Scale, Slope, Span, State, Stepper};
use crate::{AdjointScaler, AdjointScaling, Error, PeerScaler, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor};

/// What a target is multiplied by where nothing is tried again: room for a step that makes an adjoint 16 000 times larger.
#[cfg(feature = "cuda")]
const UNTRIED: f64 = 1.0 / 256.0;

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

/// The gradients that come in from outside at a time point, one for each tensor of the state; `None`: zero.
pub(crate) struct Incoming {
    pub(crate) point: usize,
    pub(crate) cotangent: Vec<Option<Tensor>>,
}

/// A product with a step's Jacobian that came through.
pub(crate) struct Product {
    /// What the cotangent was multiplied by.
    pub(crate) scale: f64,
    /// Of the scaled cotangent.
    pub(crate) pullback: Pullback,
    /// The slopes of the step's stages.
    pub(crate) slopes: Vec<Slope>,
    /// Products that overflowed before.
    pub(crate) retries: u32,
}

/// What has been found so far on the way back.
pub(crate) struct Adjoint<'a> {
    pub(crate) stepper: &'a Stepper<'a>,
    rule: Rule,
    pub(crate) needs: Needs,
    /// The gradient by each tensor of the state at the point reached; `None`: zero.
    pub(crate) a: Vec<Option<Tensor>>,
    /// The shapes of these tensors.
    shapes: Vec<Shape>,
    /// Its largest value, where that is known.
    known: Option<f64>,
    params: Vec<Option<Tensor>>,
    pub(crate) times: Vec<f64>,
    n_steps: usize,
    /// Something was not finite under [`AdjointScaling::Safe`]: all gradients will be infinite.
    spoilt: bool,
    last_scale: f64,
}

/// Gradients by the first state, the times and the parameters.
pub(crate) type Gradients = (Vec<Option<Tensor>>, Option<Tensor>, Vec<Option<Tensor>>);

/// The largest absolute value of all; infinite if a value is not finite.
fn largest_of(a: &[Option<Tensor>]) -> Result<f64> {
    a.iter().flatten().try_fold(0.0, |largest: f64, a| Ok(largest.max(max_abs(a)?)))
}

impl<'a> Adjoint<'a> {
    pub(crate) fn new(
        stepper: &'a Stepper<'a>,
        scaling: &AdjointScaling,
        needs: Needs,
        (n_points, shapes): (usize, Vec<Shape>),
    ) -> Self {
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
            a: vec![None; shapes.len()],
            shapes,
            known: None,
            params,
            times,
            n_steps: n_points - 1,
            spoilt: false,
            last_scale: 1.0,
        }
    }

    pub(crate) fn sums(&self, purpose: Purpose) -> SumFormats {
        let accumulate = self.stepper.precision.accumulate;
        SumFormats { sums: accumulate, to: accumulate, purpose }
    }

    fn failure(&self, step: usize, attempts: u32) -> Error {
        Error::NonFiniteAdjoint { step, n_steps: self.n_steps, scale: self.last_scale, attempts }
    }

    /// Adds the gradients that come in at a time point.
    pub(crate) fn add(&mut self, incoming: Incoming) -> Result<()> {
        if incoming.cotangent.iter().all(Option::is_none) {
            return Ok(());
        }
        if let Rule::Peer(scaler) = &mut self.rule
            && scaler.scale().is_none()
        {
            // The peer rounds the cotangent to the velocity's format and starts from that at the last time; it joins
            // tensors on their last axis.
            let low = self.stepper.precision.velocity_storage();
            let rounded = incoming.cotangent.iter().flatten().map(|it| it.cast(low, Purpose::Activation));
            let rounded: Vec<Option<Tensor>> = rounded.map(|it| it.map(Some)).collect::<std::result::Result<_, _>>()?;
            let samples = self.shapes.first().and_then(|shape| shape.first()).copied().unwrap_or(1);
            let features = self.shapes.iter().map(Shape::numel).sum::<usize>() / samples.max(1);
            if scaler.start(largest_of(&rounded)?, &[samples, features]).is_none() {
                return Err(self.failure(incoming.point.saturating_sub(1), 0));
            }
        }
        self.known = None;
        let formats = self.sums(Purpose::Activation);
        for (a, cotangent) in self.a.iter_mut().zip(incoming.cotangent) {
            let Some(cotangent) = cotangent else { continue };
            // Also the first one into a buffer of its own, so that the caller's gradient stays as it is.
            *a = Some(self.stepper.device.combine(a.as_ref(), &[(1.0, &cotangent)], formats)?);
        }
        Ok(())
    }

    /// The largest value of a cotangent, where the rule wants to know it. `None`: there is nothing to do in this step.
    fn largest(&mut self, step: usize, cotangent: &[Option<Tensor>], known: Option<f64>) -> Result<Option<f64>> {
        if !self.rule.checks() {
            return Ok(Some(1.0));
        }
        let largest = known.map_or_else(|| largest_of(cotangent), Ok)?;
        if largest.is_finite() {
            return Ok(if largest > 0.0 || matches!(self.rule, Rule::Peer(_)) { Some(largest) } else { None });
        }
        match self.rule {
            Rule::Safe => {
                self.spoilt = true;
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

    /// Passes through one step, from `state` at its beginning, with its tapes if they were kept.
    pub(crate) fn step(&mut self, step: usize, span: Span, state: &State, kept: Option<Linearised>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Rule::Dynamic(scaler) = &self.rule
            && self.stepper.device.as_cuda().is_some_and(|cuda| cuda.context().is_recording())
        {
            let scaler = *scaler;
            return self.recorded_step(&scaler, span, state);
        }
        let (a, known) = (self.a.clone(), self.known);
        let Some(product) = self.product(step, span, (state, kept), (&a, known))? else { return Ok(()) };
        drop(a);
        let Product { scale, pullback, retries, .. } = product;
        let h = span.length();
        let (time, length, slope) = (pullback.time / scale, pullback.length / scale, pullback.slope / scale);
        self.times[step] += h * (time - length) - slope;
        self.times[step + 1] += h * length + slope;
        self.add_product(h / scale, pullback)?;
        self.grow(retries)
    }

    /// The product of the Jacobian of a step from `state`, transposed, with `cotangent`, whose largest value may be
    /// known, in a scale that lets it through. `None`: it is zero, or everything is spoilt.
    pub(crate) fn product(
        &mut self,
        step: usize,
        span: Span,
        (state, mut kept): (&State, Option<Linearised>),
        (cotangent, known): (&[Option<Tensor>], Option<f64>),
    ) -> Result<Option<Product>> {
        if self.spoilt || cotangent.iter().all(Option::is_none) {
            return Ok(None);
        }
        let Some(largest) = self.largest(step, cotangent, known)? else { return Ok(None) };
        let (stepper, record) = (self.stepper, self.stepper.record);
        let mut attempts = 0;
        let (scale, pullback, slopes) = loop {
            let scale = self.scale(largest);
            let linearised = kept.take().map_or_else(|| stepper.linearise(span, state, self.needs), Ok)?;
            let slopes = linearised.slopes.clone();
            record.note(|record| record.n_vjps += 1);
            attempts += 1;
            let scaled = (cotangent, &Scale::Known(scale));
            if let Some(it) = stepper.pull_back(span, linearised, scaled, self.needs, self.rule.checks())? {
                break (scale, it, slopes);
            }
            // A velocity that is not finite is nothing that a smaller scale mends.
            if !slopes.iter().flatten().all(Tensor::all_finite) {
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
                    self.spoilt = true;
                    return Ok(None);
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
        Ok(Some(Product { scale, pullback, slopes, retries: attempts - 1 }))
    }

    /// As [`Adjoint::step`] with a scale that moves, while launches are recorded, where the host cannot know what became of a step: the device
    /// chooses the scale of each step by its adjoint, and what is not finite for all that arrives in the gradients.
    #[cfg(feature = "cuda")]
    fn recorded_step(&mut self, scaler: &AdjointScaler, span: Span, state: &State) -> Result<()> {
        use crate::state_cuda::{By, ChosenScale, combine};
        let stepper = self.stepper;
        let Some(cuda) = stepper.device.as_cuda() else { return Ok(()) };
        let adjoints: Vec<&Tensor> = self.a.iter().flatten().collect();
        let chosen = ChosenScale::of(cuda, stepper.device, &adjoints, scaler.target() * UNTRIED, scaler.bounds())?;
        let linearised = stepper.linearise(span, state, self.needs)?;
        let scaled = (&self.a[..], &Scale::Chosen(chosen.clone()));
        let Some(pullback) = stepper.pull_back(span, linearised, scaled, self.needs, false)? else { return Ok(()) };
        let (by, formats) = (Some(By::Inverse(&chosen)), self.sums(Purpose::Activation));
        for (leaf, a) in self.a.iter_mut().enumerate() {
            let stages = pullback.stages.iter().filter_map(|stage| stage[leaf].as_ref());
            let terms: Vec<(f64, &Tensor)> = stages.map(|w| (span.length(), w)).collect();
            if !terms.is_empty() {
                *a = Some(combine(stepper.device, a.as_ref(), &terms, by, formats)?);
            }
        }
        let formats = self.sums(Purpose::Grad);
        for (sum, term) in self.params.iter_mut().zip(pullback.params) {
            let Some(term) = term else { continue };
            *sum = Some(combine(stepper.device, sum.as_ref(), &[(span.length(), &term)], by, formats)?);
        }
        Ok(())
    }

    /// Adds `factor` times a product to the gradients by the state and the parameters.
    pub(crate) fn add_product(&mut self, factor: f64, pullback: Pullback) -> Result<()> {
        let device = self.stepper.device;
        let formats = self.sums(Purpose::Activation);
        for (leaf, a) in self.a.iter_mut().enumerate() {
            let stages = pullback.stages.iter().filter_map(|stage| stage[leaf].as_ref());
            let terms: Vec<(f64, &Tensor)> = stages.map(|w| (factor, w)).collect();
            // A tensor that the field does not read keeps its adjoint.
            if !terms.is_empty() {
                *a = Some(device.combine(a.as_ref(), &terms, formats)?);
            }
        }
        self.known = None;
        let formats = self.sums(Purpose::Grad);
        for (sum, term) in self.params.iter_mut().zip(pullback.params) {
            let Some(term) = term else { continue };
            *sum = Some(device.combine(sum.as_ref(), &[(factor, &term)], formats)?);
        }
        Ok(())
    }

    /// Tells the rule how a step went.
    pub(crate) fn grow(&mut self, retries: u32) -> Result<()> {
        if !matches!(self.rule, Rule::Dynamic(_) | Rule::Peer(_)) {
            return Ok(());
        }
        let largest = largest_of(&self.a)?;
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
            let finite = self.a.iter().chain(&self.params).flatten().all(|it| self.stepper.is_finite(it));
            if !finite || !self.times.iter().all(|it| it.is_finite()) {
                match self.rule {
                    Rule::Safe => self.spoilt = true,
                    _ => return Err(self.failure(0, 0)),
                }
            }
        }
        if self.needs.params && !self.spoilt {
            // A parameter that nothing reached has a gradient, too: zero.
            for (sum, param) in self.params.iter_mut().zip(self.stepper.params).filter(|(sum, _)| sum.is_none()) {
                *sum = Some(device.alloc(param.shape().clone(), DType::real(accumulate), Purpose::Grad)?);
            }
        }
        if self.spoilt {
            let infinite = |shape: &Shape| {
                let values = vec![f64::INFINITY; shape.numel()];
                Tensor::from_slice(device, &values, shape.clone(), accumulate, Purpose::Grad).map(Some)
            };
            let params = self.stepper.params.iter().map(|it| infinite(it.shape()));
            self.params = params.collect::<std::result::Result<_, _>>()?;
            self.a = self.shapes.iter().map(infinite).collect::<std::result::Result<_, _>>()?;
            self.times.fill(f64::INFINITY);
        }
        let times: Vec<f64> = marks.iter().filter_map(|&idx| self.times.get(idx).copied()).collect();
        let times =
            self.needs.time.then(|| Tensor::from_slice(device, &times, [times.len()], Precision::F64, Purpose::Grad));
        Ok((self.a, times.transpose()?, self.params))
    }
}
