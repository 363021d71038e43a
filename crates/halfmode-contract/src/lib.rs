#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adjoint;
mod blocking;
mod cache;
mod equation;
mod error;
mod exact;
mod execute;
mod greedy;
mod label;
mod operand;
mod pair;
mod plan;
mod policy;
mod reference;
mod tile;

pub use adjoint::{Adjoint, Factor, adjoint_equation, adjoint_equation_conj};
pub use cache::{CacheStats, Planner};
pub use equation::Equation;
pub use error::Error;
pub use exact::MAX_EXACT_OPERANDS;
pub use execute::execute;
pub use label::Sizes;
pub use operand::{ComplexLayout, Conj, Operand, OutputSpec};
pub use plan::{Plan, Step};
pub use policy::{Objective, Policy};
pub use reference::{ReferenceOperand, reference_einsum};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
