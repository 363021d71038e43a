//! One step of a method: forward, linearised, and the product with its Jacobian's transpose.

use crate::kernels::{StepKernels, SumFormats, dot};
use crate::{Error, OdePrecision, Record, Result, StateSum, Tableau, VectorField};
use halfmode_autograd::{Cx, LeafId, Tape, Var};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use std::sync::Arc;

/// The running state: a number, or the sum of two.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) high: Tensor,
    pub(crate) low: Option<Tensor>,
}

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
    pub(crate) field: &'a dyn VectorField,
    pub(crate) tableau: &'static Tableau,
    pub(crate) precision: &'a OdePrecision,
    pub(crate) device: &'a Device,
    pub(crate) params: &'a [Tensor],
    pub(crate) record: &'a Record,
}

/// Which inputs want gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    pub(crate) params: bool,
    pub(crate) time: bool,
}

/// A step's stages, each with the tape that made its slope.
pub(crate) struct Linearised {
    pub(crate) slopes: Vec<Tensor>,
    stages: Vec<(Tape, Var)>,
}

/// What a step's Jacobian, transposed, makes of a cotangent.
pub(crate) struct Pullback {
    /// Gradients of the stage inputs; their sum is that of the step's start, but for the identity.
    pub(crate) stages: Vec<Tensor>,
    /// Sums over stages.
    pub(crate) params: Vec<Option<Tensor>>,
    /// Of the mean slope, by the start's time and by the step's length.
    pub(crate) time: f64,
    pub(crate) length: f64,
    /// The mean slope times the cotangent.
    pub(crate) slope: f64,
}

