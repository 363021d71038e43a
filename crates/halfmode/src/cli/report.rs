//! `halfmode report`: the HTML report of a run, written again from its files.

use crate::cli::error::{CliError, Exit};
use crate::cli::{Context, run_dir, text};
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// The run directory.
    run: PathBuf,
}

pub(crate) fn run(args: &ReportArgs, context: &Context) -> Result<Exit, CliError> {
    run_dir::check_is_run(&args.run)?;
    let help = || format!("halfmode train {} --resume", args.run.display());
    let path = halfmode::train::job::write_report(&args.run).map_err(|err| CliError::from(err).or_help(help()))?;
    context
        .output
        .result(json!({ "run": text::path(&args.run), "report": text::path(&path) }), || path.display().to_string())?;
    Ok(Exit::Done)
}
