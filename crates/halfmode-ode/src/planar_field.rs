//! The field of small normalising flows: planar flows whose coefficients a network of the time gives.

use crate::TupleField;
use halfmode_autograd::{Error, Result, Tape, Var};
use halfmode_nn::{ChannelBias, Init, Linear, ParamSpec, PlanarFlow, Tanh};

/// A mean of planar flows with coefficients that depend on time, and its divergence in closed form: the toy field of
/// FFJORD. The state is `(z, log p)`, points `[…, dim]` and their log-density `[…, 1]`, with `d log p / dt = -div v`.
///
/// The coefficients at a time, `n_flows (3 dim + 1)` numbers, come from a perceptron of the time alone,
/// `l_3(tanh(l_2(tanh(l_1(t)))))`; see [`PlanarFlow`] for what they mean. Parameters have torch's names:
/// `time_net.0.weight` `[hidden, 1]`, `time_net.0.bias`, `time_net.2.weight` `[hidden, hidden]`, `time_net.2.bias`,
/// `time_net.4.weight` `[n_flows (3 dim + 1), hidden]`, `time_net.4.bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanarField {
    /// Axes of the points.
    pub dim: usize,
    /// Width of the network of the time.
    pub hidden: usize,
    /// Flows in the mean.
    pub n_flows: usize,
}

impl PlanarField {
    /// The coefficients of the flows at time `t` `[1]`, flow by flow: one small table for all points.
    ///
    /// # Errors
    /// Those of its ops, and [`Error::Arity`] for another number of parameters.
    pub fn coefficients(&self, tape: &mut Tape, t: &Var, params: &[Var]) -> Result<Var> {
        let [w1, b1, w2, b2, w3, b3] = params else {
            return Err(Error::Arity { op: "planar_field", expected: 6, found: params.len() });
        };
        let mut x = t.clone();
        for (idx, (w, b)) in [(w1, b1), (w2, b2), (w3, b3)].into_iter().enumerate() {
            if idx > 0 {
                x = tape.apply(Tanh, &[&x])?;
            }
            x = tape.apply(Linear, &[&x, w])?;
            x = tape.apply(ChannelBias, &[&x, b])?;
        }
        Ok(x)
    }
}

impl TupleField for PlanarField {
    fn param_specs(&self) -> Vec<ParamSpec> {
        let widths = [1, self.hidden, self.hidden, self.n_flows * (3 * self.dim + 1)];
        let layers = widths.windows(2).enumerate().flat_map(|(idx, pair)| {
            // torch's default of a linear layer
            let init = Init::Uniform { bound: 1.0 / (pair[0] as f64).sqrt() };
            let name = |what: &str| format!("time_net.{}.{what}", 2 * idx);
            let weight = ParamSpec::real(name("weight"), &[pair[1], pair[0]], init);
            [weight, ParamSpec::real(name("bias"), &[pair[1]], init)]
        });
        layers.collect()
    }

    fn as_planar(&self) -> Option<&PlanarField> {
        Some(self)
    }

    fn velocities(&self, tape: &mut Tape, t: &Var, y: &[Var], params: &[Var]) -> Result<Vec<Var>> {
        let [z, _] = y else {
            return Err(Error::Arity { op: "planar_field", expected: 2, found: y.len() });
        };
        let coefficients = self.coefficients(tape, t, params)?;
        tape.apply_many(Box::new(PlanarFlow), &[z, &coefficients])
    }
}
