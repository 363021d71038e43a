//! The training step and the evaluation.

use crate::job::fields::FieldSet;
#[cfg(feature = "cuda")]
use crate::job::gpu_step::GpuStep;
use crate::job::{DataShapes, Evaluation, JobConfig, JobData, JobError, LossKind, Normalisers};
use crate::{
    AdamW, Array, Entry, H1Loss, LpLoss, Reduction, Scheduler, SchedulerState, clip_factor, grad_stats, relative_h1,
    relative_l2,
};
use halfmode_autograd::{Cx, LeafId, Tape, Var};
use halfmode_nn::{Module, Params};
use halfmode_operators::Fno;
use halfmode_precision::{DynamicScaler, LossScale, PrecisionPolicy, ScalerState, Step};
use halfmode_tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything about a run that changes, but for tensors. Written to every checkpoint; a run that
/// reads it back goes on bit for bit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Epochs done.
    pub epoch: u64,
    /// Batches of the current epoch done.
    pub batch: u64,
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Steps skipped because something was not finite.
    pub skipped_steps: u64,
    /// Steps skipped one after another, up to now.
    pub skipped_in_a_row: u64,
    /// Sum of the losses of the current epoch's applied steps, over samples.
    pub loss_sum: f64,
    /// Samples of these steps.
    pub loss_samples: u64,
    /// Smallest test error of the first test set so far.
    pub best: Option<f64>,
    /// Seconds of all sessions.
    pub seconds: f64,
    /// Dynamic loss scale.
    pub scaler: Option<ScalerState>,
    /// Learning-rate schedule.
    pub scheduler: Option<SchedulerState>,
}

impl TrainState {
    /// Mean loss per sample of the current epoch's applied steps; not a number before the first.
    pub(crate) fn mean_loss(&self) -> f64 {
        if self.loss_samples == 0 { f64::NAN } else { self.loss_sum / self.loss_samples as f64 }
    }

