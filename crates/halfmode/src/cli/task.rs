//! `train`, `plan` and `bench step` of tasks: jobs that are no operators on fields.

use crate::cli::bench::{StepArgs, quantile};
use crate::cli::config_file::{ConfigArgs, Loaded, load_as};
use crate::cli::error::{CliError, Exit, no_room};
use crate::cli::plan::{memory_table, plan_json, saved_json, saved_table, target_text};
use crate::cli::progress::Watch;
use crate::cli::signals::{Signals, stop_exit};
use crate::cli::train::{TrainArgs, precision_line};
use crate::cli::{Context, device_name, environment, gpu, memory, text};
use halfmode::precision::{PrecisionConfig, PrecisionPolicy, Preset};
use halfmode::tensor::Target;
use halfmode::train::job::{JobError, JobPlan, RunOptions, StopReason, Summary};
use halfmode::train::task::{self, TaskConfig, TaskRun, TaskTrainer, build};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// The configuration with its policy, checked.
fn load(args: &ConfigArgs, context: &Context) -> Result<(Loaded<TaskConfig>, PrecisionPolicy), CliError> {
    let loaded = load_as::<TaskConfig>(args, context.global.seed)?;
    let policy = loaded.config.validate().map_err(|err| loaded.explain(err))?;
    build(&loaded.config, &policy).map_err(|err| loaded.explain(err))?;
    Ok((loaded, policy))
}

fn make_plan(loaded: &Loaded<TaskConfig>, target: Target) -> Result<JobPlan, CliError> {
    task::plan(&loaded.config, target).map_err(|err| loaded.explain(err))
}

/// Model, data and precision in lines.
fn lines(config: &TaskConfig, policy: &PrecisionPolicy, plan: &JobPlan) -> Result<Vec<String>, CliError> {
    let task = build(config, policy)?;
    Ok(vec![
        format!("data       {}", task.describe_data()),
        format!("model      {}, {} parameters", task.describe(), text::thousands(plan.n_parameters)),
        format!("precision  {}", precision_line(policy)),
    ])
}

fn check_memory(command: &str, argument: &str, plan: &JobPlan, context: &Context) -> Result<(), CliError> {
    let device = context.device()?;
    let needed = memory::taken(plan.peak_bytes(), device.target());
    let Some(available) = memory::room(&device).filter(|&available| needed > available) else { return Ok(()) };
    let why = format!("it needs {}, of which {} are available", text::bytes(needed), text::bytes(available));
    let err = CliError::new(Exit::Device, "the job does not fit memory").at(format!("halfmode {command} {argument}"));
    Err(err.why(why).help(format!("halfmode plan {argument} --set train.batch_size=64")))
}

/// `halfmode train` of a task.
pub(crate) fn train(args: &TrainArgs, context: &Context) -> Result<Exit, CliError> {
    let (loaded, policy) = load(&args.config, context)?;
    let (config, argument) = (&loaded.config, &args.config.config);
    let out = args.out.resolve(&loaded, argument, &context.output)?;
    let device = context.device()?;
    let plan = make_plan(&loaded, device.target())?;
    check_memory("train", argument, &plan, context)?;
    let mut header = vec![format!("run        {}", out.display())];
    header.extend(lines(config, &policy, &plan)?);
    header.push(format!(
        "training   {} epochs, batches of {}, seed {}",
        config.train.epochs, config.train.batch_size, config.seed
    ));
    header.push(format!(
        "memory     planned peak {}, of which activations at most {}",
        text::bytes(plan.peak_bytes()),
        text::bytes(plan.peak_activation_bytes())
    ));
    context.output.note(&header.join("\n"));
    let signals = Signals::listen()?;
    let options = RunOptions {
        out: out.clone(),
        resume: args.out.resume,
        resume_from: args.out.resume_from.clone(),
        force: args.out.force,
        environment: environment::facts(&device, context.n_threads()),
        n_plots: args.plots.into(),
    };
    let explain = |err: JobError| explain_run(&loaded, argument, &out, err);
    let mut run = TaskRun::new(config.clone(), &device, options).map_err(explain)?;
    let n_steps = run.trainer().steps_per_epoch() * config.train.epochs;
    let mut watch = Watch::new(&context.output, n_steps, run.trainer().state().step);
    let outcome = run.train(&mut watch, &|| signals.stop());
    watch.finish();
    let (summary, stopped) = outcome.map_err(explain)?;
    let best = out.join("checkpoints/best");
    let object = json!({
        "run": text::path(&out),
        "stopped": stopped.map(|reason| match reason {
            StopReason::Interrupt => "interrupt",
            StopReason::Terminate => "terminate",
        }),
        "summary": summary,
        "best": best.exists().then(|| text::path(&best)),
        "latest": text::path(&out.join("checkpoints/latest")),
        "report": text::path(&out.join("report.html")),
    });
    context.output.result(object, || end_table(&summary, config, &out))?;
    if let Some(reason) = stopped {
        context.output.note(&format!("stopped and saved; go on with: halfmode train {} --resume", out.display()));
        return Ok(stop_exit(reason));
    }
    Ok(Exit::Done)
}

