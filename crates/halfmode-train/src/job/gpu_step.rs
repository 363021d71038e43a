//! The training step on a GPU: recorded once, replayed as a whole.
//!
//! The host fills page-locked memory with the samples of the next step, launches, and waits once, for the report of
//! what became of the step. Everything in between, whether the step is taken and with which loss scale the next one
//! begins included, is the device's.

use crate::job::fields::FieldSet;
use crate::job::host_fields::HostFields;
use crate::job::{JobError, StepRecord, Trainer};
use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_precision::LossScale;
use halfmode_tensor::cuda::{Feed, Graph};
use halfmode_tensor::{Device, Tensor};

/// Gradients of so many bytes are used as soon as they are final, where the step allows it. Smaller ones cost less to
/// keep than to launch for.
const LARGE: usize = 1 << 20;

/// What a step leaves for the next.
#[derive(Debug)]
pub(super) struct GpuStep {
    feed: Feed,
    /// The samples on their way.
    sent: Vec<usize>,
    batch: Option<Batch>,
    /// Whether steps are recorded at all.
    records: bool,
}

/// Inputs of one size, and the step that reads them.
#[derive(Debug)]
struct Batch {
    n: usize,
    x: Tensor,
    y: Tensor,
    progress: Recording,
}

/// How far the recording of a step is. The first step is not recorded: it compiles kernels and makes tables.
#[derive(Debug)]
enum Recording {
    Fresh,
    Warm,
    Done(Graph),
    /// The step leaves work to the host.
    Refused,
}

impl GpuStep {
    /// For batches of up to `n` samples; `None` on a CPU.
    pub(super) fn new(device: &Device, train: &FieldSet, n: usize) -> Result<Option<Self>, JobError> {
        let Some([x, y]) = train.on_host() else { return Ok(None) };
        let feed = Feed::new(device, n.min(train.shape.n) * (x.len() + y.len()))?;
        Ok(Some(GpuStep { feed, sent: Vec::new(), batch: None, records: true }))
    }

    /// Forgets what was recorded and sent: weights are not where they were.
    pub(super) fn forget(&mut self) {
        self.batch = None;
        self.sent.clear();
        self.feed.clear();
    }

    /// Sends samples that are there to the device.
    fn send(&mut self, [x, y]: [&HostFields; 2], indices: &[usize]) -> Result<(), JobError> {
        let n = indices.len();
        self.feed.send(n * (x.len() + y.len()), |to| {
            let (to_x, to_y) = to.split_at_mut(n * x.len());
            x.write(indices, to_x);
            y.write(indices, to_y);
        })?;
        self.sent = indices.to_vec();
        Ok(())
    }

    /// The inputs of a step, which hold these samples from now on. A recorded step of another size is dropped with
    /// its memory.
    fn receive(&mut self, samples: [&HostFields; 2], indices: &[usize]) -> Result<&mut Batch, JobError> {
        if self.sent != indices {
            self.feed.clear();
            self.send(samples, indices)?;
        }
        let n = indices.len();
        if self.batch.as_ref().is_some_and(|batch| batch.n != n) {
            self.batch = None;
        }
        let batch = match self.batch.take() {
            Some(batch) => batch,
            None => {
                let [x, y] = samples;
                Batch { n, x: x.unwritten(n)?, y: y.unwritten(n)?, progress: Recording::Fresh }
            }
        };
        let batch = self.batch.insert(batch);
        self.feed.receive(&mut [&mut batch.x, &mut batch.y])?;
        self.sent.clear();
        Ok(batch)
    }
}

impl Trainer {
    /// Whether steps on a GPU are recorded and replayed (the default) or launched one by one: the same launches, and
    /// the same results to the bit. On a CPU this changes nothing.
    pub fn record_steps(&mut self, records: bool) {
        if let Some(gpu) = &mut self.gpu {
            gpu.records = records;
            gpu.forget();
        }
    }

