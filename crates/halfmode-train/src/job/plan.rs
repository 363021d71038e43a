//! What a job will cost, learnt by running one step and one evaluation on the planning device.

use crate::job::{DataShapes, JobConfig, JobError, Trainer};
use halfmode_autograd::{Cx, MemoryReport, Tape};
use halfmode_nn::Module;
use halfmode_operators::Fno;
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Device, MemoryStats, Purpose, Target};
use std::sync::Arc;

/// One op of the plan's table: what it keeps for backward.
pub type PlanOp = halfmode_autograd::MemoryRow;

/// What a job will cost.
#[derive(Clone, Debug)]
pub struct JobPlan {
    /// Real scalars of all parameters.
    pub n_parameters: usize,
    /// Bytes by purpose at their peaks, over one training step and one evaluation batch of each test
    /// set.
    pub memory: MemoryStats,
    /// Bytes by purpose over the training step alone, data sets included.
    pub step: MemoryStats,
    /// What the ops of one forward pass keep.
    pub saved: MemoryReport,
    /// Floating-point operations of one training step (multiply and add counted apart).
    pub step_flops: f64,
}

impl JobPlan {
    /// The ledger's peak over the whole job.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        self.memory.total.peak
    }

    /// The most bytes that saved values, activations and scratch take at once in a training step.
    #[must_use]
    pub fn peak_activation_bytes(&self) -> usize {
        self.step.activations.peak
    }
}

/// Plans a job for the CPU with `threads` threads.
///
/// # Errors
/// Those of [`Trainer::new`].
pub fn plan(config: &JobConfig, shapes: &DataShapes, threads: usize) -> Result<JobPlan, JobError> {
    plan_for(config, shapes, Target::Cpu { threads })
}

/// Plans a job for any target.
///
/// # Errors
/// Those of [`Trainer::new`].
pub fn plan_for(config: &JobConfig, shapes: &DataShapes, target: Target) -> Result<JobPlan, JobError> {
    let device = Device::meta(target);
    let mut trainer = Trainer::new(config.clone(), &device, shapes, None)?;
    let batch: Vec<usize> = (0..config.train.batch_size.min(shapes.train.n)).collect();
    trainer.step(&batch)?;
    let step = device.memory();
    if config.train.epochs > 1 {
        trainer.evaluate_on_the_way()?;
        // Later epochs train while the tables of the grids tested so far live.
        trainer.step(&batch)?;
    }
    trainer.evaluate_all()?;
    let memory = device.memory();
    let saved = saved_by_forward(config, shapes, batch.len(), target)?;
    let n_parameters = trainer.params().n_scalars();
    let step_flops = step_flops(config, shapes, batch.len());
    Ok(JobPlan { n_parameters, memory, step, saved, step_flops })
}

/// The tape's report after one forward pass of the model.
fn saved_by_forward(
    config: &JobConfig,
    shapes: &DataShapes,
    batch: usize,
    target: Target,
) -> Result<MemoryReport, JobError> {
    let device = Device::meta(target);
    let policy = Arc::new(config.validate()?);
    let fno = Fno::new(config.model.fno().clone())?;
    let params = halfmode_nn::Params::new(&device, fno.param_specs(), &policy, 0)?;
    let mut tape = Tape::new(Cx::new(&device, &policy));
    let weights = params.leaves(&mut tape);
    let extents = [&[batch, shapes.train.c_in][..], &shapes.train.grid].concat();
    let x = tape.constant(device.alloc(extents, shapes.train.dtype(Precision::F32), Purpose::Data)?);
    fno.forward(&mut tape, &weights, &[&x])?;
    Ok(tape.memory_report())
}

/// Operations of forward, recomputation and backward, from the shapes alone.
fn step_flops(config: &JobConfig, shapes: &DataShapes, batch: usize) -> f64 {
    let model = config.model.fno();
    let (b, c) = (batch as f64, model.hidden_channels as f64);
    let points: f64 = shapes.train.grid.iter().product::<usize>() as f64;
    let modes = model.stored_modes();
    // One transform, either direction: the last axis real for real fields, all others complex.
    let complex = config.model.domain() == Domain::Complex;
    let mut transform = 0.0;
    let mut rest = points;
    for (axis, (&n, &k)) in shapes.train.grid.iter().zip(&modes).enumerate().rev() {
        let per_line = if axis + 1 == modes.len() && !complex { 4.0 } else { 8.0 } * n as f64 * k as f64;
        rest /= n as f64;
        let later: f64 = modes[axis + 1..].iter().product::<usize>() as f64;
        transform += b * c * rest * later * per_line;
    }
    let mix = 8.0 * b * c * c * modes.iter().product::<usize>() as f64;
    let hidden = (c * model.channel_mlp_expansion).round();
    // A layer of complex fields is two real ones, each of both parts.
    let layers = if complex { 4.0 } else { 1.0 };
    let dense = layers * 2.0 * b * points * (c * c + 2.0 * c * hidden);
    // Forward; then again for the recomputed inverse and dense layers; then twice for backward.
    let block =
        (2.0 * transform + mix + dense) + (transform + mix + dense) + (2.0 * transform + 2.0 * mix + 2.0 * dense);
    let mlp = |c_in: f64, width: f64, c_out: f64| layers * 2.0 * b * points * width * (c_in + c_out) * 4.0;
    let lifting = mlp(model.in_channels as f64 + modes.len() as f64, c * model.lifting_channel_ratio, c);
    let projection = mlp(c, c * model.projection_channel_ratio, model.out_channels as f64);
    model.n_layers as f64 * block + lifting + projection
}
