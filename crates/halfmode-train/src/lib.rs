#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod accumulator;
mod atomic;
mod checkpoint;
mod error;
pub mod job;
mod loss;
mod metrics;
mod optim;
pub mod pictures;
#[cfg(feature = "cuda")]
mod recorded_step;
mod schedule;
pub mod task;

pub use atomic::{atomic_write, atomic_write_with};
pub use checkpoint::{Array, Entry, Values, load_parameters, read_named, write_named};
pub use error::{Corruption, Error};
pub use loss::{CrossEntropy, GaussianNll, H1Loss, LpLoss, Reduction, SquaredError, relative_h1, relative_l2};
pub use metrics::{MetricsLog, read_metrics};
pub use optim::{AdamW, AdamWConfig, AdamWKind, GradStats, Moments, clip_factor, grad_stats};
#[cfg(feature = "cuda")]
pub use recorded_step::{RecordedStep, StepOutcome};
pub use schedule::{Schedule, Scheduler, SchedulerState};

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;