    /// Whether a run can have come here: counts that can still be counted on, sums that are numbers.
    pub(crate) fn is_sound(&self) -> bool {
        let counts = [self.epoch, self.batch, self.step, self.skipped_steps, self.skipped_in_a_row, self.loss_samples];
        counts.iter().all(|&count| count < 1 << 53)
            && [self.loss_sum, self.seconds, self.best.unwrap_or(0.0)].iter().all(|sum| sum.is_finite())
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRecord {
    /// Mean loss per sample.
    pub loss: f64,
    /// Whether the weights moved.
    pub applied: bool,
}

/// A model with everything that trains it.
#[derive(Debug)]
pub struct Trainer {
    pub(super) config: JobConfig,
    pub(super) device: Device,
    pub(super) policy: Arc<PrecisionPolicy>,
    pub(super) fno: Fno,
    pub(super) params: Params,
    pub(super) optimizer: AdamW,
    pub(super) scheduler: Scheduler,
    pub(super) scaler: Option<DynamicScaler>,
    normalisers: Normalisers,
    pub(super) train: FieldSet,
    tests: Vec<FieldSet>,
    /// What a step on a GPU keeps for the next.
    #[cfg(feature = "cuda")]
    pub(super) gpu: Option<GpuStep>,
    pub(crate) state: TrainState,
}

/// Skipped steps in a row without a loss scale after which a run counts as diverged: nothing is
/// left to adapt.
const MAX_SKIPPED_IN_A_ROW: u64 = 10;

impl Trainer {
    /// Builds model, optimiser and data on a device. Without `data` (on the planning device) only
    /// the shapes are used.
    ///
    /// # Errors
    /// Those of the configuration, of data that do not fit the model, and of memory.
    pub fn new(
        config: JobConfig,
        device: &Device,
        shapes: &DataShapes,
        data: Option<JobData>,
    ) -> Result<Self, JobError> {
        let policy = Arc::new(config.validate_on(device)?);
        let fno = Fno::new(config.model.fno().clone())?;
        for shape in std::iter::once(&shapes.train).chain(&shapes.tests) {
            check_shape(&config, shape)?;
        }
        let normalisers = match &data {
            Some(data) => Normalisers::fit(&data.train)?,
            None => Normalisers::identity(&config.model)?,
        };
        let (train, tests) = match data {
            Some(data) => (Some(data.train), data.tests.into_iter().map(|(_, pairs)| Some(pairs)).collect()),
            None => (None, vec![None; shapes.tests.len()]),
        };
        let train = FieldSet::new(device, shapes.train.clone(), train, &normalisers, true)?;
        let tests = shapes
            .tests
            .iter()
            .zip(tests)
            .map(|(shape, pairs)| FieldSet::new(device, shape.clone(), pairs, &normalisers, false));
        let tests = tests.collect::<Result<Vec<_>, _>>()?;
        let params = Params::new(device, fno.param_specs(), &policy, config.seed)?;
        let optimizer = AdamW::new(config.optimizer.adamw(), &params, &policy)?;
        let scheduler = Scheduler::new(config.scheduler.over(config.train.epochs), config.optimizer.learning_rate)?;
        let scaler = match policy.loss_scale {
            LossScale::Dynamic(scaler) => Some(DynamicScaler::new(scaler)?),
            _ => None,
        };
        #[cfg(feature = "cuda")]
        let gpu = GpuStep::new(device, &train, config.train.batch_size)?;
        let (device, state) = (device.clone(), TrainState::default());
        Ok(Trainer {
            config,
            device,
            policy,
            fno,
            params,
            optimizer,
            scheduler,
            scaler,
            normalisers,
            train,
            tests,
            #[cfg(feature = "cuda")]
            gpu,
            state,
        })
    }

    /// The job.
    #[must_use]
    pub fn config(&self) -> &JobConfig {
        &self.config
    }

    /// Where it runs.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// In which formats.
    #[must_use]
    pub fn policy(&self) -> &PrecisionPolicy {
        &self.policy
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Where the run is.
    #[must_use]
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// How fields are normalised.
    #[must_use]
    pub fn normalisers(&self) -> &Normalisers {
        &self.normalisers
    }

    /// Labels of the test sets.
    pub fn test_labels(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|test| test.shape.label.as_str())
    }

    pub(crate) fn model(&self) -> &Fno {
        &self.fno
    }

    pub(crate) fn train_set(&self) -> &FieldSet {
        &self.train
    }

    pub(crate) fn test(&self, idx: usize) -> &FieldSet {
        &self.tests[idx]
    }

    /// Training samples.
    #[must_use]
    pub fn n_train(&self) -> usize {
        self.train.shape.n
    }

    /// Steps of an epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.train.shape.n.div_ceil(self.config.train.batch_size) as u64
    }

    /// The loss scale now; 1 without one.
    #[must_use]
    pub fn loss_scale(&self) -> f64 {
        self.scaler.as_ref().map_or(self.policy.loss_scale.initial(), DynamicScaler::scale)
    }

    /// Step size now.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.scheduler.learning_rate()
    }

    pub(crate) fn loss(&self, tape: &mut Tape, prediction: &Var, target: &Var) -> halfmode_autograd::Result<Var> {
        match self.config.train.loss {
            LossKind::L2 => {
                let loss = LpLoss { p: 2.0, relative: true, reduction: Reduction::Sum, measure: 1.0 };
                tape.apply(loss, &[prediction, target])
            }
            LossKind::H1 => {
                let loss = H1Loss { relative: true, reduction: Reduction::Sum, periodic: Vec::new(), measure: 1.0 };
                tape.apply(loss, &[prediction, target])
            }
        }
    }

    /// One step on the training samples of these indices: forward, loss, backward, update. A step in
    /// which something is not finite leaves the weights alone and is counted.
    ///
    /// # Errors
    /// [`JobError::Diverged`] when nothing is left to adapt; those of memory; on a GPU also more samples than a batch of
    /// the configuration has.
    pub fn step(&mut self, indices: &[usize]) -> Result<StepRecord, JobError> {
        self.step_before(indices, &[])
    }