    /// Whether the steps to come are replays.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        let batch = self.gpu.as_ref().and_then(|gpu| gpu.batch.as_ref());
        batch.is_some_and(|batch| matches!(batch.progress, Recording::Done(_)))
    }

    pub(super) fn step_on_gpu(
        &mut self,
        mut gpu: GpuStep,
        indices: &[usize],
        next: &[usize],
    ) -> Result<StepRecord, JobError> {
        let outcome = self.run_on_gpu(&mut gpu, indices, next);
        if outcome.is_err() {
            gpu.forget();
        }
        self.gpu = Some(gpu);
        outcome
    }

    fn run_on_gpu(&mut self, gpu: &mut GpuStep, indices: &[usize], next: &[usize]) -> Result<StepRecord, JobError> {
        let scaler = match (&self.policy.loss_scale, &self.scaler) {
            (LossScale::Dynamic(config), Some(scaler)) => Some((*config, scaler.state().n_finite)),
            _ => None,
        };
        self.optimizer.set_learning_rate(self.scheduler.learning_rate());
        self.optimizer.set_guarded(self.loss_scale(), scaler, self.config.train.clip_grad_norm)?;

        let Some(samples) = self.train.on_host() else { return Err(halfmode_tensor::Error::NotOnGpu.into()) };
        // Before anything is launched: a step that was launched is booked.
        samples[0].check(indices)?;
        samples[0].check(next)?;
        let (device, records) = (self.device.clone(), gpu.records);
        let Batch { x, y, progress, .. } = gpu.receive(samples, indices)?;
        let mut observed = Vec::new();
        if let (Recording::Warm, true, Some(cuda)) = (&*progress, records, device.as_cuda()) {
            let graph = cuda.context().capture(|| self.launch_step(x, y).map(|_| ()))?;
            *progress = Recording::Done(graph);
        }
        match progress {
            Recording::Done(graph) => graph.launch()?,
            _ => {
                observed = self.launch_step(x, y)?;
                *progress = if observed.is_empty() { Recording::Warm } else { Recording::Refused };
            }
        }
        if let (Some(samples), false) = (self.train.on_host(), next.is_empty()) {
            gpu.send(samples, next)?;
        }
        let verdict = self.optimizer.finish_guarded()?;
        let record = self.book(verdict.loss, verdict.applied, &observed, indices.len())?;
        // The host only follows; both move the scale by the same rule.
        debug_assert!(self.scaler.is_none() || verdict.next.scale.to_bits() == self.loss_scale().to_bits());
        Ok(record)
    }

    /// Forward, loss, backward and update, all of them launches. What the host has to average is returned.
    fn launch_step(&mut self, x: &Tensor, y: &Tensor) -> Result<Vec<(LeafId, Tensor)>, JobError> {
        let mut tape = Tape::new(Cx::new(&self.device, &self.policy));
        let loss = self.forward(&mut tape, x.clone(), || Ok(y.clone()))?;
        let observed = tape.take_observed();
        let (sum, is_final) = (loss.value().clone(), self.loss_decides());
        if is_final {
            self.optimizer.begin_guarded(&sum)?;
        }
        let seed = self.optimizer.seed()?;
        let (params, optimizer) = (&mut self.params, &mut self.optimizer);
        let mut grads: Vec<Option<Tensor>> = vec![None; params.list.len()];
        let mut failed = None;
        tape.backward_from(vec![(loss, seed)], &mut |id, grad| {
            if is_final && grad.bytes() >= LARGE {
                let outcome = optimizer.update_guarded(id.0, &mut params.list[id.0], &grad);
                outcome.unwrap_or_else(|err| _ = failed.get_or_insert(err));
            } else {
                grads[id.0] = Some(grad);
            }
            Ok(())
        })?;
        failed.map_or(Ok(()), Err)?;
        if is_final {
            self.optimizer.update_rest(&mut self.params, &grads)?;
        } else {
            self.optimizer.launch_guarded(&mut self.params, &grads, &sum)?;
        }
        Ok(observed)
    }
}
