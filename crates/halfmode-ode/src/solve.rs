//! A solve as one differentiable op: discretise, then optimise.

use crate::adaptive::Controller;
use crate::adjoint::{Adjoint, Incoming};
use crate::checkpoint::{Checkpoints, positions};
use crate::leapfrog::Lattice;
use crate::step::{Leaf, Linearised, Needs, RecentTimes, Slope, Span, State, Stepper};
use crate::{AdjointScaling, Error, Field, OdeOptions, Result, StateSum, Steps, Storage};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor};
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

pub(crate) const NAME: &str = "odeint";

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
/// - inputs 0 to `n_leaves - 1`, `y0`: any shapes, real
/// - the next input, the times: `[n]`, f64 (only if `times` is `None`)
/// - further inputs: the field's parameters
/// - outputs: the state at each time point asked for, one tensor after another, in the precision of sums
///
/// # Saved for backward
/// The state before each step, in the precision `stored` (role `y`), or as many states as [`Storage`] allows (roles
/// `high` and `low`), or all and the tapes of all stages, which the op itself keeps, or the last one and its velocity
/// (roles `y` and `v`); parameters and times are shared. Stages are computed again, on a tape that lives for one step.
///
/// # Errors
/// [`Error::Times`], [`Error::Velocity`], [`Error::Leaves`], [`Error::NonFiniteVelocity`], and in backward
/// [`Error::NonFiniteAdjoint`]; those of options that do not go together; with [`Storage::Reversible`]
/// [`Error::BeyondLattice`] and [`Error::Irreversible`].
#[derive(Clone)]
pub struct OdeSolve {
    /// The right-hand side.
    pub field: Field,
    /// Tensors of the state.
    pub n_leaves: usize,
    /// The time points; `None`: the input behind the state is a tensor of them and may want a gradient.
    pub times: Option<Arc<[f64]>>,
    /// Which points are outputs.
    pub points: Points,
    /// Method and precision.
    pub options: OdeOptions,
    /// The tapes of the last forward pass, first step first, if they are kept.
    tapes: Rc<RefCell<Vec<Linearised>>>,
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

/// The state at the first time, the times and the parameters.
type Split<'a> = (Vec<&'a Tensor>, Option<&'a Tensor>, Vec<Tensor>);

impl OdeSolve {
    /// The op for a state of `n_leaves` tensors; its fields say what the rest is.
    #[must_use]
    pub fn new(field: Field, n_leaves: usize, times: Option<Arc<[f64]>>, points: Points, options: OdeOptions) -> Self {
        OdeSolve { field, n_leaves, times, points, options, tapes: Rc::default() }
    }

