//! `halfmode bench step`: times whole training steps on random data.

use crate::cli::bench_micro::{self, MicroArgs};
use crate::cli::config_file::{self, ConfigArgs, Job, Loaded};
use crate::cli::error::{CliError, Exit, no_room};
use crate::cli::plan::{explain_no_room, make_plan};
use crate::cli::train::{model_line, precision_line};
use crate::cli::{Context, device_name, gpu, memory, task, text};
use halfmode::data::FieldPairs;
use halfmode::train::job::{DataShapes, FieldShape, JobData, JobError, LossKind, Trainer};
use ndarray::{ArrayD, IxDyn};
use serde_json::json;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    /// Times whole training steps on random data of the configuration's shapes.
    Step(StepArgs),
    /// Times a truncated transform of random fields, there and back, in each storage precision.
    Transform(MicroArgs),
    /// Times the product of a spectrum with dense weights in each storage precision.
    Contract(MicroArgs),
}

impl BenchArgs {
    pub(crate) fn name(&self) -> &'static str {
        match self.command {
            BenchCommand::Step(_) => "bench step",
            BenchCommand::Transform(_) => "bench transform",
            BenchCommand::Contract(_) => "bench contract",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct StepArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Steps that are timed.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) iterations: u32,
    /// Steps before them.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) warmup: u32,
}

pub(crate) fn run(args: &BenchArgs, context: &Context) -> Result<Exit, CliError> {
    match &args.command {
        BenchCommand::Step(args) => run_step(args, context),
        BenchCommand::Transform(args) => bench_micro::run_transform(args, context),
        BenchCommand::Contract(args) => bench_micro::run_contract(args, context),
    }
}

