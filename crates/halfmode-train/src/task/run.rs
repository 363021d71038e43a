//! A task's run: the loop over epochs, and the directory it writes.

use crate::job::model_file::{FORMAT_VERSION, read_named_checked};
use crate::job::run_folder;
use crate::job::{
    About, EpochRecord, JobError, JobPlan, Observer, Progress, RunOptions, ScaleRecord, StopReason, Summary, TrainState,
};
use crate::task::{Task, TaskConfig, TaskModel, TaskTrainer, plan, write_report};
use crate::{MetricsLog, atomic_write, write_named};
use halfmode_data::shuffled;
use halfmode_precision::PrecisionConfig;
use halfmode_tensor::Device;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The JSON object under `halfmode` in the metadata of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Metadata {
    format_version: u64,
    config: TaskModel,
    precision: PrecisionConfig,
    job: TaskConfig,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<TrainState>,
}

/// Checkpoints of steps that are kept besides `latest` and `best`.
const KEPT_CHECKPOINTS: usize = 2;

/// A task with its directory.
#[derive(Debug)]
pub struct TaskRun {
    trainer: TaskTrainer,
    plan: JobPlan,
    options: RunOptions,
    metrics: MetricsLog,
    scales: MetricsLog,
    /// What was measured last.
    measured: BTreeMap<String, f64>,
    peak_activation_bytes: usize,
    peak_bytes: usize,
    /// The most that an earlier session held of a GPU's memory.
    device_peak_bytes: Option<usize>,
    /// Held as long as the run lives.
    _lock: Option<File>,
}

/// When a session began, and after how many steps and seconds.
struct Session {
    start: Instant,
    before: f64,
    first_step: u64,
}

impl Session {
    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64()
    }
}

