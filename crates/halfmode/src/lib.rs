//! Mixed-precision training of neural operators: one name for halfmode's libraries.
//!
//! Each library is a module here, and [`prelude`] has what most programs need. The `halfmode` program
//! is written against this crate alone; each of its commands is about twenty lines of it:
//!
//! ```
//! use halfmode::prelude::*;
//!
//! // What would `halfmode train darcy` cost?
//! let job = JobConfig::darcy();
//! let plan = halfmode::train::job::plan(&job, &data_shapes(&job.data)?, 2)?;
//! assert!(plan.peak_activation_bytes() < plan.peak_bytes());
//! # Ok::<(), JobError>(())
//! ```
#![forbid(unsafe_code)]

pub use halfmode_autograd as autograd;
pub use halfmode_contract as contract;
pub use halfmode_data as data;
pub use halfmode_fft as fft;
pub use halfmode_nn as nn;
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
