//! `halfmode predict`: a model's outputs for the inputs in a file.

use crate::cli::array_file::ArrayFile;
use crate::cli::error::{CliError, Exit};
use crate::cli::model_source::{self, PrecisionChoice, check_fields, check_grid};
use crate::cli::{Context, memory, text};
use halfmode::data::numpy::write_npy;
use halfmode::precision::Domain;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct PredictArgs {
    /// A model file or a run directory.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// The inputs, `[samples, channels, n_1, …]`, complex or with a last axis of 2 for complex data: an .npy, .npz, .safetensors, .pt or HDF5 file.
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
    /// The grid of the outputs, as in 64,64 [default: that of the inputs].
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    output_shape: Option<Vec<u32>>,
    /// Samples at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    batch: u32,
}

pub(crate) fn run(args: &PredictArgs, context: &Context) -> Result<Exit, CliError> {
    // The model first: an error in it is told even when the input is wrong, too.
    let source = model_source::load(&args.model, args.precision, context)?;
    let mut file = ArrayFile::open(&args.input)?;
    let (key, x) = file.read_f32(args.key.as_deref())?;
    let help = format!("halfmode data inspect {}", args.input.display());
    if file.domain(&key)? == Domain::Complex && source.model.config().domain() == Domain::Real {
        let err = CliError::new(Exit::Data, format!("`{key}` holds complex numbers, which the model cannot take"));
        let why = "it is of real fields: train one with model.complex_data = true";
        return Err(err.at(args.input.display().to_string()).why(why).help(help));
    }
    check_fields(&source.model, &format!("`{key}`"), x.shape())
        .map_err(|err| err.at(args.input.display().to_string()).or_help(help))?;
    let n_axes = source.model.config().fno().n_modes.len();
    if let Err(why) = check_grid(&source.model, &x.shape()[2..2 + n_axes]) {
        context.output.warn(&format!("{why}; the others are left out"));
    }
    let output_shape: Option<Vec<usize>> =
        args.output_shape.as_ref().map(|shape| shape.iter().map(|&n| n as usize).collect());
    if let Some(shape) = output_shape.as_ref().filter(|shape| shape.len() != n_axes) {
        let what = format!("--output-shape has {} numbers, the model has {n_axes} spatial axes", shape.len());
        return Err(CliError::new(Exit::Usage, what).at("--output-shape"));
    }
    if let Some(bad) = x.iter().find(|value| !value.is_finite()) {
        context.output.warn(&format!("the input holds {bad}; the outputs of such samples mean nothing"));
    }
    let n_outputs = x.shape()[0] * source.model.config().fno().out_channels;
    let grid = output_shape.as_deref().unwrap_or(&x.shape()[2..]);
    let files = [&args.model, &args.input, &args.output].map(|path| text::path(path));
    let [model, input, output] = &files;
    let help = |more: &str| format!("halfmode predict --model {model} --input {input} --output {output}{more}");
    // Predictions are joined at the end: twice their bytes.
    let outputs = grid.iter().fold(n_outputs.saturating_mul(8), |bytes, &n| bytes.saturating_mul(n));
    memory::check("the prediction", outputs).map_err(|err| err.at("--output-shape").help(help("")))?;
    let working = source.model.planned_peak_bytes(x.shape(), args.batch as usize, output_shape.as_deref())?;
    memory::check_on(&context.device()?, "the batch", working)
        .map_err(|err| err.at("--batch").help(help(" --batch 1")))?;
    let start = Instant::now();
    let y = source.model.predict_on(&x.view(), args.batch as usize, output_shape.as_deref());
    let y = y.map_err(|err| CliError::from(err).at_memory(|| help(" --batch 1")))?;
    let seconds = start.elapsed().as_secs_f64();
    let n_bad = y.iter().filter(|value| !value.is_finite()).count();
    if n_bad > 0 {
        context.output.warn(&format!("{n_bad} of {} outputs are not finite; try --precision full", y.len()));
    }
    write_npy(&args.output, &y.view())?;
    let object = json!({
        "model": text::path(&source.file),
        "precision": source.model.policy().preset,
        "format": source.model.policy().format,
        "input": { "file": text::path(&args.input), "key": key, "shape": x.shape() },
        "output": { "file": text::path(&args.output), "shape": y.shape(), "n_non_finite": n_bad },
        "seconds": seconds,
    });
    context
        .output
        .result(object, || format!("{}: {:?}, f32, in {}", args.output.display(), y.shape(), text::seconds(seconds)))?;
    Ok(Exit::Done)
}
