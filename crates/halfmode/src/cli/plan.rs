//! `halfmode plan`: what a job would cost, without running it.

use crate::cli::config_file::{self, ConfigArgs, Job, Loaded};
use crate::cli::error::{CliError, Exit};
use crate::cli::memory::{self, NoRoom};
use crate::cli::plan_precisions::{self, Column};
use crate::cli::train::{grid_text, model_line, precision_line};
use crate::cli::{Context, command_line, task, text};
use halfmode::autograd::MemoryReport;
use halfmode::precision::{PrecisionConfig, Preset};
use halfmode::tensor::{MemoryStats, Target};
use halfmode::train::job::{DataShapes, JobConfig, JobPlan, plan_for};
use serde_json::{Value, json};

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Memory that the largest batch has to fit, such as 4GiB [default: what is available now; all of a GPU].
    #[arg(long, value_name = "BYTES", value_parser = text::parse_bytes)]
    memory: Option<usize>,
}

/// Scalars beyond which a job is refused without planning it: byte counts stay far from overflow.
const MAX_SCALARS: f64 = (1u64 << 48) as f64;

/// Layers beyond which a job is refused: a typing error would keep the planner busy for hours.
const MAX_LAYERS: usize = 1024;

/// Plans a job.
pub(crate) fn make_plan(loaded: &Loaded, shapes: &DataShapes, target: Target) -> Result<JobPlan, CliError> {
    check_size(&loaded.config)?;
    plan_for(&loaded.config, shapes, target).map_err(|err| loaded.explain(err))
}

/// Refuses models whose bytes no counter holds.
fn check_size(config: &JobConfig) -> Result<(), CliError> {
    let fno = config.model.fno();
    if fno.n_layers > MAX_LAYERS {
        let what = format!("model.n_layers = {}: between 1 and {MAX_LAYERS}", fno.n_layers);
        let err = CliError::new(Exit::Config, what).at("model.n_layers");
        return Err(err.why("planning and training take every layer one by one").help("halfmode plan darcy"));
    }
    let modes: f64 = fno.stored_modes().iter().map(|&n| n as f64).product();
    let width = fno.hidden_channels as f64;
    let ratios = fno.lifting_channel_ratio + fno.projection_channel_ratio + fno.channel_mlp_expansion;
    let channels = (fno.in_channels + fno.out_channels) as f64;
    let scalars = fno.n_layers as f64 * width * width * (2.0 * modes + 2.0 * ratios + 2.0) + width * ratios * channels;
    if scalars <= MAX_SCALARS {
        return Ok(());
    }
    let what = format!("the model has about {scalars:.1e} parameters, which fit no memory");
    let err = CliError::new(Exit::Device, what).at("model");
    Err(err
        .why("the weights of the spectral convolutions are n_layers x hidden_channels² x modes")
        .help("halfmode plan darcy"))
}

