//! Jobs that are no operators on fields: each kind is a [`Task`], and one trainer, one run directory and one report
//! serve them all.
//!
//! A new kind is a file here with an implementation of [`Task`]; a variant of [`TaskModel`] (and of [`TaskData`], if
//! its samples are of a new sort) with the keys that users type, and its name in [`TaskModel::KINDS`] or
//! [`TaskData::KINDS`]; a preset in [`TaskConfig::preset`] with its name in [`PRESETS`]; and an arm in [`build`]. The
//! command line, checkpoints, `--resume`, planning, `bench step` and the report need nothing more.

mod classifier;
mod cnf;
mod config;
mod latent_spiral;
mod report;
mod run;
mod trainer;

pub use classifier::ClassifierTask;
pub use cnf::CnfTask;
pub use config::{
    ClassifierModel, CnfModel, DensityData, ImageFormat, ImagesData, LatentOdeModel, OdeMethod, PRESETS, ShapesData,
    SolverConfig, SpiralData, TaskConfig, TaskData, TaskModel, TaskTrain, is_task,
};
pub use latent_spiral::LatentSpiralTask;
pub use report::{is_task_run, write_report};
pub use run::TaskRun;
pub use trainer::{TaskTrainer, plan};

use crate::job::JobError;
use halfmode_autograd::{Cx, Tape, Var};
use halfmode_nn::{ParamSpec, Params};
use halfmode_precision::PrecisionPolicy;
use halfmode_tensor::{Device, Tensor};
use std::fmt;
use std::sync::Arc;

/// What is trained, on what, and how well it does.
pub trait Task: fmt::Debug + Send + Sync {
    /// The model in a line, without the number of its parameters.
    fn describe(&self) -> String;

    /// The data in a line.
    fn describe_data(&self) -> String;

    /// The parameters, in the order in which [`Task::loss`] takes them.
    fn param_specs(&self) -> Vec<ParamSpec>;

    /// The parameters as training finds them.
    ///
    /// # Errors
    /// Those of [`Params::new`].
    fn params(&self, device: &Device, policy: &PrecisionPolicy, seed: u64) -> Result<Params, JobError> {
        Ok(Params::new(device, self.param_specs(), policy, seed)?)
    }

    /// Samples of an epoch.
    fn n_train(&self) -> usize;

    /// The training samples of these numbers below [`Task::n_train`], in an epoch, on a device. What is the same in all
    /// epochs does not depend on `epoch`.
    ///
    /// # Errors
    /// Those of reading samples and of memory.
    fn batch(&self, device: &Device, epoch: u64, indices: &[usize]) -> Result<Vec<Tensor>, JobError>;

    /// The mean loss of a batch, one number.
    ///
    /// # Errors
    /// Those of its ops.
    fn loss(&self, tape: &mut Tape, params: &[Var], batch: Vec<Tensor>) -> halfmode_autograd::Result<Var>;

    /// What is measured on held-out samples. The first is the criterion: smaller is better, it steers the schedule and
    /// the best model.
    fn measures(&self) -> &'static [&'static str];

    /// The values of [`Task::measures`]. On the planning device: the same work, no numbers.
    ///
    /// # Errors
    /// Those of the model and of memory.
    fn evaluate(&self, model: &Trained<'_>) -> Result<Vec<f64>, JobError>;

    /// Measures that are made once, after the last epoch.
    ///
    /// # Errors
    /// Those of [`Task::evaluate`].
    fn evaluate_at_end(&self, _model: &Trained<'_>) -> Result<Vec<(&'static str, f64)>, JobError> {
        Ok(Vec::new())
    }

    /// Pictures of the trained model, PNG files by their names: `NN-what it shows` becomes a caption.
    ///
    /// # Errors
    /// Those of the model, and of drawing.
    fn pictures(&self, _model: &Trained<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError> {
        Ok(Vec::new())
    }

    /// Floating-point operations of a training step on `batch` samples, multiply and add counted apart.
    fn step_flops(&self, batch: usize) -> f64;
}

/// A model that is not trained at the moment.
#[derive(Clone, Copy, Debug)]
pub struct Trained<'a> {
    /// Where it is.
    pub device: &'a Device,
    /// In which formats.
    pub policy: &'a Arc<PrecisionPolicy>,
    /// Its parameters.
    pub params: &'a Params,
}

impl Trained<'_> {
    /// A tape that keeps nothing, and the parameters on it.
    #[must_use]
    pub fn tape(&self) -> (Tape, Vec<Var>) {
        let mut tape = Tape::new(Cx::inference(self.device, self.policy));
        let params = self.params.leaves(&mut tape);
        (tape, params)
    }
}

/// The task that a configuration describes, in whatever precision: one for planning and training alike, since it holds
/// the samples that were read.
///
/// # Errors
/// Those of [`TaskConfig::validate`], [`JobError::Config`] for data that the model cannot take, and those of reading
/// files.
pub fn build(config: &TaskConfig) -> Result<Arc<dyn Task>, JobError> {
    config.validate()?;
    match (&config.model, &config.data) {
        (TaskModel::Cnf(model), TaskData::Density(data)) => {
            Ok(Arc::new(CnfTask::new(model, data, &config.solver, config.seed)))
        }
        (TaskModel::LatentOde(model), TaskData::Spirals(data)) => {
            Ok(Arc::new(LatentSpiralTask::new(model, data, &config.solver, config.seed)))
        }
        (TaskModel::OdeClassifier(model), data @ (TaskData::Shapes(_) | TaskData::Images(_))) => {
            Ok(Arc::new(ClassifierTask::new(model, data, &config.solver, config.seed)?))
        }
        _ => {
            let why = "the model cannot take these data: cnf takes density, latent-ode takes spirals, ode-classifier \
                       takes shapes or images"
                .to_owned();
            Err(JobError::Config { key: "data.kind".to_owned(), why })
        }
    }
}
