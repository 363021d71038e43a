//! A solve as one differentiable op: discretise, then optimise.

use crate::adaptive::Controller;
use crate::adjoint::{Adjoint, Incoming};
use crate::checkpoint::{Checkpoints, positions};
use crate::step::{Needs, Span, State, Stepper};
use crate::{Error, OdeOptions, Result, Steps, VectorField};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Purpose, Tensor};
use std::fmt;
use std::sync::Arc;

const NAME: &str = "odeint";

/// Which time points a solve returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Points {
    /// All of the grid.
    All,
    /// The last.
    Last,
}

/// Integrates `y' = f(t, y)` over a grid of times as one op. Its gradient is the exact one of the discrete steps,
/// linearised at the stored states.
///
/// # Shapes
/// - input 0, `y0`: any shape, real
/// - input 1, the times: `[n]`, f64 (only if `times` is `None`)
/// - further inputs: the field's parameters
/// - outputs: the state at each time point asked for, in the precision of sums
///
/// # Saved for backward
/// The state before each step, in the precision `stored` (role `y`), or as many states as [`Storage`](crate::Storage)
/// allows (roles `high` and `low`); parameters and times are shared. Stages are computed again, on a tape that lives for
/// one step.
///
/// # Errors
/// [`Error::Times`], [`Error::Velocity`], [`Error::NonFiniteVelocity`], and in backward [`Error::NonFiniteAdjoint`].
#[derive(Clone)]
pub struct OdeSolve {
    /// The right-hand side.
    pub field: Arc<dyn VectorField>,
    /// The time points; `None`: input 1 is a tensor of them and may want a gradient.
    pub times: Option<Arc<[f64]>>,
    /// Which points are outputs.
    pub points: Points,
    /// Method and precision.
    pub options: OdeOptions,
}

impl fmt::Debug for OdeSolve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OdeSolve").field("points", &self.points).field("options", &self.options).finish_non_exhaustive()
    }
}

/// Refuses what is no grid.
fn check_times(times: &[f64]) -> Result<()> {
    let wrong = |problem, point| Err(Error::Times { problem, point });
    if times.len() < 2 {
        return wrong("there are too few", times.len());
    }
    if let Some(point) = times.iter().position(|t| !t.is_finite()) {
        return wrong("the time is not finite", point);
    }
    let rises = times[1] > times[0];
    match times.windows(2).position(|pair| if rises { pair[1] <= pair[0] } else { pair[1] >= pair[0] }) {
        Some(idx) => wrong("the direction turns, or time stands still", idx + 1),
        None => Ok(()),
    }
}

/// The times that a tensor holds; on the planning device, as many.
fn times_of(t: &Tensor) -> Result<Vec<f64>> {
    if t.device().launches() { Ok(t.to_vec::<f64>()?) } else { Ok((0..t.numel()).map(|idx| idx as f64).collect()) }
}