impl TaskRun {
    /// Prepares the directory and the trainer.
    ///
    /// # Errors
    /// [`JobError::OutNotEmpty`], [`JobError::OutInUse`] if another process writes there, [`JobError::Resume`], and
    /// those of [`TaskTrainer::new`].
    pub fn new(
        config: TaskConfig,
        task: &Arc<dyn Task>,
        device: &Device,
        options: RunOptions,
    ) -> Result<Self, JobError> {
        let out = &options.out;
        let resumes = options.resume || options.resume_from.is_some();
        if !run_folder::is_unused(out) && !resumes && !options.force {
            return Err(JobError::OutNotEmpty { path: out.clone() });
        }
        let plan = plan(&config, task, device.target())?;
        let mut trainer = TaskTrainer::new(config.clone(), task, device)?;
        let lock = run_folder::take(out)?;
        let text = toml::to_string(&config)
            .map_err(|err| JobError::Config { key: "config".to_owned(), why: err.to_string() })?;
        let newest = || run_folder::newest_checkpoint(out);
        let checkpoint = options.resume_from.clone().or_else(|| newest().filter(|_| options.resume));
        let [metrics, scales] = ["metrics.jsonl", "loss-scale.jsonl"].map(|name| out.join(name));
        let up_to = |key: &'static str, last: u64| {
            move |record: &serde_json::Map<String, serde_json::Value>| {
                record.get(key).and_then(serde_json::Value::as_u64).is_some_and(|at| at <= last)
            }
        };
        let (metrics, scales) = match checkpoint {
            Some(checkpoint) => {
                let state = restore(&mut trainer, out, &checkpoint)?;
                atomic_write(out.join("config.toml"), text.as_bytes())?;
                (
                    MetricsLog::resume(&metrics, up_to("epoch", state.epoch))?,
                    MetricsLog::resume(&scales, up_to("step", state.step))?,
                )
            }
            None => {
                run_folder::remove_checkpoints(out)?;
                // The first file: it says that a run began here.
                atomic_write(out.join("config.toml"), text.as_bytes())?;
                (MetricsLog::create(&metrics)?, MetricsLog::create(&scales)?)
            }
        };
        let environment = serde_json::to_vec_pretty(&options.environment).unwrap_or_default();
        atomic_write(out.join("environment.json"), &environment)?;
        // A resumed run keeps the peaks of its earlier sessions.
        let earlier = std::fs::read(out.join("summary.json")).ok().filter(|_| resumes);
        let earlier = earlier.and_then(|text| serde_json::from_slice::<Summary>(&text).ok());
        let (peak_activation_bytes, peak_bytes, device_peak_bytes) = earlier.map_or((0, 0, None), |summary| {
            (summary.peak_activation_bytes, summary.peak_bytes, summary.device_peak_bytes)
        });
        Ok(TaskRun {
            trainer,
            plan,
            options,
            metrics,
            scales,
            measured: BTreeMap::new(),
            peak_activation_bytes,
            peak_bytes,
            device_peak_bytes,
            _lock: lock,
        })
    }

    /// The trainer.
    #[must_use]
    pub fn trainer(&self) -> &TaskTrainer {
        &self.trainer
    }

    /// Trains to the end or until `stop` says so; then saves, draws and writes the report.
    ///
    /// # Errors
    /// [`JobError::Diverged`] with the newest checkpoint, and those of writing files.
    pub fn train(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> Option<StopReason>,
    ) -> Result<(Summary, Option<StopReason>), JobError> {
        let state = self.trainer.state();
        let session = Session { start: Instant::now(), before: state.seconds, first_step: state.step };
        let outcome = self.epochs(observer, stop, &session);
        self.trainer.state.seconds = session.seconds();
        match outcome {
            Ok(stopped) => Ok((self.finish(stopped)?, stopped)),
            Err(JobError::Diverged { epoch, step, why, .. }) => {
                let latest = self.options.out.join("checkpoints/latest");
                let checkpoint = latest.exists().then_some(latest);
                let written = self.write_summary(false).and_then(|_| write_report(&self.options.out));
                if let Err(err) = written {
                    observer.note(&format!("the summary could not be written: {err}"));
                }
                Err(JobError::Diverged { epoch, step, why, checkpoint })
            }
            Err(err) => Err(err),
        }
    }

    fn epochs(
        &mut self,
        observer: &mut dyn Observer,
        stop: &dyn Fn() -> Option<StopReason>,
        session: &Session,
    ) -> Result<Option<StopReason>, JobError> {
        let (n_epochs, batch_size) = (self.trainer.config().train.epochs, self.trainer.config().train.batch_size);
        let device = self.trainer.device().clone();
        while self.trainer.state().epoch < n_epochs {
            let epoch = self.trainer.state().epoch;
            let order = shuffled(self.trainer.task().n_train(), self.trainer.config().seed, epoch);
            let (start, first_batch) = (Instant::now(), self.trainer.state().batch as usize);
            device.reset_peak();
            for indices in order.chunks(batch_size).skip(first_batch) {
                if let Some(reason) = stop() {
                    if self.trainer.state().batch > 0 {
                        // Of the weights before this epoch.
                        self.measured.clear();
                    }
                    self.note_peaks();
                    self.save(session)?;
                    return Ok(Some(reason));
                }
                let before = self.trainer.loss_scale();
                let step = self.trainer.step(indices)?;
                self.note_scale(before, step.applied)?;
                self.trainer.state.batch += 1;
                observer.step(&self.progress(session));
            }
            let seconds = start.elapsed().as_secs_f64();
            self.peak_activation_bytes = self.peak_activation_bytes.max(device.memory().activations.peak);
            let n_samples = order.len().saturating_sub(first_batch.saturating_mul(batch_size));
            let (learning_rate, loss) = (self.trainer.learning_rate(), self.trainer.state().mean_loss());
            let measured = self.trainer.evaluate()?;
            let criterion = measured.first().map(|(_, value)| *value);
            self.measured = measured.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            self.note_peaks();
            self.trainer.end_epoch(criterion)?;
            let criterion = criterion.filter(|value| value.is_finite());
            let state = self.trainer.state();
            let record = EpochRecord {
                epoch: state.epoch,
                step: state.step,
                loss,
                eval: BTreeMap::new(),
                metrics: self.measured.clone(),
                learning_rate,
                loss_scale: self.trainer.loss_scale(),
                skipped_steps: state.skipped_steps,
                samples_per_s: n_samples as f64 / seconds.max(1e-9),
                seconds: session.seconds(),
                peak_bytes: self.peak_bytes,
            };
            self.metrics.append(&record)?;
            observer.epoch(&record, n_epochs);
            let is_best = criterion.is_some_and(|it| self.trainer.state().best.is_none_or(|best| it < best));
            if is_best {
                self.trainer.state.best = criterion;
                let entries = crate::Entry::parameters(self.trainer.params())?;
                write_named(self.options.out.join("checkpoints/best"), &entries, &self.metadata(None)?)?;
            }
            let every = self.trainer.config().train.checkpoint_every;
            // An epoch whose criterion is not finite is no place to go on from.
            if criterion.is_some() && (is_best || record.epoch.is_multiple_of(every) || record.epoch == n_epochs) {
                self.save(session)?;
            }
        }
        Ok(None)
    }

    /// Logs a step that was skipped or moved the loss scale from `before`.
    fn note_scale(&mut self, before: f64, applied: bool) -> Result<(), JobError> {
        let scale = self.trainer.loss_scale();
        if !applied || scale.to_bits() != before.to_bits() {
            let step = self.trainer.state().step;
            self.scales.append(&ScaleRecord { step, loss_scale: scale, skipped: !applied })?;
        }
        Ok(())
    }

    fn note_peaks(&mut self) {
        self.peak_bytes = self.peak_bytes.max(self.trainer.device().memory().total.peak);
    }

    fn progress(&self, session: &Session) -> Progress {
        let (state, config) = (self.trainer.state(), self.trainer.config());
        let n_steps = self.trainer.steps_per_epoch() * config.train.epochs;
        let done = (state.step - session.first_step).max(1) as f64;
        let elapsed = session.start.elapsed().as_secs_f64();
        let memory = self.trainer.device().memory();
        Progress {
            epoch: state.epoch + 1,
            n_epochs: config.train.epochs,
            step: state.step,
            n_steps,
            loss: state.mean_loss(),
            eval: BTreeMap::new(),
            metrics: self.measured.clone(),
            samples_per_s: done * config.train.batch_size as f64 / elapsed.max(1e-9),
            live_bytes: memory.total.live,
            peak_bytes: memory.total.peak.max(self.peak_bytes),
            loss_scale: self.trainer.loss_scale(),
            skipped_steps: state.skipped_steps,
            seconds_left: elapsed / done * n_steps.saturating_sub(state.step) as f64,
        }
    }

    fn metadata(&self, state: Option<TrainState>) -> Result<serde_json::Value, JobError> {
        let job = self.trainer.config().clone();
        let (config, precision) = (job.model.clone(), job.precision.clone());
        let metadata = Metadata { format_version: FORMAT_VERSION, config, precision, job, state };
        serde_json::to_value(metadata).map_err(|source| crate::Error::ToJson { what: "the metadata", source }.into())
    }

    /// Writes a checkpoint and points `latest` to it.
    fn save(&mut self, session: &Session) -> Result<(), JobError> {
        self.trainer.state.seconds = session.seconds();
        let folder = self.options.out.join("checkpoints");
        let state = self.trainer.snapshot();
        let path = folder.join(format!("step-{:08}.safetensors", state.step));
        write_named(&path, &self.trainer.entries()?, &self.metadata(Some(state))?)?;
        run_folder::link(&path, &folder.join("latest"))?;
        let mut old = run_folder::step_files(&folder);
        old.truncate(old.len().saturating_sub(KEPT_CHECKPOINTS));
        for path in old {
            std::fs::remove_file(&path).map_err(|err| crate::Error::write(&path, err))?;
        }
        Ok(())
    }

    fn write_summary(&self, finished: bool) -> Result<Summary, JobError> {
        let (state, device) = (self.trainer.state(), self.trainer.device());
        let summary = Summary {
            finished,
            epochs: state.epoch,
            steps: state.step,
            seconds: state.seconds,
            peak_bytes: self.peak_bytes.max(device.memory().total.peak),
            device_peak_bytes: device.held_peak_bytes().max(self.device_peak_bytes),
            planned_peak_bytes: self.plan.peak_bytes(),
            peak_activation_bytes: self.peak_activation_bytes,
            n_parameters: self.trainer.params().n_scalars(),
            skipped_steps: state.skipped_steps,
            final_loss_scale: self.trainer.loss_scale(),
            eval: BTreeMap::new(),
            metrics: self.measured.clone(),
            about: Some(About { data: self.trainer.task().describe_data(), model: self.trainer.task().describe() }),
        };
        let text = serde_json::to_vec_pretty(&summary).unwrap_or_default();
        atomic_write(self.options.out.join("summary.json"), &text)?;
        let purposes: Vec<_> =
            device.memory().iter().map(|(purpose, usage)| (purpose.name(), usage.live, usage.peak)).collect();
        let planned: Vec<_> = self.plan.memory.iter().map(|(purpose, usage)| (purpose.name(), usage.peak)).collect();
        let memory = serde_json::json!({ "purposes": purposes, "planned": planned });
        atomic_write(self.options.out.join("memory.json"), memory.to_string().as_bytes())?;
        Ok(summary)
    }

    fn finish(&mut self, stopped: Option<StopReason>) -> Result<Summary, JobError> {
        let trainer = &self.trainer;
        let mut measured = if self.measured.is_empty() { trainer.evaluate()? } else { Vec::new() };
        let at_end = trainer.within_range(|| trainer.task().evaluate_at_end(&trainer.trained()))?;
        measured.extend(at_end.unwrap_or_default());
        self.measured.extend(measured.into_iter().map(|(name, value)| (name.to_owned(), value)));
        // What pictures take is nothing that a plan speaks of.
        let summary = self.write_summary(stopped.is_none())?;
        if self.options.n_plots > 0 {
            let trainer = &self.trainer;
            let pictures = trainer.within_range(|| trainer.task().pictures(&trainer.trained()))?;
            for (name, png) in pictures.unwrap_or_default() {
                atomic_write(self.options.out.join(format!("plots/{name}.png")), &png)?;
            }
        }
        write_report(&self.options.out)?;
        Ok(summary)
    }
}

