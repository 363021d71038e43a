//! The configuration of a task, as users type it.

use crate::Schedule;
use crate::job::config::check_compute;
use crate::job::{JobError, OptimizerConfig};
use halfmode_data::Density;
use halfmode_ode::Method;
use halfmode_precision::{PrecisionConfig, PrecisionPolicy};
use halfmode_tensor::Device;
use serde::{Deserialize, Serialize};

/// Tasks that are known by name.
pub const PRESETS: [&str; 3] = ["cnf", "latent-spiral", "ode-classifier"];

/// A whole task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// Seed of the weights, of the samples and of their order.
    #[serde(default)]
    pub seed: u64,
    /// Where the samples come from.
    pub data: TaskData,
    /// What is trained.
    pub model: TaskModel,
    /// How its differential equation is solved.
    #[serde(default)]
    pub solver: SolverConfig,
    /// Formats of numbers.
    #[serde(default)]
    pub precision: PrecisionConfig,
    /// How long.
    #[serde(default)]
    pub train: TaskTrain,
    /// How weights move.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How the learning rate moves from epoch to epoch.
    #[serde(default)]
    pub scheduler: Schedule,
}

/// Where the samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum TaskData {
    /// A toy density in the plane.
    Density(DensityData),
    /// Noisy spirals.
    Spirals(SpiralData),
    /// Images of shapes, drawn.
    Shapes(ShapesData),
    /// Images in files.
    Images(ImagesData),
}

/// Grey images of eight shapes under noise. The equations halve the points twice: much below 32 a side, the norms of the
/// last one have few points, and gradients are too ill-conditioned for half formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShapesData {
    /// Points along each axis.
    pub size: usize,
    /// Images of an epoch, the same in all.
    pub n_train: usize,
    /// Held-out images.
    pub n_test: usize,
}

impl Default for ShapesData {
    fn default() -> Self {
        ShapesData { size: 32, n_train: 2000, n_test: 400 }
    }
}

/// How images are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// IDX files, one of images and one of labels.
    Mnist,
    /// Binary batches.
    Cifar10,
    /// Binary files, one of images and one of labels.
    Stl10,
}

/// Labelled images in files that the user has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagesData {
    /// How they are stored.
    pub format: ImageFormat,
    /// Files to train on: images and labels, or batches.
    pub train: Vec<String>,
    /// Held-out files, likewise.
    pub test: Vec<String>,
    /// The first of the images to train on; all, if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_train: Option<usize>,
    /// The first of the held-out images; all, if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_test: Option<usize>,
}

/// Points drawn from a toy density, fresh ones in every epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DensityData {
    /// Which.
    pub density: Density,
    /// Points of an epoch.
    pub n_train: usize,
    /// Held-out points.
    pub n_test: usize,
}

impl Default for DensityData {
    fn default() -> Self {
        DensityData { density: Density::EightGaussians, n_train: 51_200, n_test: 8192 }
    }
}

/// Spirals in the plane, observed with noise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpiralData {
    /// Curves.
    pub n_train: usize,
    /// Held-out curves.
    pub n_test: usize,
    /// Observations of a curve.
    pub n_points: usize,
    /// Standard deviation of the noise in each coordinate.
    pub noise: f64,
}

