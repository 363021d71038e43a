//! A run: the loop over epochs, and the directory it writes.

use crate::job::model_file::{FORMAT_VERSION, Metadata};
use crate::job::observer::nans_from_null;
use crate::job::run_curves::draw_curves;
use crate::job::run_folder;
use crate::job::{
    EpochRecord, Evaluation, JobConfig, JobData, JobError, JobPlan, Observer, Progress, ScaleRecord, TrainState,
    Trainer, plan_for, write_report,
};
use crate::pictures::{Field, moduli_png, prediction_png};
use crate::{MetricsLog, atomic_write, write_named};
use halfmode_data::shuffled;
use halfmode_precision::Domain;
use halfmode_tensor::Device;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

/// Why a run was asked to stop early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

/// How a run directory is taken.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The directory.
    pub out: PathBuf,
    /// Go on from its newest checkpoint; from the beginning if the run died before the first.
    pub resume: bool,
    /// Go on from this checkpoint instead.
    pub resume_from: Option<PathBuf>,
    /// Write into it although it is not empty.
    pub force: bool,
    /// Facts about machine and versions, for `environment.json` and the report.
    pub environment: BTreeMap<String, String>,
    /// Test samples to draw per test set.
    pub n_plots: usize,
}

/// `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Whether all epochs were done.
    pub finished: bool,
    /// Epochs done.
    pub epochs: u64,
    /// Steps done, skipped ones included.
    pub steps: u64,
    /// Seconds of all sessions.
    pub seconds: f64,
    /// The ledger's peak.
    pub peak_bytes: usize,
    /// The most that the process held of a GPU's memory; `None` on a CPU.
    #[serde(default)]
    pub device_peak_bytes: Option<usize>,
    /// What planning said the ledger's peak would be.
    pub planned_peak_bytes: usize,
    /// Most bytes of saved values, activations and scratch at once.
    pub peak_activation_bytes: usize,
    /// Real scalars of all parameters.
    pub n_parameters: usize,
    /// Steps skipped because something was not finite.
    pub skipped_steps: u64,
    /// Loss scale at the end.
    pub final_loss_scale: f64,
    /// Errors by resolution; of operators on fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, Evaluation>,
    /// What a [task](crate::task) measured on held-out samples.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nans_from_null")]
    pub metrics: BTreeMap<String, f64>,
    /// What a [task](crate::task) is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<About>,
}

/// A run in words, for a report that needs neither data nor model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The data in a line.
    pub data: String,
    /// The model in a line.
    pub model: String,
}

/// A job with its directory.
#[derive(Debug)]
pub struct Run {
    trainer: Trainer,
    plan: JobPlan,
    options: RunOptions,
    metrics: MetricsLog,
    scales: MetricsLog,
    eval: BTreeMap<String, Evaluation>,
    /// The ledger's activation peak over training steps.
    peak_activation_bytes: usize,
    peak_bytes: usize,
    /// The most that an earlier session held of a GPU's memory.
    device_peak_bytes: Option<usize>,
    /// Held as long as the run lives.
    _lock: Option<File>,
}

/// Checkpoints of steps that are kept besides `latest` and `best`.
const KEPT_CHECKPOINTS: usize = 2;

