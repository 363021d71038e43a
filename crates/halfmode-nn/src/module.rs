//! What a model is: a pure function of parameters and inputs.

use crate::ParamSpec;
use halfmode_autograd::{Result, Tape, Var};

/// A model or a part of one. It owns no values: the same module runs on any tape, device and
/// precision.
pub trait Module {
    /// Its parameters, in the order in which `forward` expects them.
    fn param_specs(&self) -> Vec<ParamSpec>;

    /// Applies the module. `params` are in the order of [`Module::param_specs`].
    ///
    /// # Errors
    /// Those of its ops, for inputs of the wrong shape.
    fn forward(&self, tape: &mut Tape, params: &[Var], inputs: &[&Var]) -> Result<Var>;
}
