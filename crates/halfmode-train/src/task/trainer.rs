//! A task's training step and evaluation.

use crate::job::{JobError, JobPlan, StepRecord, TrainState};
use crate::task::{Task, TaskConfig, Trained};
use crate::{AdamW, Array, Entry, Scheduler, clip_factor, grad_stats};
use halfmode_autograd::{Cx, Tape};
use halfmode_nn::Params;
use halfmode_precision::{DynamicScaler, LossScale, PrecisionPolicy, Step};
use halfmode_tensor::{Device, Target, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A task with everything that trains it.
#[derive(Debug)]
pub struct TaskTrainer {
    config: TaskConfig,
    device: Device,
    policy: Arc<PrecisionPolicy>,
    task: Arc<dyn Task>,
    params: Params,
    optimizer: AdamW,
    scheduler: Scheduler,
    scaler: Option<DynamicScaler>,
    pub(crate) state: TrainState,
}

/// Skipped steps in a row without a loss scale after which a run counts as diverged.
const MAX_SKIPPED_IN_A_ROW: u64 = 10;

impl TaskTrainer {
    /// Weights and optimiser of a configuration's task, see [`build`](crate::task::build), on a device.
    ///
    /// # Errors
    /// Those of the configuration and of memory.
    pub fn new(config: TaskConfig, task: &Arc<dyn Task>, device: &Device) -> Result<Self, JobError> {
        let (policy, task) = (Arc::new(config.validate_on(device)?), Arc::clone(task));
        let params = task.params(device, &policy, config.seed)?;
        let optimizer = AdamW::new(config.optimizer.adamw(), &params, &policy)?;
        let scheduler = Scheduler::new(config.scheduler.over(config.train.epochs), config.optimizer.learning_rate)?;
        let scaler = match policy.loss_scale {
            LossScale::Dynamic(scaler) => Some(DynamicScaler::new(scaler)?),
            _ => None,
        };
        let (device, state) = (device.clone(), TrainState::default());
        Ok(TaskTrainer { config, device, policy, task, params, optimizer, scheduler, scaler, state })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TaskConfig {
        &self.config
    }

    /// What is trained.
    #[must_use]
    pub fn task(&self) -> &dyn Task {
        &*self.task
    }

    /// Where.
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

    /// How far the training is.
    #[must_use]
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Steps of an epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.task.n_train().div_ceil(self.config.train.batch_size) as u64
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

    /// The model as it is.
    #[must_use]
    pub fn trained(&self) -> Trained<'_> {
        Trained { device: &self.device, policy: &self.policy, params: &self.params }
    }

    /// One step on samples of these numbers: forward, loss, backward, update. A step in which something is not finite
    /// leaves the weights alone and is counted.
    ///
    /// # Errors
    /// [`JobError::Diverged`] when nothing is left to adapt; those of the task and of memory.
    pub fn step(&mut self, indices: &[usize]) -> Result<StepRecord, JobError> {
        let device = self.device.clone();
        // Inside the pool from the first op to the last: small ops do not wait for a worker each.
        let taken = if device.launches() {
            device.run(|| self.take_step(indices)).unwrap_or_else(|| Ok((0.0, false)))?
        } else {
            self.take_step(indices)?
        };
        let (loss, finite) = taken;
        self.state.step += 1;
        let applied = self.settle(finite)?;
        if applied {
            self.state.loss_sum += loss * indices.len() as f64;
            self.state.loss_samples += indices.len() as u64;
        }
        Ok(StepRecord { loss, applied })
    }

    /// The loss, and whether the weights moved.
    fn take_step(&mut self, indices: &[usize]) -> Result<(f64, bool), JobError> {
        let batch = self.task.batch(&self.device, self.state.epoch, indices)?;
        let mut tape = Tape::new(Cx::new(&self.device, &self.policy));
        let weights = self.params.leaves(&mut tape);
        let loss = self.task.loss(&mut tape, &weights, batch);
        drop(weights);
        let loss = match loss {
            Err(err) if left_range(&err) => return Ok((f64::NAN, false)),
            other => other?,
        };
        let observed = tape.take_observed();
        let value = if self.device.launches() { loss.value().to_vec::<f64>()?[0] } else { 0.0 };
        if !value.is_finite() {
            return Ok((value, false));
        }
        let scale = self.loss_scale();
        self.optimizer.set_learning_rate(self.scheduler.learning_rate());
        let mut grads: Vec<Option<Tensor>> = vec![None; self.params.list.len()];
        let swept = tape.backward(loss, scale, &mut |id, grad| {
            grads[id.0] = Some(grad);
            Ok(())
        });
        match swept {
            Err(err) if left_range(&err) => return Ok((value, false)),
            other => other?,
        }
        let stats = grad_stats(grads.iter().flatten())?;
        if !stats.finite {
            return Ok((value, false));
        }
        let clip = self.config.train.clip_grad_norm.map_or(1.0, |max| clip_factor(stats.norm / scale, max));
        self.optimizer.step(&mut self.params, &grads, clip / scale)?;
        self.params.observe(&observed)?;
        Ok((value, true))
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

    /// What the task measures on held-out samples, the criterion first: not a number, if a solve leaves the range of
    /// numbers.
    ///
    /// # Errors
    /// Those of [`Task::evaluate`].
    pub fn evaluate(&self) -> Result<Vec<(&'static str, f64)>, JobError> {
        let names = self.task.measures();
        let values = self.within_range(|| self.task.evaluate(&self.trained()))?;
        let values = values.unwrap_or_else(|| vec![f64::NAN; names.len()]);
        Ok(names.iter().copied().zip(values).collect())
    }

    /// What `work` with the trained model comes to, in the pool of threads; `None`, if a solve leaves the range of
    /// numbers.
    pub(crate) fn within_range<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, JobError> + Send,
    ) -> Result<Option<T>, JobError> {
        match self.in_pool(work) {
            Err(JobError::Train(crate::Error::Autograd(err))) if left_range(&err) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Runs `work` among the device's threads, so that small ops do not wait for a worker each.
    fn in_pool<T: Send>(&self, work: impl FnOnce() -> Result<T, JobError> + Send) -> Result<T, JobError> {
        if !self.device.launches() {
            return work();
        }
        let stopped = || JobError::Config { key: "threads".to_owned(), why: "the device has none".to_owned() };
        self.device.run(work).unwrap_or_else(|| Err(stopped()))
    }

    /// Ends an epoch: moves the schedule by the criterion and starts new sums.
    ///
    /// # Errors
    /// Those of the schedule.
    pub fn end_epoch(&mut self, criterion: Option<f64>) -> Result<(), JobError> {
        self.scheduler.end_epoch(criterion)?;
        self.state.epoch += 1;
        self.state.batch = 0;
        (self.state.loss_sum, self.state.loss_samples) = (0.0, 0);
        Ok(())
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
    /// Those of tensors that are missing or do not fit, and [`crate::Error::UnknownTensor`] for one of another model.
    pub fn restore(&mut self, arrays: &BTreeMap<String, Array>, state: TrainState) -> Result<(), JobError> {
        let entries = self.entries()?;
        if let Some(name) = arrays.keys().find(|&name| entries.iter().all(|entry| entry.name() != name)) {
            return Err(crate::Error::UnknownTensor { name: name.clone() }.into());
        }
        drop(entries);
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
        self.state = state;
        Ok(())
    }
}

/// Whether a solve left the range of numbers: a smaller loss scale or other weights may mend that.
fn left_range(err: &halfmode_autograd::Error) -> bool {
    let halfmode_autograd::Error::Op { source, .. } = err else { return false };
    let of_solve = source.downcast_ref::<halfmode_ode::Error>();
    matches!(
        of_solve,
        Some(halfmode_ode::Error::NonFiniteAdjoint { .. } | halfmode_ode::Error::NonFiniteVelocity { .. })
    )
}

/// What a task would cost: a step and an evaluation on the planning device.
///
/// # Errors
/// Those of [`TaskTrainer::new`] and of the task.
pub fn plan(config: &TaskConfig, task: &Arc<dyn Task>, target: Target) -> Result<JobPlan, JobError> {
    let device = Device::meta(target);
    let mut trainer = TaskTrainer::new(config.clone(), task, &device)?;
    let batch: Vec<usize> = (0..config.train.batch_size.min(task.n_train())).collect();
    trainer.step(&batch)?;
    let step = device.memory();
    trainer.evaluate()?;
    task.evaluate_at_end(&trainer.trained())?;
    let memory = device.memory();
    let own = Device::meta(target);
    let params = task.params(&own, &trainer.policy, 0)?;
    let mut tape = Tape::new(Cx::new(&own, &trainer.policy));
    let weights = params.leaves(&mut tape);
    task.loss(&mut tape, &weights, task.batch(&own, 0, &batch)?)?;
    let (n_parameters, step_flops) = (params.n_scalars(), task.step_flops(batch.len()));
    Ok(JobPlan { n_parameters, memory, step, saved: tape.memory_report(), step_flops })
}
