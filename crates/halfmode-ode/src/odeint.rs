//! The calls of a user.

use crate::solve::{OdeSolve, Points};
use crate::{
    AdjointScaling, Field, Method, OdePrecision, Record, StepControl, Steps, Storage, TupleField, VectorField,
};
use halfmode_autograd::{Result, Tape, Var};
use std::sync::Arc;

/// How to solve.
#[derive(Clone, Debug)]
pub struct OdeOptions {
    /// The method.
    pub method: Method,
    /// Where steps begin and end.
    pub steps: Steps,
    /// The precision of every quantity.
    pub precision: OdePrecision,
    /// Which states wait for the way back.
    pub storage: Storage,
    /// The adjoint's scale.
    pub scaling: AdjointScaling,
    /// Where to write what the solve did.
    pub record: Record,
}

impl OdeOptions {
    /// The classical Runge-Kutta method in `precision`, with the adjoint scaling that the velocity's format needs.
    #[must_use]
    pub fn new(precision: OdePrecision) -> Self {
        let scaling = AdjointScaling::natural(precision.velocity_storage());
        let (method, steps, storage) = (Method::default(), Steps::Grid, Storage::Trajectory);
        OdeOptions { method, steps, precision, storage, scaling, record: Record::default() }
    }

    /// The same with another method.
    #[must_use]
    pub fn method(self, method: Method) -> Self {
        OdeOptions { method, ..self }
    }

    /// The same with Tsitouras' pair and steps that keep to these tolerances.
    #[must_use]
    pub fn adaptive(self, rtol: f64, atol: f64) -> Self {
        let steps = Steps::Adaptive(StepControl::new(rtol, atol));
        OdeOptions { method: Method::Tsitouras54, steps, ..self }
    }

    /// The same with other states kept.
    #[must_use]
    pub fn storage(self, storage: Storage) -> Self {
        OdeOptions { storage, ..self }
    }

    /// The same with the asynchronous leapfrog, whose steps the way back takes back: memory does not grow with their
    /// number. See [`Storage::Reversible`].
    #[must_use]
    pub fn reversible(self) -> Self {
        OdeOptions { method: Method::AsynchronousLeapfrog, storage: Storage::REVERSIBLE, ..self }
    }

    /// The same with another scale of the adjoint.
    #[must_use]
    pub fn scaling(self, scaling: AdjointScaling) -> Self {
        OdeOptions { scaling, ..self }
    }
}

/// The time points of a solve, rising or falling.
#[derive(Clone, Copy, Debug)]
pub enum Times<'a> {
    /// Known numbers, without gradient.
    Fixed(&'a [f64]),
    /// A variable `[n]`, f64, whose gradient is wanted. Its values are read from the device once.
    Var(&'a Var),
}

fn solve(
    tape: &mut Tape,
    field: Field,
    y0: &[&Var],
    times: Times<'_>,
    params: &[Var],
    (points, options): (Points, &OdeOptions),
) -> Result<Vec<Var>> {
    let (fixed, t) = match times {
        Times::Fixed(times) => (Some(Arc::from(times)), None),
        Times::Var(t) => (None, Some(t)),
    };
    let op = OdeSolve::new(field, y0.len(), fixed, points, options.clone());
    let inputs: Vec<&Var> = y0.iter().copied().chain(t).chain(params).collect();
    tape.apply_many(Box::new(op), &inputs)
}

fn single<F: VectorField + 'static>(field: &Arc<F>) -> Field {
    Field::Single(Arc::clone(field) as Arc<dyn VectorField>)
}

fn tuple<F: TupleField + 'static>(field: &Arc<F>) -> Field {
    Field::Tuple(Arc::clone(field) as Arc<dyn TupleField>)
}

/// Integrates `y' = field(t, y; params)` from `y0` at the first time and returns the state at every time point, the
/// first included.
///
/// # Shapes
/// - `y0`: any shape, real; the outputs have it, in the precision of sums
///
/// # Errors
/// Those of [`OdeSolve`].
pub fn odeint<F: VectorField + 'static>(
    tape: &mut Tape,
    field: &Arc<F>,
    y0: &Var,
    times: Times<'_>,
    params: &[Var],
    options: &OdeOptions,
) -> Result<Vec<Var>> {
    solve(tape, single(field), &[y0], times, params, (Points::All, options))
}

/// As [`odeint`], but returns the state at the last time only.
///
/// # Errors
/// Those of [`OdeSolve`].
pub fn odeint_last<F: VectorField + 'static>(
    tape: &mut Tape,
    field: &Arc<F>,
    y0: &Var,
    times: Times<'_>,
    params: &[Var],
    options: &OdeOptions,
) -> Result<Var> {
    let mut outputs = solve(tape, single(field), &[y0], times, params, (Points::Last, options))?;
    let found = outputs.len();
    outputs.pop().ok_or(halfmode_autograd::Error::Arity { op: "odeint", expected: 1, found })
}

/// As [`odeint`] for a state of several tensors, which need not agree in shape or format: nothing is concatenated.
/// Returns the state at every time point, the first included; each is as many tensors as `y0`.
///
/// # Errors
/// Those of [`OdeSolve`].
pub fn odeint_tuple<F: TupleField + 'static>(
    tape: &mut Tape,
    field: &Arc<F>,
    y0: &[Var],
    times: Times<'_>,
    params: &[Var],
    options: &OdeOptions,
) -> Result<Vec<Vec<Var>>> {
    let leaves: Vec<&Var> = y0.iter().collect();
    let outputs = solve(tape, tuple(field), &leaves, times, params, (Points::All, options))?;
    Ok(outputs.chunks(y0.len().max(1)).map(<[Var]>::to_vec).collect())
}

/// As [`odeint_tuple`], but returns the state at the last time only.
///
/// # Errors
/// Those of [`OdeSolve`].
pub fn odeint_tuple_last<F: TupleField + 'static>(
    tape: &mut Tape,
    field: &Arc<F>,
    y0: &[Var],
    times: Times<'_>,
    params: &[Var],
    options: &OdeOptions,
) -> Result<Vec<Var>> {
    let leaves: Vec<&Var> = y0.iter().collect();
    solve(tape, tuple(field), &leaves, times, params, (Points::Last, options))
}
