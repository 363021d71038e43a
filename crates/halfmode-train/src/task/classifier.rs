//! A classifier of images whose layers are differential equations.

use crate::job::JobError;
use crate::pictures::{Tile, confusion_png, tiles_png};
use crate::task::{ClassifierModel, ImageFormat, ImagesData, ShapesData, SolverConfig, Task, TaskData, Trained};
use crate::{CrossEntropy, Reduction};
use halfmode_autograd::{Tape, Var};
use halfmode_data::{LabelledImages, drawn_shapes};
use halfmode_nn::{Module, ParamSpec, Params};
use halfmode_ode::{ConvNode, Storage, classes};
use halfmode_precision::{DType, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use std::fmt;
use std::path::Path;
use std::sync::LazyLock;

/// Images and what they show, told by a [`ConvNode`].
pub struct ClassifierTask {
    node: ConvNode,
    n_train: usize,
    n_test: usize,
    about: String,
    /// Shapes are drawn when an image is wanted: planning wants none.
    sets: LazyLock<Sets, Box<dyn FnOnce() -> Sets + Send>>,
}

impl fmt::Debug for ClassifierTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ClassifierTask { node, n_train, n_test, about, sets: _ } = self;
        write!(f, "ClassifierTask({about}, {n_train} and {n_test} images, {node:?})")
    }
}

/// Images to train on, and held-out ones.
struct Sets {
    train: LabelledImages,
    test: LabelledImages,
    /// Mean and reciprocal deviation of the training bytes.
    scale: (f64, f64),
}

impl Sets {
    fn new(train: LabelledImages, test: LabelledImages) -> Self {
        let n = train.pixels.len().max(1) as f64;
        let mean = train.pixels.iter().map(|&it| f64::from(it)).sum::<f64>() / n;
        let var = train.pixels.iter().map(|&it| (f64::from(it) - mean).powi(2)).sum::<f64>() / n;
        Sets { train, test, scale: (mean, 1.0 / var.sqrt().max(1.0)) }
    }
}

/// Images that are evaluated at a time.
const EVAL_BATCH: usize = 64;
/// Images in the picture of predictions, and of them in a row.
const SHOWN: (usize, usize) = (32, 8);

/// The sets in the files that a configuration names.
fn read(ImagesData { format, train, test, n_train, n_test }: &ImagesData) -> Result<Sets, JobError> {
    let paths = |key: &'static str, list: &[String]| match list {
        [images, labels] => Ok([images.clone(), labels.clone()]),
        _ => Err(JobError::Config {
            key: key.to_owned(),
            why: format!("needs a file of images and one of labels, found {} names", list.len()),
        }),
    };
    let read = |key: &'static str, list: &[String]| -> Result<LabelledImages, JobError> {
        Ok(match format {
            ImageFormat::Cifar10 => {
                let list: Vec<&Path> = list.iter().map(Path::new).collect();
                LabelledImages::read_cifar10(&list)?
            }
            ImageFormat::Mnist => {
                let [images, labels] = paths(key, list)?;
                LabelledImages::read_idx(images.as_ref(), labels.as_ref())?
            }
            ImageFormat::Stl10 => {
                let [images, labels] = paths(key, list)?;
                LabelledImages::read_stl10(images.as_ref(), labels.as_ref())?
            }
        })
    };
    let limited = |images: LabelledImages, n: Option<usize>| images.first(n.unwrap_or(usize::MAX));
    let train = limited(read("data.train", train)?, *n_train);
    let test = limited(read("data.test", test)?, *n_test);
    if train.is_empty() || test.is_empty() {
        return Err(JobError::Config { key: "data".to_owned(), why: "a set without images".to_owned() });
    }
    if train.extents != test.extents {
        let why = format!("images of {:?} points, training images have {:?}", test.extents, train.extents);
        return Err(JobError::Config { key: "data.test".to_owned(), why });
    }
    Ok(Sets::new(train, test))
}

