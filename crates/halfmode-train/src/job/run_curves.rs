//! The curves of a run as a picture of its own, made from its metrics.

use crate::job::{EpochRecord, JobError};
use crate::pictures::{Chart, Series, YAxis, curves_svg};
use crate::{atomic_write, read_metrics};
use std::collections::BTreeSet;
use std::path::Path;

/// Writes `plots/curves.svg` of a run directory: training loss and test errors over epochs.
///
/// # Errors
/// Those of reading `metrics.jsonl` and of writing.
pub(crate) fn draw_curves(out: &Path) -> Result<(), JobError> {
    let path = out.join("metrics.jsonl");
    let record = |line| serde_json::from_value(serde_json::Value::Object(line));
    let records = read_metrics(&path)?.into_iter().map(record).collect::<Result<Vec<EpochRecord>, _>>();
    let records = records.map_err(|err| JobError::ModelFile { path, why: err.to_string() })?;
    Ok(atomic_write(out.join("plots/curves.svg"), curves_svg(&chart(&records)).as_bytes())?)
}

/// Loss and relative L2 errors on one logarithmic axis. A test set that is only evaluated at the end is a dot.
fn chart(records: &[EpochRecord]) -> Chart {
    let loss = records.iter().map(|record| (record.epoch as f64, record.loss)).collect();
    let labels: BTreeSet<&String> = records.iter().flat_map(|record| record.eval.keys()).collect();
    let errors = labels.into_iter().map(|label| {
        let point = |record: &EpochRecord| Some((record.epoch as f64, record.eval.get(label)?.l2));
        Series { name: format!("test L2, {label}"), points: records.iter().filter_map(point).collect() }
    });
    Chart {
        title: "Training loss and test error".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "relative error".to_owned(),
        y_axis: YAxis::Log10,
        series: std::iter::once(Series { name: "training loss".to_owned(), points: loss }).chain(errors).collect(),
        ..Chart::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Evaluation;
    use std::collections::BTreeMap;

    fn record(epoch: u64, errors: &[(&str, f64)]) -> EpochRecord {
        let eval = errors.iter().map(|&(label, l2)| (label.to_owned(), Evaluation { l2, h1: l2 })).collect();
        EpochRecord {
            epoch,
            step: epoch,
            loss: 0.5 / epoch as f64,
            eval,
            metrics: BTreeMap::new(),
            learning_rate: 1e-3,
            loss_scale: 1.0,
            skipped_steps: 0,
            samples_per_s: 1.0,
            seconds: 1.0,
            peak_bytes: 0,
        }
    }

    #[test]
    fn every_test_set_has_a_curve_of_the_epochs_it_was_evaluated_in() {
        let chart = chart(&[record(1, &[("32", 0.25)]), record(2, &[("32", 0.125), ("64", 0.2)])]);
        let series = |name: &str, points: &[(f64, f64)]| Series { name: name.to_owned(), points: points.to_vec() };
        let expected = [
            series("training loss", &[(1.0, 0.5), (2.0, 0.25)]),
            series("test L2, 32", &[(1.0, 0.25), (2.0, 0.125)]),
            series("test L2, 64", &[(2.0, 0.2)]),
        ];
        assert_eq!(chart.series, expected);
    }
}
