//! What a user sees of an error, and the exit code.

use crate::cli::gpu;
use halfmode::autograd::Error as AutogradError;
use halfmode::data::Error as DataError;
use halfmode::nn::Error as NnError;
use halfmode::operators::Error as ModelError;
use halfmode::tensor::Error as TensorError;
use halfmode::train::Error as TrainError;
use halfmode::train::job::JobError;
use serde_json::{Value, json};
use std::process::ExitCode;

/// Exit codes, as `halfmode` documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is well.
    Done = 0,
    /// Anything that has no code of its own.
    Other = 1,
    /// The command line itself.
    Usage = 2,
    /// The configuration.
    Config = 3,
    /// The data.
    Data = 4,
    /// Training diverged.
    Diverged = 5,
    /// A device is missing, or a valid configuration does not fit memory.
    Device = 6,
    /// A model or checkpoint cannot be read or does not fit.
    Model = 7,
    /// Stopped by SIGTERM, after saving.
    Terminated = 75,
    /// Stopped by Ctrl-C, after saving.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// What, where, why, and one command that helps.
#[derive(Clone, Debug)]
pub(crate) struct CliError {
    pub(crate) code: Exit,
    what: String,
    place: Option<String>,
    why: Option<String>,
    help: Option<String>,
}

impl CliError {
    pub(crate) fn new(code: Exit, what: impl Into<String>) -> Self {
        CliError { code, what: what.into(), place: None, why: None, help: None }
    }

    /// The same under another name of what happened.
    pub(crate) fn named(self, what: impl Into<String>) -> Self {
        CliError { what: what.into(), ..self }
    }

    /// Where: a file, `file:line: key`, or an argument.
    pub(crate) fn at(self, place: impl Into<String>) -> Self {
        CliError { place: Some(place.into()), ..self }
    }

    /// Why.
    pub(crate) fn why(self, why: impl Into<String>) -> Self {
        CliError { why: Some(why.into()), ..self }
    }

    /// A command to run.
    pub(crate) fn help(self, help: impl Into<String>) -> Self {
        CliError { help: Some(help.into()), ..self }
    }

    /// The command to run, unless there is one already.
    pub(crate) fn or_help(self, help: impl Into<String>) -> Self {
        if self.help.is_some() { self } else { self.help(help) }
    }

    /// What happened.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    pub(crate) fn render(&self, color: bool) -> String {
        let label = if color { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
        let mut text = format!("{label} {}\n", clipped(&self.what));
        let lines = [("at", &self.place), ("why", &self.why), ("help", &self.help)];
        for (label, line) in lines {
            if let Some(line) = line {
                text.push_str(&format!("  {label}: {}\n", clipped(line)));
            }
        }
        text
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({ "code": self.code as u8, "what": self.what, "where": self.place, "why": self.why, "help": self.help })
    }
}

/// What a user typed or fed may be of any length; a message is read.
fn clipped(line: &str) -> String {
    const LONGEST: usize = 1000;
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// The key of the configuration that an error is about.
pub(crate) fn config_key(err: &JobError) -> Option<String> {
    match err {
        JobError::Config { key, .. } => Some(key.clone()),
        JobError::Model(ModelError::Config { key, .. }) => Some(format!("model.{key}")),
        JobError::Model(ModelError::Grid { .. }) => Some("model.n_modes".to_owned()),
        JobError::Precision(_) => Some("precision".to_owned()),
        JobError::Train(TrainError::Setting { setting, .. }) => {
            let optimizer = ["learning_rate", "betas", "eps", "weight_decay"];
            let table = if optimizer.contains(setting) { "optimizer" } else { "scheduler" };
            Some(format!("{table}.{setting}"))
        }
        _ => None,
    }
}

/// The exit code of an error of the training library.
pub(crate) fn job_exit(err: &JobError) -> Exit {
    match err {
        JobError::Config { .. } | JobError::Model(_) | JobError::Precision(_) => Exit::Config,
        JobError::Data(err) => data_exit(err),
        JobError::DataShape { .. } => Exit::Data,
        JobError::Diverged { .. } => Exit::Diverged,
        JobError::OutNotEmpty { .. } | JobError::OutInUse { .. } => Exit::Usage,
        JobError::Resume { .. } | JobError::ModelFile { .. } => Exit::Model,
        JobError::Train(err) => train_exit(err),
        _ => Exit::Other,
    }
}

fn data_exit(err: &DataError) -> Exit {
    match err {
        DataError::OutOfMemory { .. } => Exit::Device,
        DataError::Config { .. } | DataError::Unresolved { .. } => Exit::Config,
        DataError::Io { action: "write" | "create", .. } | DataError::Threads { .. } => Exit::Other,
        _ => Exit::Data,
    }
}

fn train_exit(err: &TrainError) -> Exit {
    match err {
        TrainError::Tensor(err) => tensor_exit(err),
        TrainError::Autograd(err) => autograd_exit(err),
        TrainError::Setting { .. } => Exit::Config,
        TrainError::ShortAxis { .. } => Exit::Data,
        TrainError::Corrupt { .. }
        | TrainError::MetricsLine { .. }
        | TrainError::DType { .. }
        | TrainError::MissingTensor { .. }
        | TrainError::TensorShape { .. } => Exit::Model,
        _ => Exit::Other,
    }
}

fn tensor_exit(err: &TensorError) -> Exit {
    match err {
        TensorError::OutOfMemory { .. } | TensorError::TooLarge { .. } => Exit::Device,
        _ => gpu::exit(err).unwrap_or(Exit::Other),
    }
}

fn autograd_exit(err: &AutogradError) -> Exit {
    match err {
        AutogradError::Tensor(err) => tensor_exit(err),
        AutogradError::Op { source, .. } => {
            if let Some(err) = source.downcast_ref::<TrainError>() {
                train_exit(err)
            } else if source.downcast_ref::<ModelError>().is_some() {
                Exit::Config
            } else if let Some(NnError::Tensor(err)) = source.downcast_ref::<NnError>() {
                tensor_exit(err)
            } else if let Some(err) = source.downcast_ref::<AutogradError>() {
                autograd_exit(err)
            } else {
                Exit::Other
            }
        }
        _ => Exit::Other,
    }
}

impl From<JobError> for CliError {
    fn from(err: JobError) -> Self {
        let code = job_exit(&err);
        let out = CliError::new(code, err.to_string());
        match &err {
            JobError::Diverged { checkpoint, .. } => {
                let good = match checkpoint {
                    Some(path) => format!(
                        "the last good checkpoint is {0}, the best model {1}",
                        path.display(),
                        path.with_file_name("best").display()
                    ),
                    None => "no checkpoint was written yet".to_owned(),
                };
                out.why(good)
            }
            _ => match config_key(&err) {
                Some(key) => out.at(key),
                None => out,
            },
        }
    }
}

impl From<DataError> for CliError {
    fn from(err: DataError) -> Self {
        CliError::new(data_exit(&err), err.to_string())
    }
}

impl From<TrainError> for CliError {
    fn from(err: TrainError) -> Self {
        CliError::new(train_exit(&err), err.to_string())
    }
}
