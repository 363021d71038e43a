//! The command line: what users type, and which file answers it.

mod array_file;
mod bench;
mod bench_micro;
mod command_line;
mod config_file;
mod data;
mod doctor;
mod environment;
mod error;
mod eval;
#[cfg_attr(not(feature = "cuda"), path = "gpu_absent.rs")]
mod gpu;
mod import;
mod inspect;
mod memory;
mod model_source;
mod output;
mod plan;
mod plan_precisions;
mod predict;
mod progress;
mod report;
mod run_dir;
mod signals;
mod task;
mod text;
mod train;

use clap::{Args, ColorChoice, Parser, Subcommand, ValueEnum};
use error::{CliError, Exit};
use halfmode::tensor::{Device, Target};
use output::{Output, Verbosity};

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;

/// Trains neural operators in mixed precision.
#[derive(Debug, Parser)]
#[command(
    name = "halfmode",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command takes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE", help = gpu::DEVICE_HELP)]
    device: DeviceChoice,
    /// Worker threads; 0: one per core.
    #[arg(long, global = true, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: u16,
    /// Replaces the seed of the configuration, or of the generator.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=i64::MAX as u64))]
    pub(crate) seed: Option<u64>,
    /// Says more.
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    verbose: bool,
    /// Says nothing but results and errors.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Colours on stderr.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    color: Color,
    /// Prints one JSON object on stdout instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// Where generated data is kept [default: $HALFMODE_CACHE, $XDG_CACHE_HOME/halfmode or ~/.cache/halfmode].
    #[arg(long, global = true, value_name = "DIR")]
    data_cache: Option<PathBuf>,
}

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    /// Where stderr is a terminal and NO_COLOR is not set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What `--device` may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(u32),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == "cpu" => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", index)) => {
                index.parse().map(DeviceChoice::Cuda).map_err(|_| format!("`{index}` is not the number of a GPU"))
            }
            _ => Err("use auto, cpu or cuda[:i]".to_owned()),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what this machine and this build can do.
    Doctor,
    /// Makes and inspects data.
    Data(data::DataArgs),
    /// Trains a model: the main job. `halfmode train darcy` needs nothing else.
    Train(train::TrainArgs),
    /// Errors of a trained model, at any resolution.
    Eval(eval::EvalArgs),
    /// Makes a model file from a model of another library.
    Import(import::ImportArgs),
    /// Predicts outputs for the inputs in a file.
    Predict(predict::PredictArgs),
    /// Tensors of a model, a checkpoint or a data set: shapes, ranges, and what f16 would lose of them.
    Inspect(inspect::InspectArgs),
    /// Says what a job would cost, without running it.
    Plan(plan::PlanArgs),
    /// Measures.
    Bench(bench::BenchArgs),
    /// Writes the HTML report of a run again.
    Report(report::ReportArgs),
}

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Command::Doctor => "doctor",
            Command::Data(args) => args.name(),
            Command::Train(_) => "train",
            Command::Eval(_) => "eval",
            Command::Import(_) => "import neuraloperator",
            Command::Predict(_) => "predict",
            Command::Inspect(_) => "inspect",
            Command::Plan(_) => "plan",
            Command::Bench(args) => args.name(),
            Command::Report(_) => "report",
        }
    }
}

/// What a command was started with.
pub(crate) struct Context {
    pub(crate) global: Global,
    pub(crate) output: Output,
    device: OnceLock<Device>,
}

impl Context {
    /// Worker threads, never 0.
    pub(crate) fn n_threads(&self) -> usize {
        match usize::from(self.global.threads) {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            n => n,
        }
    }

    /// The device that was asked for. It is opened once, and stderr says which it is.
    pub(crate) fn device(&self) -> Result<Device, CliError> {
        if let Some(device) = self.device.get() {
            return Ok(device.clone());
        }
        let (gpu, broken) = match self.global.device {
            DeviceChoice::Cpu => (None, None),
            DeviceChoice::Cuda(index) => (Some(gpu::device(index, self.data_cache())?), None),
            DeviceChoice::Auto => gpu::find(self.data_cache()).map_or_else(|why| (None, Some(why)), |it| (it, None)),
        };
        let cpu = || Device::cpu(self.n_threads()).map_err(|err| CliError::new(Exit::Other, err.to_string()));
        let device = gpu.map_or_else(cpu, Ok)?;
        let what = gpu::model(&device).unwrap_or_else(|| format!("threads: {}", self.n_threads()));
        let broken = broken.map_or_else(String::new, |why| format!("; the GPU does not work: {why}"));
        self.output.note(&format!("device     {}, {what}{broken}", device_name(&device)));
        Ok(self.device.get_or_init(|| device).clone())
    }