fn run_step(args: &StepArgs, context: &Context) -> Result<Exit, CliError> {
    let loaded = match config_file::load(&args.config, context.global.seed)? {
        Job::Task(loaded) => return task::bench_step(args, *loaded, context),
        Job::Fields(loaded) => *loaded,
    };
    let policy = loaded.validate()?;
    let (config, device) = (&loaded.config, context.device()?);
    let shape = loaded.shapes()?.train;
    let shape = FieldShape { n: config.train.batch_size, ..shape };
    let shapes = DataShapes { train: shape.clone(), tests: Vec::new() };
    let plan = make_plan(&loaded, &shapes, device.target())?;
    let needed = memory::taken(plan.peak_bytes(), device.target());
    if let Some(available) = memory::room(&device).filter(|&available| needed > available) {
        let why = format!("it needs {}, of which {} are available", text::bytes(needed), text::bytes(available));
        let help = format!("halfmode bench step {} --set train.batch_size=1", args.config.config);
        return Err(CliError::new(Exit::Device, "the step does not fit memory")
            .at("train.batch_size")
            .why(why)
            .help(help));
    }
    context.output.note(&format!("model      {}", model_line(config, plan.n_parameters)));
    context.output.note(&format!("precision  {}", precision_line(&policy)));

    let explain = |err: JobError| match no_room(&err) {
        Some(full) => explain_no_room(full, &loaded, &shapes, device.target()),
        None => loaded.explain(err),
    };
    let data = random_data(&loaded, &shapes)?;
    let mut trainer = Trainer::new(config.clone(), &device, &shapes, Some(data)).map_err(explain)?;
    let batch: Vec<usize> = (0..shape.n).collect();
    for _ in 0..args.warmup {
        trainer.step_before(&batch, &batch).map_err(explain)?;
    }
    // A step that was recorded on a GPU allocates nothing: its peaks are those of the steps before.
    if device.is_cpu() {
        device.reset_peak();
    }
    let rss_is_of_steps = memory::reset_peak_rss();
    let mut times = Vec::with_capacity(args.iterations as usize);
    for _ in 0..args.iterations {
        let start = Instant::now();
        trainer.step_before(&batch, &batch).map_err(explain)?;
        gpu::synchronize(&device).map_err(|err| explain(err.into()))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let peak_rss = memory::peak_rss();
    if !rss_is_of_steps {
        context.output.warn("the peak of resident memory could not be reset: it is that of the whole process");
    }
    times.sort_by(f64::total_cmp);
    let step_ms = quantile(&times, 0.5);
    let samples_per_s = shape.n as f64 / step_ms.max(1e-9) * 1e3;
    let (memory, device_peak) = (device.memory(), device.held_peak_bytes());
    let object = json!({
        "config": config,
        "device": device_name(&device),
        "device_model": gpu::model(&device),
        "threads": context.n_threads(),
        "iterations": args.iterations,
        "warmup": args.warmup,
        "batch_size": shape.n,
        "grid": shape.grid,
        "loss": config.train.loss,
        "precision": policy.preset,
        "format": policy.format,
        "step_ms": step_ms,
        "p10_ms": quantile(&times, 0.1),
        "p90_ms": quantile(&times, 0.9),
        "samples_per_s": samples_per_s,
        "peak_bytes": memory.total.peak,
        "planned_peak_bytes": plan.peak_bytes(),
        "peak_activation_bytes": memory.activations.peak,
        "peak_rss_bytes": peak_rss,
        "device_peak_bytes": device_peak,
        "n_parameters": plan.n_parameters,
        "step_flops": plan.step_flops,
        "skipped_steps": trainer.state().skipped_steps,
    });
    context.output.result(object, || {
        let loss = match config.train.loss {
            LossKind::L2 => "relative L2",
            LossKind::H1 => "relative H1",
        };
        let mut lines = vec![
            format!(
                "step         {step_ms:.2} ms (10 %: {:.2}, 90 %: {:.2}), {loss}",
                quantile(&times, 0.1),
                quantile(&times, 0.9)
            ),
            format!(
                "throughput   {samples_per_s:.1} samples/s, {:.2} GFLOP/s",
                plan.step_flops / step_ms.max(1e-9) / 1e6
            ),
            format!("peak         {} (planned {})", text::bytes(memory.total.peak), text::bytes(plan.peak_bytes())),
            format!("activations  {}", text::bytes(memory.activations.peak)),
            format!("resident     {}", peak_rss.map_or_else(|| "unknown".to_owned(), text::bytes)),
        ];
        lines.extend(device_peak.map(|peak| format!("held by GPU  {}", text::bytes(peak))));
        lines.join("\n")
    })?;
    Ok(Exit::Done)
}

/// Random fields: one batch, no test sets, no file.
fn random_data(loaded: &Loaded, shapes: &DataShapes) -> Result<JobData, CliError> {
    let shape = &shapes.train;
    let mut state = loaded.config.seed;
    let mut field = |channels: usize| {
        let extents = shape.array(shape.n, channels);
        ArrayD::from_shape_simple_fn(IxDyn(&extents), || random(&mut state))
    };
    let train = FieldPairs::of(shape.domain, field(shape.c_in), field(shape.c_out))?;
    Ok(JobData { train, tests: Vec::new(), notes: Vec::new() })
}

/// A number in [-1, 1): a counter through an invertible mixing of its bits.
pub(crate) fn random(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    bits = (bits ^ (bits >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    bits ^= bits >> 32;
    (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// The value of sorted `times` below which the share `q` lies, between two of them linearly.
pub(crate) fn quantile(times: &[f64], q: f64) -> f64 {
    let position = q * times.len().saturating_sub(1) as f64;
    let (low, share) = (position.floor() as usize, position.fract());
    match (times.get(low), times.get(low + 1)) {
        (Some(a), Some(b)) => a + share * (b - a),
        (Some(a), None) => *a,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between() {
        let times = [1.0, 2.0, 3.0, 5.0];
        let near = |q: f64, want: f64| assert!((quantile(&times, q) - want).abs() < 1e-12);
        near(0.0, 1.0);
        near(0.5, 2.5);
        near(1.0, 5.0);
        assert!((quantile(&[4.0], 0.9) - 4.0).abs() < 1e-12);
    }

    #[test]
    fn random_numbers_fill_their_range() {
        let mut state = 0;
        let values: Vec<f32> = (0..4096).map(|_| random(&mut state)).collect();
        assert!(values.iter().all(|value| (-1.0..1.0).contains(value)));
        assert!(values.iter().sum::<f32>().abs() / 4096.0 < 0.05);
    }
}
