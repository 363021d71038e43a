//! `halfmode eval`: errors of a trained model at several resolutions.

use crate::cli::error::{CliError, Exit};
use crate::cli::model_source::{self, PrecisionChoice, Source, check_fields, check_grid};
use crate::cli::progress::DataWatch;
use crate::cli::train::precision_line;
use crate::cli::{Context, command_line, memory, text};
use halfmode::data::{ChannelLayout, FieldPairs, NpzFile, Problem, read_pairs};
use halfmode::precision::Domain;
use halfmode::train::atomic_write;
use halfmode::train::job::{DarcyPtData, DataConfig, DataSource, FileLayout, render_panels};
use serde_json::json;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    /// A run directory or a model file.
    #[arg(value_name = "RUN|MODEL")]
    run: PathBuf,
    /// Points per axis of generated test data, such as 64,128 [default: those of the configuration].
    #[arg(long, value_name = "N,…", value_delimiter = ',', conflicts_with = "data")]
    resolution: Vec<usize>,
    /// Test data in an .npz file instead (keys and layout of the configuration; else x, y, channels first).
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Computes in another precision than the model's: full, amp, mixed, half, or as mixed:bf16.
    #[arg(long, value_name = "PRESET")]
    precision: Option<PrecisionChoice>,
    /// Samples at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    batch: u32,
    /// Samples to draw per data set.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1000))]
    plots: u16,
    /// Where to draw [default: RUN/plots, or plots].
    #[arg(long, value_name = "DIR")]
    plots_dir: Option<PathBuf>,
}

/// One line of the result.
struct Row {
    label: String,
    n: usize,
    l2: f64,
    h1: f64,
    seconds: f64,
}

pub(crate) fn run(args: &EvalArgs, context: &Context) -> Result<Exit, CliError> {
    let source = model_source::load(&args.run, args.precision, context)?;
    let smaller = || command_line::with("--batch", "1");
    context.output.note(&format!("model      {}", source.file.display()));
    context.output.note(&format!("precision  {}", precision_line(source.model.policy())));
    let plots_dir =
        args.plots_dir.clone().unwrap_or_else(|| source.run.as_deref().unwrap_or(Path::new("")).join("plots"));
    let (mut rows, mut plots) = (Vec::new(), Vec::new());
    for set in sets(args, &source)? {
        let (label, pairs) = set.load(context, source.model.config().domain())?;
        check_fields(&source.model, &format!("the input of {label}"), pairs.x().shape())?;
        check_grid(&source.model, pairs.grid())
            .map_err(|why| CliError::new(Exit::Data, format!("the input of {label} is too coarse")).why(why))?;
        if pairs.c_out() != source.model.config().fno().out_channels {
            let what = format!("the output of {label} has {} channels", pairs.c_out());
            let why = format!("the model gives {}", source.model.config().fno().out_channels);
            return Err(CliError::new(Exit::Data, what).why(why));
        }
        let working = source.model.planned_peak_bytes(pairs.x().shape(), args.batch as usize, None)?;
        let help = || format!("halfmode eval {} --batch 1", args.run.display());
        memory::check_on(&context.device()?, "the batch", working).map_err(|err| err.at("--batch").help(help()))?;
        let start = Instant::now();
        let (errors, prediction) =
            source.model.evaluate(&pairs, args.batch as usize).map_err(|err| CliError::from(err).at_memory(smaller))?;
        let seconds = start.elapsed().as_secs_f64();
        for sample in 0..usize::from(args.plots).min(pairs.len()) {
            let path = plots_dir.join(format!("eval-{label}-sample-{sample}.png"));
            draw(&path, &pairs, prediction.as_slice().unwrap_or_default(), sample)?;
            plots.push(text::path(&path));
        }
        rows.push(Row { label, n: pairs.len(), l2: errors.l2, h1: errors.h1, seconds });
    }
    let eval: serde_json::Map<String, serde_json::Value> = rows
        .iter()
        .map(|row| (row.label.clone(), json!({ "n": row.n, "l2": row.l2, "h1": row.h1, "seconds": row.seconds })))
        .collect();
    let preset = source.model.policy().preset;
    let object = json!({
        "model": text::path(&source.file),
        "precision": preset,
        "format": source.model.policy().format,
        "n_parameters": source.model.params().n_scalars(),
        "eval": eval,
        "plots": plots,
    });
    context.output.result(object, || {
        let cells = |row: &Row| {
            let errors = [row.l2, row.h1].map(|error| format!("{error:.5}"));
            [&[row.label.clone(), row.n.to_string()][..], &errors, &[text::seconds(row.seconds)]].concat()
        };
        let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
        text::table(&["data", "samples", "L2", "H1", "time"], &cells)
    })?;
    Ok(Exit::Done)
}

/// A data set that is to be read or made.
enum Set {
    Generated { resolution: usize, problem: Problem },
    DarcyPt { resolution: usize, data: DarcyPtData },
    File { path: PathBuf, input: String, output: String, layout: ChannelLayout },
}

