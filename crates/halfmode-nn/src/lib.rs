#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod module;
mod param;

pub use error::Error;
pub use module::Module;
pub use param::{Init, ParamLayout, ParamRole, ParamSpec, Parameter, Params};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
