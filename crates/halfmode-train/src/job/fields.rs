//! Samples: loaded on the host, normalised, and put on the device once.

use crate::job::{DataConfig, DataSource, FileLayout, JobError, Normalisers};
use halfmode_data::{CacheOutcome, DarcyPt, FieldPairs, NpzFile, Problem, read_pairs};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use ndarray::ArrayD;
use std::num::NonZeroUsize;
use std::path::Path;

/// Shapes of one set of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldShape {
    /// The name under which errors are reported: the resolution.
    pub label: String,
    /// Samples.
    pub n: usize,
    /// Channels in.
    pub c_in: usize,
    /// Channels out.
    pub c_out: usize,
    /// Points per axis.
    pub grid: Vec<usize>,
}

/// Shapes of all samples of a job: what planning needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataShapes {
    /// Training samples.
    pub train: FieldShape,
    /// Test samples.
    pub tests: Vec<FieldShape>,
}

/// All samples of a job.
#[derive(Clone, Debug)]
pub struct JobData {
    /// Training samples.
    pub train: FieldPairs,
    /// Test samples by label.
    pub tests: Vec<(String, FieldPairs)>,
    /// What is worth telling about where they came from.
    pub notes: Vec<String>,
}

/// `64` for a square grid, `64x48` for another.
fn label(grid: &[usize]) -> String {
    match grid {
        [first, rest @ ..] if rest.iter().all(|n| n == first) => first.to_string(),
        _ => grid.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
    }
}

/// Labels made unique by a number where two test sets share a resolution.
fn unique_labels(grids: &[Vec<usize>]) -> Vec<String> {
    let mut labels: Vec<String> = Vec::new();
    for grid in grids {
        let base = label(grid);
        let n_same = grids.iter().take(labels.len()).filter(|other| *other == grid).count();
        labels.push(if n_same == 0 { base } else { format!("{base}#{}", n_same + 1) });
    }
    labels
}

impl JobData {
    /// The shapes of these samples.
    #[must_use]
    pub fn shapes(&self) -> DataShapes {
        let shape = |label: String, pairs: &FieldPairs| FieldShape {
            label,
            n: pairs.len(),
            c_in: pairs.c_in(),
            c_out: pairs.c_out(),
            grid: pairs.grid().to_vec(),
        };
        DataShapes {
            train: shape(label(self.train.grid()), &self.train),
            tests: self.tests.iter().map(|(label, pairs)| shape(label.clone(), pairs)).collect(),
        }
    }
}

/// The shapes of a job's samples without loading them.
///
/// # Errors
/// Those of reading the headers of files.
pub fn data_shapes(config: &DataConfig) -> Result<DataShapes, JobError> {
    match config.source() {
        DataSource::Generated(generated) => {
            let shape = |problem: Problem| {
                let (n, grid) = (problem.n(), problem.grid());
                FieldShape { label: label(&grid), n, c_in: 1, c_out: 1, grid }
            };
            let tests = generated.test_resolutions.iter().map(|&n| shape(generated.test(n))).collect();
            Ok(DataShapes { train: shape(generated.train()), tests })
        }
        DataSource::DarcyPt(darcy) => {
            let shape = |file: DarcyPt, n: usize, resolution: usize| -> Result<FieldShape, JobError> {
                let n = file.n_samples()?.min(n);
                Ok(FieldShape { label: resolution.to_string(), n, c_in: 1, c_out: 1, grid: vec![resolution; 2] })
            };
            let train = shape(darcy.train_file(), darcy.n_train, darcy.resolution)?;
            let tests = darcy.test_resolutions.iter().map(|&n| shape(darcy.test_file(n), darcy.n_test, n));
            Ok(DataShapes { train, tests: tests.collect::<Result<Vec<_>, _>>()? })
        }
        DataSource::File(file) => {
            let shape = |path: &Path| -> Result<FieldShape, JobError> {
                let mut npz = NpzFile::open(path)?;
                let (x, y) = (npz.info(&file.input)?.shape, npz.info(&file.output)?.shape);
                let (expected, layout) = match file.layout {
                    FileLayout::ChannelsFirst => (3, "samples, channels, grid"),
                    FileLayout::ChannelsLast => (3, "samples, grid, channels"),
                    FileLayout::NoChannels => (2, "samples, grid"),
                };
                for (array, shape) in [(&file.input, &x), (&file.output, &y)] {
                    if shape.len() < expected {
                        let (array, shape) = (array.clone(), shape.clone());
                        return Err(halfmode_data::Error::Rank { array, expected, layout, shape }.into());
                    }
                }
                let channels = |shape: &[usize]| match (file.layout.in_file(), shape) {
                    (halfmode_data::ChannelLayout::ChannelsFirst, [_, c, ..])
                    | (halfmode_data::ChannelLayout::ChannelsLast, [_, .., c]) => *c,
                    _ => 1,
                };
                let grid = match (file.layout.in_file(), &x[..]) {
                    (halfmode_data::ChannelLayout::ChannelsFirst, [_, _, grid @ ..])
                    | (halfmode_data::ChannelLayout::ChannelsLast, [_, grid @ .., _])
                    | (halfmode_data::ChannelLayout::NoChannels, [_, grid @ ..]) => grid.to_vec(),
                    _ => Vec::new(),
                };
                let n = x.first().copied().unwrap_or(0);
                Ok(FieldShape { label: label(&grid), n, c_in: channels(&x), c_out: channels(&y), grid })
            };
            let train = shape(&file.train)?;
            let mut tests = file.test.iter().map(|path| shape(path)).collect::<Result<Vec<_>, _>>()?;
            let labels = unique_labels(&tests.iter().map(|test| test.grid.clone()).collect::<Vec<_>>());
            tests.iter_mut().zip(labels).for_each(|(test, label)| test.label = label);
            Ok(DataShapes { train, tests })
        }
    }
}