impl OdeSolve {
    fn split<'a>(&self, inputs: &[&'a Tensor]) -> Result<(&'a Tensor, Option<&'a Tensor>, Vec<Tensor>)> {
        let missing = || halfmode_autograd::Error::Arity { op: NAME, expected: 2, found: inputs.len() };
        let (&y0, rest) = inputs.split_first().ok_or_else(missing)?;
        let (t, params) = match self.times {
            Some(_) => (None, rest),
            None => rest.split_first().map(|(&t, params)| (Some(t), params)).ok_or_else(missing)?,
        };
        Ok((y0, t, params.iter().map(|&it| it.clone()).collect()))
    }

    fn times(&self, t: Option<&Tensor>) -> Result<Vec<f64>> {
        match (&self.times, t) {
            (Some(times), _) => Ok(times.to_vec()),
            (None, Some(t)) => times_of(t),
            (None, None) => Ok(Vec::new()),
        }
    }

    fn stepper<'a>(&'a self, device: &'a halfmode_tensor::Device, params: &'a [Tensor]) -> Stepper<'a> {
        let OdeOptions { method, precision, record, .. } = &self.options;
        Stepper { field: &*self.field, tableau: method.tableau(), precision, device, params, record }
    }

    fn run(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let (y0, t, params) = self.split(inputs)?;
        self.options.precision.validate()?;
        if y0.dtype().domain == Domain::Complex {
            return Err(Error::ComplexState);
        }
        let times = self.times(t)?;
        check_times(&times)?;
        #[cfg(feature = "cuda")]
        if let Some(solve) = crate::mlp_solve::MlpSolve::of(self, &cx.device, &params, y0) {
            return solve.run(cx, y0, &times);
        }
        let (stepper, accumulate) = (self.stepper(&cx.device, &params), self.options.precision.accumulate);
        let mut control = match self.options.steps {
            Steps::Grid => None,
            Steps::Adaptive(it) => Some(Controller::new(it, self.options.method, &self.options.precision)?),
        };
        let slots = self.options.storage.slots(y0.numel(), &self.options.precision)?;
        let places = match (slots, &control) {
            (None, _) => None,
            (Some(slots), None) => Some(first_places(times.len() - 1, slots)),
            // How many steps there will be is not known yet: the way back begins with the first state alone.
            (Some(_), Some(_)) => Some(vec![0]),
        };
        let mut outputs = Outputs::new();
        let mut saved = Saved::new(NAME);
        let mut state = stepper.begin(y0)?;
        let (mut grid, direction) = (vec![times[0]], (times[1] - times[0]).signum());
        if self.points == Points::All {
            outputs.push(stepper.rounded(&state, accumulate, Purpose::Activation)?);
        }
        for (interval, &target) in times.iter().enumerate().skip(1) {
            let mut from = times[interval - 1];
            while (target - from) * direction > 0.0 {
                if cx.save {
                    saved = match &places {
                        None => saved.share(
                            cx,
                            "y",
                            &stepper.rounded(&state, self.options.precision.stored, Purpose::Saved)?,
                        ),
                        Some(places) if places.binary_search(&(grid.len() - 1)).is_ok() => {
                            let kept = stepper.kept(&state)?;
                            let saved = saved.share(cx, "high", &kept.high);
                            kept.low.iter().fold(saved, |saved, low| saved.share(cx, "low", low))
                        }
                        Some(_) => saved,
                    };
                }
                let span = Span { from, to: target };
                let (span, next) = match &mut control {
                    None => (span, advance(&stepper, &state, span, (interval - 1, times.len() - 1))?),
                    Some(control) => control.next(&stepper, &state, span)?,
                };
                (from, state) = (span.to, next);
                grid.push(from);
            }
            if self.points == Points::All || interval + 1 == times.len() {
                outputs.push(stepper.rounded(&state, accumulate, Purpose::Activation)?);
            }
        }
        self.options.record.note(|record| {
            record.n_steps = grid.len() - 1;
            record.grid.clone_from(&grid);
        });
        if control.is_some() {
            let grid = Tensor::from_slice(&cx.device, &grid, [grid.len()], Precision::F64, Purpose::Saved)?;
            saved = saved.share(cx, "steps", &grid);
        }
        for param in &params {
            saved = saved.share(cx, "param", param);
        }
        if let Some(t) = t {
            saved = saved.share(cx, "t", t);
        }
        Ok((outputs, saved))
    }

    fn pull_back(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let t = if self.times.is_none() { Some(saved.take("t")?) } else { None };
        let times = self.times(t.as_ref())?;
        let (params, mut states) = (saved.take_all("param"), saved.take_all("y"));
        #[cfg(feature = "cuda")]
        {
            let states = saved.take_all("row_states");
            if let Some(solve) =
                states.first().and_then(|y| crate::mlp_solve::MlpSolve::of(self, &cx.device, &params, y))
            {
                let needs_params = needs.get(1..).is_some_and(|it| it.contains(&true));
                let (y0, params) = solve.pull_back(states, &times, grads, needs_params)?;
                return Ok(std::iter::once(y0).chain(params).collect());
            }
        }
        let (high, low) = (saved.take_all("high"), saved.take_all("low"));
        let stepper = self.stepper(&cx.device, &params);
        let grid = match self.options.steps {
            Steps::Grid => times.clone(),
            Steps::Adaptive(_) => times_of(&saved.take("steps")?)?,
        };
        let n_steps = grid.len() - 1;
        let first_param = needs.len() - params.len();
        let needs = Needs { params: needs[first_param..].contains(&true), time: t.is_some() && needs[1] };
        let marks = marks(&grid, &times);
        let incoming = |point: usize| match self.points {
            Points::All => marks.binary_search(&point).ok(),
            Points::Last => (point == n_steps).then_some(0),
        };
        let mut low = low.into_iter();
        let kept: Vec<State> = high.into_iter().map(|high| State { high, low: low.next() }).collect();
        let numel = kept.first().map_or(0, |state| state.high.numel());
        let slots = self.options.storage.slots(numel, &self.options.precision)?.unwrap_or(1);
        let places = if kept.len() > 1 { first_places(n_steps, slots) } else { vec![0] };
        let kept: Vec<(usize, State)> = places.into_iter().zip(kept).collect();
        let mut checkpoints = Checkpoints { stepper: &stepper, grid: &grid, slots, kept };
        let mut adjoint = Adjoint::new(&stepper, &self.options.scaling, needs, grid.len());
        for step in (0..n_steps).rev() {
            let cotangent = incoming(step + 1).and_then(|idx| grads.get_mut(idx)?.take());
            adjoint.add(Incoming { point: step + 1, cotangent })?;
            let found = match states.pop() {
                Some(high) => Some(high),
                None => match checkpoints.state(step)? {
                    Some(state) => Some(stepper.rounded(&state, self.options.precision.stored, Purpose::Activation)?),
                    None => None,
                },
            };
            let high = found.ok_or(halfmode_autograd::Error::MissingRole { op: NAME, role: "y" })?;
            adjoint.step(step, Span { from: grid[step], to: grid[step + 1] }, &State { high, low: None })?;
        }
        let cotangent = incoming(0).and_then(|idx| grads.get_mut(idx)?.take());
        adjoint.add(Incoming { point: 0, cotangent })?;
        let (y0, t_grad, params) = adjoint.finish(&marks)?;
        let t_grad = t.is_some().then_some(t_grad);
        Ok(std::iter::once(y0).chain(t_grad).chain(params).collect())
    }
}