    fn split<'a>(&self, inputs: &[&'a Tensor]) -> Result<Split<'a>> {
        let expected = self.n_leaves.max(1) + usize::from(self.times.is_none());
        if self.n_leaves == 0 || inputs.len() < expected {
            return Err(halfmode_autograd::Error::Arity { op: NAME, expected, found: inputs.len() }.into());
        }
        let (y0, rest) = inputs.split_at(self.n_leaves);
        let (t, params) = rest.split_at(usize::from(self.times.is_none()));
        Ok((y0.to_vec(), t.first().copied(), params.iter().map(|&it| it.clone()).collect()))
    }

    pub(crate) fn times(&self, t: Option<&Tensor>) -> Result<Vec<f64>> {
        match (&self.times, t) {
            (Some(times), _) => Ok(times.to_vec()),
            (None, Some(t)) => times_of(t),
            (None, None) => Ok(Vec::new()),
        }
    }

    fn stepper<'a>(&'a self, device: &'a halfmode_tensor::Device, params: &'a [Tensor]) -> Stepper<'a> {
        let OdeOptions { method, precision, record, .. } = &self.options;
        Stepper {
            field: &self.field,
            tableau: method.tableau(),
            precision,
            device,
            params,
            record,
            recent: RecentTimes::default(),
        }
    }

    fn run(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let (y0, t, params) = self.split(inputs)?;
        self.options.precision.validate()?;
        if let AdjointScaling::Dynamic(config) = &self.options.scaling {
            config.validate()?;
        }
        if y0.iter().any(|it| it.dtype().domain == Domain::Complex) {
            return Err(Error::ComplexState);
        }
        let times = self.times(t)?;
        check_times(&times)?;
        if let Some(lattice) = Lattice::of(&self.options)? {
            return self.run_reversible(cx, (&y0, t, &params), &times, lattice);
        }
        #[cfg(feature = "cuda")]
        if let Some(solve) = crate::mlp_solve::MlpSolve::of(self, &cx.device, &params, &y0) {
            return solve.run(cx, y0[0], &times);
        }
        #[cfg(feature = "cuda")]
        if let [z, l] = y0[..]
            && let Some(solve) = crate::planar_solve::PlanarSolve::of(self, &cx.device, &params, [z, l])
        {
            return solve.run(cx, [z, l], &times);
        }
        let stepper = self.stepper(&cx.device, &params);
        let mut control = match self.options.steps {
            Steps::Grid => None,
            Steps::Adaptive(it) => Some(Controller::new(it, self.options.method, &self.options.precision)?),
        };
        let numels: Vec<usize> = y0.iter().map(|it| it.numel()).collect();
        let slots = self.options.storage.slots(&numels, &self.options.precision)?;
        let full = self.options.storage == Storage::Full;
        let places = match (slots, &control) {
            (None, _) => None,
            (Some(slots), None) => Some(first_places(times.len() - 1, slots)),
            // How many steps there will be is not known yet: the way back begins with the first state alone.
            (Some(_), Some(_)) => Some(vec![0]),
        };
        let needs = Needs { params: true, time: t.is_some() };
        let (mut outputs, mut tapes) = (Outputs::new(), Vec::new());
        let mut saved = Saved::new(NAME);
        let mut state = stepper.begin(&y0)?;
        let (mut grid, direction) = (vec![times[0]], (times[1] - times[0]).signum());
        if self.points == Points::All {
            push_output(&stepper, &state, &mut outputs)?;
        }
        for (interval, &target) in times.iter().enumerate().skip(1) {
            let mut from = times[interval - 1];
            while (target - from) * direction > 0.0 {
                if cx.save {
                    match &places {
                        None if !full => {
                            for (idx, leaf) in state.iter().enumerate() {
                                let stored = self.options.precision.leaf(idx).stored;
                                saved = saved.share(cx, "y", &stepper.rounded(leaf, stored, Purpose::Saved)?);
                            }
                        }
                        places if places.as_ref().is_none_or(|it| it.binary_search(&(grid.len() - 1)).is_ok()) => {
                            for leaf in stepper.kept(&state)? {
                                saved = saved.share(cx, "high", &leaf.high);
                                saved = leaf.low.iter().fold(saved, |saved, low| saved.share(cx, "low", low));
                            }
                        }
                        _ => {}
                    }
                }
                let span = Span { from, to: target };
                let at = (interval - 1, times.len() - 1);
                let (span, next) = match &mut control {
                    None if full && cx.save => {
                        let linearised = stepper.linearise(span, &state, needs)?;
                        let next = advance(&stepper, &state, span, &linearised.slopes, at)?;
                        tapes.push(linearised);
                        (span, next)
                    }
                    None => {
                        let slopes = stepper.slopes(span, &state, None)?;
                        (span, advance(&stepper, &state, span, &slopes, at)?)
                    }
                    Some(control) => {
                        let (span, next) = control.next(&stepper, &state, span)?;
                        if full && cx.save {
                            tapes.push(stepper.linearise(span, &state, needs)?);
                        }
                        (span, next)
                    }
                };
                (from, state) = (span.to, next);
                grid.push(from);
            }
            if self.points == Points::All || interval + 1 == times.len() {
                push_output(&stepper, &state, &mut outputs)?;
            }
        }
        self.tapes.replace(tapes);
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
        let params = saved.take_all("param");
        if let Some(lattice) = Lattice::of(&self.options)? {
            return self.pull_back_reversible(cx, saved, (t, &params), &times, (grads, needs), lattice);
        }
        let mut states = saved.take_all("y");
        #[cfg(feature = "cuda")]
        {
            if let Some(kept) = saved.take_all("points").pop() {
                let state = [saved.take("z")?, saved.take("l")?];
                let [z, l] = &state;
                if let Some(solve) = crate::planar_solve::PlanarSolve::of(self, &cx.device, &params, [z, l]) {
                    return solve.pull_back(&kept, [z, l], &times, grads);
                }
            }
            let states = saved.take_all("row_states");
            if let Some(solve) =
                states.first().and_then(|y| crate::mlp_solve::MlpSolve::of(self, &cx.device, &params, &[y]))
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
        let needs = Needs { params: needs[first_param..].contains(&true), time: t.is_some() && needs[self.n_leaves] };
        let marks = marks(&grid, &times);
        let incoming = |point: usize| match self.points {
            Points::All => marks.binary_search(&point).ok(),
            Points::Last => (point == n_steps).then_some(0),
        };
        let first = if high.is_empty() { &states } else { &high };
        let shapes: Vec<Shape> = first.iter().take(self.n_leaves).map(|it| it.shape().clone()).collect();
        let numels: Vec<usize> = shapes.iter().map(Shape::numel).collect();
        let mut low = low.into_iter();
        let leaves = high.into_iter().enumerate().map(|(idx, high)| {
            let parts = self.options.precision.leaf(idx % self.n_leaves).state;
            let low = if matches!(parts, StateSum::Compensated(_)) { low.next() } else { None };
            Leaf { high, low }
        });
        let mut kept: Vec<State> = leaves.collect::<Vec<Leaf>>().chunks(self.n_leaves).map(<[Leaf]>::to_vec).collect();
        let mut tapes = self.tapes.take();
        let full = self.options.storage == Storage::Full;
        let mut all = if full { std::mem::take(&mut kept) } else { Vec::new() };
        let slots = self.options.storage.slots(&numels, &self.options.precision)?.unwrap_or(1);
        let places = if kept.len() > 1 { first_places(n_steps, slots) } else { vec![0] };
        let kept: Vec<(usize, State)> = places.into_iter().zip(kept).collect();
        let mut checkpoints = Checkpoints { stepper: &stepper, grid: &grid, slots, kept };
        let mut adjoint = Adjoint::new(&stepper, &self.options.scaling, needs, (grid.len(), shapes));
        let mut cotangent = |point: usize| self.take_cotangent(grads, incoming(point));
        for step in (0..n_steps).rev() {
            adjoint.add(Incoming { point: step + 1, cotangent: cotangent(step + 1) })?;
            let missing = halfmode_autograd::Error::MissingRole { op: NAME, role: "y" };
            let state = match states.len().checked_sub(self.n_leaves) {
                Some(first) => states.drain(first..).map(|high| Leaf { high, low: None }).collect(),
                None if full => all.pop().ok_or(missing)?,
                None => stored(&stepper, &checkpoints.state(step)?.ok_or(missing)?)?,
            };
            adjoint.step(step, Span { from: grid[step], to: grid[step + 1] }, &state, tapes.pop())?;
        }
        adjoint.add(Incoming { point: 0, cotangent: cotangent(0) })?;
        let (y0, t_grad, params) = adjoint.finish(&marks)?;
        let t_grad = t.is_some().then_some(t_grad);
        Ok(y0.into_iter().chain(t_grad).chain(params).collect())
    }
}