/// The largest batch, at most all training samples, that fits `memory` by its planned peak ([`memory::taken`]).
pub(crate) fn largest_batch(config: &JobConfig, shapes: &DataShapes, target: Target, memory: usize) -> Option<usize> {
    let fits = |batch: usize| {
        let mut config = config.clone();
        config.train.batch_size = batch;
        plan_for(&config, shapes, target).is_ok_and(|plan| memory::taken(plan.peak_bytes(), target) <= memory)
    };
    let most = shapes.train.n.max(1);
    if !fits(1) {
        return None;
    }
    // `low` fits, `high` does not or is beyond the samples.
    let (mut low, mut high) = (1, 2);
    while high <= most && fits(high) {
        (low, high) = (high, high * 2);
    }
    high = high.min(most + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Some(low)
}

/// The error of a full GPU, with the largest batch below the one that was tried which fits it by plan.
pub(crate) fn explain_no_room(full: NoRoom, loaded: &Loaded, shapes: &DataShapes, target: Target) -> CliError {
    let tried = loaded.config.train.batch_size.min(shapes.train.n);
    let fits = largest_batch(&loaded.config, shapes, target, full.room()).map(|it| it.min(tried.saturating_sub(1)));
    let err = full.error().at("train.batch_size");
    match fits.filter(|&batch| batch > 0) {
        Some(batch) => {
            let why = format!("{}; by plan the largest batch below {tried} that fits is {batch}", full.why());
            err.why(why).help(command_line::with("--set", &format!("train.batch_size={batch}")))
        }
        None => {
            let why = format!("{}; by plan not even a smaller batch fits", full.why());
            err.why(why).help(command_line::with("--device", "cpu"))
        }
    }
}

pub(crate) fn run(args: &PlanArgs, context: &Context) -> Result<Exit, CliError> {
    let loaded = match config_file::load(&args.config, context.global.seed)? {
        Job::Task(loaded) => return task::plan(*loaded, args.memory, context),
        Job::Fields(loaded) => *loaded,
    };
    let policy = loaded.validate()?;
    let (threads, target) = (context.n_threads(), context.target()?);
    let device = context.target_name()?;
    let shapes = loaded.shapes()?;
    let configured = make_plan(&loaded, &shapes, target)?;
    let mut full = loaded.clone();
    full.config.precision = PrecisionConfig::new(Preset::Full, loaded.config.precision.format);
    let full = make_plan(&full, &shapes, target)?;
    let memory = args.memory.or_else(|| context.memory_to_fit());
    let batch = memory.and_then(|memory| largest_batch(&loaded.config, &shapes, target, memory));
    let columns = plan_precisions::columns(&loaded, &shapes, target, memory);
    let ratio = configured.peak_activation_bytes() as f64 / full.peak_activation_bytes().max(1) as f64;

    let object = json!({
        "config": loaded.config,
        "device": device,
        "threads": threads,
        "n_parameters": configured.n_parameters,
        "step_flops": configured.step_flops,
        "steps_per_epoch": shapes.train.n.div_ceil(loaded.config.train.batch_size),
        "precision": { "preset": policy.preset, "format": policy.format, "policy": policy },
        "configured": plan_json(&configured),
        "full": plan_json(&full),
        "peak_activation_ratio": ratio,
        "saved": saved_json(&configured.saved),
        "precisions": columns.iter().map(Column::json).collect::<Vec<_>>(),
        "memory_bytes": memory,
        "largest_batch": batch,
        "fits": memory.map(|memory| memory::taken(configured.peak_bytes(), target) <= memory),
    });
    context.output.result(object, || {
        let config = &loaded.config;
        let mut parts = vec![
            format!("model      {}", model_line(config, configured.n_parameters)),
            format!(
                "data       {} samples at {}, batches of {}",
                shapes.train.n,
                grid_text(&shapes.train.grid),
                config.train.batch_size.min(shapes.train.n)
            ),
            format!("precision  {}", precision_line(&policy)),
            format!("step       {:.2} GFLOP", configured.step_flops / 1e9),
            String::new(),
            format!("peak bytes by purpose ({})", target_text(target, &device)),
            memory_table(&policy.preset.to_string(), &configured, &full),
            "in each precision".to_owned(),
            plan_precisions::table(&columns),
            "kept for backward by one forward pass".to_owned(),
            saved_table(&configured.saved, context.output.is_verbose()),
            String::new(),
            policy.table(),
        ];
        parts.push(fit_line(memory, batch, shapes.train.n, target));
        parts.join("\n")
    })?;
    Ok(Exit::Done)
}

/// `2 threads`, `cuda:0`.
pub(crate) fn target_text(target: Target, device: &str) -> String {
    match target {
        Target::Cpu { threads } => format!("{threads} threads"),
        #[allow(unreachable_patterns, reason = "a build without a GPU backend has no other target")]
        _ => device.to_owned(),
    }
}

fn fit_line(memory: Option<usize>, batch: Option<usize>, n_train: usize, target: Target) -> String {
    let Some(memory) = memory else {
        return "how much memory there is, is not known here: use --memory".to_owned();
    };
    let is_gpu = !matches!(target, Target::Cpu { .. });
    let reserve = if is_gpu { ", of which the GPU's memory pool and libraries may take a fifth" } else { "" };
    let memory = format!("{}{reserve}", text::bytes(memory));
    match batch {
        Some(batch) if batch == n_train => format!("largest batch in {memory}: all {n_train} training samples"),
        Some(batch) => format!("largest batch in {memory}: {batch}"),
        None => format!(
            "not even one sample at a time fits {memory}: use fewer modes, channels or layers, or a coarser grid"
        ),
    }
}

/// Each purpose's own peak, and those of the sums.
pub(crate) fn plan_json(plan: &JobPlan) -> Value {
    let purposes = |stats: &MemoryStats| -> serde_json::Map<String, Value> {
        stats.iter().map(|(purpose, usage)| (purpose.name().to_owned(), usage.peak.into())).collect()
    };
    json!({
        "peak_bytes": plan.peak_bytes(),
        "step_peak_bytes": plan.step.total.peak,
        "peak_activation_bytes": plan.peak_activation_bytes(),
        "saved_bytes": plan.saved.total_bytes(),
        "by_purpose": purposes(&plan.memory),
    })
}

/// What forward keeps: what lives because of it, and with `-v` what is only referred to, too.
pub(crate) fn saved_table(report: &MemoryReport, all: bool) -> String {
    let rows = report.rows.iter().filter(|row| all || !row.shared).cloned().collect();
    MemoryReport { rows }.to_string()
}

pub(crate) fn saved_json(report: &MemoryReport) -> Vec<Value> {
    let rows = report.rows.iter().map(|row| {
        let shape: &[usize] = &row.shape;
        let (dtype, bytes) = (row.dtype.to_string(), row.bytes);
        json!({ "op": row.op, "role": row.role, "shape": shape, "dtype": dtype, "bytes": bytes, "shared": row.shared })
    });
    rows.collect()
}

pub(crate) fn memory_table(preset: &str, configured: &JobPlan, full: &JobPlan) -> String {
    let ratio =
        |bytes: usize, of: usize| if of == 0 { "-".to_owned() } else { format!("{:.3}", bytes as f64 / of as f64) };
    let row = |name: &str, bytes: usize, of: usize| {
        vec![name.to_owned(), bytes.to_string(), of.to_string(), ratio(bytes, of)]
    };
    let pairs = configured.memory.iter().zip(full.memory.iter());
    let mut rows: Vec<Vec<String>> = pairs
        .filter(|((_, ours), (_, theirs))| ours.peak > 0 || theirs.peak > 0)
        .map(|((purpose, ours), (_, theirs))| row(purpose.name(), ours.peak, theirs.peak))
        .collect();
    rows.push(row("activations (training)", configured.peak_activation_bytes(), full.peak_activation_bytes()));
    rows.push(row("training step", configured.step.total.peak, full.step.total.peak));
    rows.push(row("whole job", configured.peak_bytes(), full.peak_bytes()));
    text::table(&["", preset, "full", "ratio"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::config_file::{ConfigArgs, load};

    #[test]
    fn a_full_gpu_is_answered_by_the_largest_batch_that_fits() {
        let sets = ["data.n_train=16", "data.n_test=2", "data.resolution=16", "data.test_resolutions=[16]"];
        let sets = sets.iter().chain(&["model.n_modes=[4,4]", "model.hidden_channels=4", "train.batch_size=16"]);
        let args = ConfigArgs { config: "darcy".to_owned(), sets: sets.map(|&set| set.to_owned()).collect() };
        let Job::Fields(loaded) = load(&args, None).unwrap() else { panic!("a task") };
        let (shapes, target) = (loaded.shapes().unwrap(), Target::Cpu { threads: 1 });
        let mut smaller = loaded.clone();
        smaller.config.train.batch_size = 5;
        let held = make_plan(&smaller, &shapes, target).unwrap().peak_bytes();

        let full = NoRoom { bytes: 1 << 20, free: 0, total: 2 * held, held };
        let text = explain_no_room(full, &loaded, &shapes, target).render(false);
        for part in ["1.00 MiB were asked for", "0 B are free", "below 16 that fits is 5", "at: train.batch_size"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains("--set train.batch_size=5"), "{text}");
        // Where the plan says that it fits, and it did not: something smaller all the same.
        let roomy = NoRoom { free: 1 << 40, ..full };
        let text = explain_no_room(roomy, &loaded, &shapes, target).render(false);
        assert!(text.contains("--set train.batch_size=15"), "{text}");
        let tight = NoRoom { held: 1, ..full };
        assert!(explain_no_room(tight, &loaded, &shapes, target).render(false).contains("--device cpu"));
    }
}
