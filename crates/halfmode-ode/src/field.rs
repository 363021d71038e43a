//! The right-hand side of an ordinary differential equation.

use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::{Module, ParamSpec};
use std::sync::Arc;

/// The right-hand side `f` of `y' = f(t, y; params)`.
///
/// A closure of type `Fn(&mut Tape, &Var, &Var, &[Var]) -> Result<Var>` is one, too. The solver calls it on short
/// tapes of its own, several times for the same point, so it must be a pure function: what it captures gets no
/// gradient, and randomness drawn inside makes gradients wrong.
pub trait VectorField {
    /// Its parameters, in the order in which `velocity` expects them.
    fn param_specs(&self) -> Vec<ParamSpec> {
        Vec::new()
    }

    /// The perceptron that this field is, where it is one: a GPU has kernels that keep it through whole steps.
    fn as_mlp(&self) -> Option<&crate::MlpField> {
        None
    }

    /// `dy/dt` at time `t`.
    ///
    /// # Shapes
    /// - `t`: `[1]`, f64
    /// - `y`: any shape, real, in the velocity's precision
    /// - returns the shape of `y`
    ///
    /// # Errors
    /// Those of its ops.
    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var>;

    /// As [`VectorField::velocity`], with the time as a number of the host, too, for fields that choose by it: reading
    /// it off a GPU would make the host wait. This is what solvers call.
    ///
    /// # Errors
    /// Those of its ops.
    fn velocity_at(&self, tape: &mut Tape, _time: f64, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        self.velocity(tape, t, y, params)
    }
}

impl<F> VectorField for F
where
    F: Fn(&mut Tape, &Var, &Var, &[Var]) -> Result<Var>,
{
    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        self(tape, t, y, params)
    }
}

/// A module as a field that does not depend on time: `y' = module(y)`.
#[derive(Clone, Copy, Debug)]
pub struct Autonomous<M>(pub M);

impl<M: Module> VectorField for Autonomous<M> {
    fn param_specs(&self) -> Vec<ParamSpec> {
        self.0.param_specs()
    }

    fn velocity(&self, tape: &mut Tape, _: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        self.0.forward(tape, params, &[y])
    }
}

/// The right-hand side of an equation whose state is several tensors, each of its own shape and format:
/// `y_l' = f_l(t, y_1, y_2, …; params)`.
///
/// A closure of type `Fn(&mut Tape, &Var, &[Var], &[Var]) -> Result<Vec<Var>>` is one, too. What is said of
/// [`VectorField`] holds here.
pub trait TupleField {
    /// Its parameters, in the order in which `velocities` expects them.
    fn param_specs(&self) -> Vec<ParamSpec> {
        Vec::new()
    }

    /// The planar field that this is, where it is one: a GPU has kernels that take it through all steps at once.
    fn as_planar(&self) -> Option<&crate::PlanarField> {
        None
    }

    /// `dy/dt` at time `t`, one tensor for each of the state.
    ///
    /// # Shapes
    /// - `t`: `[1]`, f64
    /// - `y`: the state's tensors, real, each in the velocity's precision or that of
    ///   [`LeafPrecision`](crate::LeafPrecision)
    /// - returns as many tensors of the same shapes
    ///
    /// # Errors
    /// Those of its ops.
    fn velocities(&self, tape: &mut Tape, t: &Var, y: &[Var], params: &[Var]) -> Result<Vec<Var>>;
}

impl<F> TupleField for F
where
    F: Fn(&mut Tape, &Var, &[Var], &[Var]) -> Result<Vec<Var>>,
{
    fn velocities(&self, tape: &mut Tape, t: &Var, y: &[Var], params: &[Var]) -> Result<Vec<Var>> {
        self(tape, t, y, params)
    }
}

/// A field of either kind, as a solve holds it.
#[derive(Clone)]
pub enum Field {
    /// The state is one tensor.
    Single(Arc<dyn VectorField>),
    /// The state is several.
    Tuple(Arc<dyn TupleField>),
}

impl Field {
    pub(crate) fn velocities(
        &self,
        tape: &mut Tape,
        time: f64,
        t: &Var,
        y: &[Var],
        params: &[Var],
    ) -> Result<Vec<Var>> {
        match (self, y) {
            (Field::Tuple(field), _) => field.velocities(tape, t, y, params),
            (Field::Single(field), [y]) => Ok(vec![field.velocity_at(tape, time, t, y, params)?]),
            (Field::Single(_), _) => Err(halfmode_autograd::Error::Arity { op: "odeint", expected: 1, found: y.len() }),
        }
    }
}
