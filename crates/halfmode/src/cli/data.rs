//! `halfmode data`: makes and inspects data.

use crate::cli::array_file::ArrayFile;
use crate::cli::error::{CliError, Exit};
use crate::cli::inspect::{self, InspectArgs};
use crate::cli::progress::DataWatch;
use crate::cli::signals::Signals;
use crate::cli::{Context, memory, text};
use halfmode::data::numpy::{NpzArray, write_npz};
use halfmode::data::{BurgersConfig, DarcyConfig, LeftOut, NavierStokesConfig, Problem, write_pairs};
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
    /// Gathers arrays of other files (.npy, .npz, .safetensors, .pt of torch, .h5, .mat 7.3, .nc) into one .npz, in f32.
    Import(ImportArgs),
    /// Names, shapes, types and ranges of the arrays of a file (.npz, .npy, .safetensors, .pt, .h5, .mat, .nc).
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
    /// Points per axis: 64 unless said otherwise, 256 for burgers.
    #[arg(long, value_name = "N")]
    resolution: Option<usize>,
    /// Viscosity of burgers (0.1 unless said otherwise) and navier-stokes (0.001).
    #[arg(long, value_name = "NU", allow_negative_numbers = true)]
    viscosity: Option<f64>,
    /// Time of the output of burgers (1 unless said otherwise) and navier-stokes (5).
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    time: Option<f64>,
    /// Amplitude of the force of navier-stokes (0.1 unless said otherwise).
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    forcing: Option<f64>,
    /// Makes samples of the test streams, which share nothing with training samples of the same seed.
    #[arg(long)]
    test: bool,
    /// The .npz file to write, with arrays `x` and `y`, channels first.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Generator {
    /// Darcy flow: -div(a grad u) = 1 on the unit square, u = 0 on the boundary.
    Darcy,
    /// Burgers' equation u_t + u u_x = ν u_xx on the periodic interval, from time 0 to 1.
    Burgers,
    /// Vorticity w_t + u·∇w = ν Δw + f on the periodic square, from time 0 to 5.
    NavierStokes,
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

impl GenerateArgs {
    /// What is asked for.
    fn problem(&self, seed: u64) -> Result<Problem, CliError> {
        let n = self.n;
        let problem = match self.generator {
            Generator::Darcy => Problem::Darcy(DarcyConfig::new(n, self.resolution.unwrap_or(64), seed)),
            Generator::Burgers => {
                let usual = BurgersConfig::new(n, self.resolution.unwrap_or(256), seed);
                let viscosity = self.viscosity.unwrap_or(usual.viscosity);
                Problem::Burgers(BurgersConfig { viscosity, time: self.time.unwrap_or(usual.time), ..usual })
            }
            Generator::NavierStokes => {
                let usual = NavierStokesConfig::new(n, self.resolution.unwrap_or(64), seed);
                let viscosity = self.viscosity.unwrap_or(usual.viscosity);
                let forcing = self.forcing.unwrap_or(usual.forcing);
                let time = self.time.unwrap_or(usual.time);
                Problem::NavierStokes(NavierStokesConfig { viscosity, time, forcing, ..usual })
            }
        };
        let darcy = self.generator == Generator::Darcy;
        let burgers = self.generator == Generator::Burgers;
        for (argument, given) in [
            ("--viscosity", self.viscosity.is_some() && darcy),
            ("--time", self.time.is_some() && darcy),
            ("--forcing", self.forcing.is_some() && (darcy || burgers)),
        ] {
            if given {
                let err = CliError::new(Exit::Usage, format!("{} data have no such setting", problem.name()));
                return Err(err.at(argument).help(self.example()));
            }
        }
        Ok(if self.test { problem.for_test() } else { problem })
    }

    /// A command that works.
    fn example(&self) -> String {
        let (generator, resolution) = match self.generator {
            Generator::Darcy => ("darcy", 64),
            Generator::Burgers => ("burgers", 256),
            Generator::NavierStokes => ("navier-stokes", 64),
        };
        let output = self.output.display();
        format!("halfmode data generate {generator} --n 1000 --resolution {resolution} --output {output}")
    }
}

fn run_generate(args: &GenerateArgs, context: &Context) -> Result<Exit, CliError> {
    let problem = args.problem(context.global.seed.unwrap_or(0))?;
    let again = args.example();
    problem.validate().map_err(|err| CliError::from(err).help(again.clone()))?;
    // Both arrays in f32; the solvers' own memory is small beside them.
    let needed = 8 * args.n * problem.grid().iter().product::<usize>();
    if let Some(available) = memory::available().filter(|&available| needed > available) {
        let why =
            format!("the samples take {}, of which {} are available", text::bytes(needed), text::bytes(available));
        return Err(CliError::new(Exit::Device, "the samples do not fit memory").at("--n").why(why).help(again));
    }
    let start = Instant::now();
    let watch = DataWatch::new(&context.output);
    let what = problem.to_string();
    let signals = Signals::listen()?;
    let progress = |done: usize, n: usize| {
        watch.report(&what, done, n);
        signals.exit_if_asked(&context.output, "stopped before all samples were made: nothing is written");
    };
    let pairs = problem.generate(NonZeroUsize::new(context.n_threads()), &progress)?;
    if let Some(folder) = args.output.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|err| {
            CliError::new(Exit::Other, format!("cannot create the folder: {err}")).at(folder.display().to_string())
        })?;
    }
    write_pairs(&args.output, &pairs)?;
    let seconds = start.elapsed().as_secs_f64();
    let object = json!({
        "file": text::path(&args.output),
        "generator": problem.name(),
        "config": problem,
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
    let mut left_out = Vec::new();
    for path in &args.files {
        let mut file = ArrayFile::open(path)?;
        for LeftOut { name, reason } in file.left_out() {
            context.output.warn(&format!("{name} is left out: {reason}"));
            left_out.push(json!({ "file": text::path(path), "name": name, "reason": reason }));
        }
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
    let object = json!({ "file": text::path(&args.output), "arrays": shapes, "left_out": left_out });
    context.output.result(object, || {
        let shapes = arrays.iter().map(|(name, array)| format!("{name} {:?}", array.shape()));
        format!("{}: {}, f32", args.output.display(), shapes.collect::<Vec<_>>().join(", "))
    })?;
    Ok(Exit::Done)
}
