//! What a job tells while it runs.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Errors on one test set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean relative L2 error over samples, on de-normalised fields.
    #[serde(deserialize_with = "nan_from_null")]
    pub l2: f64,
    /// Mean relative H1 error over samples.
    #[serde(deserialize_with = "nan_from_null")]
    pub h1: f64,
}

/// JSON writes numbers that are not finite as null.
pub(crate) fn nan_from_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// As [`nan_from_null`], for every number of a table.
pub(crate) fn nans_from_null<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, f64>, D::Error> {
    let table = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    Ok(table.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch, from 1.
    pub epoch: u64,
    /// Steps done since the start, skipped ones included.
    pub step: u64,
    /// Mean training loss per sample over the steps that were applied.
    #[serde(deserialize_with = "nan_from_null")]
    pub loss: f64,
    /// By resolution; of operators on fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, Evaluation>,
    /// What a [task](crate::task) measures on held-out samples.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nans_from_null")]
    pub metrics: BTreeMap<String, f64>,
    /// Step size during the epoch.
    pub learning_rate: f64,
    /// Loss scale at the end of the epoch.
    pub loss_scale: f64,
    /// Steps skipped since the start.
    pub skipped_steps: u64,
    /// Training samples per second of this epoch, evaluation not counted.
    pub samples_per_s: f64,
    /// Seconds since the start of the run, all sessions together.
    pub seconds: f64,
    /// The ledger's peak so far.
    pub peak_bytes: usize,
}

/// One line of `loss-scale.jsonl`: a step that was skipped or moved the loss scale.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScaleRecord {
    /// Steps done since the start, this one included.
    pub step: u64,
    /// Loss scale from here on.
    pub loss_scale: f64,
    /// Whether a gradient was not finite.
    pub skipped: bool,
}

/// Where a run is, for a progress line.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The epoch, from 1.
    pub epoch: u64,
    /// Epochs in all.
    pub n_epochs: u64,
    /// Steps done since the start.
    pub step: u64,
    /// Steps in all.
    pub n_steps: u64,
    /// Mean training loss per sample in this epoch so far.
    pub loss: f64,
    /// Newest test error, by resolution; of operators on fields.
    pub eval: BTreeMap<String, Evaluation>,
    /// What a [task](crate::task) measured last on held-out samples.
    pub metrics: BTreeMap<String, f64>,
    /// Samples per second of this session.
    pub samples_per_s: f64,
    /// Bytes live and at most.
    pub live_bytes: usize,
    /// The ledger's peak.
    pub peak_bytes: usize,
    /// Loss scale now.
    pub loss_scale: f64,
    /// Steps skipped since the start.
    pub skipped_steps: u64,
    /// Seconds left, by the pace of this session.
    pub seconds_left: f64,
}

/// Watches a run.
pub trait Observer {
    /// Called after every step.
    fn step(&mut self, _progress: &Progress) {}
    /// Called after every epoch, evaluation included.
    fn epoch(&mut self, _record: &EpochRecord, _n_epochs: u64) {}
    /// Called with a sentence about something worth knowing.
    fn note(&mut self, _text: &str) {}
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Observer for Quiet {}
