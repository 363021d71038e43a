//! `train`, `plan` and `bench step` of tasks: jobs that are no operators on fields.

use crate::cli::bench::{StepArgs, quantile};
use crate::cli::config_file::Loaded;
use crate::cli::error::{CliError, Exit, no_room};
use crate::cli::plan::{memory_table, plan_json, saved_json, saved_table, target_text};
use crate::cli::progress::Watch;
use crate::cli::run_dir::read_config;
use crate::cli::signals::{Signals, stop_exit};
use crate::cli::train::{TrainArgs, precision_line};
use crate::cli::{Context, command_line, device_name, environment, gpu, memory, text};
use halfmode::data::Error as DataError;
use halfmode::precision::{PrecisionConfig, PrecisionPolicy, Preset};
use halfmode::tensor::{Device, Target};
use halfmode::train::Error as TrainError;
use halfmode::train::job::{JobError, JobPlan, RunOptions, StopReason, Summary, newest_checkpoint};
use halfmode::train::task::{self, ImageFormat, Task, TaskConfig, TaskData, TaskRun, TaskTrainer};
use serde_json::json;
use std::iter::successors;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The policy and the task of a configuration, checked.
fn open(loaded: &Loaded<TaskConfig>) -> Result<(PrecisionPolicy, Arc<dyn Task>), CliError> {
    let policy = loaded.config.validate().map_err(|err| loaded.explain(err))?;
    let task = task::build(&loaded.config).map_err(|err| {
        let help = images_help(loaded, &err);
        let err = loaded.explain(err);
        help.map_or_else(|| err.clone(), |help| err.clone().or_help(help))
    })?;
    Ok((policy, task))
}

