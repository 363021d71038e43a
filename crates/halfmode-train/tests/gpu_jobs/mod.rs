//! Small jobs for tests on a GPU.

use halfmode_data::FieldPairs;
use halfmode_operators::FnoConfig;
use halfmode_precision::{Precision, PrecisionConfig, Preset};
use halfmode_train::job::{DataConfig, FileData, FileLayout, JobConfig, LossKind, ModelConfig, Trainer};
use ndarray::{ArrayD, IxDyn};
use std::path::PathBuf;

pub(crate) const GRIDS: [&[usize]; 3] = [&[48], &[20, 18], &[10, 12, 9]];
pub(crate) const BATCH: usize = 4;

pub(crate) fn config(grid: &[usize], preset: Preset, format: Precision, loss: LossKind) -> JobConfig {
    let mut config = JobConfig::darcy();
    let modes: Vec<usize> = grid.iter().map(|n| n / 3).collect();
    let mut fno = FnoConfig::new(&modes, 8);
    fno.n_layers = 2;
    config.model = ModelConfig::Fno(fno);
    // The samples are handed over; the files do not exist.
    let path = PathBuf::from("samples.npz");
    config.data = DataConfig::File(FileData {
        train: path.clone(),
        test: vec![path],
        input: "x".to_owned(),
        output: "y".to_owned(),
        layout: FileLayout::ChannelsFirst,
    });
    config.precision = PrecisionConfig::new(preset, format);
    config.train.loss = loss;
    config.train.batch_size = BATCH;
    config.optimizer.learning_rate = 1e-3;
    config
}

/// Waves of a few lengths, and waves that depend on them.
pub(crate) fn samples(grid: &[usize], n: usize) -> FieldPairs {
    let shape = [&[n, 1][..], grid].concat();
    let field = |of: &dyn Fn(f64, f64) -> f64| {
        ArrayD::from_shape_fn(IxDyn(&shape), |at| {
            let place: f64 = grid.iter().enumerate().map(|(axis, &n)| at[axis + 2] as f64 / n as f64).sum();
            of(std::f64::consts::TAU * place, at[0] as f64) as f32
        })
    };
    let x = field(&|t, sample| (t + sample).sin() + 0.3 * (2.0 * t - sample).cos());
    let y = field(&|t, sample| (t + sample).cos() * 0.5 + 0.2 * (3.0 * t + sample).sin());
    FieldPairs::new(x, y).unwrap()
}

/// The exact weights, parameter by parameter.
pub(crate) fn weights(trainer: &Trainer) -> Vec<Vec<f64>> {
    trainer.params().list.iter().map(|param| param.file_values().unwrap()).collect()
}