impl OdeSolve {
    /// The gradients by an output, one for each tensor of the state.
    pub(crate) fn take_cotangent(&self, grads: &mut [Option<Tensor>], output: Option<usize>) -> Vec<Option<Tensor>> {
        let first = output.map(|idx| idx * self.n_leaves);
        let leaf = |leaf: usize| grads.get_mut(first? + leaf)?.take();
        (0..self.n_leaves).map(leaf).collect()
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

/// The state in the formats of those kept for backward: the point at which the adjoint linearises.
fn stored(stepper: &Stepper<'_>, state: &State) -> Result<State> {
    let leaf = |(idx, leaf): (usize, &Leaf)| {
        let high = stepper.rounded(leaf, stepper.precision.leaf(idx).stored, Purpose::Activation)?;
        Ok(Leaf { high, low: None })
    };
    state.iter().enumerate().map(leaf).collect()
}

/// Appends the state to the outputs, in the precision of sums.
pub(crate) fn push_output(stepper: &Stepper<'_>, state: &State, outputs: &mut Outputs) -> Result<()> {
    for leaf in state {
        outputs.push(stepper.rounded(leaf, stepper.precision.accumulate, Purpose::Activation)?);
    }
    Ok(())
}

/// The state after a step, if it is finite.
fn advance(
    stepper: &Stepper<'_>,
    state: &State,
    span: Span,
    slopes: &[Slope],
    (step, n_steps): (usize, usize),
) -> Result<State> {
    let next = stepper.advance(state, span.length(), slopes)?;
    if next.iter().all(|leaf| stepper.is_finite(&leaf.high)) {
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