/// The steps before which the first sweep keeps a state.
fn first_places(n_steps: usize, slots: usize) -> Vec<usize> {
    std::iter::once(0).chain(positions(0, n_steps.saturating_sub(1), slots - 1)).collect()
}

/// Where the time points are in the grid of steps, both in one direction.
fn marks(grid: &[f64], times: &[f64]) -> Vec<usize> {
    if grid.len() == times.len() {
        return (0..grid.len()).collect();
    }
    let mut left = times.iter().peekable();
    let is_mark = |t: &f64| left.next_if(|mark| mark.to_bits() == t.to_bits()).is_some();
    let found: Vec<bool> = grid.iter().map(is_mark).collect();
    (0..grid.len()).filter(|&idx| found[idx]).collect()
}

/// The state after a step, if it is finite.
fn advance(stepper: &Stepper<'_>, state: &State, span: Span, (step, n_steps): (usize, usize)) -> Result<State> {
    let slopes = stepper.slopes(span, state, None)?;
    let next = stepper.advance(state, span.length(), &slopes)?;
    if stepper.is_finite(&next.high) {
        Ok(next)
    } else {
        Err(Error::NonFiniteVelocity { step, n_steps, time: span.from })
    }
}

impl Op for OdeSolve {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        self.run(cx, inputs).map_err(|err| err.in_op(NAME))
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        self.pull_back(cx, saved, grads, needs).map_err(|err| err.in_op(NAME))
    }
}
