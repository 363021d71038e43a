//! `halfmode predict`: a model's outputs for the inputs in a file.

use crate::cli::array_file::ArrayFile;
use crate::cli::error::{CliError, Exit};
use crate::cli::model_source::{self, PrecisionChoice, check_fields};
use crate::cli::{Context, text};
use halfmode::data::numpy::write_npy;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct PredictArgs {
    /// A model file or a run directory.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// The inputs, `[samples, channels, n_1, …]`: an .npy, .npz or .safetensors file.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The array of the input file [default: the only one, or `x`].
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// The .npy file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Computes in another precision than the model's: full, amp, mixed, half, or as mixed:bf16.
    #[arg(long, value_name = "PRESET")]
    precision: Option<PrecisionChoice>,
    /// Samples at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    batch: u32,
}

pub(crate) fn run(args: &PredictArgs, context: &Context) -> Result<Exit, CliError> {
    // The model first: an error in it is told even when the input is wrong, too.
    let source = model_source::load(&args.model, args.precision, context)?;
    let (key, x) = ArrayFile::open(&args.input)?.read_f32(args.key.as_deref())?;
    let help = format!("halfmode data inspect {}", args.input.display());
    check_fields(&source.model, &format!("`{key}`"), x.shape())
        .map_err(|err| err.at(args.input.display().to_string()).or_help(help))?;
    if let Some(bad) = x.iter().find(|value| !value.is_finite()) {
        context.output.warn(&format!("the input holds {bad}; the outputs of such samples mean nothing"));
    }
    let start = Instant::now();
    let y = source.model.predict(&x.view(), args.batch as usize)?;
    let seconds = start.elapsed().as_secs_f64();
    let n_bad = y.iter().filter(|value| !value.is_finite()).count();
    if n_bad > 0 {
        context.output.warn(&format!("{n_bad} of {} outputs are not finite; try --precision full", y.len()));
    }
    write_npy(&args.output, &y.view())?;
    let object = json!({
        "model": source.file,
        "precision": source.model.policy().preset,
        "format": source.model.policy().format,
        "input": { "file": args.input, "key": key, "shape": x.shape() },
        "output": { "file": args.output, "shape": y.shape(), "n_non_finite": n_bad },
        "seconds": seconds,
    });
    context
        .output
        .result(object, || format!("{}: {:?}, f32, in {}", args.output.display(), y.shape(), text::seconds(seconds)))?;
    Ok(Exit::Done)
}
