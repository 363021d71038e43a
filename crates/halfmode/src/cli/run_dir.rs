//! Run directories: when one may be written, and what is in it.

use crate::cli::config_file::{Loaded, differences, read};
use crate::cli::error::{CliError, Exit};
use crate::cli::output::Output;
use halfmode::train::job::{is_unused, newest_checkpoint};
use serde::Serialize;
use serde::de::DeserializeOwned;
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
    /// Goes on from this checkpoint of the run instead of the newest.
    #[arg(long, value_name = "FILE", conflicts_with = "force")]
    pub(crate) resume_from: Option<PathBuf>,
    /// Starts over in a run directory that is not empty.
    #[arg(long)]
    pub(crate) force: bool,
}

impl OutArgs {
    /// Whether a run that is there goes on.
    pub(crate) fn resumes(&self) -> bool {
        self.resume || self.resume_from.is_some()
    }

    /// The directory, once it is clear that it may be used.
    pub(crate) fn resolve<C: DeserializeOwned + Serialize>(
        &self,
        loaded: &Loaded<C>,
        argument: &str,
        output: &Output,
    ) -> Result<PathBuf, CliError> {
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
        let is_empty = is_unused(&out);
        if self.resumes() {
            if self.resume_from.is_none() && newest_checkpoint(&out).is_none() {
                // A run that began and died before its first checkpoint has its configuration there.
                if !out.join("config.toml").is_file() {
                    let err = CliError::new(Exit::Model, "there is no checkpoint to resume from").at(shown.to_string());
                    let force = if is_empty { "" } else { " --force" };
                    return Err(err.help(format!("halfmode train {argument}{given}{force}")));
                }
                output.note(&format!("{shown} holds no checkpoint yet: the run begins again"));
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

/// Tells what a resumed run does otherwise than before.
fn note_differences<C: DeserializeOwned + Serialize>(out: &Path, loaded: &Loaded<C>, output: &Output) {
    let before = read_config::<C>(out);
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
pub(crate) fn read_config<C: DeserializeOwned>(run: &Path) -> Result<C, CliError> {
    let path = run.join("config.toml");
    let refuse = |why: String| {
        let err = CliError::new(Exit::Model, "the run's configuration cannot be read").at(path.display().to_string());
        err.why(why).help("halfmode train darcy")
    };
    let text = read(&path, "config.toml").map_err(|err| refuse(err.what().to_owned()))?;
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
