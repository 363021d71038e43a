//! Training steps and checkpoints on a GPU against the CPU. Without a GPU only plans are made; with
//! `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod gpu_jobs;

use gpu_jobs::{BATCH, GRIDS, config, samples, weights};
use halfmode_precision::{LossScale, Precision, Preset, ScalerConfig};
use halfmode_tensor::{Device, Target};
use halfmode_testkit::gpu;
use halfmode_train::job::{JobConfig, JobData, LossKind, Trainer, plan_for};
use halfmode_train::{read_named, write_named};
use std::path::PathBuf;

const N_SAMPLES: usize = 12;

fn data(grid: &[usize]) -> JobData {
    let tests = vec![("test".to_owned(), samples(grid, 5))];
    JobData { train: samples(grid, N_SAMPLES), tests, notes: Vec::new() }
}

fn trainer(config: &JobConfig, grid: &[usize], device: &Device) -> Trainer {
    let data = data(grid);
    Trainer::new(config.clone(), device, &data.shapes(), Some(data)).unwrap()
}

fn train(trainer: &mut Trainer, n_steps: usize) -> Vec<f64> {
    let batch = |step: usize| (0..BATCH).map(move |i| (step * BATCH + i) % N_SAMPLES).collect::<Vec<_>>();
    let mut step = |step| {
        let record = trainer.step(&batch(step)).unwrap();
        assert!(record.applied, "step {step} was skipped");
        record.loss
    };
    (0..n_steps).map(&mut step).collect()
}

fn assert_losses_agree(preset: Preset, format: Precision, tolerance: f64) {
    let Some(gpu) = gpu() else { return };
    for grid in GRIDS {
        for loss in [LossKind::L2, LossKind::H1] {
            let config = config(grid, preset, format, loss);
            let mut cpu = trainer(&config, grid, &Device::cpu(2).unwrap());
            let mut gpu = trainer(&config, grid, &gpu);
            let (want, got) = (train(&mut cpu, 5), train(&mut gpu, 5));
            let close = |(want, got): (&f64, &f64)| (want - got).abs() <= tolerance * want;
            let name = format!("{loss:?} on {grid:?} in {preset:?} {format}");
            assert!(want.iter().zip(&got).all(close), "{name}: {got:?} for {want:?}");
            let (want, got) = (cpu.evaluate(0).unwrap(), gpu.evaluate(0).unwrap());
            let error = |want: f64, got: f64| (want - got).abs() / want;
            assert!(error(want.l2, got.l2) <= tolerance && error(want.h1, got.h1) <= tolerance, "{name} evaluated");
        }
    }
}

#[test]
fn five_steps_in_single_precision() {
    assert_losses_agree(Preset::Full, Precision::F16, 1e-5);
}

#[test]
fn five_steps_in_f16() {
    assert_losses_agree(Preset::Mixed, Precision::F16, 0.02);
}

#[test]
fn five_steps_in_bf16() {
    assert_losses_agree(Preset::Mixed, Precision::Bf16, 0.02);
}

