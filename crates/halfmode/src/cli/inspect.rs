//! `halfmode inspect`: what is in a file, and what half precision would lose of it.

use crate::cli::array_file::{ArrayFile, Kind};
use crate::cli::error::{CliError, Exit};
use crate::cli::{Context, text};
use halfmode::data::LeftOut;
use halfmode::precision::{Format, RangeStats};
use halfmode::train::job::newest_checkpoint;
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// A model, a checkpoint, a run (its newest checkpoint) or data: .safetensors, .npz, .npy, .pt, .h5,
    /// .mat (7.3), .nc (NetCDF-4).
    file: PathBuf,
}

/// What is told about one array.
struct Row {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    min: f64,
    max: f64,
    mean: f64,
    half: RangeStats,
}

fn row(name: String, dtype: String, shape: Vec<usize>, values: &[f64]) -> Row {
    let numbers = || values.iter().copied().filter(|value| !value.is_nan());
    let n_numbers = numbers().count().max(1) as f64;
    Row {
        name,
        dtype,
        shape,
        min: numbers().fold(f64::INFINITY, f64::min),
        max: numbers().fold(f64::NEG_INFINITY, f64::max),
        mean: numbers().sum::<f64>() / n_numbers,
        half: Format::F16.range_stats(values.iter().copied()),
    }
}

/// A number as JSON: null where there is none, as for empty arrays.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}

impl Row {
    fn json(&self) -> Value {
        let half = &self.half;
        json!({
            "name": self.name,
            "dtype": self.dtype,
            "shape": self.shape,
            "min": number(self.min),
            "max": number(self.max),
            "mean": number(self.mean),
            "absmax": number(half.absmax),
            "n_nan": half.n_nan,
            "f16": {
                "flushed_share": half.share(half.n_flushed),
                "subnormal_share": half.share(half.n_subnormal),
                "overflow_share": half.share(half.n_overflow),
            },
        })
    }

    fn cells(&self) -> Vec<String> {
        let half = &self.half;
        let value = |value: f64| if half.n == 0 { "-".to_owned() } else { format!("{value:.4e}") };
        let share = |count: u64| format!("{:.3} %", 100.0 * half.share(count));
        vec![
            self.name.clone(),
            format!("{:?}", self.shape),
            self.dtype.clone(),
            value(self.min),
            value(self.max),
            value(half.absmax),
            half.n_nan.to_string(),
            share(half.n_flushed),
            share(half.n_subnormal),
            share(half.n_overflow),
        ]
    }
}

/// What a file of halfmode says about its model, without what takes pages.
fn model_facts(metadata: &Value) -> Value {
    let state = |key: &str| metadata.pointer(&format!("/state/{key}")).cloned().unwrap_or(Value::Null);
    json!({
        "format_version": metadata["format_version"],
        "config": metadata["config"],
        "precision": metadata["precision"],
        "epoch": state("epoch"),
        "step": state("step"),
    })
}

/// The same in one line.
fn model_line(model: &Value) -> String {
    let precision = |key: &str| model["precision"][key].as_str().unwrap_or("?").to_owned();
    let kind = model["config"]["kind"].as_str().unwrap_or("unknown").to_owned();
    let (preset, format) = (precision("preset"), precision("format"));
    let at = match (model["epoch"].as_u64(), model["step"].as_u64()) {
        (Some(epoch), Some(step)) => format!(", checkpoint after {epoch} epochs and {step} steps"),
        _ => String::new(),
    };
    format!("model {kind}, trained in {preset} {format}{at}")
}

pub(crate) fn run(args: &InspectArgs, context: &Context) -> Result<Exit, CliError> {
    // Of a run, what it would go on from.
    let checkpoint = newest_checkpoint(&args.file).filter(|_| args.file.is_dir());
    let path = checkpoint.as_ref().unwrap_or(&args.file);
    let mut file = ArrayFile::open(path)?;
    let kind = file.kind();
    let mut rows = Vec::new();
    let mut unreadable: Vec<(String, CliError)> = Vec::new();
    for LeftOut { name, reason } in file.left_out() {
        unreadable.push((name.clone(), CliError::new(Exit::Data, reason.clone()).at(path.display().to_string())));
    }
    for name in file.names() {
        match file.read_f64(&name) {
            Ok((dtype, shape, values)) => rows.push(row(name, dtype, shape, &values)),
            // One array of strings is no reason to hide the others.
            Err(err) if matches!(kind, Kind::Npz | Kind::Hdf5) => unreadable.push((name, err)),
            Err(err) => return Err(err),
        }
    }
    if rows.is_empty()
        && let Some((_, err)) = unreadable.pop()
    {
        return Err(err);
    }
    let model = file.metadata().map(model_facts);
    let object = json!({
        "file": text::path(path),
        "kind": kind.name(),
        "model": model,
        "arrays": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "unreadable": unreadable.iter().map(|(name, err)| json!({ "name": name, "error": err.to_json() })).collect::<Vec<_>>(),
    });
    for (name, err) in &unreadable {
        context.output.warn(&format!("{name} is left out: {}", err.what()));
    }
    context.output.result(object, || {
        let header =
            ["array", "shape", "dtype", "min", "max", "absmax", "NaN", "f16 flushed", "f16 subnormal", "f16 overflow"];
        let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
        let facts = model.as_ref().map(|model| format!("{}\n\n", model_line(model))).unwrap_or_default();
        format!("{facts}{}", text::table(&header, &cells))
    })?;
    Ok(Exit::Done)
}