/// Loads or generates a job's samples. `cache` is where generated ones are kept; `progress` gets
/// what is being made, how many are done, and how many there are.
///
/// # Errors
/// Those of generators and readers.
pub fn load_data(
    config: &DataConfig,
    cache: &Path,
    threads: usize,
    progress: &(dyn Fn(&str, usize, usize) + Sync),
) -> Result<JobData, JobError> {
    match config.source() {
        DataSource::Generated(generated) => {
            let mut notes = Vec::new();
            let mut make = |set: &str, problem: Problem| -> Result<FieldPairs, JobError> {
                let what = format!("{problem} {set}");
                let report = |done, n| progress(&what, done, n);
                let (pairs, outcome) = problem.load_or_generate(cache, NonZeroUsize::new(threads), &report)?;
                notes.extend(outcome.warning());
                if let CacheOutcome::Loaded { path } = &outcome {
                    notes.push(format!("{what}: read from {}", path.display()));
                }
                Ok(pairs)
            };
            let train = make("train", generated.train())?;
            let test = |&n: &usize| Ok((n.to_string(), make("test", generated.test(n))?));
            let tests = generated.test_resolutions.iter().map(test).collect::<Result<Vec<_>, JobError>>()?;
            Ok(JobData { train, tests, notes })
        }
        DataSource::DarcyPt(darcy) => {
            let train = darcy.train_file().read(darcy.n_train)?;
            let test = |&n: &usize| Ok((n.to_string(), darcy.test_file(n).read(darcy.n_test)?));
            let tests = darcy.test_resolutions.iter().map(test).collect::<Result<Vec<_>, JobError>>()?;
            Ok(JobData { train, tests, notes: Vec::new() })
        }
        DataSource::File(file) => {
            let read = |path: &Path| read_pairs(path, &file.input, &file.output, file.layout.in_file());
            let train = read(&file.train)?;
            let tests = file.test.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
            let labels = unique_labels(&tests.iter().map(|pairs| pairs.grid().to_vec()).collect::<Vec<_>>());
            Ok(JobData { train, tests: labels.into_iter().zip(tests).collect(), notes: Vec::new() })
        }
    }
}

/// One set of samples on a device, in f32.
#[derive(Debug)]
pub(crate) struct FieldSet {
    pub(crate) shape: FieldShape,
    x: Tensor,
    y: Tensor,
}

impl FieldSet {
    /// Puts samples on the device. Inputs are normalised; outputs too if `encode_outputs`.
    pub(crate) fn new(
        device: &Device,
        shape: FieldShape,
        pairs: Option<FieldPairs>,
        normalisers: &Normalisers,
        encode_outputs: bool,
    ) -> Result<Self, JobError> {
        let extents = |channels| [&[shape.n, channels][..], &shape.grid].concat();
        let put = |array: Option<ArrayD<f32>>, channels| -> Result<Tensor, JobError> {
            let precision = Precision::F32;
            Ok(match array {
                Some(array) => Tensor::from_ndarray(device, array.view(), precision, Purpose::Data)?,
                None => device.alloc(extents(channels), DType::real(precision), Purpose::Data)?,
            })
        };
        let (x, y) = match pairs {
            Some(pairs) => {
                let (mut x, mut y) = pairs.into_parts();
                normalisers.input.encode(&mut x.view_mut())?;
                if encode_outputs {
                    normalisers.output.encode(&mut y.view_mut())?;
                }
                (Some(x), Some(y))
            }
            None => (None, None),
        };
        let (x, y) = (put(x, shape.c_in)?, put(y, shape.c_out)?);
        Ok(FieldSet { shape, x, y })
    }

    pub(crate) fn x(&self) -> &Tensor {
        &self.x
    }

    pub(crate) fn y(&self) -> &Tensor {
        &self.y
    }
}
