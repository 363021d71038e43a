//! The report of a task's run, made from the files of its directory alone.

use crate::job::run_report::{bad, loss_scale, memory_rows, precision_table, read};
use crate::job::{About, EpochRecord, JobError, Summary};
use crate::pictures::{Chart, Image, Line, MemoryRow, Outcome, Report, Series, YAxis, curves_svg, report_html};
use crate::task::{TaskConfig, is_task};
use crate::{atomic_write, read_metrics};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Whether the run in a directory is a task's.
#[must_use]
pub fn is_task_run(out: &Path) -> bool {
    let text = std::fs::read_to_string(out.join("config.toml")).unwrap_or_default();
    text.parse::<toml::Table>().is_ok_and(|table| is_task(&table))
}

/// Writes `report.html` and `plots/curves.svg` of a run directory and returns the report's path.
///
/// # Errors
/// Those of reading `config.toml`, `metrics.jsonl` and `summary.json`, and of writing.
pub fn write_report(out: &Path) -> Result<PathBuf, JobError> {
    let path = out.join("report.html");
    let report = gather(out)?;
    if let Some(first) = report.curves.first() {
        atomic_write(out.join("plots/curves.svg"), curves_svg(first).as_bytes())?;
    }
    atomic_write(&path, report_html(&report).as_bytes())?;
    Ok(path)
}

fn gather(out: &Path) -> Result<Report, JobError> {
    let config_path = out.join("config.toml");
    let config_text = read(&config_path)?;
    let config: TaskConfig = toml::from_str(&config_text).map_err(|err| bad(&config_path, err))?;
    let summary_path = out.join("summary.json");
    let summary: Summary = serde_json::from_str(&read(&summary_path)?).map_err(|err| bad(&summary_path, err))?;
    let metrics_path = out.join("metrics.jsonl");
    let records = read_metrics(&metrics_path)?
        .into_iter()
        .map(|record| serde_json::from_value(record.into()).map_err(|err| bad(&metrics_path, err)))
        .collect::<Result<Vec<EpochRecord>, _>>()?;
    let environment: BTreeMap<String, String> =
        read(&out.join("environment.json")).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let policy = config.validate()?;
    let About { data, model } = summary.about.clone().unwrap_or_default();
    let format = if policy.pointwise.storage.is_half() { policy.format.name() } else { "f32" };
    let fact = |name: &str, value: String| (name.to_owned(), value);
    let facts = vec![
        fact("data", data),
        fact("model", model.clone()),
        fact("epochs", format!("{} of {}", summary.epochs, config.train.epochs)),
        fact("batch size", config.train.batch_size.to_string()),
        fact("learning rate", config.optimizer.learning_rate.to_string()),
        fact("seed", config.seed.to_string()),
        fact("parameters", summary.n_parameters.to_string()),
        fact("steps", format!("{} ({} skipped)", summary.steps, summary.skipped_steps)),
        fact("peak activation bytes", summary.peak_activation_bytes.to_string()),
    ];
    Ok(Report {
        title: out.file_name().map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned()),
        outcome: if summary.finished { Outcome::Finished } else { Outcome::Stopped },
        subtitle: format!("{model}, {} parameters, {} {format}", summary.n_parameters, config.precision.preset),
        metrics: summary.metrics.iter().map(|(name, value)| (name.clone(), *value)).collect(),
        facts,
        precision: precision_table(&policy),
        memory: memory_rows(out),
        memory_total: Some(MemoryRow {
            purpose: "total".to_owned(),
            live: 0,
            peak: summary.peak_bytes as u64,
            planned: Some(summary.planned_peak_bytes as u64),
        }),
        seconds: Some(summary.seconds),
        curves: charts(&records),
        panels: panels(out),
        loss_scale: (policy.loss_scale != halfmode_precision::LossScale::None)
            .then(|| loss_scale(out, policy.loss_scale.initial(), &summary))
            .transpose()?,
        config: config_text,
        environment: environment.into_iter().collect(),
        ..Report::default()
    })
}

/// Loss and measures over epochs, and the learning rate.
fn charts(records: &[EpochRecord]) -> Vec<Chart> {
    let points = |value: &dyn Fn(&EpochRecord) -> Option<f64>| -> Vec<(f64, f64)> {
        records.iter().filter_map(|record| Some((record.epoch as f64, value(record)?))).collect()
    };
    let names: Vec<&String> = records.last().map(|record| record.metrics.keys().collect()).unwrap_or_default();
    let measures = names.iter().map(|name| Series {
        name: format!("test {name}"),
        points: points(&|record| record.metrics.get(*name).copied()),
    });
    let loss = Series { name: "training loss".to_owned(), points: points(&|record| Some(record.loss)) };
    let curves = Chart {
        title: "Training loss and held-out samples".to_owned(),
        x_label: "epoch".to_owned(),
        series: std::iter::once(loss).chain(measures).collect(),
        ..Chart::default()
    };
    let rate = Chart {
        title: "Learning rate".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "learning rate".to_owned(),
        y_axis: YAxis::Log10,
        line: Line::Steps,
        series: vec![Series { name: "learning rate".to_owned(), points: points(&|record| Some(record.learning_rate)) }],
        ..Chart::default()
    };
    vec![curves, rate]
}

/// The PNG files of `plots`, in the order of their names; `1-samples` is captioned "samples".
fn panels(out: &Path) -> Vec<Image> {
    let entries = std::fs::read_dir(out.join("plots")).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "png"));
    paths.sort();
    let image = |path: PathBuf| {
        let stem = path.file_stem()?.to_string_lossy().into_owned();
        let caption = stem.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-').replace('-', " ");
        Some(Image { caption, png: std::fs::read(&path).ok()? })
    };
    paths.into_iter().filter_map(image).collect()
}
