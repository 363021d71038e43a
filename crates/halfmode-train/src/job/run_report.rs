//! The report of a run, made from the files of its directory alone.

use crate::job::{EpochRecord, JobConfig, JobError, LossKind, PrecisionReport, ScaleRecord, Summary};
use crate::pictures::{
    Chart, Evaluation, Image, Line, LossScale, MemoryRow, OpPrecision, Outcome, Report, Series, Table, YAxis,
    report_html,
};
use crate::{atomic_write, read_metrics};
use halfmode_precision::Domain;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Writes `report.html` of a run directory and returns its path.
///
/// # Errors
/// Those of reading `config.toml`, `metrics.jsonl` and `summary.json`, and of writing.
pub fn write_report(out: &Path) -> Result<PathBuf, JobError> {
    if crate::task::is_task_run(out) {
        return crate::task::write_report(out);
    }
    let path = out.join("report.html");
    atomic_write(&path, report_html(&gather(out)?).as_bytes())?;
    Ok(path)
}

pub(crate) fn read(path: &Path) -> Result<String, JobError> {
    Ok(std::fs::read_to_string(path).map_err(|err| crate::Error::read(path, err))?)
}

pub(crate) fn bad(path: &Path, why: impl std::fmt::Display) -> JobError {
    JobError::ModelFile { path: path.to_owned(), why: why.to_string() }
}

fn gather(out: &Path) -> Result<Report, JobError> {
    let config_path = out.join("config.toml");
    let config_text = read(&config_path)?;
    let config: JobConfig = toml::from_str(&config_text).map_err(|err| bad(&config_path, err))?;
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
    let model = config.model.fno();
    let subtitle = format!(
        "FNO-{}d, {} modes, width {}, {} layers, {:.1} M parameters, {} {}",
        model.n_modes.len(),
        model.n_modes.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
        model.hidden_channels,
        model.n_layers,
        summary.n_parameters as f64 / 1e6,
        config.precision.preset,
        if policy.pointwise.storage.is_half() { policy.format.name() } else { "f32" },
    );
    let train_label = training_label(&config);
    let outcome = if summary.finished { Outcome::Finished } else { Outcome::Stopped };
    Ok(Report {
        title: out.file_name().map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned()),
        outcome,
        subtitle,
        evaluation: evaluation(&config, &summary, &train_label),
        metrics: Vec::new(),
        facts: facts(&config, &summary),
        precision: precision_table(&policy),
        op_precision: op_precision(out)?,
        memory: memory_rows(out),
        memory_total: Some(MemoryRow {
            purpose: "total".to_owned(),
            live: 0,
            peak: summary.peak_bytes as u64,
            planned: Some(summary.planned_peak_bytes as u64),
        }),
        time: Vec::new(),
        seconds: Some(summary.seconds),
        curves: charts(&records),
        panels: panels(out, config.model.domain()),
        loss_scale: (policy.loss_scale != halfmode_precision::LossScale::None)
            .then(|| loss_scale(out, policy.loss_scale.initial(), &summary))
            .transpose()?,
        config: config_text,
        environment: environment.into_iter().collect(),
    })
}

/// The resolution that was trained on, where the configuration tells it.
fn training_label(config: &JobConfig) -> Option<String> {
    match &config.data {
        crate::job::DataConfig::DarcyPt(darcy) => Some(darcy.resolution.to_string()),
        crate::job::DataConfig::File(_) => crate::job::data_shapes(config).ok().map(|shapes| shapes.train.label),
        data => data.generated().map(|generated| generated.resolution.to_string()),
    }
}

fn evaluation(config: &JobConfig, summary: &Summary, train_label: &Option<String>) -> Vec<Evaluation> {
    let shapes = crate::job::data_shapes(config).ok();
    let n_samples = |label: &String| {
        let test = shapes.as_ref().and_then(|shapes| shapes.tests.iter().find(|test| test.label == *label));
        test.map_or(0, |test| test.n)
    };
    let mut rows: Vec<Evaluation> = summary
        .eval
        .iter()
        .map(|(label, errors)| Evaluation {
            resolution: label.clone(),
            n_samples: n_samples(label),
            l2: errors.l2,
            h1: Some(errors.h1),
            // Test sets of one resolution are told apart by a number behind it.
            zero_shot: train_label.as_deref().is_some_and(|trained| label.split('#').next() != Some(trained)),
        })
        .collect();
    rows.sort_by_key(|row| (row.zero_shot, row.resolution.parse::<usize>().unwrap_or(usize::MAX)));
    rows
}