/// The command with other files of images in place of those that cannot be read.
fn images_help(loaded: &Loaded<TaskConfig>, err: &JobError) -> Option<String> {
    let (JobError::Data(DataError::Io { path, .. } | DataError::Images { path, .. }), TaskData::Images(images)) =
        (err, &loaded.config.data)
    else {
        return None;
    };
    // Files to train on are read first.
    let is_train = images.train.iter().any(|file| Path::new(file) == path);
    let key = if is_train { "train" } else { "test" };
    let files = if images.format == ImageFormat::Cifar10 { r#"["BATCH"]"# } else { r#"["IMAGES","LABELS"]"# };
    Some(format!("halfmode plan {} --set 'data.{key}={files}'", loaded.argument()))
}

fn make_plan(loaded: &Loaded<TaskConfig>, task: &Arc<dyn Task>, target: Target) -> Result<JobPlan, CliError> {
    task::plan(&loaded.config, task, target).map_err(|err| loaded.explain(err))
}

/// Model, data and precision in lines.
fn lines(task: &dyn Task, policy: &PrecisionPolicy, plan: &JobPlan) -> Vec<String> {
    vec![
        format!("data       {}", task.describe_data()),
        format!("model      {}, {} parameters", task.describe(), text::thousands(plan.n_parameters)),
        format!("precision  {}", precision_line(policy)),
    ]
}

/// The command with half the batch, a quarter and so on: the first that fits `memory` by plan. Where none does, the one
/// that shows what takes so much.
fn help_memory(loaded: &Loaded<TaskConfig>, task: &Arc<dyn Task>, target: Target, memory: usize) -> String {
    let batches = successors(Some(loaded.config.train.batch_size.min(task.n_train()) / 2), |batch| Some(batch / 2));
    let fits = |batch: &usize| {
        let mut config = loaded.config.clone();
        config.train.batch_size = *batch;
        task::plan(&config, task, target).is_ok_and(|plan| memory::taken(plan.peak_bytes(), target) <= memory)
    };
    match batches.take_while(|&batch| batch > 0).find(fits) {
        Some(batch) => command_line::with("--set", &format!("train.batch_size={batch}")),
        None => format!("halfmode plan {}", loaded.argument()),
    }
}

fn check_memory(
    command: &str,
    loaded: &Loaded<TaskConfig>,
    task: &Arc<dyn Task>,
    plan: &JobPlan,
    device: &Device,
) -> Result<(), CliError> {
    let needed = memory::taken(plan.peak_bytes(), device.target());
    let Some(available) = memory::room(device).filter(|&available| needed > available) else { return Ok(()) };
    let why = format!("it needs {}, of which {} are available", text::bytes(needed), text::bytes(available));
    let place = format!("halfmode {command} {}", loaded.argument());
    let err = CliError::new(Exit::Device, "the job does not fit memory").at(place).why(why);
    Err(err.help(help_memory(loaded, task, device.target(), available)))
}

/// `halfmode train` of a task.
pub(crate) fn train(args: &TrainArgs, loaded: Loaded<TaskConfig>, context: &Context) -> Result<Exit, CliError> {
    let (policy, task) = open(&loaded)?;
    let (config, argument) = (&loaded.config, &args.config.config);
    let out = args.out.resolve(&loaded, argument, &context.output)?;
    let device = context.device()?;
    let plan = make_plan(&loaded, &task, device.target())?;
    check_memory("train", &loaded, &task, &plan, &device)?;
    let mut header = vec![format!("run        {}", out.display())];
    header.extend(lines(&*task, &policy, &plan));
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
    let explain = |err: JobError| explain_run(&loaded, &out, (&task, &device), err);
    let mut run = TaskRun::new(config.clone(), &task, &device, options).map_err(explain)?;
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
fn explain_run(
    loaded: &Loaded<TaskConfig>,
    out: &Path,
    (task, device): (&Arc<dyn Task>, &Device),
    err: JobError,
) -> CliError {
    let (shown, argument) = (out.display(), loaded.argument());
    if let Some(full) = no_room(&err) {
        let help = help_memory(loaded, task, device.target(), full.room());
        let flag = if newest_checkpoint(out).is_some() { "--resume" } else { "--force" };
        let is_plan = help.starts_with("halfmode plan");
        return full.error().help(if is_plan { help } else { command_line::flagged(&help, flag) });
    }
    let config = &loaded.config;
    // The number of a solver's steps may be one of parameters, too.
    let other_model = || {
        read_config::<TaskConfig>(out)
            .is_ok_and(|before| (&before.model, &before.solver) != (&config.model, &config.solver))
    };
    let help = match &err {
        JobError::Diverged { .. } => {
            let rate = config.optimizer.learning_rate / 4.0;
            Some(format!("halfmode train {argument} --out {shown}-2 --set optimizer.learning_rate={rate:e}"))
        }
        JobError::Resume { .. } if other_model() => Some(format!("halfmode train {shown} --resume")),
        JobError::Resume { older: Some(older), .. } => {
            Some(format!("halfmode train {argument} --out {shown} --resume-from {}", older.display()))
        }
        JobError::Resume { .. } => Some(format!("halfmode train {argument} --out {shown} --force")),
        JobError::OutNotEmpty { .. } => Some(format!("halfmode train {argument} --out {shown} --resume")),
        JobError::OutInUse { .. } => Some(format!("halfmode train {argument} --out {shown}-2")),
        JobError::Train(TrainError::MetricsLine { path, .. }) => Some(format!("mv {0} {0}.damaged", path.display())),
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
pub(crate) fn plan(loaded: Loaded<TaskConfig>, memory: Option<usize>, context: &Context) -> Result<Exit, CliError> {
    let (policy, task) = open(&loaded)?;
    let target = context.target()?;
    let device = context.target_name()?;
    let configured = make_plan(&loaded, &task, target)?;
    let mut full = loaded.clone();
    full.config.precision = PrecisionConfig::new(Preset::Full, loaded.config.precision.format);
    let full = make_plan(&full, &task, target)?;
    let memory = memory.or_else(|| context.memory_to_fit());
    let ratio = configured.peak_activation_bytes() as f64 / full.peak_activation_bytes().max(1) as f64;
    let fits = memory.map(|memory| memory::taken(configured.peak_bytes(), target) <= memory);
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
    let mut parts = lines(&*task, &policy, &configured);
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
pub(crate) fn bench_step(args: &StepArgs, loaded: Loaded<TaskConfig>, context: &Context) -> Result<Exit, CliError> {
    let (policy, task) = open(&loaded)?;
    let device = context.device()?;
    let plan = make_plan(&loaded, &task, device.target())?;
    check_memory("bench step", &loaded, &task, &plan, &device)?;
    lines(&*task, &policy, &plan).iter().for_each(|line| context.output.note(line));
    let explain = |err: JobError| match no_room(&err) {
        Some(full) => full.error().help(help_memory(&loaded, &task, device.target(), full.room())),
        None => loaded.explain(err),
    };
    let mut trainer = TaskTrainer::new(loaded.config.clone(), &task, &device).map_err(explain)?;
    let n = loaded.config.train.batch_size.min(task.n_train());
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