impl Default for SpiralData {
    fn default() -> Self {
        SpiralData { n_train: 2048, n_test: 256, n_points: 21, noise: 0.05 }
    }
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum TaskModel {
    /// A continuous normalising flow.
    Cnf(CnfModel),
    /// A latent differential equation behind curves.
    LatentOde(LatentOdeModel),
    /// A classifier of images: three differential equations one after another.
    OdeClassifier(ClassifierModel),
}

impl TaskData {
    /// The kinds of data that make a configuration a task's.
    pub const KINDS: [&'static str; 4] = ["density", "spirals", "shapes", "images"];
}

impl TaskModel {
    /// The kinds of models that make a configuration a task's.
    pub const KINDS: [&'static str; 3] = ["cnf", "latent-ode", "ode-classifier"];
}

/// Whether a configuration is a task's, by the kind of its model or of its data.
#[must_use]
pub fn is_task(table: &toml::Table) -> bool {
    let kind = |name: &str| table.get(name).and_then(|it| it.get("kind")).and_then(toml::Value::as_str);
    kind("model").is_some_and(|kind| TaskModel::KINDS.contains(&kind))
        || kind("data").is_some_and(|kind| TaskData::KINDS.contains(&kind))
}

/// Three equations with convolutional fields; channels double from one to the next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClassifierModel {
    /// Channels of the first equation.
    pub channels: usize,
}

impl Default for ClassifierModel {
    fn default() -> Self {
        ClassifierModel { channels: 8 }
    }
}

/// A continuous normalising flow: a mean of planar flows whose coefficients a network of the time gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CnfModel {
    /// Width of the network of the time.
    pub hidden: usize,
    /// Flows in the mean.
    pub n_flows: usize,
}

impl Default for CnfModel {
    fn default() -> Self {
        CnfModel { hidden: 32, n_flows: 64 }
    }
}

/// A latent differential equation between two perceptrons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LatentOdeModel {
    /// Channels of the latent state.
    pub latent: usize,
    /// Width of the hidden layer of field, encoder and decoder.
    pub hidden: usize,
}

impl Default for LatentOdeModel {
    fn default() -> Self {
        LatentOdeModel { latent: 6, hidden: 64 }
    }
}

/// How a differential equation is solved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SolverConfig {
    /// The method.
    pub method: OdeMethod,
    /// Steps of equal length; between observations of curves, as many to each interval as make at least so many in all.
    pub steps: usize,
}

impl Default for SolverConfig {
    fn default() -> Self {
        SolverConfig { method: OdeMethod::Rk4, steps: 16 }
    }
}

impl SolverConfig {
    /// The points between two times.
    #[must_use]
    pub fn times(&self, from: f64, to: f64) -> Vec<f64> {
        let n = self.steps.max(1);
        (0..=n).map(|i| from + (to - from) * i as f64 / n as f64).collect()
    }
}

/// A method with steps of given length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OdeMethod {
    /// Order 1.
    Euler,
    /// Order 2.
    Midpoint,
    /// Order 2.
    Heun,
    /// Order 4, the classical one.
    #[default]
    Rk4,
}

impl OdeMethod {
    /// As the solver calls it.
    #[must_use]
    pub const fn method(self) -> Method {
        match self {
            OdeMethod::Euler => Method::Euler,
            OdeMethod::Midpoint => Method::Midpoint,
            OdeMethod::Heun => Method::Heun,
            OdeMethod::Rk4 => Method::Rk4,
        }
    }
}

/// How long a task is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskTrain {
    /// Epochs.
    pub epochs: u64,
    /// Samples per step.
    pub batch_size: usize,
    /// Largest norm of all gradients together; larger ones are scaled down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// Epochs between checkpoints.
    pub checkpoint_every: u64,
}

impl Default for TaskTrain {
    fn default() -> Self {
        TaskTrain { epochs: 20, batch_size: 1024, clip_grad_norm: None, checkpoint_every: 1 }
    }
}

/// The largest count in a configuration: larger ones are typing errors.
const MAX_COUNT: u64 = 1 << 24;

