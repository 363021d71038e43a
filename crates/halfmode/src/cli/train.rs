//! `halfmode train`: the main job.

use crate::cli::config_file::{self, ConfigArgs, Job, Loaded};
use crate::cli::error::{CliError, Exit, no_room};
use crate::cli::plan::{explain_no_room, largest_batch, make_plan};
use crate::cli::progress::{DataWatch, Watch};
use crate::cli::run_dir::{OutArgs, read_config};
use crate::cli::signals::{Signals, stop_exit};
use crate::cli::{Context, command_line, environment, memory, task, text};
use halfmode::precision::PrecisionPolicy;
use halfmode::tensor::Device;
use halfmode::train::Error as TrainError;
use halfmode::train::job::{
    DataConfig, DataShapes, FieldShape, JobConfig, JobError, JobPlan, Run, RunOptions, StopReason, Summary, load_data,
    newest_checkpoint,
};
use serde_json::json;
use std::path::Path;

#[derive(Debug, clap::Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    #[command(flatten)]
    pub(crate) out: OutArgs,
    /// Test samples to draw per resolution.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub(crate) plots: u16,
}

pub(crate) fn run(args: &TrainArgs, context: &Context) -> Result<Exit, CliError> {
    let loaded = match config_file::load(&args.config, context.global.seed)? {
        Job::Task(loaded) => return task::train(args, *loaded, context),
        Job::Fields(loaded) => *loaded,
    };
    let policy = loaded.validate()?;
    let argument = &args.config.config;
    let out = args.out.resolve(&loaded, argument, &context.output)?;
    let device = context.device()?;
    let shapes = loaded.shapes()?;
    let plan = make_plan(&loaded, &shapes, device.target())?;
    check_memory(&loaded, argument, &shapes, &plan, &device)?;
    context.output.note(&header(&loaded.config, &policy, &shapes, &plan, &out));

    let signals = Signals::listen()?;
    let data = {
        let watch = DataWatch::new(&context.output);
        let progress = |what: &str, done: usize, n: usize| {
            watch.report(what, done, n);
            signals.exit_if_asked(&context.output, "stopped before training began: nothing to save");
        };
        load_data(&loaded.config, &context.data_cache(), context.n_threads(), &progress)
    };
    let data = data.map_err(|err| loaded.explain_data(err))?;
    data.notes.iter().for_each(|note| context.output.detail(note));

    let options = RunOptions {
        out: out.clone(),
        resume: args.out.resume,
        resume_from: args.out.resume_from.clone(),
        force: args.out.force,
        environment: environment::facts(&device, context.n_threads()),
        n_plots: args.plots.into(),
    };
    let resume_help = format!("halfmode train {} --resume", out.display());
    let run = Run::new(loaded.config.clone(), &device, data, options);
    let mut run = run.map_err(|err| explain_run(&loaded, argument, &out, (&shapes, &device), err))?;
    let n_steps = run.trainer().steps_per_epoch() * loaded.config.train.epochs;
    let mut watch = Watch::new(&context.output, n_steps, run.trainer().state().step);
    let outcome = run.train(&mut watch, &|| signals.stop());
    watch.finish();
    let (summary, stopped) = outcome.map_err(|err| match &err {
        JobError::Diverged { .. } => {
            let (rate, shown) = (loaded.config.optimizer.learning_rate / 4.0, out.display());
            CliError::from(err)
                .help(format!("halfmode train {argument} --out {shown}-2 --set optimizer.learning_rate={rate:e}"))
        }
        _ => explain_run(&loaded, argument, &out, (&shapes, &device), err),
    })?;

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
    context.output.result(object, || end_table(&summary, &loaded.config, &out))?;
    if let Some(reason) = stopped {
        context.output.note(&format!("stopped and saved; go on with: {resume_help}"));
        return Ok(stop_exit(reason));
    }
    Ok(Exit::Done)
}

/// An error of a run, with the command that takes it up again.
fn explain_run(
    loaded: &Loaded,
    argument: &str,
    out: &Path,
    (shapes, device): (&DataShapes, &Device),
    err: JobError,
) -> CliError {
    if let Some(full) = no_room(&err) {
        let err = explain_no_room(full, loaded, shapes, device.target());
        let flag = if newest_checkpoint(out).is_some() { "--resume" } else { "--force" };
        return err.map_help(|line| command_line::flagged(&line, flag));
    }
    let shown = out.display();
    let other_model = || read_config::<JobConfig>(out).is_ok_and(|before| before.model != loaded.config.model);
    let help = match &err {
        JobError::Resume { .. } if other_model() => Some(format!("halfmode train {shown} --resume")),
        JobError::Resume { older: Some(older), .. } => {
            Some(format!("halfmode train {argument} --out {shown} --resume-from {}", older.display()))
        }
        JobError::Resume { .. } => Some(format!("halfmode train {argument} --out {shown} --force")),
        JobError::OutNotEmpty { .. } => Some(format!("halfmode train {argument} --out {shown} --resume")),
        JobError::OutInUse { .. } => Some(format!("halfmode train {argument} --out {shown}-2")),
        JobError::Train(TrainError::MetricsLine { path, .. }) => Some(format!("mv {0} {0}.damaged", path.display())),
        // The disk is full, or may not be written: what was saved is still there.
        JobError::Train(_) if out.join("config.toml").exists() => Some(format!("halfmode train {shown} --resume")),
        JobError::Train(_) if out.is_dir() => Some(format!("halfmode train {argument} --out {shown} --force")),
        JobError::Train(_) => Some(format!("halfmode train {argument} --out runs/{}", loaded.name)),
        _ => None,
    };
    let err = loaded.explain(err);
    help.map_or_else(|| err.clone(), |help| err.clone().or_help(help))
}

