//! Whole jobs on small Darcy data: what must hold across crates.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_operators::{FnoConfig, StabilizerKind};
use halfmode_precision::{Precision, PrecisionConfig, Preset};
use halfmode_tensor::Device;
use halfmode_train::job::{DarcyData, DataConfig, JobConfig, JobData, ModelConfig, Trainer, load_data, plan};
use std::path::PathBuf;

fn config(preset: Preset, format: Precision) -> JobConfig {
    let mut config = JobConfig::darcy();
    let mut fno = FnoConfig::new(&[8, 8], 8);
    fno.n_layers = 2;
    fno.stabilizer = StabilizerKind::Tanh;
    config.model = ModelConfig::Fno(fno);
    config.data = DataConfig::Darcy(DarcyData {
        n_train: 24,
        n_test: 4,
        resolution: 16,
        test_resolutions: vec![16, 23],
        seed: 3,
    });
    config.train.batch_size = 8;
    config.precision = PrecisionConfig::new(preset, format);
    config
}

fn data(config: &JobConfig) -> JobData {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("job-cache");
    load_data(config, &cache, 1, &|_, _, _| {}).unwrap()
}

fn trainer(config: &JobConfig, device: &Device) -> Trainer {
    let data = data(config);
    Trainer::new(config.clone(), device, &data.shapes(), Some(data)).unwrap()
}

fn weights(trainer: &Trainer) -> Vec<Vec<u64>> {
    let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect();
    trainer.params().list.iter().map(|param| bits(param.file_values().unwrap())).collect()
}

fn train(trainer: &mut Trainer, n_steps: usize) -> Vec<f64> {
    let indices: Vec<usize> = (0..trainer.n_train()).collect();
    (0..n_steps).map(|step| trainer.step(&indices[step % 3 * 8..step % 3 * 8 + 8]).unwrap().loss).collect()
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (preset, format) in
        [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::F16), (Preset::Mixed, Precision::Bf16)]
    {
        let config = config(preset, format);
        let runs: Vec<_> = [1, 2, 3]
            .into_iter()
            .map(|threads| {
                let mut trainer = trainer(&config, &Device::cpu(threads).unwrap());
                let losses = train(&mut trainer, 4);
                (losses.into_iter().map(f64::to_bits).collect::<Vec<_>>(), weights(&trainer))
            })
            .collect();
        assert!(runs[0] == runs[1] && runs[0] == runs[2], "{preset} {format}");
    }
}

#[test]
fn every_preset_learns_and_half_formats_follow_full() {
    let mut last = Vec::new();
    for (preset, format) in [
        (Preset::Full, Precision::F16),
        (Preset::Amp, Precision::F16),
        (Preset::Mixed, Precision::F16),
        (Preset::Mixed, Precision::Bf16),
    ] {
        let mut trainer = trainer(&config(preset, format), &Device::cpu(2).unwrap());
        let losses = train(&mut trainer, 60);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, end) = (mean(&losses[..3]), mean(&losses[57..]));
        assert!(end < 0.6 * first, "{preset} {format}: {first} to {end}");
        assert_eq!(trainer.state().skipped_steps, 0, "{preset} {format}");
        last.push(end);
    }
    // Training is chaotic in its low bits, so this is a band, not a tolerance of rounding.
    assert!(last.iter().all(|end| (end / last[0] - 1.0).abs() < 0.2), "{last:?}");
}

#[test]
fn mixed_keeps_at_most_55_percent_of_the_activations_and_the_plan_knows() {
    // Wide enough that scratch does not dominate; the same threads and batch for both.
    let mut peaks = Vec::new();
    for preset in [Preset::Full, Preset::Mixed] {
        let mut config = config(preset, Precision::F16);
        let mut fno = FnoConfig::new(&[16, 16], 16);
        fno.stabilizer = StabilizerKind::Tanh;
        config.model = ModelConfig::Fno(fno);
        config.data =
            DataConfig::Darcy(DarcyData { n_train: 8, n_test: 2, resolution: 64, test_resolutions: vec![64], seed: 3 });
        let device = Device::cpu(2).unwrap();
        let mut trainer = trainer(&config, &device);
        let plan = plan(&config, &data(&config).shapes(), device.n_threads()).unwrap();
        train_one(&mut trainer);
        assert_eq!(device.memory().activations.peak, plan.peak_activation_bytes(), "{preset}");
        assert_eq!(device.memory().total.peak, plan.step.total.peak, "{preset}");
        peaks.push(plan.peak_activation_bytes() as f64);
    }
    assert!(peaks[1] <= 0.55 * peaks[0], "{peaks:?}");
}

fn train_one(trainer: &mut Trainer) {
    trainer.step(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
}

#[test]
fn the_half_preset_has_no_masters_and_half_moments() {
    let device = Device::cpu(1).unwrap();
    let trainer = trainer(&config(Preset::Half, Precision::F16), &device);
    assert!(
        trainer.params().list.iter().all(|param| param.master.is_none() && param.value.precision() == Precision::F16)
    );
    let memory = device.memory();
    let [params, state] =
        [halfmode_tensor::Purpose::Param, halfmode_tensor::Purpose::OptimState].map(|it| memory.of(it).live);
    assert_eq!(params, 2 * trainer.params().n_scalars());
    assert_eq!(state, 2 * params);
}