fn facts(config: &JobConfig, summary: &Summary) -> Vec<(String, String)> {
    let data = match &config.data {
        crate::job::DataConfig::Darcy(darcy) => {
            format!("Darcy flow, {} + {} samples, seed {}", darcy.n_train, darcy.n_test, darcy.seed)
        }
        crate::job::DataConfig::Burgers(it) => format!(
            "Burgers' equation, viscosity {}, time {}, {} + {} samples, seed {}",
            it.viscosity, it.time, it.n_train, it.n_test, it.seed
        ),
        crate::job::DataConfig::NavierStokes(it) => format!(
            "Navier-Stokes equations, viscosity {}, force {}, time {}, {} + {} samples, seed {}",
            it.viscosity, it.forcing, it.time, it.n_train, it.n_test, it.seed
        ),
        crate::job::DataConfig::DarcyPt(darcy) => darcy.train_file().path().display().to_string(),
        crate::job::DataConfig::File(file) => file.train.display().to_string(),
    };
    let loss = match config.train.loss {
        LossKind::L2 => "relative L2",
        LossKind::H1 => "relative H1",
    };
    let pair = |key: &str, value: String| (key.to_owned(), value);
    let device_peak = summary.device_peak_bytes.map(|peak| pair("peak bytes held of the GPU", peak.to_string()));
    let mut facts = vec![
        pair("data", data),
        pair("loss", loss.to_owned()),
        pair("epochs", format!("{} of {}", summary.epochs, config.train.epochs)),
        pair("batch size", config.train.batch_size.to_string()),
        pair("learning rate", config.optimizer.learning_rate.to_string()),
        pair("seed", config.seed.to_string()),
        pair("parameters", summary.n_parameters.to_string()),
        pair("steps", format!("{} ({} skipped)", summary.steps, summary.skipped_steps)),
        pair("peak activation bytes", summary.peak_activation_bytes.to_string()),
    ];
    facts.extend(device_peak);
    facts
}

/// The policy's own table, split at its columns.
pub(crate) fn precision_table(policy: &halfmode_precision::PrecisionPolicy) -> Table {
    let text = policy.table();
    // The first line says the preset, the second names the columns behind that of the ops.
    let mut lines =
        text.lines().skip(1).map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<String>>());
    let mut header = lines.next().unwrap_or_default();
    header.insert(0, String::new());
    let n_columns = header.len();
    let rows = lines.map(|mut row| {
        // A cell of several words: everything beyond the last column belongs to it.
        while row.len() > n_columns.max(1) {
            if let Some(word) = row.pop()
                && let Some(last) = row.last_mut()
            {
                last.push(' ');
                last.push_str(&word);
            }
        }
        row
    });
    let rows = rows.collect();
    Table { header, rows }
}

pub(crate) fn memory_rows(out: &Path) -> Vec<MemoryRow> {
    #[derive(serde::Deserialize)]
    struct Memory {
        purposes: Vec<(String, u64, u64)>,
        planned: Vec<(String, u64)>,
    }
    let memory = read(&out.join("memory.json")).ok().and_then(|text| serde_json::from_str::<Memory>(&text).ok());
    let Some(memory) = memory else { return Vec::new() };
    let planned: BTreeMap<String, u64> = memory.planned.into_iter().collect();
    let rows = memory.purposes.into_iter().filter(|row| row.2 > 0).map(|(purpose, live, peak)| {
        let planned = planned.get(&purpose).copied();
        MemoryRow { purpose, live, peak, planned }
    });
    rows.collect()
}

