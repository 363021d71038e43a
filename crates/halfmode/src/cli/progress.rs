//! One live line on a terminal, one plain line per epoch elsewhere.

use crate::cli::output::Output;
use crate::cli::text;
use halfmode::train::job::{EpochRecord, Evaluation, Observer, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A bar with a message after it.
fn bar(output: &Output, len: u64, prefix: &str) -> ProgressBar {
    if !output.is_live() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(len);
    let template = if output.color() { "{prefix}{bar:10.cyan} {wide_msg}" } else { "{prefix}{bar:10} {wide_msg}" };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("━╸─"));
    bar.set_prefix(prefix.to_owned());
    bar
}

/// `0.0171@64 0.0175@128`
fn errors(eval: &BTreeMap<String, Evaluation>) -> String {
    if eval.is_empty() {
        return "-".to_owned();
    }
    let mut sorted: Vec<(&String, &Evaluation)> = eval.iter().collect();
    sorted.sort_by_key(|(label, _)| (label.parse::<u64>().unwrap_or(u64::MAX), label.as_str()));
    sorted.into_iter().map(|(label, errors)| format!("{:.4}@{label}", errors.l2)).collect::<Vec<_>>().join(" ")
}

/// `NLL 2.8412`: what a task measures.
fn measures(metrics: &BTreeMap<String, f64>) -> String {
    metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect::<Vec<_>>().join(" ")
}

/// Test errors, or what a task measures instead.
fn tested(eval: &BTreeMap<String, Evaluation>, metrics: &BTreeMap<String, f64>) -> String {
    if eval.is_empty() && !metrics.is_empty() { measures(metrics) } else { errors(eval) }
}

/// Watches training.
pub(crate) struct Watch<'a> {
    output: &'a Output,
    bar: ProgressBar,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(output: &'a Output, n_steps: u64, done: u64) -> Self {
        let bar = bar(output, n_steps, "");
        bar.set_position(done);
        Watch { output, bar }
    }

    /// Takes the live line away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, line: &str) {
        if self.bar.is_hidden() { self.output.note(line) } else { self.bar.println(line) }
    }
}

impl Observer for Watch<'_> {
    fn step(&mut self, progress: &Progress) {
        self.bar.set_position(progress.step);
        let first = tested(&progress.eval, &progress.metrics);
        // What matters least comes last: narrow terminals cut it off.
        self.bar.set_message(format!(
            "epoch {}/{}  loss {:.4}  test {}  left {}  {:.0} samples/s  mem {}/{}  scale {}  skipped {}",
            progress.epoch,
            progress.n_epochs,
            progress.loss,
            if progress.eval.is_empty() { &first } else { first.split(' ').next().unwrap_or_default() },
            text::seconds(progress.seconds_left),
            progress.samples_per_s,
            text::bytes(progress.live_bytes),
            text::bytes(progress.peak_bytes),
            progress.loss_scale,
            progress.skipped_steps,
        ));
    }

    fn epoch(&mut self, record: &EpochRecord, n_epochs: u64) {
        let left = record.seconds / record.epoch.max(1) as f64 * n_epochs.saturating_sub(record.epoch) as f64;
        self.say(&format!(
            "epoch {}/{n_epochs}  loss {:.4}  test {}  {:.0} samples/s  peak {}  scale {}  skipped {}  left {}",
            record.epoch,
            record.loss,
            tested(&record.eval, &record.metrics),
            record.samples_per_s,
            text::bytes(record.peak_bytes),
            record.loss_scale,
            record.skipped_steps,
            text::seconds(left),
        ));
    }

    fn note(&mut self, text: &str) {
        self.say(text);
    }
}

/// Watches data being made, from any thread.
pub(crate) struct DataWatch<'a> {
    output: &'a Output,
    current: Mutex<Option<(String, ProgressBar)>>,
}

impl<'a> DataWatch<'a> {
    pub(crate) fn new(output: &'a Output) -> Self {
        DataWatch { output, current: Mutex::new(None) }
    }

    /// `done` of `n` samples of `what` are there.
    pub(crate) fn report(&self, what: &str, done: usize, n: usize) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|(name, _)| name != what) {
            let bar = bar(self.output, n as u64, &format!("data {what} "));
            if bar.is_hidden() {
                self.output.note(&format!("data {what}: making {n} samples"));
            }
            *current = Some((what.to_owned(), bar));
        }
        if let Some((_, bar)) = &*current {
            // Counts may arrive out of order.
            bar.set_position(bar.position().max(done as u64));
            bar.set_message(format!("{}/{n}  left {}", bar.position(), text::seconds(bar.eta().as_secs_f64())));
            if done == n {
                bar.finish_and_clear();
            }
        }
    }
}
