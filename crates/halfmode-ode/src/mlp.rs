//! A perceptron as a field.

use crate::VectorField;
use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::{Init, ParamSpec, TanhMlp, TimeColumn};

/// Whether a field sees the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeInput {
    /// It does not.
    None,
    /// As one more input channel.
    Concatenated,
}

/// A perceptron with tanh between its layers, `l_n(… tanh(l_1([y, t])))`, on the last axis of the state.
///
/// Parameters: `l1.weight` `[width, c_in]`, `l1.bias` `[width]`, `l2.weight`, …
#[derive(Clone, Debug, PartialEq)]
pub struct MlpField {
    /// Channels of the state.
    pub channels: usize,
    /// Widths of the hidden layers.
    pub hidden: Vec<usize>,
    /// Whether the first layer sees the time.
    pub time: TimeInput,
}

impl VectorField for MlpField {
    fn param_specs(&self) -> Vec<ParamSpec> {
        let mut c_in = self.channels + usize::from(self.time == TimeInput::Concatenated);
        let mut specs = Vec::new();
        for (idx, &c_out) in self.hidden.iter().chain([&self.channels]).enumerate() {
            // torch's default of a linear layer
            let init = Init::Uniform { bound: 1.0 / (c_in as f64).sqrt() };
            specs.push(ParamSpec::real(format!("l{}.weight", idx + 1), &[c_out, c_in], init));
            specs.push(ParamSpec::real(format!("l{}.bias", idx + 1), &[c_out], init));
            c_in = c_out;
        }
        specs
    }

    fn as_mlp(&self) -> Option<&MlpField> {
        Some(self)
    }

    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        let expected = 2 * self.hidden.len() + 2;
        if params.len() != expected {
            return Err(halfmode_autograd::Error::Arity { op: "mlp_field", expected, found: params.len() });
        }
        let (mut inputs, time) = match self.time {
            TimeInput::None => (vec![y], TimeColumn::None),
            TimeInput::Concatenated => (vec![y, t], TimeColumn::Last),
        };
        inputs.extend(params);
        tape.apply(TanhMlp(time), &inputs)
    }
}