/// What a checkpoint of a task holds.
fn read_state(path: &Path, model: &TaskModel) -> Result<(BTreeMap<String, crate::Array>, TrainState), JobError> {
    let bad = |why: String| JobError::ModelFile { path: path.to_owned(), why };
    let (arrays, metadata) = read_named_checked(path)?;
    let metadata: Metadata =
        serde_json::from_value(metadata).map_err(|err| bad(format!("it has metadata that cannot be used: {err}")))?;
    let state = metadata.state.ok_or_else(|| bad("it holds a model but no training state".to_owned()))?;
    if metadata.config != *model {
        return Err(bad("it was written for another model than the configuration describes".to_owned()));
    }
    if !state.is_sound() {
        return Err(bad("its training state has counts that no run reaches".to_owned()));
    }
    Ok((arrays, state))
}

/// Restores a checkpoint, or names the newest other one that can be used.
fn restore(trainer: &mut TaskTrainer, out: &Path, path: &Path) -> Result<TrainState, JobError> {
    let model = trainer.config().model.clone();
    let restored = read_state(path, &model).and_then(|(arrays, state)| {
        trainer.restore(&arrays, state.clone())?;
        Ok(state)
    });
    restored.map_err(|err| {
        let why = match err {
            JobError::ModelFile { why, .. } => why,
            other => other.to_string(),
        };
        let mut others = run_folder::step_files(&out.join("checkpoints"));
        others.retain(|other| other != path);
        let older = others.into_iter().rev().find(|other| read_state(other, &model).is_ok());
        JobError::Resume { path: path.to_owned(), why, older }
    })
}