/// An error of a run, with the command that takes it up again.
fn explain_run(loaded: &Loaded<TaskConfig>, argument: &str, out: &Path, err: JobError) -> CliError {
    let shown = out.display();
    if let Some(full) = no_room(&err) {
        return full.error().help(format!("halfmode train {argument} --set train.batch_size=64 --out {shown}-2"));
    }
    let help = match &err {
        JobError::Diverged { .. } => {
            let rate = loaded.config.optimizer.learning_rate / 4.0;
            Some(format!("halfmode train {argument} --out {shown}-2 --set optimizer.learning_rate={rate:e}"))
        }
        JobError::Resume { older: Some(older), .. } => {
            Some(format!("halfmode train {argument} --out {shown} --resume-from {}", older.display()))
        }
        JobError::Resume { .. } => Some(format!("halfmode train {argument} --out {shown} --force")),
        JobError::OutNotEmpty { .. } => Some(format!("halfmode train {argument} --out {shown} --resume")),
        JobError::OutInUse { .. } => Some(format!("halfmode train {argument} --out {shown}-2")),
        JobError::Train(_) if out.join("config.toml").exists() => Some(format!("halfmode train {shown} --resume")),
        _ => None,
    };
    let err = loaded.explain(err);
    help.map_or_else(|| err.clone(), |help| err.clone().or_help(help))
}

/// The results of a run.
fn end_table(summary: &Summary, config: &TaskConfig, out: &Path) -> String {
    let rows: Vec<Vec<String>> =
        summary.metrics.iter().map(|(name, value)| vec![name.clone(), format!("{value:.5}")]).collect();
    let planned = summary.peak_bytes as f64 / summary.planned_peak_bytes.max(1) as f64 * 100.0;
    [
        text::table(&["held out", "value"], &rows),
        format!("epochs   {} of {}", summary.epochs, config.train.epochs),
        format!("time     {}", text::seconds(summary.seconds)),
        format!(
            "memory   peak {}, planned {} ({planned:.1} %); activations {}",
            text::bytes(summary.peak_bytes),
            text::bytes(summary.planned_peak_bytes),
            text::bytes(summary.peak_activation_bytes)
        ),
        format!(
            "skipped  {} of {} steps, loss scale {}",
            summary.skipped_steps, summary.steps, summary.final_loss_scale
        ),
        format!("model    {}", out.join("checkpoints/best").display()),
        format!("report   {}", out.join("report.html").display()),
    ]
    .join("\n")
}

