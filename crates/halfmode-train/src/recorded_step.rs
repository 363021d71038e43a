//! Training steps of any model on a GPU, recorded once and replayed as a whole.

use crate::optim::AdamW;
use crate::{Error, Result};
use halfmode_autograd::{Cx, Tape, Var};
use halfmode_nn::Params;
use halfmode_precision::{LossScale, PrecisionPolicy, ScalerConfig};
use halfmode_tensor::Tensor;
use halfmode_tensor::cuda::Graph;
use std::sync::Arc;

/// A training step of any model on a GPU: forward, loss, backward and AdamW are launched once, recorded at the second
/// step, and replayed from then on. The device decides by itself whether a step is taken and how the loss scale moves;
/// the host waits once, for the report.
///
/// The first step is launched, as it compiles kernels and makes tables.
///
/// A replay repeats the launches with their arguments: only what lies in tensors may change from step to step. Numbers
/// that a model or loss hands to kernels, such as the labels of [`CrossEntropy`](crate::CrossEntropy), stay those of the
/// second step.
#[derive(Debug)]
pub struct RecordedStep {
    params: Params,
    optimizer: AdamW,
    policy: Arc<PrecisionPolicy>,
    scale: f64,
    scaler: Option<(ScalerConfig, u32)>,
    progress: Progress,
    records: bool,
}

#[derive(Debug)]
enum Progress {
    Fresh,
    Warm,
    Done(Graph),
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// The loss.
    pub loss: f64,
    /// False if the loss or a gradient was not finite: nothing moved.
    pub applied: bool,
    /// The loss scale of the next step.
    pub scale: f64,
}

impl RecordedStep {
    /// Steps of `optimizer` on these parameters. The loss scale is the policy's.
    #[must_use]
    pub fn new(params: Params, optimizer: AdamW, policy: &Arc<PrecisionPolicy>) -> Self {
        let scale = policy.loss_scale.initial();
        let scaler = match policy.loss_scale {
            LossScale::Dynamic(config) => Some((config, 0)),
            LossScale::None | LossScale::Static(_) => None,
        };
        let policy = Arc::clone(policy);
        RecordedStep { params, optimizer, policy, scale, scaler, progress: Progress::Fresh, records: true }
    }

    /// The model's parameters.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Whether steps are recorded (the default) or launched one by one: the same launches, the same bits.
    pub fn record(&mut self, records: bool) {
        self.records = records;
        self.progress = Progress::Fresh;
    }

    /// Whether the steps to come are replays.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        matches!(self.progress, Progress::Done(_))
    }

    /// Takes a step. `loss` puts a loss of shape `[1]` on the tape; from the third step on it is not called any more, so
    /// it must read its inputs from the same tensors each time, and wait for nothing. Keep these tensors as long as steps
    /// are taken, and write new samples into them: what is recorded is where they are.
    ///
    /// # Errors
    /// Those of `loss` and of the optimiser. The next step is launched again.
    pub fn step(&mut self, loss: impl Fn(&mut Tape, &[Var]) -> Result<Var>) -> Result<StepOutcome> {
        let outcome = self.run(loss);
        if outcome.is_err() {
            self.progress = Progress::Fresh;
        }
        outcome
    }

    fn run(&mut self, loss: impl Fn(&mut Tape, &[Var]) -> Result<Var>) -> Result<StepOutcome> {
        self.optimizer.set_guarded(self.scale, self.scaler, None)?;
        let device = self.params.list.first().map(|it| it.value.device().clone());
        let device = device.ok_or(halfmode_tensor::Error::NotOnGpu)?;
        if let (Progress::Warm, true, Some(cuda)) = (&self.progress, self.records, device.as_cuda()) {
            let graph = cuda.context().capture(|| self.launch(&loss))?;
            self.progress = Progress::Done(graph);
        }
        match &self.progress {
            Progress::Done(graph) => graph.launch().map_err(halfmode_tensor::Error::from)?,
            _ => {
                self.launch(&loss)?;
                self.progress = Progress::Warm;
            }
        }
        let verdict = self.optimizer.finish_guarded()?;
        let scale = verdict.next.scale;
        (self.scale, self.scaler) = (scale, verdict.next.scaler);
        Ok(StepOutcome { loss: verdict.loss, applied: verdict.applied, scale })
    }

    fn launch(&mut self, loss: &impl Fn(&mut Tape, &[Var]) -> Result<Var>) -> Result<()> {
        let device = self.params.list.first().map(|it| it.value.device().clone());
        let device = device.ok_or(halfmode_tensor::Error::NotOnGpu)?;
        let mut tape = Tape::new(Cx::new(&device, &self.policy));
        let weights = self.params.leaves(&mut tape);
        let loss = loss(&mut tape, &weights)?;
        drop(weights);
        let (value, seed) = (loss.value().clone(), self.optimizer.seed()?);
        let mut grads: Vec<Option<Tensor>> = vec![None; self.params.list.len()];
        tape.backward_from(vec![(loss, seed)], &mut |id, grad| {
            if let Some(slot) = grads.get_mut(id.0) {
                *slot = Some(grad);
            }
            Ok(())
        })?;
        self.optimizer.launch_guarded(&mut self.params, &grads, &value)
    }
}

impl From<halfmode_tensor::cuda::CudaError> for Error {
    fn from(err: halfmode_tensor::cuda::CudaError) -> Self {
        Error::Tensor(err.into())
    }
}
