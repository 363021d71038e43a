//! The configuration of a job, as users type it.

use crate::job::{BurgersData, DarcyData, JobError, NavierStokesData};
use crate::{AdamWConfig, AdamWKind, Schedule};
use halfmode_data::{DarcyPt, Split};
use halfmode_operators::FnoConfig;
use halfmode_precision::{Compute, Domain, PrecisionConfig, PrecisionPolicy};
use halfmode_tensor::Device;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobConfig {
    /// Seed of the weights and of the order of samples.
    #[serde(default)]
    pub seed: u64,
    /// Where the samples come from.
    pub data: DataConfig,
    /// What is trained.
    pub model: ModelConfig,
    /// Formats of numbers.
    #[serde(default)]
    pub precision: PrecisionConfig,
    /// How long and on what loss.
    #[serde(default)]
    pub train: TrainConfig,
    /// How weights move.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How the learning rate moves.
    #[serde(default)]
    pub scheduler: Schedule,
}

/// Where the samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum DataConfig {
    /// Generated Darcy flow.
    Darcy(DarcyData),
    /// Generated solutions of Burgers' equation.
    Burgers(BurgersData),
    /// Generated flows in two dimensions.
    NavierStokes(NavierStokesData),
    /// Arrays in `.npz` files.
    File(FileData),
    /// neuraloperator's Darcy files.
    DarcyPt(DarcyPtData),
}

/// neuraloperator's Darcy files: `darcy_train_N.pt` and `darcy_test_N.pt` of one folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DarcyPtData {
    /// Where the files are.
    pub folder: PathBuf,
    /// Training samples: the first so many, all if there are fewer.
    #[serde(default = "default_pt_train")]
    pub n_train: usize,
    /// Test samples of each file: the first so many, all if there are fewer.
    #[serde(default = "default_pt_test")]
    pub n_test: usize,
    /// Points per axis in training.
    #[serde(default = "default_pt_resolution")]
    pub resolution: usize,
    /// Points per axis in testing.
    #[serde(default = "default_pt_tests")]
    pub test_resolutions: Vec<usize>,
}

fn default_pt_train() -> usize {
    1000
}

fn default_pt_test() -> usize {
    100
}

fn default_pt_resolution() -> usize {
    16
}

fn default_pt_tests() -> Vec<usize> {
    vec![16, 32]
}

impl DarcyPtData {
    /// The training file.
    #[must_use]
    pub fn train_file(&self) -> DarcyPt {
        DarcyPt::new(&self.folder, Split::Train, self.resolution)
    }

    /// The test file of a resolution.
    #[must_use]
    pub fn test_file(&self, resolution: usize) -> DarcyPt {
        DarcyPt::new(&self.folder, Split::Test, resolution)
    }
}

/// Arrays in `.npz` files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileData {
    /// Training file.
    pub train: PathBuf,
    /// Test files.
    pub test: Vec<PathBuf>,
    /// Key of the input array.
    #[serde(default = "default_input")]
    pub input: String,
    /// Key of the output array.
    #[serde(default = "default_output")]
    pub output: String,
    /// Where the channels are.
    #[serde(default)]
    pub layout: FileLayout,
}

fn default_input() -> String {
    "x".to_owned()
}

fn default_output() -> String {
    "y".to_owned()
}

/// Where the channels of an array in a file are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileLayout {
    /// `[n, channels, n_1, …]`
    #[default]
    ChannelsFirst,
    /// `[n, n_1, …, channels]`
    ChannelsLast,
    /// `[n, n_1, …]`: one channel.
    NoChannels,
}

impl FileLayout {
    pub(crate) fn in_file(self) -> halfmode_data::ChannelLayout {
        match self {
            FileLayout::ChannelsFirst => halfmode_data::ChannelLayout::ChannelsFirst,
            FileLayout::ChannelsLast => halfmode_data::ChannelLayout::ChannelsLast,
            FileLayout::NoChannels => halfmode_data::ChannelLayout::NoChannels,
        }
    }
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum ModelConfig {
    /// A Fourier neural operator.
    Fno(FnoConfig),
}

impl ModelConfig {
    /// The Fourier neural operator's configuration.
    #[must_use]
    pub fn fno(&self) -> &FnoConfig {
        let ModelConfig::Fno(config) = self;
        config
    }

    /// Whether it takes and gives real or complex fields.
    #[must_use]
    pub fn domain(&self) -> Domain {
        if self.fno().complex_data { Domain::Complex } else { Domain::Real }
    }
}

/// Training and test loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Relative L2.
    #[default]
    L2,
    /// Relative H1.
    H1,
}

/// How long and on what loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training samples.
    pub epochs: u64,
    /// Samples per step.
    pub batch_size: usize,
    /// What is minimised, on normalised fields, summed over the batch.
    pub loss: LossKind,
    /// Largest norm of all gradients together; larger ones are scaled down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// Epochs between checkpoints.
    pub checkpoint_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig { epochs: 15, batch_size: 8, loss: LossKind::L2, clip_grad_norm: None, checkpoint_every: 1 }
    }
}

/// Which AdamW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// torch's.
    #[default]
    #[serde(rename = "adamw")]
    Torch,
    /// neuraloperator's.
    #[serde(rename = "adamw-neuralop")]
    Neuralop,
}

