//! One step of a method: forward, linearised, and the product with its Jacobian's transpose.

use crate::kernels::{StepKernels, SumFormats, dot};
use crate::{Error, Field, OdePrecision, Record, Result, StateSum, Tableau};
use halfmode_autograd::{Cx, LeafId, Tape, Var};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use std::cell::RefCell;
use std::sync::Arc;

/// The running state: one tensor, or several.
pub(crate) type State = Vec<Leaf>;

/// A tensor of the running state: numbers, or sums of two.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) high: Tensor,
    pub(crate) low: Option<Tensor>,
}

/// A slope: as many tensors as the state has.
pub(crate) type Slope = Vec<Tensor>;

/// From where to where a step goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) from: f64,
    pub(crate) to: f64,
}

impl Span {
    pub(crate) fn length(self) -> f64 {
        self.to - self.from
    }

    /// Where a node is; the last one is exactly the end.
    fn at(self, node: f64) -> f64 {
        if node >= 1.0 { self.to } else { self.from + node * self.length() }
    }
}

/// What all steps of a solve share.
pub(crate) struct Stepper<'a> {
    pub(crate) field: &'a Field,
    pub(crate) tableau: &'static Tableau,
    pub(crate) precision: &'a OdePrecision,
    pub(crate) device: &'a Device,
    pub(crate) params: &'a [Tensor],
    pub(crate) record: &'a Record,
    pub(crate) recent: RecentTimes,
}

/// The last times that a field was shown: stages and neighbouring steps share them, on the way back too, and a GPU writes
/// each by a launch.
#[derive(Debug, Default)]
pub(crate) struct RecentTimes(RefCell<Vec<(f64, Tensor)>>);

impl RecentTimes {
    /// Those of two neighbouring steps of Runge and Kutta's rule.
    const MOST: usize = 5;

    fn get(&self, t: f64, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut recent = self.0.borrow_mut();
        if let Some((_, it)) = recent.iter().find(|it| it.0.to_bits() == t.to_bits()) {
            return Ok(it.clone());
        }
        let made = make()?;
        if recent.len() == Self::MOST {
            recent.remove(0);
        }
        recent.push((t, made.clone()));
        Ok(made)
    }
}

/// Which inputs want gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    pub(crate) params: bool,
    pub(crate) time: bool,
}

/// A step's stages, each with the tape that made its slope.
pub(crate) struct Linearised {
    pub(crate) slopes: Vec<Slope>,
    /// What the tapes find gradients for.
    needs: Needs,
    stages: Vec<(Tape, Vec<Var>)>,
}

/// What a step's Jacobian, transposed, makes of a cotangent.
pub(crate) struct Pullback {
    /// Gradients of the stage inputs, `None` for zero; their sum over stages is that of the step's start, but for the
    /// identity.
    pub(crate) stages: Vec<Vec<Option<Tensor>>>,
    /// Sums over stages.
    pub(crate) params: Vec<Option<Tensor>>,
    /// Of the mean slope, by the start's time and by the step's length.
    pub(crate) time: f64,
    pub(crate) length: f64,
    /// The mean slope times the cotangent.
    pub(crate) slope: f64,
}

/// What a cotangent is multiplied by, a power of two.
#[derive(Debug)]
pub(crate) enum Scale {
    /// Known to the host.
    Known(f64),
    /// Chosen by a GPU while launches are recorded.
    #[cfg(feature = "cuda")]
    Chosen(crate::state_cuda::ChosenScale),
}

impl Scale {
    /// Its value; one where the host does not know it, and does not ask for gradients by times.
    fn known(&self) -> f64 {
        match self {
            Scale::Known(scale) => *scale,
            #[cfg(feature = "cuda")]
            Scale::Chosen(_) => 1.0,
        }
    }

    /// `scale factor own + sum_j factor_j later_j`
    fn sum(
        &self,
        device: &Device,
        own: Option<(f64, &Tensor)>,
        later: &[(f64, &Tensor)],
        formats: SumFormats,
    ) -> Result<Tensor> {
        let own = own.map(|(factor, it)| (factor * self.known(), it));
        let terms: Vec<(f64, &Tensor)> = own.into_iter().chain(later.iter().copied()).collect();
        #[cfg(feature = "cuda")]
        if let (Scale::Chosen(scale), Some(own)) = (self, own) {
            return crate::state_cuda::combine_scaled(device, (own, scale), later, formats);
        }
        device.combine(None, &terms, formats)
    }
}

