#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod atomic_file;
mod burgers;
pub mod cache;
pub mod darcy;
mod darcy_pt;
mod darcy_solver;
mod dataset;
mod dissection;
mod error;
mod fourier;
mod grf;
mod integrating_factor;
mod navier_stokes;
mod normaliser;
mod npy_header;
mod npz;
pub mod numpy;
mod pairs_file;
mod periodic_field;
mod pickle;
mod problem;
mod random;
mod real;
mod regular_file;
mod samples;
mod torch_file;

pub use atomic_file::{is_temporary, remove_leftovers, write_atomically};
pub use burgers::{BurgersConfig, BurgersSolver};
pub use cache::{CacheOutcome, CacheWarning, Generator, load_or_generate};
pub use darcy::{DarcyConfig, generate};
pub use darcy_pt::{DarcyPt, Split};
pub use darcy_solver::{DarcySolver, DarcyWorkspace};
pub use dataset::{Batch, FieldPairs};
pub use error::{Error, Result};
pub use grf::{CosineField, FieldSampler};
pub use navier_stokes::{NavierStokesConfig, NavierStokesSolver};
pub use normaliser::{UnitGaussian, UnitGaussianFit};
pub use npy_header::{ArrayInfo, NumpyType};
pub use npz::NpzFile;
pub use pairs_file::{ChannelLayout, read_pairs, write_pairs};
pub use problem::Problem;
pub use random::shuffled;
pub use real::Real;
pub use regular_file::open_regular;
pub use torch_file::TorchFile;