/// `halfmode plan` of a task.
pub(crate) fn plan(args: &ConfigArgs, memory: Option<usize>, context: &Context) -> Result<Exit, CliError> {
    let (loaded, policy) = load(args, context)?;
    let target = context.target()?;
    let device = context.target_name()?;
    let configured = make_plan(&loaded, target)?;
    let mut full = loaded.clone();
    full.config.precision = PrecisionConfig::new(Preset::Full, loaded.config.precision.format);
    let full = make_plan(&full, target)?;
    let memory = memory.or_else(|| context.memory_to_fit());
    let ratio = configured.peak_activation_bytes() as f64 / full.peak_activation_bytes().max(1) as f64;
    let fits = memory.map(|memory| memory::taken(configured.peak_bytes(), target) <= memory);
    let task = build(&loaded.config, &policy)?;
    let object = json!({
        "config": loaded.config,
        "device": device,
        "threads": context.n_threads(),
        "n_parameters": configured.n_parameters,
        "step_flops": configured.step_flops,
        "steps_per_epoch": task.n_train().div_ceil(loaded.config.train.batch_size),
        "precision": { "preset": policy.preset, "format": policy.format, "policy": policy },
        "configured": plan_json(&configured),
        "full": plan_json(&full),
        "peak_activation_ratio": ratio,
        "saved": saved_json(&configured.saved),
        "memory_bytes": memory,
        "fits": fits,
    });
    let mut parts = lines(&loaded.config, &policy, &configured)?;
    context.output.result(object, || {
        parts.extend([
            format!("step       {:.2} GFLOP", configured.step_flops / 1e9),
            String::new(),
            format!("peak bytes by purpose ({})", target_text(target, &device)),
            memory_table(&policy.preset.to_string(), &configured, &full),
            "kept for backward by one forward pass".to_owned(),
            saved_table(&configured.saved, context.output.is_verbose()),
            String::new(),
            policy.table(),
        ]);
        if let Some(memory) = memory {
            let word = if fits == Some(true) { "fits" } else { "does not fit" };
            parts.push(format!("the job {word} {}", text::bytes(memory)));
        }
        parts.join("\n")
    })?;
    Ok(Exit::Done)
}

/// `halfmode bench step` of a task.
pub(crate) fn bench_step(args: &StepArgs, context: &Context) -> Result<Exit, CliError> {
    let (loaded, policy) = load(&args.config, context)?;
    let device = context.device()?;
    let plan = make_plan(&loaded, device.target())?;
    check_memory("bench step", &args.config.config, &plan, context)?;
    lines(&loaded.config, &policy, &plan)?.iter().for_each(|line| context.output.note(line));
    let explain = |err: JobError| match no_room(&err) {
        Some(full) => full.error(),
        None => loaded.explain(err),
    };
    let mut trainer = TaskTrainer::new(loaded.config.clone(), &device).map_err(explain)?;
    let n = loaded.config.train.batch_size.min(trainer.task().n_train());
    let batch: Vec<usize> = (0..n).collect();
    for _ in 0..args.warmup {
        trainer.step(&batch).map_err(explain)?;
    }
    device.reset_peak();
    let mut times = Vec::with_capacity(args.iterations as usize);
    for _ in 0..args.iterations {
        let start = Instant::now();
        trainer.step(&batch).map_err(explain)?;
        gpu::synchronize(&device).map_err(|err| explain(err.into()))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let step_ms = quantile(&times, 0.5);
    let (memory, samples_per_s) = (device.memory(), n as f64 / step_ms.max(1e-9) * 1e3);
    let object = json!({
        "config": loaded.config,
        "device": device_name(&device),
        "device_model": gpu::model(&device),
        "threads": context.n_threads(),
        "iterations": args.iterations,
        "warmup": args.warmup,
        "batch_size": n,
        "precision": policy.preset,
        "format": policy.format,
        "step_ms": step_ms,
        "p10_ms": quantile(&times, 0.1),
        "p90_ms": quantile(&times, 0.9),
        "samples_per_s": samples_per_s,
        "peak_bytes": memory.total.peak,
        "planned_peak_bytes": plan.peak_bytes(),
        "peak_activation_bytes": memory.activations.peak,
        "device_peak_bytes": device.held_peak_bytes(),
        "n_parameters": plan.n_parameters,
        "step_flops": plan.step_flops,
        "skipped_steps": trainer.state().skipped_steps,
    });
    context.output.result(object, || {
        [
            format!(
                "step         {step_ms:.2} ms (10 %: {:.2}, 90 %: {:.2})",
                quantile(&times, 0.1),
                quantile(&times, 0.9)
            ),
            format!(
                "throughput   {samples_per_s:.1} samples/s, {:.2} GFLOP/s",
                plan.step_flops / step_ms.max(1e-9) / 1e6
            ),
            format!("peak         {} (planned {})", text::bytes(memory.total.peak), text::bytes(plan.peak_bytes())),
            format!("activations  {}", text::bytes(memory.activations.peak)),
        ]
        .join("\n")
    })?;
    Ok(Exit::Done)
}
