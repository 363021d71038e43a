//! Tasks: what a flow learns, its exactness, and that nothing depends on threads.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::Op;
use halfmode_autograd::{Cx, Tape};
use halfmode_data::{Density, shuffled};
use halfmode_precision::{Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gradcheck};
use halfmode_train::job::{JobError, Observer, Quiet, RunOptions, StopReason, Summary};
use halfmode_train::task::{
    ClassifierModel, DensityData, LatentOdeModel, ShapesData, SolverConfig, SpiralData, TaskConfig, TaskData,
    TaskModel, TaskRun, TaskTrainer, build, is_task, plan,
};
use halfmode_train::{GaussianNll, Schedule, SquaredError, read_named, write_named};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
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

fn trainer(config: TaskConfig, device: &Device) -> TaskTrainer {
    let task = build(&config).unwrap();
    TaskTrainer::new(config, &task, device).unwrap()
}

/// Trains to the end; the held-out measures of the last epoch, and the trainer.
fn train(config: TaskConfig, device: &Device) -> (f64, TaskTrainer) {
    let (n_epochs, seed, batch) = (config.train.epochs, config.seed, config.train.batch_size);
    let mut trainer = self::trainer(config, device);
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
            let before = trainer(config.clone(), &device).evaluate().unwrap()[0].1;
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

/// One thread or three: the same bits.
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
        let plan = plan(&config, &build(&config).unwrap(), cpu.target()).unwrap();
        let mut trainer = self::trainer(config, &cpu);
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
        let before = trainer(config.clone(), &device).evaluate().unwrap()[0].1;
        let (distance, _) = train(config.clone(), &device);
        assert!(before > 1.0 && distance < 0.5 * before, "{preset} {format}: {before} to {distance}");
        if preset == Preset::Full {
            of_f32 = distance;
        }
        assert!((distance / of_f32 - 1.0).abs() < 0.3, "{preset} {format}: {distance} beside {of_f32}");
        let cpu = Device::cpu(2).unwrap();
        let plan = plan(&config, &build(&config).unwrap(), cpu.target()).unwrap();
        let mut trainer = self::trainer(config, &cpu);
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
    let said = build(&config).unwrap_err().to_string();
    assert!(said.contains("data.kind") && said.contains("cnf takes density"), "{said}");
}

