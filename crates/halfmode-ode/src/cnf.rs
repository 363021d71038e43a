//! Continuous normalising flows of any field whose ops take jets.

use crate::{MlpField, TimeInput, TupleField, VectorField};
use halfmode_autograd::{Error, Result, Tape, Var};
use halfmode_nn::jets::{JetBias, JetConstant, JetDivergence, JetStart, JetTanh, Tangents};
use halfmode_nn::{Linear, ParamSpec};
use halfmode_tensor::Tensor;

/// A field that takes jets (see [`halfmode_nn::jets`]): besides its velocity, it knows its derivatives in any
/// direction.
pub trait JetField: VectorField {
    /// Channels of the state, its last axis.
    fn channels(&self) -> usize;

    /// The jet of the velocity from a jet of the state.
    ///
    /// # Shapes
    /// - `t`: `[1]`, f64
    /// - `y`: `[1 + m, …, channels]`; returns that shape
    ///
    /// # Errors
    /// Those of its ops.
    fn velocity_jet(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var>;
}

impl JetField for MlpField {
    fn channels(&self) -> usize {
        self.channels
    }

    fn velocity_jet(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        let expected = 2 * self.hidden.len() + 2;
        if params.len() != expected {
            return Err(Error::Arity { op: "mlp_field", expected, found: params.len() });
        }
        let mut x = match self.time {
            TimeInput::None => y.clone(),
            TimeInput::Concatenated => tape.apply(JetConstant, &[y, t])?,
        };
        for (idx, layer) in params.chunks_exact(2).enumerate() {
            let (weight, bias) = (&layer[0], &layer[1]);
            if idx > 0 {
                x = tape.apply(JetTanh, &[&x])?;
            }
            x = tape.apply(Linear, &[&x, weight])?;
            x = tape.apply(JetBias, &[&x, bias])?;
        }
        Ok(x)
    }
}

/// How a flow finds the divergence of its field.
#[derive(Clone, Debug)]
pub enum Divergence {
    /// Exactly, with as many tangents as channels.
    Exact,
    /// By Hutchinson's estimator with this direction, in the shape of the points, for a whole solve; see
    /// [`random_signs`](halfmode_nn::jets::random_signs).
    Hutchinson(Tensor),
}

/// A field as the flow of a density: the state is `(z, log p)`, points `[…, d]` and their log-density `[…, 1]`, with
/// `dz/dt = v(t, z)` and `d log p / dt = -div v`. The divergence comes from jets; a field that states its own, such as
/// [`PlanarField`](crate::PlanarField), is a flow by itself.
#[derive(Clone, Debug)]
pub struct Cnf<F> {
    /// The velocity of points.
    pub field: F,
    /// How its divergence is found.
    pub divergence: Divergence,
}

impl<F: JetField> TupleField for Cnf<F> {
    fn param_specs(&self) -> Vec<ParamSpec> {
        self.field.param_specs()
    }

    fn velocities(&self, tape: &mut Tape, t: &Var, y: &[Var], params: &[Var]) -> Result<Vec<Var>> {
        let [z, _] = y else {
            return Err(Error::Arity { op: "cnf", expected: 2, found: y.len() });
        };
        let (tangents, direction) = match &self.divergence {
            Divergence::Exact => (Tangents::Unit, None),
            Divergence::Hutchinson(direction) => (Tangents::Given, Some(tape.constant(direction.clone()))),
        };
        let with = |x: &Var| -> Vec<Var> { std::iter::once(x.clone()).chain(direction.clone()).collect() };
        let start = tape.apply(JetStart(tangents), &with(z).iter().collect::<Vec<_>>())?;
        let jet = self.field.velocity_jet(tape, t, &start, params)?;
        let end = JetDivergence { tangents, channels: self.field.channels() };
        tape.apply_many(Box::new(end), &with(&jet).iter().collect::<Vec<_>>())
    }
}