/// Refuses a job that the memory cannot hold, before hours are spent on data.
fn check_memory(
    loaded: &Loaded,
    argument: &str,
    shapes: &DataShapes,
    plan: &JobPlan,
    device: &Device,
) -> Result<(), CliError> {
    let needed = memory::taken(plan.peak_bytes(), device.target());
    let Some(available) = memory::room(device).filter(|&available| needed > available) else { return Ok(()) };
    let what = if device.is_cpu() { "the job does not fit memory" } else { "the job does not fit the GPU's memory" };
    let why = format!("it needs {}, of which {} are available", text::bytes(needed), text::bytes(available));
    let err = CliError::new(Exit::Device, what).at(format!("halfmode train {argument}")).why(why);
    let smaller = largest_batch(&loaded.config, shapes, device.target(), available);
    Err(err.help(match smaller {
        Some(batch) => format!("halfmode train {argument} --set train.batch_size={batch}"),
        None => format!("halfmode plan {argument}"),
    }))
}

/// `64x64`.
pub(crate) fn grid_text(grid: &[usize]) -> String {
    grid.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

/// The formats of a policy, in one line.
pub(crate) fn precision_line(policy: &PrecisionPolicy) -> String {
    let storages = [policy.transform, policy.contraction, policy.pointwise].map(|op| op.storage);
    let [transform, contraction, pointwise] = storages;
    let master = policy.master.map_or_else(String::new, |master| format!(" with {master} masters"));
    format!(
        "{}: transforms {transform}, contractions {contraction}, dense layers {pointwise}, saved {}, sums {}, weights {}{master}, loss scale {}",
        policy.preset, policy.saved, policy.transform.accumulate, policy.weights, policy.loss_scale
    )
}

/// The model, in one line.
pub(crate) fn model_line(config: &JobConfig, n_parameters: usize) -> String {
    let fno = config.model.fno();
    format!(
        "FNO-{}d, {} modes, width {}, {} layers, {} parameters",
        fno.n_modes.len(),
        grid_text(&fno.n_modes),
        fno.hidden_channels,
        fno.n_layers,
        text::thousands(n_parameters)
    )
}

fn header(config: &JobConfig, policy: &PrecisionPolicy, shapes: &DataShapes, plan: &JobPlan, out: &Path) -> String {
    let kind = match &config.data {
        DataConfig::Darcy(_) => "darcy",
        DataConfig::Burgers(_) => "burgers",
        DataConfig::NavierStokes(_) => "navier-stokes",
        DataConfig::DarcyPt(_) => "darcy-pt",
        DataConfig::File(_) => "files",
    };
    let samples = |shape: &FieldShape| format!("{} at {}", shape.n, grid_text(&shape.grid));
    let tests = shapes.tests.iter().map(samples).collect::<Vec<_>>().join(", ");
    let (n_epochs, batch) = (config.train.epochs, config.train.batch_size);
    let n_steps = shapes.train.n.div_ceil(batch);
    [
        format!("run        {}", out.display()),
        format!("data       {kind}: {} to train on, to test on {tests}", samples(&shapes.train)),
        format!("model      {}", model_line(config, plan.n_parameters)),
        format!("precision  {}", precision_line(policy)),
        format!("training   {n_epochs} epochs of {n_steps} steps of {batch} samples, seed {}", config.seed),
        format!(
            "memory     planned peak {}, of which activations at most {}",
            text::bytes(plan.peak_bytes()),
            text::bytes(plan.peak_activation_bytes())
        ),
    ]
    .join("\n")
}

/// The results of a run.
fn end_table(summary: &Summary, config: &JobConfig, out: &Path) -> String {
    let mut labels: Vec<&String> = summary.eval.keys().collect();
    labels.sort_by_key(|label| (label.parse::<u64>().unwrap_or(u64::MAX), label.as_str()));
    let rows: Vec<Vec<String>> = labels
        .into_iter()
        .filter_map(|label| Some((label, summary.eval.get(label)?)))
        .map(|(label, errors)| vec![label.clone(), format!("{:.5}", errors.l2), format!("{:.5}", errors.h1)])
        .collect();
    let planned = summary.peak_bytes as f64 / summary.planned_peak_bytes.max(1) as f64 * 100.0;
    let device_peak = summary.device_peak_bytes.map(|peak| format!("GPU      held at most {}", text::bytes(peak)));
    let lines = [
        text::table(&["resolution", "test L2", "test H1"], &rows),
        format!("epochs   {} of {}", summary.epochs, config.train.epochs),
        format!("time     {}", text::seconds(summary.seconds)),
        format!(
            "memory   peak {}, planned {} ({planned:.1} %); activations {}",
            text::bytes(summary.peak_bytes),
            text::bytes(summary.planned_peak_bytes),
            text::bytes(summary.peak_activation_bytes)
        ),
        device_peak.unwrap_or_default(),
        format!(
            "skipped  {} of {} steps, loss scale {}",
            summary.skipped_steps, summary.steps, summary.final_loss_scale
        ),
        format!("model    {}", out.join("checkpoints/best").display()),
        format!("report   {}", out.join("report.html").display()),
    ];
    lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}