    /// What to plan for. A GPU that is named need not be there.
    pub(crate) fn target(&self) -> Result<Target, CliError> {
        match self.global.device {
            DeviceChoice::Cuda(index) => gpu::target(index),
            _ => Ok(self.device()?.target()),
        }
    }

    /// The name of what [`Context::target`] plans for.
    pub(crate) fn target_name(&self) -> Result<String, CliError> {
        match self.global.device {
            gpu @ DeviceChoice::Cuda(_) => Ok(gpu.to_string()),
            _ => Ok(device_name(&self.device()?)),
        }
    }

    /// Bytes that a planned job has to fit, where they are known: all of a GPU, or what the machine has free.
    pub(crate) fn memory_to_fit(&self) -> Option<usize> {
        match (self.global.device, self.device.get()) {
            (DeviceChoice::Cuda(index), _) => gpu::total_bytes(index as usize),
            (_, Some(device)) if !device.is_cpu() => gpu::total_bytes(gpu::ordinal(device)?),
            _ => memory::available(),
        }
    }

    /// Where generated data is kept, and compiled kernels.
    pub(crate) fn data_cache(&self) -> PathBuf {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        self.global
            .data_cache
            .clone()
            .or_else(|| variable("HALFMODE_CACHE"))
            .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("halfmode")))
            .or_else(|| variable("HOME").map(|folder| folder.join(".cache/halfmode")))
            .unwrap_or_else(|| std::env::temp_dir().join("halfmode-cache"))
    }
}

/// The name of a device, as `--device` takes it.
pub(crate) fn device_name(device: &Device) -> String {
    gpu::ordinal(device).map_or_else(|| "cpu".to_owned(), |ordinal| format!("cuda:{ordinal}"))
}

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => {
            // Help and version are errors to clap, with code 0.
            let code = if err.use_stderr() { Exit::Usage } else { Exit::Done };
            // Nothing can be said when the streams are closed.
            let _ = err.print();
            if code == Exit::Usage && std::env::args_os().any(|word| word == "--json") {
                let text = err.render().to_string();
                let what = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
                let err = CliError::new(code, what).help("halfmode --help");
                Output::new("", true, Verbosity::Quiet, ColorChoice::Never).print_error(&err);
            }
            return code.into();
        }
    };
    let verbosity = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    let color = match cli.global.color {
        Color::Auto => ColorChoice::Auto,
        Color::Always => ColorChoice::Always,
        Color::Never => ColorChoice::Never,
    };
    let output = Output::new(cli.command.name(), cli.global.json, verbosity, color);
    let context = Context { global: cli.global, output, device: OnceLock::new() };
    match signals::survive_file_limits().and_then(|()| run(&cli.command, &context)) {
        Ok(code) => code.into(),
        Err(err) => {
            let help = match err.code {
                Exit::Device => "halfmode doctor".to_owned(),
                _ => format!("halfmode {} --help", cli.command.name()),
            };
            let err = err.or_help(help);
            context.output.error(&err);
            err.code.into()
        }
    }
}

fn run(command: &Command, context: &Context) -> Result<Exit, CliError> {
    if let DeviceChoice::Cuda(index) = context.global.device
        && !matches!(command, Command::Doctor | Command::Plan(_))
    {
        gpu::check(index)?;
    }
    match command {
        Command::Doctor => doctor::run(context),
        Command::Data(args) => data::run(args, context),
        Command::Train(args) => train::run(args, context),
        Command::Eval(args) => eval::run(args, context),
        Command::Import(args) => import::run(args, context),
        Command::Predict(args) => predict::run(args, context),
        Command::Inspect(args) => inspect::run(args, context),
        Command::Plan(args) => plan::run(args, context),
        Command::Bench(args) => bench::run(args, context),
        Command::Report(args) => report::run(args, context),
    }
}
