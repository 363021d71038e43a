//! `halfmode import`: models of other libraries.

use crate::cli::config_file;
use crate::cli::error::{CliError, Exit};
use crate::cli::{Context, text};
use halfmode::train::job::{import_neuraloperator, neuraloperator_config};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    #[command(subcommand)]
    from: From,
}

#[derive(Debug, clap::Subcommand)]
enum From {
    /// An FNO of neuraloperator, from its constructor's arguments and its weights.
    Neuraloperator(NeuraloperatorArgs),
}

#[derive(Debug, clap::Args)]
struct NeuraloperatorArgs {
    /// The constructor's arguments as a JSON object, under neuraloperator's names.
    #[arg(long, value_name = "CONFIG.json")]
    config: PathBuf,
    /// The weights under their `state_dict` names; complex ones as C64, or as F32 with a last
    /// dimension of 2.
    #[arg(long, value_name = "FILE.safetensors")]
    weights: PathBuf,
    /// The model file to write.
    #[arg(long, short, value_name = "FILE.safetensors")]
    output: PathBuf,
}

pub(crate) fn run(args: &ImportArgs, context: &Context) -> Result<Exit, CliError> {
    let From::Neuraloperator(args) = &args.from;
    let place = args.config.display().to_string();
    let refuse = |why: String| CliError::new(Exit::Config, format!("{place} cannot be used")).at(&place).why(why);
    let json = config_file::read_text(&args.config).map_err(|err| refuse(err.to_string()))?;
    let arguments: Value = serde_json::from_str(&json).map_err(|err| refuse(format!("it is not JSON: {err}")))?;
    let config = neuraloperator_config(&arguments).map_err(|err| CliError::from(err).at(&place))?;
    let help = format!("halfmode data inspect {}", args.weights.display());
    let n_parameters =
        import_neuraloperator(&config, &args.weights, &args.output).map_err(|err| CliError::from(err).or_help(help))?;
    let object = json!({ "output": text::path(&args.output), "config": config, "n_parameters": n_parameters });
    context.output.result(object, || format!("{}: {n_parameters} parameters", args.output.display()))?;
    Ok(Exit::Done)
}
