//! A whole training job: from a configuration to a run directory.

pub(crate) mod config;
mod error;
mod fields;
mod generated;
#[cfg(feature = "cuda")]
mod gpu_step;
#[cfg(feature = "cuda")]
mod host_fields;
mod import;
pub(crate) mod model_file;
pub(crate) mod observer;
mod plan;
mod precision_report;
mod run;
mod run_curves;
pub(crate) mod run_folder;
pub(crate) mod run_report;
mod trainer;

pub use config::{
    DarcyPtData, DataConfig, FileData, FileLayout, JobConfig, LossKind, ModelConfig, OptimizerConfig, OptimizerKind,
    TrainConfig,
};
pub use error::JobError;
pub use fields::{DataShapes, FieldShape, JobData, data_shapes, load_data};
pub use generated::{BurgersData, DarcyData, DataSource, GeneratedData, NavierStokesData};
pub use import::{import_neuraloperator, neuraloperator_config};
pub use model_file::{Model, Normalisers};
pub use observer::{EpochRecord, Evaluation, Observer, Progress, Quiet, ScaleRecord};
pub use plan::{JobPlan, PlanOp, plan, plan_for};
pub use precision_report::{Discretisation, PrecisionReport, PrecisionRow};
pub use run::{About, Run, RunOptions, StopReason, Summary, render_panels};
pub use run_folder::{is_unused, newest_checkpoint};
pub use run_report::write_report;
pub use trainer::{StepRecord, TrainState, Trainer};