impl TaskConfig {
    /// The task of a name in [`PRESETS`].
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        let adam = |learning_rate| OptimizerConfig { learning_rate, weight_decay: 0.0, ..OptimizerConfig::default() };
        match name {
            "cnf" => Some(TaskConfig {
                seed: 0,
                data: TaskData::Density(DensityData::default()),
                model: TaskModel::Cnf(CnfModel::default()),
                solver: SolverConfig::default(),
                precision: PrecisionConfig::default(),
                train: TaskTrain::default(),
                optimizer: adam(1e-2),
                scheduler: Schedule::Step { step_size: 10, gamma: 0.1 },
            }),
            "latent-spiral" => Some(TaskConfig {
                seed: 0,
                data: TaskData::Spirals(SpiralData::default()),
                model: TaskModel::LatentOde(LatentOdeModel::default()),
                solver: SolverConfig { steps: 20, ..SolverConfig::default() },
                precision: PrecisionConfig::default(),
                train: TaskTrain { epochs: 100, batch_size: 64, ..TaskTrain::default() },
                optimizer: adam(1e-2),
                scheduler: Schedule::Cosine { t_max: 0, eta_min: 0.0 },
            }),
            "ode-classifier" => Some(TaskConfig {
                seed: 0,
                data: TaskData::Shapes(ShapesData::default()),
                model: TaskModel::OdeClassifier(ClassifierModel::default()),
                solver: SolverConfig { steps: 2, ..SolverConfig::default() },
                precision: PrecisionConfig::default(),
                train: TaskTrain { epochs: 8, batch_size: 16, ..TaskTrain::default() },
                optimizer: adam(4e-3),
                scheduler: Schedule::Cosine { t_max: 0, eta_min: 0.0 },
            }),
            _ => None,
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`JobError::Config`], [`JobError::Precision`], and those of optimiser and schedule.
    pub fn validate(&self) -> Result<PrecisionPolicy, JobError> {
        let bad = |key: &str, why: String| Err(JobError::Config { key: key.to_owned(), why });
        let mut counts = vec![
            ("train.epochs", self.train.epochs, MAX_COUNT),
            ("train.batch_size", self.train.batch_size as u64, MAX_COUNT),
            ("train.checkpoint_every", self.train.checkpoint_every, MAX_COUNT),
            ("solver.steps", self.solver.steps as u64, 1 << 16),
        ];
        match &self.data {
            TaskData::Density(data) => {
                counts.push(("data.n_train", data.n_train as u64, MAX_COUNT));
                counts.push(("data.n_test", data.n_test as u64, MAX_COUNT));
            }
            TaskData::Spirals(data) => {
                counts.push(("data.n_train", data.n_train as u64, MAX_COUNT));
                counts.push(("data.n_test", data.n_test as u64, MAX_COUNT));
                if !(2..=1 << 12).contains(&data.n_points) {
                    return bad("data.n_points", "must be between 2 and 4096".to_owned());
                }
                if !(data.noise.is_finite() && data.noise >= 0.0) {
                    return bad("data.noise", "must be finite and not negative".to_owned());
                }
            }
            TaskData::Shapes(data) => {
                counts.push(("data.n_train", data.n_train as u64, 1 << 20));
                counts.push(("data.n_test", data.n_test as u64, 1 << 20));
                if !(8..=64).contains(&data.size) {
                    return bad("data.size", "must be between 8 and 64".to_owned());
                }
            }
            TaskData::Images(data) => {
                let n = [("data.n_train", data.n_train), ("data.n_test", data.n_test)];
                counts.extend(n.into_iter().filter_map(|(key, n)| Some((key, n? as u64, MAX_COUNT))));
            }
        }
        match &self.model {
            TaskModel::Cnf(model) => {
                counts.push(("model.hidden", model.hidden as u64, 1 << 12));
                counts.push(("model.n_flows", model.n_flows as u64, 1 << 12));
            }
            TaskModel::LatentOde(model) => {
                counts.push(("model.latent", model.latent as u64, 1 << 12));
                counts.push(("model.hidden", model.hidden as u64, 1 << 12));
            }
            TaskModel::OdeClassifier(model) => counts.push(("model.channels", model.channels as u64, 1 << 10)),
        }
        for (key, value, most) in counts {
            if !(1..=most).contains(&value) {
                return bad(key, format!("must be between 1 and {most}"));
            }
        }
        if self.train.clip_grad_norm.is_some_and(|norm| !(norm.is_finite() && norm > 0.0)) {
            return bad("train.clip_grad_norm", "must be positive".to_owned());
        }
        let policy = self.precision.resolve()?;
        self.optimizer.adamw().validate()?;
        self.scheduler.over(self.train.epochs).validate()?;
        Ok(policy)
    }

    /// As [`TaskConfig::validate`], for a task on a device.
    ///
    /// # Errors
    /// Those of [`TaskConfig::validate`], and [`JobError::Config`] for arithmetic that the device does not have.
    pub fn validate_on(&self, device: &Device) -> Result<PrecisionPolicy, JobError> {
        let policy = self.validate()?;
        check_compute(&policy, device)?;
        Ok(policy)
    }
}