/// Scales that overflow at first, and norms that are clipped: a GPU decides as the host does. Which scale overflows
/// first depends on what is stored in f16 on the way, so steps are counted as they are taken.
#[test]
fn steps_are_skipped_and_clipped_as_on_the_cpu() {
    let grid = GRIDS[1];
    let mut config = config(grid, Preset::Mixed, Precision::F16, LossKind::L2);
    // Gradients of fields are stored in f16, which ends at 65504.
    let scaler = ScalerConfig { init: 2f64.powi(30), max: 2f64.powi(30), ..ScalerConfig::DEFAULT };
    config.precision.loss_scale = Some(LossScale::Dynamic(scaler));
    config.train.clip_grad_norm = Some(0.01);
    let devices = [Device::cpu(2).unwrap()].into_iter().chain(gpu());
    let runs = devices.map(|device| {
        let mut trainer = trainer(&config, grid, &device);
        let batch: Vec<usize> = (0..BATCH).collect();
        let (mut taken, mut n_skipped) = (Vec::new(), 0);
        while taken.len() < 5 {
            let (before, scale) = (weights(&trainer), trainer.loss_scale());
            let record = trainer.step(&batch).unwrap();
            let moved = weights(&trainer) != before;
            assert_eq!(moved, record.applied);
            let next = if moved { scale } else { scale / 2.0 };
            assert_eq!(trainer.loss_scale().to_bits(), next.to_bits());
            if moved {
                taken.push(record.loss)
            } else {
                n_skipped += 1
            }
            assert!(n_skipped < 30);
        }
        assert!(n_skipped > 0 && trainer.state().skipped_steps == n_skipped, "{n_skipped}");
        taken
    });
    let runs: Vec<Vec<f64>> = runs.collect();
    for run in &runs {
        let close = |(want, got): (&f64, &f64)| (want - got).abs() <= 0.02 * want;
        assert!(runs[0].iter().zip(run).all(close), "{runs:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_on_one_gpu() {
    let Some(gpu) = gpu() else { return };
    let (grid, config) = (GRIDS[1], config(GRIDS[1], Preset::Mixed, Precision::F16, LossKind::H1));
    let runs = [0; 2].map(|_| train(&mut trainer(&config, grid, &gpu), 4));
    assert!(runs[0].iter().zip(&runs[1]).all(|(a, b)| a.to_bits() == b.to_bits()), "{runs:?}");
}

/// From the GPU to a file, to the CPU, to a file, to the GPU, to a file: three equal files.
#[test]
fn checkpoints_travel_between_devices() {
    let Some(gpu) = gpu() else { return };
    let grid = GRIDS[1];
    for (preset, format) in
        [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::Bf16), (Preset::Half, Precision::Bf16)]
    {
        let config = config(grid, preset, format, LossKind::L2);
        let mut first = trainer(&config, grid, &gpu);
        train(&mut first, 3);
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda-job-{preset:?}"));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |trainer: &Trainer, name: &str| {
            let path = folder.join(name);
            write_named(&path, &trainer.entries().unwrap(), &serde_json::Value::Null).unwrap();
            (std::fs::read(&path).unwrap(), read_named(&path).unwrap().0)
        };
        let move_to = |device: &Device, from: &Trainer, name: &str| {
            let (bytes, arrays) = write(from, name);
            let mut next = trainer(&config, grid, device);
            next.restore(&arrays, from.snapshot(), from.normalisers().clone()).unwrap();
            (bytes, next)
        };
        let (on_gpu, second) = move_to(&Device::cpu(2).unwrap(), &first, "gpu");
        let (on_cpu, third) = move_to(&gpu, &second, "cpu");
        assert!(on_gpu == on_cpu && on_gpu == write(&third, "back").0, "{preset:?}");
        // What forward reads came back too.
        for trainers in [[&first, &second], [&first, &third]] {
            let values = |trainer: &Trainer| -> Vec<Vec<f64>> {
                trainer.params().list.iter().map(|param| param.value.to_vec().unwrap()).collect()
            };
            let [a, b] = trainers.map(values);
            let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
            assert!(a.iter().flatten().zip(b.iter().flatten()).all(same), "{preset:?}");
        }
    }
}

/// Needs no GPU: the planning device goes through a step and an evaluation as the GPU would.
#[test]
fn a_job_is_planned_for_a_gpu() {
    for grid in GRIDS {
        for (preset, format) in [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::F16)] {
            let config = config(grid, preset, format, LossKind::H1);
            let shapes = data(grid).shapes();
            let plan = plan_for(&config, &shapes, Target::Cuda).unwrap();
            let elsewhere = plan_for(&config, &shapes, Target::Cpu { threads: 1 }).unwrap();
            assert!(plan.n_parameters == elsewhere.n_parameters && plan.peak_bytes() > 0);
            let Some(gpu) = gpu() else { continue };
            let mut trainer = trainer(&config, grid, &gpu);
            train(&mut trainer, 1);
            assert!(gpu.memory().total.peak <= plan.peak_bytes(), "{preset:?} on {grid:?}");
        }
    }
}
