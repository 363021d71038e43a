#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod op;
mod report;
mod saved;
mod tape;
mod watch;

pub use error::Error;
pub use op::{Cx, Op, Outputs};
pub use report::{MemoryReport, MemoryRow};
pub use saved::Saved;
pub use tape::{LeafId, Tape, Var};
pub use watch::{Role, Sight};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