impl ClassifierTask {
    /// The task of a configuration; reads images from files. Shapes are drawn later, once.
    ///
    /// # Errors
    /// [`JobError::Config`] for data that are no images, and those of reading files.
    pub fn new(model: &ClassifierModel, data: &TaskData, solver: &SolverConfig, seed: u64) -> Result<Self, JobError> {
        let node = |like: &LabelledImages| ConvNode {
            c_in: like.channels,
            n_classes: like.names.len(),
            n_steps: solver.steps,
            method: solver.method.method(),
            storage: Storage::Trajectory,
            ..ConvNode::new(like.extents, model.channels)
        };
        match data {
            &TaskData::Shapes(ShapesData { size, n_train, n_test }) => {
                let draw = move || {
                    // Held-out shapes have numbers that no training reaches.
                    Sets::new(drawn_shapes(seed, size, 0, n_train), drawn_shapes(seed, size, 1 << 62, n_test))
                };
                let (node, about) = (node(&drawn_shapes(seed, size, 0, 0)), "drawn shapes".to_owned());
                Ok(ClassifierTask { node, n_train, n_test, about, sets: LazyLock::new(Box::new(draw)) })
            }
            TaskData::Images(data) => {
                let sets = read(data)?;
                let (node, about) = (node(&sets.train), format!("{:?} files", data.format).to_lowercase());
                let (n_train, n_test) = (sets.train.len(), sets.test.len());
                Ok(ClassifierTask { node, n_train, n_test, about, sets: LazyLock::new(Box::new(move || sets)) })
            }
            TaskData::Density(_) | TaskData::Spirals(_) => Err(JobError::Config {
                key: "data.kind".to_owned(),
                why: "the classifier takes `shapes` or `images`".to_owned(),
            }),
        }
    }

    /// Images of a set, standardised.
    fn tensor(
        &self,
        device: &Device,
        set: fn(&Sets) -> &LabelledImages,
        indices: &[usize],
    ) -> Result<Tensor, JobError> {
        let shape = [indices.len(), self.node.c_in, self.node.image[0], self.node.image[1]];
        if !device.launches() {
            return Ok(device.alloc(shape, DType::real(Precision::F32), Purpose::Data)?);
        }
        let ((mean, factor), images) = (self.sets.scale, set(&self.sets));
        let bytes = indices.iter().flat_map(|&idx| images.image(idx));
        let values: Vec<f32> = bytes.map(|&it| ((f64::from(it) - mean) * factor) as f32).collect();
        Ok(Tensor::from_slice(device, &values, shape, Precision::F32, Purpose::Data)?)
    }

    /// Predicted classes of the test set, none where logits are no numbers, and the mean cross entropy; on the planning
    /// device nothing.
    fn predictions(&self, model: &Trained<'_>) -> Result<(Vec<Option<usize>>, f64), JobError> {
        let (mut found, mut sum) = (Vec::new(), 0.0);
        for first in (0..self.n_test).step_by(EVAL_BATCH) {
            let indices: Vec<usize> = (first..self.n_test.min(first + EVAL_BATCH)).collect();
            let (mut tape, params) = model.tape();
            let x = tape.constant(self.tensor(model.device, |sets| &sets.test, &indices)?);
            let logits = self.node.forward(&mut tape, &params, &[&x])?;
            let labels = match model.device.launches() {
                true => indices.iter().map(|&idx| self.sets.test.labels[idx]).collect(),
                false => vec![0; indices.len()],
            };
            let loss = tape.apply(CrossEntropy { labels: labels.into(), reduction: Reduction::Sum }, &[&logits])?;
            if !model.device.launches() {
                break;
            }
            found.extend(classes(logits.value())?);
            sum += loss.value().to_vec::<f64>()?.iter().sum::<f64>();
        }
        Ok((found, sum / self.n_test.max(1) as f64))
    }
}

impl Task for ClassifierTask {
    fn describe(&self) -> String {
        let ConvNode { channels, n_steps, method, .. } = self.node;
        let method = method.tableau().name;
        format!(
            "classifier of three neural ODEs, {channels} to {} channels, {n_steps} steps of {method} each",
            4 * channels
        )
    }

    fn describe_data(&self) -> String {
        let ([rows, columns], n_classes) = (self.node.image, self.node.n_classes);
        let (about, n, n_test) = (&self.about, self.n_train, self.n_test);
        format!("{about}, {rows}x{columns} points, {n_classes} classes, {n} to train on, {n_test} held out")
    }

