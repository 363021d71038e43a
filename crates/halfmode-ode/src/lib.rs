#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adaptive;
mod adjoint;
mod checkpoint;
mod cnf;
mod conv_field;
mod conv_node;
mod error;
mod field;
mod kernels;
mod leapfrog;
mod mlp;
#[cfg(feature = "cuda")]
mod mlp_solve;
mod odeint;
mod planar_field;
#[cfg(feature = "cuda")]
mod planar_solve;
mod precision;
mod record;
mod scaling;
mod solve;
#[cfg(feature = "cuda")]
mod state_cuda;
mod step;
mod tableau;
mod time_channel;

pub use adaptive::{StepControl, Steps};
pub use checkpoint::{Storage, StoragePlan};
pub use cnf::{Cnf, Divergence, JetField};
pub use conv_field::ConvField;
pub use conv_node::{ConvNode, classes};
pub use error::Error;
pub use field::{Autonomous, Field, TupleField, VectorField};
pub use mlp::{MlpField, TimeInput};
pub use odeint::{OdeOptions, Times, odeint, odeint_last, odeint_tuple, odeint_tuple_last};
pub use planar_field::PlanarField;
pub use precision::{LeafPrecision, OdePrecision, StateSum};
pub use record::{Record, SolveRecord};
pub use scaling::{AdjointScaler, AdjointScaling, PeerScaler, ScaleConfig};
pub use solve::{OdeSolve, Points};
pub use tableau::{Embedded, Method, Tableau};
pub use time_channel::TimeChannel;

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