    /// As [`Trainer::step`], while the samples of the step after it are already on their way to a GPU.
    ///
    /// # Errors
    /// Those of [`Trainer::step`].
    pub fn step_before(&mut self, indices: &[usize], next: &[usize]) -> Result<StepRecord, JobError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.gpu.take() {
            return self.step_on_gpu(gpu, indices, next);
        }
        // Where samples are already, nothing can be sent ahead.
        _ = next;
        let mut tape = Tape::new(Cx::new(&self.device, &self.policy));
        let loss = self.forward(&mut tape, self.train.x().batch(indices)?, || self.train.y().batch(indices))?;
        let observed = tape.take_observed();
        let sum = if self.device.launches() { loss.value().to_vec::<f64>()?[0] } else { 0.0 };
        let finite = sum.is_finite() && self.update(tape, loss)?;
        self.book(sum, finite, &observed, indices.len())
    }

    /// The loss of a batch, whose truth is asked for when the prediction is there.
    pub(super) fn forward(
        &self,
        tape: &mut Tape,
        x: Tensor,
        y: impl FnOnce() -> Result<Tensor, JobError>,
    ) -> Result<Var, JobError> {
        let weights = self.params.leaves(tape);
        let x = tape.constant(x);
        let prediction = self.fno.forward(tape, &weights, &[&x])?;
        drop((weights, x));
        let y = tape.constant(y()?);
        Ok(self.loss(tape, &prediction, &y)?)
    }

    /// Whether a step is taken once its loss is finite, whatever its gradients are.
    pub(super) fn loss_decides(&self) -> bool {
        self.policy.loss_scale == LossScale::None && self.config.train.clip_grad_norm.is_none()
    }

    /// Counts a step of `n` samples with this sum of losses.
    pub(super) fn book(
        &mut self,
        sum: f64,
        finite: bool,
        observed: &[(LeafId, Tensor)],
        n: usize,
    ) -> Result<StepRecord, JobError> {
        self.state.step += 1;
        let applied = self.settle(finite)?;
        if applied {
            self.params.observe(observed)?;
            self.state.loss_sum += sum;
            self.state.loss_samples += n as u64;
        }
        Ok(StepRecord { loss: sum / n as f64, applied })
    }

    /// Backward and optimiser; false if a gradient was not finite and nothing moved.
    fn update(&mut self, tape: Tape, loss: Var) -> Result<bool, JobError> {
        let scale = self.loss_scale();
        self.optimizer.set_learning_rate(self.scheduler.learning_rate());
        let is_final = self.loss_decides();
        let (params, optimizer) = (&mut self.params, &mut self.optimizer);
        if is_final {
            // Nothing can reject the step any more: each gradient is used the moment it is final.
            optimizer.begin_step();
            let mut failed = None;
            tape.backward(loss, scale, &mut |id, grad| {
                if let Err(err) = optimizer.update(id.0, &mut params.list[id.0], &grad, 1.0 / scale) {
                    failed.get_or_insert(err);
                }
                Ok(())
            })?;
            return failed.map_or(Ok(true), |err| Err(err.into()));
        }
        let mut grads: Vec<Option<Tensor>> = vec![None; params.list.len()];
        tape.backward(loss, scale, &mut |id, grad| {
            grads[id.0] = Some(grad);
            Ok(())
        })?;
        let stats = grad_stats(grads.iter().flatten())?;
        if !stats.finite {
            return Ok(false);
        }
        let clip = self.config.train.clip_grad_norm.map_or(1.0, |max| clip_factor(stats.norm / scale, max));
        optimizer.step(params, &grads, clip / scale)?;
        Ok(true)
    }

    /// Books a step: moves the loss scale, counts skips, and notices divergence.
    fn settle(&mut self, finite: bool) -> Result<bool, JobError> {
        let diverged = |state: &TrainState, why: String| JobError::Diverged {
            epoch: state.epoch + 1,
            step: state.step,
            why,
            checkpoint: None,
        };
        let applied = match &mut self.scaler {
            Some(scaler) => match scaler.update(!finite) {
                Ok(step) => step == Step::Apply,
                Err(err) => return Err(diverged(&self.state, err.to_string())),
            },
            None => finite,
        };
        if applied {
            self.state.skipped_in_a_row = 0;
            return Ok(true);
        }
        self.state.skipped_steps += 1;
        self.state.skipped_in_a_row += 1;
        if self.scaler.is_none() && self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            let why = format!("loss or gradients were not finite {MAX_SKIPPED_IN_A_ROW} steps in a row");
            return Err(diverged(&self.state, why));
        }
        Ok(false)
    }

    /// Ends an epoch: moves the schedule by the test error and starts new sums.
    ///
    /// # Errors
    /// Those of the schedule.
    pub fn end_epoch(&mut self, metric: Option<f64>) -> Result<(), JobError> {
        self.scheduler.end_epoch(metric)?;
        self.state.epoch += 1;
        self.state.batch = 0;
        (self.state.loss_sum, self.state.loss_samples) = (0.0, 0);
        Ok(())
    }

    /// Samples per evaluation batch: no more points at a time than in training.
    fn eval_batch(&self, test: &FieldSet) -> usize {
        let points = |grid: &[usize]| grid.iter().product::<usize>().max(1);
        (self.config.train.batch_size * points(&self.train.shape.grid) / points(&test.shape.grid))
            .clamp(1, test.shape.n.max(1))
    }

    /// De-normalised predictions for test samples of these indices, flat; complex values as pairs.
    ///
    /// # Errors
    /// Those of the model and of memory.
    pub(crate) fn predict(&self, test: &FieldSet, indices: &[usize]) -> Result<Vec<f32>, JobError> {
        let mut tape = Tape::new(Cx::inference(&self.device, &self.policy));
        let weights = self.params.leaves(&mut tape);
        let x = tape.constant(test.x().batch(indices)?);
        let prediction = self.fno.forward(&mut tape, &weights, &[&x])?;
        if !self.device.launches() {
            return Ok(Vec::new());
        }
        let mut prediction = prediction.value().to_ndarray::<f32>()?;
        self.normalisers.output.decode(&mut prediction.view_mut())?;
        Ok(prediction.into_raw_vec_and_offset().0)
    }

    /// Mean relative errors on one test set, in the training's precision. On the planning device:
    /// one batch, no numbers.
    ///
    /// # Errors
    /// Those of the model and of memory.
    pub fn evaluate(&self, idx: usize) -> Result<Evaluation, JobError> {
        let test = &self.tests[idx];
        let (mut l2, mut h1) = (0.0, 0.0);
        let indices: Vec<usize> = (0..test.shape.n).collect();
        for batch in indices.chunks(self.eval_batch(test)) {
            let prediction = self.predict(test, batch)?;
            if !self.device.launches() {
                break;
            }
            let truth = test.y().values(batch)?;
            let shape = test.shape.array(batch.len(), test.shape.c_out);
            l2 += relative_l2(&prediction, &truth, batch.len())?.iter().sum::<f64>();
            h1 += relative_h1(&prediction, &truth, &shape, &[])?.iter().sum::<f64>();
        }
        let n = test.shape.n.max(1) as f64;
        Ok(Evaluation { l2: l2 / n, h1: h1 / n })
    }

    /// All test sets by label.
    ///
    /// # Errors
    /// Those of [`Trainer::evaluate`].
    pub fn evaluate_all(&self) -> Result<BTreeMap<String, Evaluation>, JobError> {
        self.tests.iter().enumerate().map(|(idx, test)| Ok((test.shape.label.clone(), self.evaluate(idx)?))).collect()
    }

    /// The first test set, which steers schedule and best model, and all others on the training grid.
    ///
    /// # Errors
    /// Those of [`Trainer::evaluate`].
    pub fn evaluate_on_the_way(&self) -> Result<BTreeMap<String, Evaluation>, JobError> {
        let own = |(idx, test): &(usize, &FieldSet)| *idx == 0 || test.shape.grid == self.train.shape.grid;
        let tests = self.tests.iter().enumerate().filter(own);
        tests.map(|(idx, test)| Ok((test.shape.label.clone(), self.evaluate(idx)?))).collect()
    }

    /// The state of everything that is not a tensor, for a checkpoint.
    #[must_use]
    pub fn snapshot(&self) -> TrainState {
        let scaler = self.scaler.as_ref().map(DynamicScaler::state);
        TrainState { scaler, scheduler: Some(self.scheduler.state()), ..self.state.clone() }
    }

    /// The tensors of a checkpoint: parameters and the optimiser's state.
    ///
    /// # Errors
    /// Those of reading tensors.
    pub fn entries(&self) -> Result<Vec<Entry<'_>>, JobError> {
        let mut entries = Entry::parameters(&self.params)?;
        entries.extend(self.optimizer.entries(&self.params)?);
        Ok(entries)
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// Those of tensors that are missing or do not fit.
    pub fn restore(
        &mut self,
        arrays: &BTreeMap<String, Array>,
        state: TrainState,
        normalisers: Normalisers,
    ) -> Result<(), JobError> {
        normalisers.check(&self.config.model)?;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut self.gpu {
            gpu.forget();
        }
        crate::load_parameters(&mut self.params, arrays)?;
        self.optimizer.load(&self.params, arrays)?;
        if let LossScale::Dynamic(config) = self.policy.loss_scale
            && let Some(scaler) = state.scaler
        {
            self.scaler = Some(DynamicScaler::from_state(config, scaler)?);
        }
        if let Some(scheduler) = state.scheduler {
            let schedule = self.config.scheduler.over(self.config.train.epochs);
            self.scheduler = Scheduler::from_state(schedule, self.config.optimizer.learning_rate, scheduler)?;
        }
        self.normalisers = normalisers;
        self.state = state;
        Ok(())
    }
}

