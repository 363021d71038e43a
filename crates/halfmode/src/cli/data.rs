//! `halfmode data`: makes and inspects data.

use crate::cli::array_file::ArrayFile;
use crate::cli::error::{CliError, Exit};
use crate::cli::inspect::{self, InspectArgs};
use crate::cli::progress::DataWatch;
use crate::cli::signals::Signals;
use crate::cli::{Context, memory, text};
use halfmode::data::numpy::{NpzArray, write_npz};
use halfmode::data::{DarcyConfig, generate, write_pairs};
use ndarray::{ArrayD, Axis};
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, clap::Subcommand)]
enum DataCommand {
    /// Makes samples with a native generator; the same arguments give the same bytes.
    Generate(GenerateArgs),
    /// Gathers arrays of other files (.npy, .npz, .safetensors, .pt of torch) into one .npz, in f32.
    Import(ImportArgs),
    /// Names, shapes, types and ranges of the arrays of a file (.npz, .npy, .safetensors, .pt).
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
struct GenerateArgs {
    /// What to make.
    #[arg(value_enum)]
    generator: Generator,
    /// Samples.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    n: usize,
    /// Points per axis.
    #[arg(long, value_name = "N", default_value_t = 64)]
    resolution: usize,
    /// Makes samples of the test streams, which share nothing with training samples of the same seed.
    #[arg(long)]
    test: bool,
    /// The .npz file to write, with arrays `x` and `y`, channels first.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Generator {
    /// Darcy flow: -div(a grad u) = 1 on the unit square, u = 0 on the boundary.
    Darcy,
}

#[derive(Debug, clap::Args)]
struct ImportArgs {
    /// The files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The .npz file to write.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Gives arrays `[samples, n_1, …]` a channel axis of 1 behind the first.
    #[arg(long)]
    add_channels: bool,
}

impl DataArgs {
    pub(crate) fn name(&self) -> &'static str {
        match self.command {
            DataCommand::Generate(_) => "data generate",
            DataCommand::Import(_) => "data import",
            DataCommand::Inspect(_) => "data inspect",
        }
    }
}

pub(crate) fn run(args: &DataArgs, context: &Context) -> Result<Exit, CliError> {
    match &args.command {
        DataCommand::Generate(args) => run_generate(args, context),
        DataCommand::Import(args) => run_import(args, context),
        DataCommand::Inspect(args) => inspect::run(args, context),
    }
}

fn run_generate(args: &GenerateArgs, context: &Context) -> Result<Exit, CliError> {
    let Generator::Darcy = args.generator;
    let mut config = DarcyConfig::new(args.n, args.resolution, context.global.seed.unwrap_or(0));
    if args.test {
        config = config.for_test();
    }
    let again = format!("halfmode data generate darcy --n 1000 --resolution 64 --output {}", args.output.display());
    config.validate().map_err(|err| CliError::from(err).help(again.clone()))?;
    // Both arrays in f32; the solvers' own memory is small beside them.
    let needed = 8 * args.n * args.resolution * args.resolution;
    if let Some(available) = memory::available().filter(|&available| needed > available) {
        let why =
            format!("the samples take {}, of which {} are available", text::bytes(needed), text::bytes(available));
        return Err(CliError::new(Exit::Device, "the samples do not fit memory").at("--n").why(why).help(again));
    }
    let start = Instant::now();
    let watch = DataWatch::new(&context.output);
    let what = format!("darcy {0}x{0}", args.resolution);
    let signals = Signals::listen()?;
    let progress = |done: usize, n: usize| {
        watch.report(&what, done, n);
        signals.exit_if_asked(&context.output, "stopped before all samples were made: nothing is written");
    };
    let pairs = generate(&config, NonZeroUsize::new(context.n_threads()), &progress)?;
    if let Some(folder) = args.output.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|err| {
            CliError::new(Exit::Other, format!("cannot create the folder: {err}")).at(folder.display().to_string())
        })?;
    }
    write_pairs(&args.output, &pairs)?;
    let seconds = start.elapsed().as_secs_f64();
    let object = json!({
        "file": text::path(&args.output),
        "generator": "darcy",
        "config": config,
        "arrays": { "x": pairs.x().shape(), "y": pairs.y().shape() },
        "seconds": seconds,
    });
    context.output.result(object, || {
        let shape = pairs.x().shape();
        format!("{}: x {shape:?}, y {:?}, f32, in {}", args.output.display(), pairs.y().shape(), text::seconds(seconds))
    })?;
    Ok(Exit::Done)
}

fn run_import(args: &ImportArgs, context: &Context) -> Result<Exit, CliError> {
    let mut arrays: Vec<(String, ArrayD<f32>)> = Vec::new();
    for path in &args.files {
        let mut file = ArrayFile::open(path)?;
        for name in file.names() {
            if arrays.iter().any(|(other, _)| *other == name) {
                let err = CliError::new(Exit::Data, format!("two files hold an array `{name}`"));
                return Err(err.at(path.display().to_string()).help("halfmode data import FILE -o OTHER.npz"));
            }
            let (_, mut array) = file.read_f32(Some(&name))?;
            if args.add_channels && array.ndim() > 1 {
                array = array.insert_axis(Axis(1));
            }
            arrays.push((name, array));
        }
    }
    let named: Vec<(&str, NpzArray<'_>)> =
        arrays.iter().map(|(name, array)| (name.as_str(), NpzArray::F32(array.view()))).collect();
    write_npz(&args.output, &named)?;
    let shapes: serde_json::Map<String, Value> =
        arrays.iter().map(|(name, array)| (name.clone(), json!(array.shape()))).collect();
    let object = json!({ "file": text::path(&args.output), "arrays": shapes });
    context.output.result(object, || {
        let shapes = arrays.iter().map(|(name, array)| format!("{name} {:?}", array.shape()));
        format!("{}: {}, f32", args.output.display(), shapes.collect::<Vec<_>>().join(", "))
    })?;
    Ok(Exit::Done)
}