/// How weights move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Which AdamW.
    pub kind: OptimizerKind,
    /// Step size.
    pub learning_rate: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment; absent: the kind's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Decoupled decay.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        let kind = OptimizerKind::Torch;
        OptimizerConfig { kind, learning_rate: 1e-3, betas: [0.9, 0.999], eps: None, weight_decay: 1e-4 }
    }
}

impl OptimizerConfig {
    pub(crate) fn adamw(&self) -> AdamWConfig {
        let mut config = AdamWConfig::new(match self.kind {
            OptimizerKind::Torch => AdamWKind::Torch,
            OptimizerKind::Neuralop => AdamWKind::Neuralop,
        });
        config.learning_rate = self.learning_rate;
        config.betas = self.betas;
        config.weight_decay = self.weight_decay;
        config.eps = self.eps.unwrap_or(config.eps);
        config
    }
}

/// The largest number of samples, epochs or points per axis in a configuration: larger ones are
/// typing errors.
const MAX_COUNT: u64 = 1 << 24;

impl JobConfig {
    /// The job of `halfmode train darcy`: neuraloperator's Darcy design at 64x64 in mixed precision, over 18
    /// epochs with a cosine schedule (`docs/decisions/0005-cosine-schedule-for-darcy.md`).
    #[must_use]
    pub fn darcy() -> Self {
        let mut fno = FnoConfig::new(&[32, 32], 32);
        fno.stabilizer = halfmode_operators::StabilizerKind::Tanh;
        JobConfig {
            seed: 0,
            data: DataConfig::Darcy(DarcyData::default()),
            model: ModelConfig::Fno(fno),
            precision: PrecisionConfig::default(),
            train: TrainConfig { loss: LossKind::H1, epochs: 18, ..TrainConfig::default() },
            optimizer: OptimizerConfig { learning_rate: 5e-3, ..OptimizerConfig::default() },
            scheduler: Schedule::Cosine { t_max: 0, eta_min: 0.0 },
        }
    }

    /// Checks every value that can be checked without reading data.
    ///
    /// # Errors
    /// [`JobError::Config`], [`JobError::Model`] or [`JobError::Precision`].
    pub fn validate(&self) -> Result<PrecisionPolicy, JobError> {
        let bad = |key: &str, why: &str| Err(JobError::Config { key: key.to_owned(), why: why.to_owned() });
        self.model.fno().validate()?;
        if self.model.domain() == Domain::Complex && !matches!(self.data, DataConfig::File(_)) {
            let why = "these data are real: set it to false, or train on complex fields with data.kind = \"file\"";
            return bad("model.complex_data", why);
        }
        let policy = self.precision.resolve()?;
        if !(1..=MAX_COUNT).contains(&self.train.epochs) {
            return bad("train.epochs", "must be between 1 and 16777216");
        }
        if !(1..=MAX_COUNT as usize).contains(&self.train.batch_size) {
            return bad("train.batch_size", "must be between 1 and 16777216");
        }
        if !(1..=MAX_COUNT).contains(&self.train.checkpoint_every) {
            return bad("train.checkpoint_every", "must be between 1 and 16777216");
        }
        if self.train.clip_grad_norm.is_some_and(|norm| !(norm.is_finite() && norm > 0.0)) {
            return bad("train.clip_grad_norm", "must be positive");
        }
        if let Some((counts, resolutions, max_resolution)) = self.data.sizes() {
            for (key, value) in ["data.n_train", "data.n_test"].into_iter().zip(counts) {
                if !(1..=1 << 20).contains(&value) {
                    return bad(key, "must be between 1 and 1048576");
                }
            }
            if resolutions.iter().any(|n| !(2..=max_resolution).contains(n)) {
                return bad("data.resolution", &format!("resolutions must be between 2 and {max_resolution}"));
            }
            if resolutions.len() < 2 {
                return bad("data.test_resolutions", "needs at least one resolution");
            }
            let (n_axes, axes) = self.data.axes();
            let model = self.model.fno();
            if model.n_modes.len() != n_axes || model.in_channels != 1 || model.out_channels != 1 {
                return bad("model", &format!("{axes} and one channel in and out"));
            }
        }
        if let Some(generated) = self.data.generated() {
            generated.validate()?;
        }
        if let DataConfig::File(file) = &self.data
            && file.test.is_empty()
        {
            return bad("data.test", "needs at least one file");
        }
        self.optimizer.adamw().validate()?;
        self.scheduler.over(self.train.epochs).validate()?;
        Ok(policy)
    }

    /// As [`JobConfig::validate`], for a job on a device.
    ///
    /// # Errors
    /// Those of [`JobConfig::validate`], and [`JobError::Config`] for arithmetic that the device does not have.
    pub fn validate_on(&self, device: &Device) -> Result<PrecisionPolicy, JobError> {
        let policy = self.validate()?;
        check_compute(&policy, device)?;
        Ok(policy)
    }
}

/// Refuses TF32 on a CPU, which would compute something else than was asked for.
pub(crate) fn check_compute(policy: &PrecisionPolicy, device: &Device) -> Result<(), JobError> {
    if policy.compute == Compute::Tf32 && device.is_cpu() {
        let why = "tf32 is a format of NVIDIA GPUs: use \"f32\" on a CPU, or run with --device cuda";
        return Err(JobError::Config { key: "precision.compute".to_owned(), why: why.to_owned() });
    }
    Ok(())
}