fn check_shape(config: &JobConfig, shape: &crate::job::FieldShape) -> Result<(), JobError> {
    let model = config.model.fno();
    let found = [&[shape.n, shape.c_in][..], &shape.grid].concat();
    let bad =
        |expected: String| Err(JobError::DataShape { what: format!("data set {}", shape.label), found, expected });
    if shape.domain != config.model.domain() {
        let wanted = if model.complex_data { "complex" } else { "real" };
        return bad(format!("{wanted} fields (model.complex_data = {})", model.complex_data));
    }
    if shape.grid.len() != model.n_modes.len() {
        let n_axes = model.n_modes.len();
        let maybe_complex = !model.complex_data && shape.grid.len() == n_axes + 1 && shape.grid.ends_with(&[2]);
        let hint = if maybe_complex {
            "; if its last axis is real and imaginary part, set model.complex_data = true"
        } else {
            ""
        };
        return bad(format!("{n_axes} spatial axes (model.n_modes has {n_axes}){hint}"));
    }
    if shape.c_in != model.in_channels || shape.c_out != model.out_channels {
        let (c_in, c_out) = (model.in_channels, model.out_channels);
        return bad(format!("{c_in} channels in and {c_out} out, the data have {} and {}", shape.c_in, shape.c_out));
    }
    if shape.n == 0 {
        return bad("at least one sample".to_owned());
    }
    if shape.grid.contains(&0) {
        return bad("points on every axis, its grid is empty".to_owned());
    }
    for (axis, (&n, &kept)) in shape.grid.iter().zip(&model.stored_modes()).enumerate() {
        let resolved = model.resolved_modes(axis, n);
        if kept > resolved {
            return Err(halfmode_operators::Error::Grid { axis, n, resolved, kept }.into());
        }
    }
    Ok(())
}