/// The data sets that were asked for.
fn sets(args: &EvalArgs, source: &Source) -> Result<Vec<Set>, CliError> {
    let config = source.job.as_ref().map(|job| &job.data);
    let file = |path: &PathBuf| {
        let (input, output, layout) = match config {
            Some(DataConfig::File(file)) => (file.input.clone(), file.output.clone(), channel_layout(file.layout)),
            _ => ("x".to_owned(), "y".to_owned(), ChannelLayout::ChannelsFirst),
        };
        Set::File { path: path.clone(), input, output, layout }
    };
    if !args.data.is_empty() {
        return Ok(args.data.iter().map(file).collect());
    }
    let refuse = |what: &str| {
        let err = CliError::new(Exit::Usage, what).at("--resolution");
        err.help(format!("halfmode eval {} --data FILE.npz", args.run.display()))
    };
    let asked = |tests: &[usize]| if args.resolution.is_empty() { tests.to_vec() } else { args.resolution.clone() };
    let place = |resolution: usize, trained: usize, why: String| {
        let err = CliError::new(Exit::Config, format!("resolution {resolution} cannot be evaluated"));
        let help = format!("halfmode eval {} --resolution {trained}", args.run.display());
        err.at("--resolution").why(why).help(help)
    };
    match config.map(DataConfig::source) {
        Some(DataSource::Generated(data)) => {
            let sets = asked(data.test_resolutions).into_iter().map(|resolution| {
                let place = |why: String| place(resolution, data.resolution, why);
                let problem = data.test(resolution);
                check_grid(&source.model, &problem.grid()).map_err(place)?;
                problem.validate().map_err(|err| place(err.to_string()))?;
                Ok(Set::Generated { resolution, problem })
            });
            sets.collect()
        }
        Some(DataSource::DarcyPt(data)) => {
            let sets = asked(&data.test_resolutions).into_iter().map(|resolution| {
                check_grid(&source.model, &[resolution; 2]).map_err(|why| place(resolution, data.resolution, why))?;
                Ok(Set::DarcyPt { resolution, data: data.clone() })
            });
            sets.collect()
        }
        Some(DataSource::File(_)) if !args.resolution.is_empty() => {
            Err(refuse("the model was trained on files, which have their own resolutions"))
        }
        Some(DataSource::File(data)) => Ok(data.test.iter().map(file).collect()),
        None => Err(refuse("the model file does not say what data it was trained on")),
    }
}

fn channel_layout(layout: FileLayout) -> ChannelLayout {
    match layout {
        FileLayout::ChannelsFirst => ChannelLayout::ChannelsFirst,
        FileLayout::ChannelsLast => ChannelLayout::ChannelsLast,
        FileLayout::NoChannels => ChannelLayout::NoChannels,
    }
}

impl Set {
    /// The samples and the name under which their errors are reported.
    fn load(self, context: &Context, domain: Domain) -> Result<(String, FieldPairs), CliError> {
        match self {
            Set::Generated { resolution, problem } => {
                let points: usize = problem.grid().iter().product();
                memory::check("the test data", problem.n().saturating_mul(8 * points))
                    .map_err(|err| err.at(format!("--resolution {resolution}")))?;
                let watch = DataWatch::new(&context.output);
                let what = format!("{problem} test");
                let progress = |done: usize, n: usize| watch.report(&what, done, n);
                let threads = NonZeroUsize::new(context.n_threads());
                let (pairs, outcome) = problem.load_or_generate(&context.data_cache(), threads, &progress)?;
                if let Some(warning) = outcome.warning() {
                    context.output.warn(&warning);
                }
                Ok((resolution.to_string(), pairs))
            }
            Set::DarcyPt { resolution, data } => {
                let file = data.test_file(resolution);
                let help = format!("halfmode data inspect {}", file.path().display());
                let pairs = file.read(data.n_test).map_err(|err| CliError::from(err).help(help))?;
                Ok((resolution.to_string(), pairs))
            }
            Set::File { path, input, output, layout } => {
                let refuse = |err| CliError::from(err).help(format!("halfmode data inspect {}", path.display()));
                let mut file = NpzFile::open(&path).map_err(refuse)?;
                for name in [&input, &output] {
                    let n = file.info(name).map_err(refuse)?.n_elements();
                    memory::check(&format!("array `{name}`"), n.saturating_mul(4))
                        .map_err(|err| err.at(path.display().to_string()))?;
                }
                let pairs = read_pairs(&path, &input, &output, layout, domain).map_err(refuse)?;
                let label =
                    path.file_stem().map_or_else(|| "data".to_owned(), |stem| stem.to_string_lossy().into_owned());
                Ok((label, pairs))
            }
        }
    }
}

/// Draws the first channels of one sample, of complex fields their moduli.
fn draw(path: &Path, pairs: &FieldPairs, prediction: &[f32], sample: usize) -> Result<(), CliError> {
    let points = pairs.grid().iter().product::<usize>() * pairs.domain().scalars();
    let first = |values: &[f32], channels: usize| {
        let start = sample * channels * points;
        values.get(start..start + points).unwrap_or_default().to_vec()
    };
    let input = first(pairs.x().as_slice().unwrap_or_default(), pairs.c_in());
    let truth = first(pairs.y().as_slice().unwrap_or_default(), pairs.c_out());
    let png = render_panels([&input, &truth, &first(prediction, pairs.c_out())], pairs.grid(), pairs.domain())?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|err| {
            CliError::new(Exit::Other, format!("cannot create the folder: {err}")).at(folder.display().to_string())
        })?;
    }
    Ok(atomic_write(path, &png)?)
}