#[test]
fn tasks_are_known_by_model_or_data() {
    let table = |text: &str| text.parse::<toml::Table>().unwrap();
    assert!(is_task(&table("[model]\nkind = \"cnf\"")) && is_task(&table("[data]\nkind = \"density\"")));
    assert!(!is_task(&table("[model]\nkind = \"fno\"")) && !is_task(&table("seed = 1")));
}

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Folder(std::env::temp_dir().join(format!("halfmode-task-{name}-{}", std::process::id())))
    }

    fn run(&self, config: &TaskConfig, resume: bool) -> Result<TaskRun, JobError> {
        let options = RunOptions {
            out: self.0.clone(),
            resume,
            resume_from: None,
            force: false,
            environment: BTreeMap::new(),
            n_plots: 1,
        };
        TaskRun::new(config.clone(), &build(config)?, &Device::cpu(1).unwrap(), options)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Few points and weak flows: a run takes no time.
fn quick() -> TaskConfig {
    let mut config = config(Density::EightGaussians, Preset::Full, Precision::F16);
    config.data = TaskData::Density(DensityData { n_train: 64, n_test: 32, ..DensityData::default() });
    config.solver.steps = 2;
    (config.train.batch_size, config.train.epochs) = (16, 2);
    config
}

/// Weights beyond the range of numbers are measured as not a number, as those of an operator are: the run goes on, and
/// is told to have diverged once nothing is left to adapt. A plateau follows what is not a number, too.
#[test]
fn an_evaluation_that_leaves_the_range_of_numbers_is_not_a_number() {
    let device = Device::cpu(1).unwrap();
    let mut curves = spirals(Preset::Full, Precision::F16);
    curves.data = TaskData::Spirals(SpiralData { n_train: 64, n_test: 16, n_points: 5, noise: 0.05 });
    let mut flow = quick();
    flow.scheduler = Schedule::Plateau { factor: 0.5, patience: 1, threshold: 0.0, cooldown: 0, min_lr: 0.0 };
    for (name, mut config) in [("curves", curves), ("flow", flow)] {
        config.optimizer.learning_rate = 1e38;
        config.train.batch_size = 64;
        config.train.epochs = 40;
        let mut trainer = self::trainer(config.clone(), &device);
        trainer.step(&(0..64).collect::<Vec<_>>()).unwrap();
        let measured = trainer.evaluate().unwrap();
        assert!(measured.iter().all(|(_, value)| value.is_nan()), "{measured:?}");

        let folder = Folder::new(name);
        let outcome = folder.run(&config, false).unwrap().train(&mut Quiet, &|| None);
        assert!(matches!(outcome, Err(JobError::Diverged { checkpoint: None, .. })), "{name}: {outcome:?}");
        assert!(folder.0.join("report.html").is_file());
        // One that ends before that says what it measured.
        config.train.epochs = 2;
        let folder = Folder::new(&format!("{name}-short"));
        let (summary, _) = folder.run(&config, false).unwrap().train(&mut Quiet, &|| None).unwrap();
        assert!(summary.finished && summary.metrics.values().any(|value| value.is_nan()), "{summary:?}");
        let text = std::fs::read_to_string(folder.0.join("summary.json")).unwrap();
        assert!(serde_json::from_str::<Summary>(&text).unwrap().metrics.values().any(|value| value.is_nan()));
    }
}

/// The mean loss of no steps is no number.
#[test]
fn an_epoch_without_steps_has_no_loss() {
    struct Losses(Vec<f64>);
    impl Observer for Losses {
        fn epoch(&mut self, record: &halfmode_train::job::EpochRecord, _: u64) {
            self.0.push(record.loss);
        }
    }
    let mut config = quick();
    config.optimizer.learning_rate = 1e30;
    config.train.batch_size = 64;
    let mut losses = Losses(Vec::new());
    Folder::new("losses").run(&config, false).unwrap().train(&mut losses, &|| None).unwrap();
    assert!(losses.0[0].is_finite() && losses.0[1].is_nan(), "{:?}", losses.0);
}

/// What is told of a run that was stopped within an epoch is of its weights, not of those before the epoch.
#[test]
fn a_run_that_is_stopped_measures_its_weights() {
    let folder = Folder::new("stopped");
    let (mut run, asked) = (folder.run(&quick(), false).unwrap(), Cell::new(0));
    let stop = || {
        asked.set(asked.get() + 1);
        (asked.get() > 6).then_some(StopReason::Interrupt)
    };
    let (summary, stopped) = run.train(&mut Quiet, &stop).unwrap();
    assert_eq!(
        (stopped, run.trainer().state().epoch, run.trainer().state().batch),
        (Some(StopReason::Interrupt), 1, 2)
    );
    let (name, now) = run.trainer().evaluate().unwrap()[0];
    assert_eq!(summary.metrics[name].to_bits(), now.to_bits());
}

/// A checkpoint of more steps than the classifier has now would lose weights; one with a count of batches that no epoch
/// has goes on with the next epoch.
#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let folder = Folder::new("leftovers");
    let mut config = TaskConfig::preset("ode-classifier").unwrap();
    config.data = TaskData::Shapes(ShapesData { size: 8, n_train: 16, n_test: 8 });
    config.model = TaskModel::OdeClassifier(ClassifierModel { channels: 2 });
    config.train.epochs = 1;
    folder.run(&config, false).unwrap().train(&mut Quiet, &|| None).unwrap();
    let mut fewer = config.clone();
    fewer.solver.steps = 1;
    let refused = folder.run(&fewer, true).unwrap_err();
    assert!(
        matches!(&refused, JobError::Resume { why, .. } if why.contains("that the model does not have")),
        "{refused}"
    );

    let latest = folder.0.join("checkpoints/latest");
    let (arrays, mut metadata) = read_named(&latest).unwrap();
    metadata["state"]["batch"] = serde_json::json!((1u64 << 53) - 1);
    let entries: Vec<_> = arrays
        .iter()
        .map(|(name, array)| halfmode_train::Entry::values(name, &array.shape, array.values.clone()))
        .collect();
    write_named(&latest, &entries, &metadata).unwrap();
    config.train.batch_size = 1 << 24;
    config.train.epochs = 2;
    folder.run(&config, true).unwrap().train(&mut Quiet, &|| None).unwrap();
}

/// Planning draws no image, and of curves and points no more than are evaluated at a time: these would take minutes.
#[test]
fn planning_draws_nothing_that_it_does_not_need() {
    let cpu = Device::cpu(1).unwrap();
    let most = 1 << 24;
    let mut curves = spirals(Preset::Full, Precision::F16);
    curves.data = TaskData::Spirals(SpiralData { n_train: most, n_test: most, n_points: 256, noise: 0.05 });
    let mut shapes = TaskConfig::preset("ode-classifier").unwrap();
    shapes.data = TaskData::Shapes(ShapesData { size: 64, n_train: 1 << 20, n_test: 1 << 20 });
    shapes.model = TaskModel::OdeClassifier(ClassifierModel { channels: 2 });
    for config in [curves, shapes] {
        let start = std::time::Instant::now();
        plan(&config, &build(&config).unwrap(), cpu.target()).unwrap();
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    }
}
