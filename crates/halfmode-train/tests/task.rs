//! Tasks: what a flow learns, its exactness, and that nothing depends on threads.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::Op;
use halfmode_autograd::{Cx, Tape};
use halfmode_data::{Density, shuffled};
use halfmode_precision::{Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gradcheck};
use halfmode_train::task::{
    DensityData, LatentOdeModel, SolverConfig, SpiralData, TaskConfig, TaskData, TaskModel, TaskTrainer, is_task,
};
use halfmode_train::{GaussianNll, SquaredError};
use std::sync::Arc;

fn config(density: Density, preset: Preset, format: Precision) -> TaskConfig {
    let mut config = TaskConfig::preset("cnf").unwrap();
    config.data = TaskData::Density(DensityData { density, n_train: 512, n_test: 512 });
    config.solver = SolverConfig { steps: 8, ..SolverConfig::default() };
    config.precision = PrecisionConfig::new(preset, format);
    config.train.batch_size = 128;
    config.train.epochs = 12;
    config
}

/// Trains to the end; the held-out measures of the last epoch, and the trainer.
fn train(config: TaskConfig, device: &Device) -> (f64, TaskTrainer) {
    let (n_epochs, seed, batch) = (config.train.epochs, config.seed, config.train.batch_size);
    let mut trainer = TaskTrainer::new(config, device).unwrap();
    let mut nll = f64::NAN;
    for epoch in 0..n_epochs {
        for indices in shuffled(trainer.task().n_train(), seed, epoch).chunks(batch) {
            assert!(trainer.step(indices).unwrap().applied);
        }
        nll = trainer.evaluate().unwrap()[0].1;
        trainer.end_epoch(Some(nll)).unwrap();
    }
    (nll, trainer)
}

/// Every density and format: a short training gets well below the start, the density of what was learnt integrates to
/// one within 2 %, and a half format ends where f32 does, within what so short a training leaves open.
#[test]
fn a_flow_learns_a_density_that_integrates_to_one() {
    let device = Device::cpu(2).unwrap();
    for density in [Density::EightGaussians, Density::TwoSpirals, Density::Checkerboard] {
        let mut of_f32 = f64::NAN;
        for (preset, format) in
            [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::F16), (Preset::Mixed, Precision::Bf16)]
        {
            let config = config(density, preset, format);
            let before = TaskTrainer::new(config.clone(), &device).unwrap().evaluate().unwrap()[0].1;
            let (nll, trainer) = train(config, &device);
            assert!(nll < before - 0.5, "{density:?}, {preset} {format}: {before} to {nll}");
            assert!(density.entropy().is_none_or(|entropy| nll > entropy - 0.1), "{density:?}: {nll}");
            if preset == Preset::Full {
                of_f32 = nll;
            }
            assert!((nll - of_f32).abs() < 0.1, "{density:?}, {preset} {format}: {nll} beside {of_f32}");
            let mass = trainer.task().evaluate_at_end(&trainer.trained()).unwrap()[0].1;
            assert!((mass - 1.0).abs() < 0.02, "{density:?}, {preset} {format}: {mass}");
        }
    }
}

/// One thread or three, or one step after another in a trainer that was restored: the same bits.
#[test]
fn steps_do_not_depend_on_threads() {
    let bits = |threads: usize| {
        let device = Device::cpu(threads).unwrap();
        let mut config = config(Density::TwoSpirals, Preset::Mixed, Precision::F16);
        config.train.epochs = 2;
        let (nll, trainer) = train(config, &device);
        let weights = trainer.params().list.iter().flat_map(|it| it.file_values().unwrap());
        (nll.to_bits(), weights.map(f64::to_bits).collect::<Vec<_>>())
    };
    assert!(bits(1) == bits(3));
}

/// What the planning device says of memory, the CPU takes: peak by peak.
#[test]
fn a_plan_is_what_a_step_takes() {
    for (preset, format) in [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::F16)] {
        let config = config(Density::Checkerboard, preset, format);
        let cpu = Device::cpu(2).unwrap();
        let plan = halfmode_train::task::plan(&config, cpu.target()).unwrap();
        let mut trainer = TaskTrainer::new(config, &cpu).unwrap();
        trainer.step(&(0..128).collect::<Vec<_>>()).unwrap();
        trainer.evaluate().unwrap();
        trainer.task().evaluate_at_end(&trainer.trained()).unwrap();
        for ((purpose, run), (_, planned)) in cpu.memory().iter().zip(plan.memory.iter()) {
            assert_eq!(run.peak, planned.peak, "{preset}: {purpose}");
        }
        assert_eq!(plan.n_parameters, trainer.params().n_scalars());
    }
}

#[test]
fn the_likelihood_of_a_standard_normal_base_is_right_and_differentiated() {
    let device = Device::cpu(1).unwrap();
    let mut rng = Rng::new(1);
    let inputs = [rng.tensor(&device, &[7, 3], Precision::F64), rng.tensor(&device, &[7, 1], Precision::F64)];
    gradcheck(&device, &|| Box::new(GaussianNll), &inputs, 2);
    let mut tape = Tape::new(Cx::new(&device, &Arc::new(PrecisionPolicy::double())));
    let zeros = |shape: [usize; 2]| {
        Tensor::from_slice(&device, &vec![0.0; shape[0] * shape[1]], shape, Precision::F64, Purpose::Data).unwrap()
    };
    let (z, l) = (tape.leaf(zeros([4, 2])), tape.leaf(zeros([4, 1])));
    let value = tape.apply(GaussianNll, &[&z, &l]).unwrap().value().to_vec::<f64>().unwrap()[0];
    assert!((value - std::f64::consts::TAU.ln()).abs() < 1e-14, "{value}");
    let short = tape.leaf(zeros([3, 1]));
    assert!(tape.apply(GaussianNll, &[&z, &short]).is_err());
}

