//! The model that `eval` and `predict` use: a file, or the best of a run.

use crate::cli::Context;
use crate::cli::error::{CliError, Exit};
use crate::cli::run_dir;
use halfmode::precision::{Precision, PrecisionConfig, Preset};
use halfmode::train::job::{JobConfig, Model};
use halfmode::train::read_named;
use std::path::{Path, PathBuf};

/// `full`, `mixed`, `mixed:bf16`: a preset, and the half format if it is not the model's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrecisionChoice {
    preset: Preset,
    format: Option<Precision>,
}

impl std::str::FromStr for PrecisionChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (preset, format) = text.split_once(':').map_or((text, None), |(preset, format)| (preset, Some(format)));
        let format = match format {
            None => None,
            Some("f16") => Some(Precision::F16),
            Some("bf16") => Some(Precision::Bf16),
            Some(other) => return Err(format!("`{other}` is not a half format; use f16 or bf16")),
        };
        Ok(PrecisionChoice {
            preset: preset.parse().map_err(|err: halfmode::precision::Error| err.to_string())?,
            format,
        })
    }
}

/// A loaded model and where it came from.
pub(crate) struct Source {
    pub(crate) model: Model,
    pub(crate) file: PathBuf,
    /// The run directory, if that was named.
    pub(crate) run: Option<PathBuf>,
    /// The job that trained it, where known.
    pub(crate) job: Option<JobConfig>,
}

/// Loads a model file, or `checkpoints/best` of a run directory (`latest` if there is no best yet).
pub(crate) fn load(path: &Path, precision: Option<PrecisionChoice>, context: &Context) -> Result<Source, CliError> {
    let run = path.is_dir().then(|| path.to_owned());
    let file = match &run {
        Some(run) => {
            run_dir::check_is_run(run)?;
            if halfmode::train::task::is_task_run(run) {
                let err = CliError::new(Exit::Model, "this run trained no operator on fields");
                let why = "what a task's model does is in its report";
                return Err(err
                    .at(run.display().to_string())
                    .why(why)
                    .help(format!("halfmode report {}", run.display())));
            }
            let [best, latest] = ["best", "latest"].map(|name| run.join("checkpoints").join(name));
            if best.exists() { best } else { latest }
        }
        None => path.to_owned(),
    };
    let help = match &run {
        Some(run) => format!("halfmode train {} --resume", run.display()),
        None if !file.exists() => "halfmode train darcy".to_owned(),
        None => format!("halfmode data inspect {}", file.display()),
    };
    let refuse = |err: halfmode::train::job::JobError| CliError::from(err).or_help(help.clone());
    let device = context.device()?;
    let mut model = Model::load(&file, &device, None).map_err(refuse)?;
    if let Some(choice) = precision {
        let format = choice.format.unwrap_or(model.policy().format);
        model = Model::load(&file, &device, Some(&PrecisionConfig::new(choice.preset, format))).map_err(refuse)?;
    }
    let job = match &run {
        Some(run) => Some(run_dir::read_config(run)?),
        None => {
            let (_, metadata) = read_named(&file).map_err(|err| CliError::new(Exit::Model, err.to_string()))?;
            metadata.get("job").and_then(|job| serde_json::from_value(job.clone()).ok())
        }
    };
    Ok(Source { model, file, run, job })
}

/// Refuses fields that the model cannot take, before anything is computed.
pub(crate) fn check_fields(model: &Model, what: &str, shape: &[usize]) -> Result<(), CliError> {
    let fno = model.config().fno();
    let refuse = |why: String| {
        CliError::new(Exit::Data, format!("{what} has shape {shape:?}, which the model cannot take")).why(why)
    };
    let (trailing, parts) = if fno.complex_data { (1, ", 2: real and imaginary part") } else { (0, "") };
    let fits = shape.len() == fno.n_modes.len() + 2 + trailing && (trailing == 0 || shape.ends_with(&[2]));
    if !fits || shape[1] != fno.in_channels {
        let (channels, n_axes) = (fno.in_channels, fno.n_modes.len());
        return Err(refuse(format!("it takes [samples, {channels}, {n_axes} spatial axes{parts}]")));
    }
    if shape.contains(&0) {
        return Err(refuse("there is nothing in it".to_owned()));
    }
    Ok(())
}

/// Whether a grid resolves the model's modes; the sentence says why not.
pub(crate) fn check_grid(model: &Model, grid: &[usize]) -> Result<(), String> {
    let fno = model.config().fno();
    let kept = fno.stored_modes();
    for (axis, (&n, &kept)) in grid.iter().zip(&kept).enumerate() {
        let resolved = fno.resolved_modes(axis, n);
        if kept > resolved {
            return Err(format!("{n} points on spatial axis {axis} resolve {resolved} modes, the model keeps {kept}"));
        }
    }
    Ok(())
}