fn charts(records: &[EpochRecord]) -> Vec<Chart> {
    let points = |value: &dyn Fn(&EpochRecord) -> Option<f64>| -> Vec<(f64, f64)> {
        records.iter().filter_map(|record| Some((record.epoch as f64, value(record)?))).collect()
    };
    let series = |name: String, points| Series { name, points };
    let labels: Vec<&String> = records.last().map(|record| record.eval.keys().collect()).unwrap_or_default();
    let errors = labels.iter().map(|label| {
        series(format!("test L2, {label}"), points(&|record| record.eval.get(*label).map(|errors| errors.l2)))
    });
    let loss = Chart {
        title: "Training loss".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "loss per sample".to_owned(),
        y_axis: YAxis::Log10,
        series: vec![series("train".to_owned(), points(&|record| Some(record.loss)))],
        ..Chart::default()
    };
    let error = Chart {
        title: "Test error".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "relative L2".to_owned(),
        y_axis: YAxis::Log10,
        series: errors.collect(),
        ..Chart::default()
    };
    let rate = Chart {
        title: "Learning rate".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "learning rate".to_owned(),
        y_axis: YAxis::Log10,
        line: Line::Steps,
        series: vec![series("learning rate".to_owned(), points(&|record| Some(record.learning_rate)))],
        ..Chart::default()
    };
    vec![loss, error, rate]
}

/// The loss scale from the first step to the last.
pub(crate) fn loss_scale(out: &Path, initial: f64, summary: &Summary) -> Result<LossScale, JobError> {
    let path = out.join("loss-scale.jsonl");
    let events = if path.exists() { read_metrics(&path)? } else { Vec::new() };
    let mut history = LossScale { scale: vec![(0.0, initial)], skipped: Vec::new() };
    for event in events {
        let event: ScaleRecord = serde_json::from_value(event.into()).map_err(|err| bad(&path, err))?;
        history.scale.push((event.step as f64, event.loss_scale));
        if event.skipped {
            history.skipped.push(event.step as f64);
        }
    }
    history.scale.push((summary.steps as f64, summary.final_loss_scale));
    Ok(history)
}

/// The replay of a part of a batch, where the run got as far.
fn op_precision(out: &Path) -> Result<OpPrecision, JobError> {
    let path = out.join("precision.json");
    if !path.exists() {
        return Ok(OpPrecision::default());
    }
    let report: PrecisionReport = serde_json::from_str(&read(&path)?).map_err(|err| bad(&path, err))?;
    let header = ["op", "tensor", "format", "absmax", "headroom", "flushed to 0", "subnormal", "saturated", "error"];
    let mut rows = Table::new(header);
    let share = |share: f64| if share > 0.0 { format!("{:.2} %", 100.0 * share) } else { "0".to_owned() };
    for row in &report.rows {
        rows.push([
            row.op.clone(),
            row.tensor.clone(),
            row.format.clone(),
            format!("{:.2e}", row.absmax),
            row.headroom_bits.map_or_else(|| "–".to_owned(), |bits| format!("{bits:.1} bits")),
            share(row.flushed),
            share(row.subnormal),
            share(row.saturated),
            row.error.map_or_else(|| "–".to_owned(), |error| format!("{error:.1e}")),
        ]);
    }
    let note = format!(
        "{} training samples after the last step, replayed in f32 from the same weights; gradients carry the loss \
         scale {}. Headroom: factors of two below the largest finite number. Error: relative L2 distance from the \
         replay, all roundings up to there.",
        report.n_samples, report.loss_scale
    );
    Ok(OpPrecision { sentence: report.sentence().unwrap_or_default(), rows, note })
}

fn panels(out: &Path, domain: Domain) -> Vec<Image> {
    let entries = std::fs::read_dir(out.join("plots")).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "png"));
    paths.sort();
    let image = |path: PathBuf| {
        let mut caption = path.file_stem()?.to_string_lossy().replace("-sample-", ": test sample ");
        if domain == Domain::Complex {
            caption.push_str(", moduli of complex fields");
        }
        Some(Image { caption, png: std::fs::read(&path).ok()? })
    };
    paths.into_iter().filter_map(image).collect()
}
