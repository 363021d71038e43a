//! Recorded steps on a GPU against the same steps launched one by one: the same bits. Without a GPU nothing runs; with
//! `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod gpu_jobs;

use gpu_jobs::{BATCH, GRIDS, config, samples, weights};
use halfmode_data::FieldPairs;
use halfmode_precision::{LossScale, Precision, Preset, ScalerConfig};
use halfmode_tensor::Device;
use halfmode_testkit::gpu;
use halfmode_train::job::{JobConfig, JobData, LossKind, TrainState, Trainer};
use halfmode_train::{read_named, write_named};
use ndarray::{ArrayD, Axis, IxDyn, concatenate};
use std::path::PathBuf;

const GRID: &[usize] = &[12, 10];
/// Samples that can be learnt; the one after them has a target that is its mean, of which no relative error exists.
const N_GOOD: usize = 16;

/// Every good sample twice, with both signs, so that all means are zero.
fn data() -> JobData {
    let (x, y) = samples(GRID, N_GOOD / 2).into_parts();
    let zero = ArrayD::zeros(IxDyn(&[1, 1, 12, 10]));
    let all = |field: ArrayD<f32>| concatenate(Axis(0), &[field.view(), (-&field).view(), zero.view()]).unwrap();
    let train = FieldPairs::new(all(x), all(y)).unwrap();
    JobData { train, tests: vec![("test".to_owned(), samples(GRID, 3))], notes: Vec::new() }
}

fn trainer(config: &JobConfig, device: &Device, records: bool) -> Trainer {
    let data = data();
    let mut trainer = Trainer::new(config.clone(), device, &data.shapes(), Some(data)).unwrap();
    trainer.record_steps(records);
    trainer
}

/// The batch of a step; now and then the bad sample is in it.
fn batch(step: usize, size: usize) -> Vec<usize> {
    let mut batch: Vec<usize> = (0..size).map(|i| (5 * step + 3 * i) % N_GOOD).collect();
    if step % 97 == 50 {
        batch[0] = N_GOOD;
    }
    batch
}

/// A scale that grows until gradients overflow, again and again.
fn restless() -> JobConfig {
    let mut config = config(GRID, Preset::Mixed, Precision::F16, LossKind::L2);
    let (init, max) = (2f64.powi(20), 2f64.powi(40));
    let scaler = ScalerConfig { init, max, growth_interval: 23, ..ScalerConfig::DEFAULT };
    config.precision.loss_scale = Some(LossScale::Dynamic(scaler));
    config.train.clip_grad_norm = Some(0.5);
    config
}