impl Run {
    /// Prepares the directory and the trainer.
    ///
    /// # Errors
    /// [`JobError::OutNotEmpty`], [`JobError::OutInUse`] if another process writes there,
    /// [`JobError::Resume`], and those of [`Trainer::new`].
    pub fn new(config: JobConfig, device: &Device, data: JobData, options: RunOptions) -> Result<Self, JobError> {
        let out = &options.out;
        let resumes = options.resume || options.resume_from.is_some();
        if !run_folder::is_unused(out) && !resumes && !options.force {
            return Err(JobError::OutNotEmpty { path: out.clone() });
        }
        let shapes = data.shapes();
        let plan = plan_for(&config, &shapes, device.target())?;
        let mut trainer = Trainer::new(config.clone(), device, &shapes, Some(data))?;
        let lock = run_folder::take(out)?;
        let text = toml::to_string(&config)
            .map_err(|err| JobError::Config { key: "config".to_owned(), why: err.to_string() })?;
        let metrics_path = out.join("metrics.jsonl");
        let newest = || run_folder::newest_checkpoint(out);
        let checkpoint = options.resume_from.clone().or_else(|| newest().filter(|_| options.resume));
        let scales_path = out.join("loss-scale.jsonl");
        let up_to = |key: &'static str, last: u64| {
            move |record: &serde_json::Map<String, serde_json::Value>| {
                record.get(key).and_then(serde_json::Value::as_u64).is_some_and(|at| at <= last)
            }
        };
        let (metrics, scales) = match checkpoint {
            Some(checkpoint) => {
                let state = run_folder::restore(&mut trainer, out, &checkpoint)?;
                atomic_write(out.join("config.toml"), text.as_bytes())?;
                let metrics = MetricsLog::resume(&metrics_path, up_to("epoch", state.epoch))?;
                (metrics, MetricsLog::resume(&scales_path, up_to("step", state.step))?)
            }
            None => {
                run_folder::remove_checkpoints(out)?;
                // The first file: it says that a run began here.
                atomic_write(out.join("config.toml"), text.as_bytes())?;
                (MetricsLog::create(&metrics_path)?, MetricsLog::create(&scales_path)?)
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
        Ok(Run {
            trainer,
            plan,
            options,
            metrics,
            scales,
            eval: BTreeMap::new(),
            peak_activation_bytes,
            peak_bytes,
            device_peak_bytes,
            _lock: lock,
        })
    }

    /// What planning said.
    #[must_use]
    pub fn plan(&self) -> &JobPlan {
        &self.plan
    }

    /// The trainer.
    #[must_use]
    pub fn trainer(&self) -> &Trainer {
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
        let session = Session {
            start: Instant::now(),
            before: self.trainer.state().seconds,
            first_step: self.trainer.state().step,
        };
        let outcome = self.epochs(observer, stop, &session);
        self.trainer.state.seconds = session.seconds();
        match outcome {
            Ok(stopped) => {
                let summary = self.finish(stopped)?;
                Ok((summary, stopped))
            }
            Err(JobError::Diverged { epoch, step, why, .. }) => {
                let latest = self.options.out.join("checkpoints/latest");
                let checkpoint = latest.exists().then_some(latest);
                // The directory still tells how far the run came; a second failure changes nothing.
                let written = self.write_summary(false).and_then(|_| self.describe());
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
        let n_epochs = self.trainer.config().train.epochs;
        let batch_size = self.trainer.config().train.batch_size;
        let device = self.trainer.device().clone();
        while self.trainer.state().epoch < n_epochs {
            let epoch = self.trainer.state().epoch;
            let order = shuffled(self.trainer.n_train(), self.trainer.config().seed, epoch);
            let (start, first_batch) = (Instant::now(), self.trainer.state().batch);
            device.reset_peak();
            let mut batches = order.chunks(batch_size).skip(first_batch as usize).peekable();
            while let Some(indices) = batches.next() {
                if let Some(reason) = stop() {
                    self.note_peaks();
                    self.save(session)?;
                    return Ok(Some(reason));
                }
                let scale = self.trainer.loss_scale();
                let step = self.trainer.step_before(indices, batches.peek().copied().unwrap_or_default())?;
                self.note_scale(scale, step.applied)?;
                self.trainer.state.batch += 1;
                observer.step(&self.progress(session));
            }
            let seconds = start.elapsed().as_secs_f64();
            self.peak_activation_bytes = self.peak_activation_bytes.max(device.memory().activations.peak);
            let n_samples = order.len() - (first_batch as usize).saturating_mul(batch_size).min(order.len());
            let learning_rate = self.trainer.learning_rate();
            let loss = self.trainer.state().mean_loss();
            // Other resolutions cost more than they tell on the way: they are tested at the end.
            self.eval = if epoch + 1 == n_epochs {
                self.trainer.evaluate_all()?
            } else {
                self.trainer.evaluate_on_the_way()?
            };
            self.note_peaks();
            let metric = self.first_test_error();
            self.trainer.end_epoch(metric)?;
            let metric = metric.filter(|error| error.is_finite());
            let state = self.trainer.state();
            let record = EpochRecord {
                epoch: state.epoch,
                step: state.step,
                loss,
                eval: self.eval.clone(),
                metrics: BTreeMap::new(),
                learning_rate,
                loss_scale: self.trainer.loss_scale(),
                skipped_steps: state.skipped_steps,
                samples_per_s: n_samples as f64 / seconds.max(1e-9),
                seconds: session.seconds(),
                peak_bytes: self.peak_bytes,
            };
            self.metrics.append(&record)?;
            observer.epoch(&record, n_epochs);
            let is_best = metric.is_some_and(|error| self.trainer.state().best.is_none_or(|best| error < best));
            if is_best {
                self.trainer.state.best = metric;
            }
            let every = self.trainer.config().train.checkpoint_every;
            // The best model first: a checkpoint that knows of it must not be there without it.
            if is_best {
                self.save_best()?;
            }
            // An epoch whose errors are not finite is no place to go on from.
            if metric.is_some() && (is_best || record.epoch.is_multiple_of(every) || record.epoch == n_epochs) {
                self.save(session)?;
            }
        }
        Ok(None)
    }

    fn first_test_error(&self) -> Option<f64> {
        let label = self.trainer.test_labels().next()?;
        self.eval.get(label).map(|errors| errors.l2)
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
            eval: self.eval.clone(),
            metrics: BTreeMap::new(),
            samples_per_s: done * config.train.batch_size as f64 / elapsed.max(1e-9),
            live_bytes: memory.total.live,
            peak_bytes: memory.total.peak.max(self.peak_bytes),
            loss_scale: self.trainer.loss_scale(),
            skipped_steps: state.skipped_steps,
            seconds_left: elapsed / done * n_steps.saturating_sub(state.step) as f64,
        }
    }

    fn metadata(&self, state: Option<TrainState>) -> Result<serde_json::Value, JobError> {
        let config = self.trainer.config();
        let metadata = Metadata {
            format_version: FORMAT_VERSION,
            config: config.model.clone(),
            normalisers: Some(self.trainer.normalisers().clone()),
            precision: config.precision.clone(),
            job: Some(config.clone()),
            state,
        };
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

    /// Writes the model alone.
    fn save_best(&self) -> Result<(), JobError> {
        let entries = crate::Entry::parameters(self.trainer.params())?;
        Ok(write_named(self.options.out.join("checkpoints/best"), &entries, &self.metadata(None)?)?)
    }

    fn write_summary(&self, finished: bool) -> Result<Summary, JobError> {
        let state = self.trainer.state();
        let summary = Summary {
            finished,
            epochs: state.epoch,
            steps: state.step,
            seconds: state.seconds,
            peak_bytes: self.peak_bytes.max(self.trainer.device().memory().total.peak),
            device_peak_bytes: self.trainer.device().held_peak_bytes().max(self.device_peak_bytes),
            planned_peak_bytes: self.plan.peak_bytes(),
            peak_activation_bytes: self.peak_activation_bytes,
            n_parameters: self.trainer.params().n_scalars(),
            skipped_steps: state.skipped_steps,
            final_loss_scale: self.trainer.loss_scale(),
            eval: self.eval.clone(),
            metrics: BTreeMap::new(),
            about: None,
        };
        let text = serde_json::to_vec_pretty(&summary).unwrap_or_default();
        atomic_write(self.options.out.join("summary.json"), &text)?;
        let memory: Vec<_> = self
            .trainer
            .device()
            .memory()
            .iter()
            .map(|(purpose, usage)| (purpose.name(), usage.live, usage.peak))
            .collect();
        let planned: Vec<_> = self.plan.memory.iter().map(|(purpose, usage)| (purpose.name(), usage.peak)).collect();
        let memory = serde_json::json!({ "purposes": memory, "planned": planned });
        atomic_write(self.options.out.join("memory.json"), memory.to_string().as_bytes())?;
        Ok(summary)
    }

    fn finish(&mut self, stopped: Option<StopReason>) -> Result<Summary, JobError> {
        if self.eval.len() < self.trainer.test_labels().count() {
            self.eval = self.trainer.evaluate_all()?;
        }
        let summary = self.write_summary(stopped.is_none())?;
        self.draw()?;
        if stopped.is_none() {
            let report = serde_json::to_vec_pretty(&self.trainer.precision_report()?).unwrap_or_default();
            atomic_write(self.options.out.join("precision.json"), &report)?;
        }
        self.describe()?;
        Ok(summary)
    }

    /// Draws the curves and writes the report.
    fn describe(&self) -> Result<(), JobError> {
        draw_curves(&self.options.out)?;
        write_report(&self.options.out)?;
        Ok(())
    }

    /// Draws the first test samples of every test set.
    fn draw(&self) -> Result<(), JobError> {
        let trainer = &self.trainer;
        for (idx, label) in trainer.test_labels().enumerate() {
            let test = trainer.test(idx);
            let (grid, domain) = (&test.shape.grid, test.shape.domain);
            let len = grid.iter().product::<usize>() * domain.scalars();
            for sample in 0..self.options.n_plots.min(test.shape.n) {
                let prediction = trainer.predict(test, &[sample])?;
                let mut input = test.x().batch(&[sample])?.to_ndarray::<f32>()?;
                trainer.normalisers().input.decode(&mut input.view_mut())?;
                let input = input.into_raw_vec_and_offset().0;
                let truth = test.y().values(&[sample])?;
                let png = render_panels([&input[..len], &truth[..len], &prediction[..len]], grid, domain)?;
                atomic_write(self.options.out.join(format!("plots/{label}-sample-{sample}.png")), &png)?;
            }
        }
        Ok(())
    }
}

/// The four panels of one sample: input, truth, prediction, error. Of complex fields, whose values are pairs,
/// their moduli: the error's is that of the complex difference.
///
/// # Errors
/// [`JobError::Config`] if the fields cannot be drawn.
pub fn render_panels(fields: [&[f32]; 3], grid: &[usize], domain: Domain) -> Result<Vec<u8>, JobError> {
    let [input, truth, prediction] = fields;
    let draw = || -> Result<Vec<u8>, crate::pictures::Error> {
        match domain {
            Domain::Real => {
                let field = |data| Field::central(data, grid);
                prediction_png(field(input)?, field(truth)?, field(prediction)?)
            }
            Domain::Complex => {
                let difference: Vec<f32> = prediction.iter().zip(truth).map(|(p, t)| p - t).collect();
                let [input, truth, prediction, error] = [input, truth, prediction, &difference].map(moduli);
                let field = |data| Field::central(data, grid);
                moduli_png([field(&input)?, field(&truth)?, field(&prediction)?, field(&error)?])
            }
        }
    };
    draw().map_err(|err| JobError::Config { key: "plots".to_owned(), why: err.to_string() })
}

/// `|z|` of interleaved pairs.
fn moduli(pairs: &[f32]) -> Vec<f32> {
    pairs.chunks_exact(2).map(|z| z[0].hypot(z[1])).collect()
}

/// Time of a session on top of earlier ones.
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
