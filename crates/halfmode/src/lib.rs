#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub use halfmode_autograd as autograd;
pub use halfmode_contract as contract;
pub use halfmode_data as data;
pub use halfmode_fft as fft;
pub use halfmode_nn as nn;
pub use halfmode_ode as ode;
pub use halfmode_operators as operators;
pub use halfmode_precision as precision;
pub use halfmode_tensor as tensor;
pub use halfmode_train as train;

/// What most programs need.
pub mod prelude {
    pub use halfmode_autograd::{Cx, Tape, Var};
    pub use halfmode_data::FieldPairs;
    pub use halfmode_nn::{Module, Params};
    pub use halfmode_operators::{Fno, FnoConfig};
    pub use halfmode_precision::{Precision, PrecisionConfig, PrecisionPolicy, Preset};
    pub use halfmode_tensor::{Device, Purpose, Tensor};
    pub use halfmode_train::job::{
        DataConfig, JobConfig, JobError, Model, ModelConfig, Observer, Quiet, Run, RunOptions, Trainer, data_shapes,
        load_data,
    };
}