impl Stepper<'_> {
    fn sums(&self, to: Precision) -> SumFormats {
        SumFormats::new(self.precision.accumulate, to)
    }

    /// Whether a tensor is finite. While a step is recorded on a GPU the host cannot know: what is not finite arrives in
    /// the outputs and gradients, where a guarded optimiser finds it.
    pub(crate) fn is_finite(&self, x: &Tensor) -> bool {
        #[cfg(feature = "cuda")]
        if self.device.as_cuda().is_some_and(|cuda| cuda.context().is_recording()) {
            return true;
        }
        x.all_finite()
    }

    fn cx(&self, save: bool) -> Cx {
        Cx { device: self.device.clone(), policy: Arc::clone(&self.precision.velocity), save }
    }

    fn time(&self, t: f64) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = self.device.as_cuda() {
            return crate::state_cuda::time(cuda, self.device, t);
        }
        Ok(Tensor::from_slice(self.device, &[t], [1], Precision::F64, Purpose::Activation)?)
    }

    /// The state at the beginning of a solve.
    pub(crate) fn begin(&self, y0: &Tensor) -> Result<State> {
        let precision = self.precision.state.precision();
        let high = y0.cast(precision, Purpose::Activation)?;
        let low = match self.precision.state {
            StateSum::Plain(_) => None,
            StateSum::Compensated(_) => Some(self.device.combine(Some(y0), &[(-1.0, &high)], self.sums(precision))?),
        };
        Ok(State { high, low })
    }

    /// The state as one tensor of another format.
    pub(crate) fn rounded(&self, state: &State, to: Precision, purpose: Purpose) -> Result<Tensor> {
        match &state.low {
            None => Ok(state.high.cast(to, purpose)?),
            Some(_) if to == state.high.precision() => Ok(state.high.clone()),
            Some(low) => self.device.combine(Some(&state.high), &[(1.0, low)], SumFormats { purpose, ..self.sums(to) }),
        }
    }

    /// The state in buffers of its own, counted as saved.
    pub(crate) fn kept(&self, state: &State) -> Result<State> {
        let low = state.low.as_ref().map(|low| low.copy(Purpose::Saved)).transpose()?;
        Ok(State { high: state.high.copy(Purpose::Saved)?, low })
    }

    /// The point at which stage `j` asks for a velocity, in the velocity's format.
    fn stage_input(&self, state: &State, h: f64, slopes: &[Tensor]) -> Result<Tensor> {
        let row = self.tableau.a[slopes.len()];
        let low = state.low.iter().map(|low| (1.0, low));
        let terms: Vec<(f64, &Tensor)> = low.chain(row.iter().map(|a| a * h).zip(slopes)).collect();
        self.device.combine(Some(&state.high), &terms, self.sums(self.precision.velocity_storage()))
    }

    fn checked(&self, state: &State, slope: &Var) -> Result<()> {
        self.record.note(|record| record.n_velocities += 1);
        let (expected, found) = (state.high.shape(), slope.value().shape());
        if expected == found {
            return Ok(());
        }
        Err(Error::Velocity { expected: expected.clone(), found: found.clone() })
    }

    /// The slopes that the step needs; `first` is that of the first stage, if it is known.
    pub(crate) fn slopes(&self, span: Span, state: &State, first: Option<Tensor>) -> Result<Vec<Tensor>> {
        self.some_slopes(span, state, (self.tableau.n_weighted(), first))
    }

    /// As [`Stepper::slopes`], with those that serve the error estimate alone.
    pub(crate) fn all_slopes(&self, span: Span, state: &State, first: Option<Tensor>) -> Result<Vec<Tensor>> {
        self.some_slopes(span, state, (self.tableau.n_stages(), first))
    }

    /// The slope at the beginning.
    pub(crate) fn first_slope(&self, span: Span, state: &State) -> Result<Tensor> {
        let slopes = self.some_slopes(span, state, (1, None))?;
        let shape = state.high.shape().clone();
        slopes.into_iter().next().ok_or(Error::Velocity { expected: shape.clone(), found: shape })
    }

    fn some_slopes(&self, span: Span, state: &State, (n, first): (usize, Option<Tensor>)) -> Result<Vec<Tensor>> {
        let mut slopes: Vec<Tensor> = first.into_iter().collect();
        for &node in self.tableau.c.iter().take(n).skip(slopes.len()) {
            let mut tape = Tape::new(self.cx(false));
            let params: Vec<Var> = self.params.iter().map(|it| tape.constant(it.clone())).collect();
            let input = self.stage_input(state, span.length(), &slopes)?;
            let (y, t) = (tape.constant(input), tape.constant(self.time(span.at(node))?));
            let slope = self.field.velocity_at(&mut tape, span.at(node), &t, &y, &params)?;
            self.checked(state, &slope)?;
            slopes.push(slope.into_value());
        }
        Ok(slopes)
    }

    /// The state after a step.
    pub(crate) fn advance(&self, state: &State, h: f64, slopes: &[Tensor]) -> Result<State> {
        let terms: Vec<(f64, &Tensor)> = self.tableau.b.iter().map(|b| b * h).zip(slopes).collect();
        let precision = self.precision.state.precision();
        let Some(low) = &state.low else {
            return Ok(State {
                high: self.device.combine(Some(&state.high), &terms, self.sums(precision))?,
                low: None,
            });
        };
        // What rounding takes from the first number, the second holds: (old - new) is exact.
        let terms: Vec<(f64, &Tensor)> = std::iter::once((1.0, low)).chain(terms).collect();
        let high = self.device.combine(Some(&state.high), &terms, self.sums(precision))?;
        let gone = self.device.combine(Some(&state.high), &[(-1.0, &high)], self.sums(self.precision.accumulate))?;
        let low = self.device.combine(Some(&gone), &terms, self.sums(precision))?;
        Ok(State { high, low: Some(low) })
    }

    /// The stages of a step from `state`, recorded.
    pub(crate) fn linearise(&self, span: Span, state: &State, needs: Needs) -> Result<Linearised> {
        let mut out = Linearised { slopes: Vec::new(), stages: Vec::new() };
        for &node in self.tableau.c.iter().take(self.tableau.n_weighted()) {
            let mut tape = Tape::new(self.cx(true));
            let (y, t) = (self.stage_input(state, span.length(), &out.slopes)?, self.time(span.at(node))?);
            // Leaves: the state, the time, then the parameters.
            let y = tape.leaf(y);
            let t = if needs.time { tape.leaf(t) } else { tape.constant(t) };
            let one = |tape: &mut Tape, it: &Tensor| match needs.params {
                true => tape.leaf(it.clone()),
                false => tape.constant(it.clone()),
            };
            let params: Vec<Var> = self.params.iter().map(|it| one(&mut tape, it)).collect();
            let slope = self.field.velocity_at(&mut tape, span.at(node), &t, &y, &params)?;
            self.checked(state, &slope)?;
            out.slopes.push(slope.value().clone());
            out.stages.push((tape, slope));
        }
        Ok(out)
    }

    /// The vector-Jacobian product of the mean slope with `cotangent`. `None` if `check` is set and something
    /// that is formed on the way is not finite.
    pub(crate) fn pull_back(
        &self,
        span: Span,
        linearised: Linearised,
        cotangent: &Tensor,
        needs: Needs,
        check: bool,
    ) -> Result<Option<Pullback>> {
        let (tableau, h, sums) = (self.tableau, span.length(), self.precision.accumulate);
        let Linearised { slopes, mut stages } = linearised;
        let mut inputs: Vec<Option<Tensor>> = vec![None; slopes.len()];
        let mut params: Vec<Option<Tensor>> = vec![None; self.params.len()];
        let (mut time, mut length, mut mean) = (0.0, 0.0, 0.0);
        while let Some((tape, slope)) = stages.pop() {
            let j = stages.len();
            // b_j = weight_j c + h sum over m > j of a_mj w_m
            let later = inputs.iter().enumerate().skip(j + 1);
            let later = later.filter_map(|(m, w)| Some((h * tableau.a[m][j], w.as_ref()?)));
            let terms: Vec<(f64, &Tensor)> =
                std::iter::once((tableau.b[j], cotangent)).chain(later).filter(|it| it.0 != 0.0).collect();
            if terms.is_empty() || !slope.is_tracked() {
                continue;
            }
            let b = self.device.combine(None, &terms, self.sums(slope.value().precision()))?;
            if check && !b.all_finite() {
                return Ok(None);
            }
            let mut grads: Vec<Option<Tensor>> = vec![None; 2 + self.params.len()];
            let first_param = 1 + usize::from(needs.time);
            tape.backward_from(vec![(slope, b)], &mut |LeafId(idx), grad| {
                let slot = if idx < first_param { idx } else { idx - first_param + 2 };
                grads[slot] = Some(grad);
                Ok(())
            })?;
            let mut grads = grads.into_iter();
            inputs[j] = grads.next().flatten();
            if check && inputs[j].as_ref().is_some_and(|w| !w.all_finite()) {
                return Ok(None);
            }
            if let Some(grad) = grads.next().flatten()
                && self.device.launches()
            {
                let tau: f64 = grad.to_vec::<f64>()?.iter().sum();
                time += tau;
                length += tableau.c[j] * tau;
            }
            for (sum, grad) in params.iter_mut().zip(grads) {
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
                mean += if tableau.b[j] == 0.0 { 0.0 } else { tableau.b[j] * dot(cotangent, slope)? };
                for (m, w) in inputs.iter().enumerate().skip(j + 1) {
                    let a = tableau.a[m][j];
                    if let (Some(w), true) = (w, a != 0.0) {
                        length += a * dot(w, slope)?;
                    }
                }
            }
            if check && !(time.is_finite() && length.is_finite() && mean.is_finite()) {
                return Ok(None);
            }
        }
        Ok(Some(Pullback { stages: inputs.into_iter().flatten().collect(), params, time, length, slope: mean }))
    }
}