    fn param_specs(&self) -> Vec<ParamSpec> {
        self.node.param_specs()
    }

    /// All intervals of an equation start with the same weights.
    fn params(&self, device: &Device, policy: &PrecisionPolicy, seed: u64) -> Result<Params, JobError> {
        Ok(self.node.params(device, policy, seed)?)
    }

    fn n_train(&self) -> usize {
        self.n_train
    }

    fn batch(&self, device: &Device, _epoch: u64, indices: &[usize]) -> Result<Vec<Tensor>, JobError> {
        let labels = if device.launches() {
            let labels: Vec<f64> = indices.iter().map(|&idx| self.sets.train.labels[idx] as f64).collect();
            Tensor::from_slice(device, &labels, [indices.len()], Precision::F32, Purpose::Data)?
        } else {
            device.alloc([indices.len()], DType::real(Precision::F32), Purpose::Data)?
        };
        Ok(vec![self.tensor(device, |sets| &sets.train, indices)?, labels])
    }

    fn loss(&self, tape: &mut Tape, params: &[Var], batch: Vec<Tensor>) -> halfmode_autograd::Result<Var> {
        let [x, labels] = <[Tensor; 2]>::try_from(batch).map_err(|batch| halfmode_autograd::Error::Arity {
            op: "classifier",
            expected: 2,
            found: batch.len(),
        })?;
        let labels = match labels.device().launches() {
            true => labels.to_vec::<f64>()?.into_iter().map(|label| label as usize).collect(),
            false => vec![0; labels.numel()],
        };
        let x = tape.constant(x);
        let logits = self.node.forward(tape, params, &[&x])?;
        tape.apply(CrossEntropy { labels: labels.into(), reduction: Reduction::Mean }, &[&logits])
    }

    fn measures(&self) -> &'static [&'static str] {
        &["cross entropy", "accuracy"]
    }

    fn evaluate(&self, model: &Trained<'_>) -> Result<Vec<f64>, JobError> {
        let (found, loss) = self.predictions(model)?;
        if !model.device.launches() {
            return Ok(vec![0.0; 2]);
        }
        let right = found.iter().zip(&self.sets.test.labels).filter(|(found, label)| **found == Some(**label)).count();
        Ok(vec![loss, right as f64 / self.n_test.max(1) as f64])
    }

    fn pictures(&self, model: &Trained<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError> {
        let drawn = |err: crate::pictures::Error| JobError::Config { key: "plots".to_owned(), why: err.to_string() };
        let (found, _) = self.predictions(model)?;
        let test = &self.sets.test;
        let names = &test.names;
        let mut counts = vec![0; names.len() * names.len()];
        for (found, label) in found.iter().zip(&test.labels) {
            if let Some(found) = found {
                counts[label * names.len() + found] += 1;
            }
        }
        let tile = |(idx, &found): (usize, &Option<usize>)| {
            let label = test.labels[idx];
            let (name, right) = (&names[label], found == Some(label));
            let said = match found {
                _ if right => name.clone(),
                Some(found) => format!("{name} > {}", names[found]),
                None => format!("{name} > NaN"),
            };
            Tile { pixels: test.image(idx), extents: test.extents, label: said, marked: !right }
        };
        let tiles: Vec<Tile<'_>> = found.iter().enumerate().take(SHOWN.0).map(tile).collect();
        Ok(vec![
            ("1-held-out-samples-and-predictions".to_owned(), tiles_png(&tiles, SHOWN.1).map_err(drawn)?),
            ("2-confusion-matrix".to_owned(), confusion_png(names, &counts).map_err(drawn)?),
        ])
    }

    fn step_flops(&self, batch: usize) -> f64 {
        let stages = (self.node.n_steps * self.node.method.tableau().b.len()) as f64;
        let points = (self.node.image[0] * self.node.image[1]) as f64;
        // Channels double and points become a quarter from block to block: all three cost the same. A velocity is two
        // convolutions, computed there and back, and its gradient four.
        let conv = 2.0 * 9.0 * (self.node.channels as f64).powi(2) * points;
        3.0 * stages * (2.0 + 2.0 + 4.0) * conv * batch as f64
    }
}
