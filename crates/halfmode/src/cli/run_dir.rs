//! Run directories: when one may be written, and what is in it.

use crate::cli::config_file::{Loaded, differences};
use crate::cli::error::{CliError, Exit};
use crate::cli::output::Output;
use halfmode::train::job::JobConfig;
use std::path::{Path, PathBuf};

/// How `train` takes its directory.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OutArgs {
    /// The run directory [default: runs/NAME, or CONFIG if that is a run directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Goes on from the newest checkpoint of the run directory.
    #[arg(long, conflicts_with = "force")]
    pub(crate) resume: bool,
    /// Starts over in a run directory that is not empty.
    #[arg(long)]
    pub(crate) force: bool,
}

impl OutArgs {
    /// The directory, once it is clear that it may be used.
    pub(crate) fn resolve(&self, loaded: &Loaded, argument: &str, output: &Output) -> Result<PathBuf, CliError> {
        let out = match (&self.out, &loaded.run_dir) {
            (Some(out), _) => out.clone(),
            (None, Some(run)) => run.clone(),
            (None, None) => Path::new("runs").join(&loaded.name),
        };
        let shown = out.display();
        let given = self.out.as_ref().map_or_else(String::new, |_| format!(" --out {shown}"));
        let metadata = std::fs::metadata(&out);
        if metadata.as_ref().is_ok_and(|metadata| !metadata.is_dir()) {
            let err = CliError::new(Exit::Usage, "the run directory is a file").at(shown.to_string());
            return Err(err.help(format!("halfmode train {argument} --out {shown}.run")));
        }
        let is_empty = std::fs::read_dir(&out).map(|mut entries| entries.next().is_none()).unwrap_or(true);
        if self.resume {
            if !has_checkpoint(&out) {
                let err = CliError::new(Exit::Model, "there is no checkpoint to resume from").at(shown.to_string());
                return Err(err.help(format!("halfmode train {argument}{given} --force")));
            }
            note_differences(&out, loaded, output);
        } else if !is_empty && !self.force {
            let err = CliError::new(Exit::Usage, "the run directory is not empty").at(shown.to_string());
            let (go_on, over) = (format!("halfmode train {argument}{given} --resume"), "--force instead starts over");
            return Err(err.why("a run that is there is not overwritten unasked").help(format!("{go_on}   ({over})")));
        }
        Ok(out)
    }
}

fn has_checkpoint(out: &Path) -> bool {
    let folder = out.join("checkpoints");
    let steps = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    folder.join("latest").exists()
        || steps.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("step-"))
}

/// Tells what a resumed run does otherwise than before.
fn note_differences(out: &Path, loaded: &Loaded, output: &Output) {
    let before = read_config(out);
    if let Ok(before) = before {
        for line in differences(&before, &loaded.config) {
            output.note(&format!("changed since the run began: {line}"));
            if line.starts_with("optimizer.learning_rate:") {
                output.warn(
                    "a resumed run takes its learning rate from the checkpoint; this change has no effect at once",
                );
            }
        }
    }
}

/// The configuration that a run wrote.
pub(crate) fn read_config(run: &Path) -> Result<JobConfig, CliError> {
    let path = run.join("config.toml");
    let refuse = |why: String| {
        let err = CliError::new(Exit::Model, "the run's configuration cannot be read").at(path.display().to_string());
        err.why(why).help("halfmode train darcy")
    };
    let text = std::fs::read_to_string(&path).map_err(|err| refuse(err.to_string()))?;
    toml::from_str(&text).map_err(|err| refuse(err.message().to_owned()))
}

/// Refuses what is not a run directory.
pub(crate) fn check_is_run(run: &Path) -> Result<(), CliError> {
    if run.join("config.toml").is_file() {
        return Ok(());
    }
    let why = if run.is_dir() { "it holds no config.toml" } else { "there is no such directory" };
    let err = CliError::new(Exit::Model, "this is not a run directory").at(run.display().to_string()).why(why);
    Err(err.help("halfmode train darcy"))
}