/// `sum over l of a_l b_l`, `None` for zero.
pub(crate) fn dots(a: &[Option<Tensor>], b: &[Tensor]) -> Result<f64> {
    let pairs = a.iter().zip(b).filter_map(|(a, b)| Some((a.as_ref()?, b)));
    pairs.map(|(a, b)| dot(a, b)).sum()
}

impl Stepper<'_> {
    pub(crate) fn sums(&self, to: Precision) -> SumFormats {
        SumFormats::new(self.precision.accumulate, to)
    }

    /// Whether a tensor is finite. While a step is recorded on a GPU the host cannot know: what is not finite arrives in
    /// the outputs and gradients, where a guarded optimiser finds it.
    pub(crate) fn is_finite(&self, x: &Tensor) -> bool {
        !self.may_wait() || x.all_finite()
    }

    /// Whether the host may look at values now: not while a step is recorded.
    pub(crate) fn may_wait(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.device.as_cuda().is_some_and(|cuda| cuda.context().is_recording()) {
            return false;
        }
        true
    }

    fn cx(&self, save: bool) -> Cx {
        Cx { device: self.device.clone(), policy: Arc::clone(&self.precision.velocity), save }
    }

    fn time(&self, t: f64) -> Result<Tensor> {
        self.recent.get(t, || {
            #[cfg(feature = "cuda")]
            if let Some(cuda) = self.device.as_cuda() {
                return crate::state_cuda::time(cuda, self.device, t);
            }
            Ok(Tensor::from_slice(self.device, &[t], [1], Precision::F64, Purpose::Activation)?)
        })
    }

    /// The state at the beginning of a solve.
    pub(crate) fn begin(&self, y0: &[&Tensor]) -> Result<State> {
        let leaf = |(idx, y0): (usize, &&Tensor)| {
            let sum = self.precision.leaf(idx).state;
            let high = y0.cast(sum.precision(), Purpose::Activation)?;
            let low = match sum {
                StateSum::Plain(_) => None,
                StateSum::Compensated(precision) => {
                    Some(self.device.combine(Some(y0), &[(-1.0, &high)], self.sums(precision))?)
                }
            };
            Ok(Leaf { high, low })
        };
        y0.iter().enumerate().map(leaf).collect()
    }

    /// A leaf as one tensor of another format.
    pub(crate) fn rounded(&self, leaf: &Leaf, to: Precision, purpose: Purpose) -> Result<Tensor> {
        match &leaf.low {
            None => Ok(leaf.high.cast(to, purpose)?),
            Some(_) if to == leaf.high.precision() => Ok(leaf.high.clone()),
            Some(low) => self.device.combine(Some(&leaf.high), &[(1.0, low)], SumFormats { purpose, ..self.sums(to) }),
        }
    }

    /// The state in buffers of its own, counted as saved.
    pub(crate) fn kept(&self, state: &State) -> Result<State> {
        let leaf = |leaf: &Leaf| {
            let low = leaf.low.as_ref().map(|low| low.copy(Purpose::Saved)).transpose()?;
            Ok(Leaf { high: leaf.high.copy(Purpose::Saved)?, low })
        };
        state.iter().map(leaf).collect()
    }

    /// The point at which the stage after `slopes` asks for a velocity, in the velocity's formats.
    fn stage_input(&self, state: &State, h: f64, slopes: &[Slope]) -> Result<Vec<Tensor>> {
        let row = self.tableau.a[slopes.len()];
        let leaf = |(idx, leaf): (usize, &Leaf)| {
            let low = leaf.low.iter().map(|low| (1.0, low));
            let slopes = slopes.iter().map(|slope| &slope[idx]);
            let terms: Vec<(f64, &Tensor)> = low.chain(row.iter().map(|a| a * h).zip(slopes)).collect();
            if terms.is_empty() {
                return self.rounded(leaf, self.precision.leaf(idx).velocity, Purpose::Activation);
            }
            self.device.combine(Some(&leaf.high), &terms, self.sums(self.precision.leaf(idx).velocity))
        };
        state.iter().enumerate().map(leaf).collect()
    }

    fn checked(&self, state: &State, slope: &[Var]) -> Result<()> {
        self.record.note(|record| record.n_velocities += 1);
        if slope.len() != state.len() {
            return Err(Error::Leaves { expected: state.len(), found: slope.len() });
        }
        for (leaf, slope) in state.iter().zip(slope) {
            let (expected, found) = (leaf.high.shape(), slope.value().shape());
            if expected != found {
                return Err(Error::Velocity { expected: expected.clone(), found: found.clone() });
            }
        }
        Ok(())
    }

    /// The slopes that the step needs; `first` is that of the first stage, if it is known.
    pub(crate) fn slopes(&self, span: Span, state: &State, first: Option<Slope>) -> Result<Vec<Slope>> {
        self.some_slopes(span, state, (self.tableau.n_weighted(), first))
    }

    /// As [`Stepper::slopes`], with those that serve the error estimate alone.
    pub(crate) fn all_slopes(&self, span: Span, state: &State, first: Option<Slope>) -> Result<Vec<Slope>> {
        self.some_slopes(span, state, (self.tableau.n_stages(), first))
    }

    /// The slope at the beginning.
    pub(crate) fn first_slope(&self, span: Span, state: &State) -> Result<Slope> {
        Ok(self.some_slopes(span, state, (1, None))?.into_iter().next().unwrap_or_default())
    }

    fn some_slopes(&self, span: Span, state: &State, (n, first): (usize, Option<Slope>)) -> Result<Vec<Slope>> {
        let mut slopes: Vec<Slope> = first.into_iter().collect();
        for &node in self.tableau.c.iter().take(n).skip(slopes.len()) {
            let mut tape = Tape::new(self.cx(false));
            let params: Vec<Var> = self.params.iter().map(|it| tape.constant(it.clone())).collect();
            let inputs = self.stage_input(state, span.length(), &slopes)?;
            let y: Vec<Var> = inputs.into_iter().map(|it| tape.constant(it)).collect();
            let t = tape.constant(self.time(span.at(node))?);
            let slope = self.field.velocities(&mut tape, span.at(node), &t, &y, &params)?;
            self.checked(state, &slope)?;
            slopes.push(slope.into_iter().map(Var::into_value).collect());
        }
        Ok(slopes)
    }

    /// The state after a step.
    pub(crate) fn advance(&self, state: &State, h: f64, slopes: &[Slope]) -> Result<State> {
        let leaf = |(idx, leaf): (usize, &Leaf)| {
            let slopes = slopes.iter().map(|slope| &slope[idx]);
            let terms: Vec<(f64, &Tensor)> = self.tableau.b.iter().map(|b| b * h).zip(slopes).collect();
            let precision = self.precision.leaf(idx).state.precision();
            let Some(low) = &leaf.low else {
                let high = self.device.combine(Some(&leaf.high), &terms, self.sums(precision))?;
                return Ok(Leaf { high, low: None });
            };
            // What rounding takes from the first number, the second holds: (old - new) is exact.
            let terms: Vec<(f64, &Tensor)> = std::iter::once((1.0, low)).chain(terms).collect();
            let high = self.device.combine(Some(&leaf.high), &terms, self.sums(precision))?;
            let gone = self.device.combine(Some(&leaf.high), &[(-1.0, &high)], self.sums(self.precision.accumulate))?;
            let low = self.device.combine(Some(&gone), &terms, self.sums(precision))?;
            Ok(Leaf { high, low: Some(low) })
        };
        state.iter().enumerate().map(leaf).collect()
    }

    /// The stages of a step from `state`, recorded.
    pub(crate) fn linearise(&self, span: Span, state: &State, needs: Needs) -> Result<Linearised> {
        let mut out = Linearised { slopes: Vec::new(), needs, stages: Vec::new() };
        for &node in self.tableau.c.iter().take(self.tableau.n_weighted()) {
            let mut tape = Tape::new(self.cx(true));
            let (y, t) = (self.stage_input(state, span.length(), &out.slopes)?, self.time(span.at(node))?);
            // Leaves: the state, the time, then the parameters.
            let y: Vec<Var> = y.into_iter().map(|it| tape.leaf(it)).collect();
            let t = if needs.time { tape.leaf(t) } else { tape.constant(t) };
            let one = |tape: &mut Tape, it: &Tensor| match needs.params {
                true => tape.leaf(it.clone()),
                false => tape.constant(it.clone()),
            };
            let params: Vec<Var> = self.params.iter().map(|it| one(&mut tape, it)).collect();
            let slope = self.field.velocities(&mut tape, span.at(node), &t, &y, &params)?;
            self.checked(state, &slope)?;
            out.slopes.push(slope.iter().map(|it| it.value().clone()).collect());
            out.stages.push((tape, slope));
        }
        Ok(out)
    }

    /// The vector-Jacobian product of the mean slope with `cotangent`, times a scale that no copy of it sees. `None` if
    /// `check` is set and something that is formed on the way is not finite.
    pub(crate) fn pull_back(
        &self,
        span: Span,
        linearised: Linearised,
        (cotangent, scale): (&[Option<Tensor>], &Scale),
        needs: Needs,
        check: bool,
    ) -> Result<Option<Pullback>> {
        let (tableau, h, sums) = (self.tableau, span.length(), self.precision.accumulate);
        // A tape made before it was known what is wanted finds more gradients.
        let Linearised { slopes, needs: found, mut stages } = linearised;
        let n_leaves = cotangent.len();
        let mut inputs: Vec<Vec<Option<Tensor>>> = vec![vec![None; n_leaves]; slopes.len()];
        let mut params: Vec<Option<Tensor>> = vec![None; self.params.len()];
        let (mut time, mut length, mut mean) = (0.0, 0.0, 0.0);
        while let Some((tape, slope)) = stages.pop() {
            let j = stages.len();
            // b_j = weight_j scale c + h sum over m > j of a_mj w_m
            let mut seeds = Vec::with_capacity(n_leaves);
            for (leaf, slope) in slope.into_iter().enumerate().filter(|(_, slope)| slope.is_tracked()) {
                let later = inputs.iter().enumerate().skip(j + 1);
                let later = later.filter_map(|(m, w)| Some((h * tableau.a[m][j], w[leaf].as_ref()?)));
                let later: Vec<(f64, &Tensor)> = later.filter(|it| it.0 != 0.0).collect();
                let own = cotangent[leaf].as_ref().map(|it| (tableau.b[j], it)).filter(|it| it.0 != 0.0);
                if own.is_none() && later.is_empty() {
                    continue;
                }
                let b = scale.sum(self.device, own, &later, self.sums(slope.value().precision()))?;
                if check && !b.all_finite() {
                    return Ok(None);
                }
                seeds.push((slope, b));
            }
            if seeds.is_empty() {
                continue;
            }
            let mut grads: Vec<Option<Tensor>> = vec![None; n_leaves + 1 + self.params.len()];
            let first_param = n_leaves + usize::from(found.time);
            tape.backward_from(seeds, &mut |LeafId(idx), grad| {
                let slot = if idx < first_param { idx } else { idx - first_param + n_leaves + 1 };
                grads[slot] = Some(grad);
                Ok(())
            })?;
            let mut grads = grads.into_iter();
            inputs[j] = grads.by_ref().take(n_leaves).collect();
            if check && inputs[j].iter().flatten().any(|w| !w.all_finite()) {
                return Ok(None);
            }
            if let Some(grad) = grads.next().flatten()
                && needs.time
                && self.device.launches()
            {
                let tau: f64 = grad.to_vec::<f64>()?.iter().sum();
                time += tau;
                length += tableau.c[j] * tau;
            }
            for (sum, grad) in params.iter_mut().zip(grads).filter(|_| needs.params) {
                let Some(grad) = grad else { continue };
                *sum = Some(match sum.take() {
                    None => grad.cast(sums, Purpose::Grad)?,
                    Some(sum) => self.device.combine(Some(&sum), &[(1.0, &grad)], self.sums(sums))?,
                });
            }
        }
        if check && params.iter().flatten().any(|sum| !sum.all_finite()) {
            return Ok(None);
        }
        if needs.time {
            for (j, slope) in slopes.iter().enumerate() {
                let own = tableau.b[j] * scale.known();
                mean += if own == 0.0 { 0.0 } else { own * dots(cotangent, slope)? };
                for (m, w) in inputs.iter().enumerate().skip(j + 1) {
                    let a = tableau.a[m][j];
                    length += if a == 0.0 { 0.0 } else { a * dots(w, slope)? };
                }
            }
            if check && !(time.is_finite() && length.is_finite() && mean.is_finite()) {
                return Ok(None);
            }
        }
        Ok(Some(Pullback { stages: inputs, params, time, length, slope: mean }))
    }
}