/// Everything that a checkpoint holds, as the bytes of one.
fn bytes(trainer: &Trainer, name: &str) -> (PathBuf, Vec<u8>) {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_named(&path, &trainer.entries().unwrap(), &serde_json::Value::Null).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

#[test]
fn ten_thousand_replays_give_the_bits_of_ten_thousand_steps() {
    const N_STEPS: usize = 10_000;
    const RESUMED: usize = 5_000;
    let Some(gpu) = gpu() else { return };
    let config = restless();
    let (mut replayed, mut launched) = (trainer(&config, &gpu, true), trainer(&config, &gpu, false));
    let (mut scales, mut n_replays) = (std::collections::BTreeSet::new(), 0);
    for step in 0..N_STEPS {
        if step == RESUMED {
            let (path, _) = bytes(&replayed, "cuda-graph-resumed");
            let (arrays, _) = read_named(&path).unwrap();
            let (state, normalisers) = (replayed.snapshot(), replayed.normalisers().clone());
            replayed = trainer(&config, &gpu, true);
            replayed.restore(&arrays, state, normalisers).unwrap();
        }
        let (now, next) = (batch(step, BATCH), batch(step + 1, BATCH));
        let (a, b) = (replayed.step_before(&now, &next).unwrap(), launched.step(&now).unwrap());
        assert_eq!((a.loss.to_bits(), a.applied), (b.loss.to_bits(), b.applied), "step {step}");
        assert!(step % 97 != 50 || !a.applied, "step {step} divides by zero");
        n_replays += usize::from(replayed.is_recorded());
        scales.insert(replayed.loss_scale().log2() as i32);
    }
    let state: TrainState = replayed.snapshot();
    assert_eq!((state.skipped_steps, state.scaler), (launched.state().skipped_steps, launched.snapshot().scaler));
    assert!(!launched.is_recorded() && n_replays >= N_STEPS - 4, "{n_replays} replays");
    assert!(state.skipped_steps > 2 * N_STEPS as u64 / 97 && scales.len() > 2, "{state:?}, scales 2^{scales:?}");
    assert!(bytes(&replayed, "cuda-graph-a").1 == bytes(&launched, "cuda-graph-b").1, "weights or moments differ");
    println!("{n_replays} replays, {} steps skipped, scales 2^{scales:?}", state.skipped_steps);
}

/// Batches of two sizes, evaluations between steps, other memory taken and freed, and what was sent ahead not used.
#[test]
fn recording_survives_what_happens_between_steps() {
    let Some(gpu) = gpu() else { return };
    for (preset, format, loss) in [
        (Preset::Full, Precision::F16, LossKind::H1),
        (Preset::Mixed, Precision::Bf16, LossKind::L2),
        (Preset::Half, Precision::Bf16, LossKind::L2),
    ] {
        let config = config(GRID, preset, format, loss);
        let (mut replayed, mut launched) = (trainer(&config, &gpu, true), trainer(&config, &gpu, false));
        for step in 0..40 {
            let size = if step % 10 == 9 { BATCH - 1 } else { BATCH };
            let now: Vec<usize> = (0..size).map(|i| (3 * step + i) % N_GOOD).collect();
            let wrong = [0, 1, 2];
            let (a, b) = (replayed.step_before(&now, &wrong).unwrap(), launched.step(&now).unwrap());
            assert_eq!(a.loss.to_bits(), b.loss.to_bits(), "{preset:?} {format}, step {step}");
            assert_eq!(replayed.is_recorded(), size == BATCH && step % 10 >= 1, "step {step}");
            if step % 4 == 0 {
                assert_eq!(replayed.evaluate(0).unwrap(), launched.evaluate(0).unwrap());
            }
        }
        assert_eq!(weights(&replayed), weights(&launched), "{preset:?} {format}");
        let err = replayed.step(&[0, 1, 2, N_GOOD + 1]).unwrap_err().to_string();
        assert!(err.contains("17"), "{err}");
        replayed.step(&[0, 1, 2, 3]).unwrap();
    }
}

/// What is recorded holds no more memory than what is launched, in the ledger and at the driver.
#[test]
fn a_recorded_step_takes_the_memory_of_a_launched_one() {
    let Some(_) = gpu() else { return };
    let config = config(GRIDS[1], Preset::Mixed, Precision::F16, LossKind::L2);
    let peaks = [true, false].map(|records| {
        let device = gpu().unwrap();
        let pairs = samples(GRIDS[1], 8);
        let data = JobData { train: pairs.clone(), tests: vec![("test".to_owned(), pairs)], notes: Vec::new() };
        let mut trainer = Trainer::new(config.clone(), &device, &data.shapes(), Some(data)).unwrap();
        trainer.record_steps(records);
        for _ in 0..4 {
            trainer.step(&[0, 1, 2, 3]).unwrap();
        }
        assert_eq!(trainer.is_recorded(), records);
        let held = device.as_cuda().unwrap().context().memory_info().unwrap().held_peak;
        (device.memory().total.peak, held)
    });
    // One segment of the driver's memory may be begun twice.
    assert!(peaks[0].0 <= peaks[1].0 && peaks[0].1 <= peaks[1].1 + (4 << 20), "{peaks:?}");
}
