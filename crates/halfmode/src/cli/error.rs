//! What a user sees of an error, and the exit code.

use crate::cli::memory::NoRoom;
use crate::cli::{command_line, gpu};
use halfmode::autograd::Error as AutogradError;
use halfmode::contract::Error as ContractError;
use halfmode::data::Error as DataError;
use halfmode::fft::Error as FftError;
use halfmode::nn::Error as NnError;
use halfmode::operators::Error as ModelError;
use halfmode::tensor::Error as TensorError;
use halfmode::train::Error as TrainError;
use halfmode::train::job::JobError;
use serde_json::{Value, json};
use std::error::Error as StdError;
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

    /// The command to run if the device was too small, unless there is one already.
    pub(crate) fn at_memory(self, help: impl FnOnce() -> String) -> Self {
        if self.code == Exit::Device { self.or_help(help()) } else { self }
    }

    /// The command to run, changed, if there is one.
    pub(crate) fn map_help(self, change: impl FnOnce(String) -> String) -> Self {
        CliError { help: self.help.map(change), ..self }
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
    if let Some(Exit::Device) = tensor_error(err).map(tensor_exit) {
        return Exit::Device;
    }
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

/// The tensor's error at the bottom of an error, if there is one.
fn tensor_error<'a>(err: &'a (dyn StdError + 'static)) -> Option<&'a TensorError> {
    // Errors that are transparent hide what is in them from `source`.
    let below: &'a (dyn StdError + 'static) = if let Some(err) = err.downcast_ref::<JobError>() {
        match err {
            JobError::Train(err) => err,
            JobError::Model(err) => err,
            _ => return None,
        }
    } else if let Some(err) = err.downcast_ref::<TrainError>() {
        match err {
            TrainError::Tensor(err) => err,
            TrainError::Autograd(err) => err,
            _ => return None,
        }
    } else if let Some(err) = err.downcast_ref::<AutogradError>() {
        match err {
            AutogradError::Tensor(err) => err,
            AutogradError::Op { source, .. } => source.as_ref(),
            _ => return None,
        }
    } else if let Some(err) = err.downcast_ref::<NnError>() {
        match err {
            NnError::Tensor(err) => err,
            NnError::Fft(err) => err,
            _ => return None,
        }
    } else if let Some(ModelError::Fft(err)) = err.downcast_ref::<ModelError>() {
        err
    } else if let Some(FftError::Tensor(err)) = err.downcast_ref::<FftError>() {
        err
    } else if let Some(ContractError::Tensor(err)) = err.downcast_ref::<ContractError>() {
        err
    } else {
        return err.downcast_ref::<TensorError>();
    };
    tensor_error(below)
}

/// What a full GPU says, if that is what happened.
pub(crate) fn no_room(err: &(dyn StdError + 'static)) -> Option<NoRoom> {
    tensor_error(err).and_then(gpu::no_room)
}

/// An error of a kernel that was called by itself: of the device if it is that, else of its arguments.
pub(crate) fn kernel_error(err: &(dyn StdError + 'static), code: Exit) -> CliError {
    match tensor_error(err) {
        Some(below) if gpu::wants_cpu(below) => {
            CliError::new(Exit::Device, err.to_string()).help(command_line::with("--device", "cpu"))
        }
        Some(below) if tensor_exit(below) == Exit::Device => match gpu::no_room(below) {
            Some(full) => full.error(),
            None => CliError::new(Exit::Device, err.to_string()),
        },
        _ => CliError::new(code, err.to_string()),
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
        | TrainError::UnknownTensor { .. }
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
        let out = kernel_error(&err, job_exit(&err));
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