fn spirals(preset: Preset, format: Precision) -> TaskConfig {
    let mut config = TaskConfig::preset("latent-spiral").unwrap();
    config.data = TaskData::Spirals(SpiralData { n_train: 512, n_test: 64, n_points: 9, noise: 0.05 });
    config.model = TaskModel::LatentOde(LatentOdeModel { latent: 4, hidden: 16 });
    config.solver.steps = 16;
    config.precision = PrecisionConfig::new(preset, format);
    config.train.batch_size = 32;
    config.train.epochs = 30;
    config.optimizer.learning_rate = 1e-2;
    config
}

/// Curves that were never seen are fitted much better than by the middle of the picture, in every format alike; and a
/// plan is what a step takes.
#[test]
fn a_latent_equation_fits_curves_that_it_never_saw() {
    let device = Device::cpu(2).unwrap();
    let mut of_f32 = f64::NAN;
    for (preset, format) in
        [(Preset::Full, Precision::F16), (Preset::Mixed, Precision::F16), (Preset::Mixed, Precision::Bf16)]
    {
        let config = spirals(preset, format);
        let before = TaskTrainer::new(config.clone(), &device).unwrap().evaluate().unwrap()[0].1;
        let (distance, _) = train(config.clone(), &device);
        assert!(before > 1.0 && distance < 0.5 * before, "{preset} {format}: {before} to {distance}");
        if preset == Preset::Full {
            of_f32 = distance;
        }
        assert!((distance / of_f32 - 1.0).abs() < 0.3, "{preset} {format}: {distance} beside {of_f32}");
        let cpu = Device::cpu(2).unwrap();
        let plan = halfmode_train::task::plan(&config, cpu.target()).unwrap();
        let mut trainer = TaskTrainer::new(config, &cpu).unwrap();
        trainer.step(&(0..32).collect::<Vec<_>>()).unwrap();
        trainer.evaluate().unwrap();
        for ((purpose, run), (_, planned)) in cpu.memory().iter().zip(plan.memory.iter()) {
            assert_eq!(run.peak, planned.peak, "{preset}: {purpose}");
        }
    }
}

#[test]
fn squared_errors_of_several_pairs_are_one_mean() {
    let device = Device::cpu(1).unwrap();
    let mut rng = Rng::new(4);
    let mut input = |shape: &[usize]| rng.tensor(&device, shape, Precision::F64);
    let inputs = [input(&[3, 2]), input(&[5]), input(&[3, 2]), input(&[5])];
    let policy = Arc::new(PrecisionPolicy::double());
    let mut tape = Tape::new(Cx::new(&device, &policy));
    let x: Vec<_> = inputs[..2].iter().map(|it| tape.leaf(it.clone())).collect();
    let y: Vec<_> = inputs[2..].iter().map(|it| tape.constant(it.clone())).collect();
    let loss = tape.apply(SquaredError, &x.iter().chain(&y).collect::<Vec<_>>()).unwrap();
    let of = |pair: usize| -> Vec<f64> {
        let (x, y) = (inputs[pair].to_vec::<f64>().unwrap(), inputs[pair + 2].to_vec::<f64>().unwrap());
        x.iter().zip(&y).map(|(x, y)| x - y).collect()
    };
    let want = of(0).iter().chain(&of(1)).map(|it| it * it).sum::<f64>() / 11.0;
    assert!((loss.value().to_vec::<f64>().unwrap()[0] - want).abs() < 1e-14);
    tape.backward(loss, 3.0, &mut |id, grad| {
        // The derivative of a mean of eleven squares, three times.
        let want: Vec<f64> = of(id.0).iter().map(|it| 6.0 / 11.0 * it).collect();
        let error = grad.to_vec::<f64>()?.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-14, "input {}: {error}", id.0);
        Ok(())
    })
    .unwrap();
    let cx = Cx::inference(&device, &policy);
    assert!(SquaredError.forward(&cx, &[&inputs[0], &inputs[1]]).is_err());
    assert!(SquaredError.forward(&cx, &[&inputs[0]]).is_err());
}

/// Model and data that do not go together are refused by the key.
#[test]
fn a_flow_of_curves_is_refused() {
    let mut config = spirals(Preset::Full, Precision::F16);
    config.model = TaskConfig::preset("cnf").unwrap().model;
    let said = TaskTrainer::new(config, &Device::cpu(1).unwrap()).unwrap_err().to_string();
    assert!(said.contains("data.kind") && said.contains("cnf takes density"), "{said}");
}

#[test]
fn tasks_are_known_by_model_or_data() {
    let table = |text: &str| text.parse::<toml::Table>().unwrap();
    assert!(is_task(&table("[model]\nkind = \"cnf\"")) && is_task(&table("[data]\nkind = \"density\"")));
    assert!(!is_task(&table("[model]\nkind = \"fno\"")) && !is_task(&table("seed = 1")));
}
