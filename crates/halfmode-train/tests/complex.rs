//! Training on complex fields: the peer's numbers, central differences, and whole jobs.

#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op, Tape};
use halfmode_data::numpy::{NpzArray, write_npz};
use halfmode_data::{Error as DataError, UnitGaussian};
use halfmode_nn::{Module, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{DType, Domain, Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, Rng, assert_close};
use halfmode_train::job::{
    DataConfig, FileData, FileLayout, JobConfig, JobError, LossKind, Model, ModelConfig, Quiet, Run, RunOptions,
    Summary, data_shapes, load_data, plan,
};
use halfmode_train::{AdamW, AdamWConfig, AdamWKind, H1Loss, LpLoss, Reduction, Schedule};
use ndarray::{ArrayD, IxDyn};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn double(device: &Device) -> Cx {
    Cx::new(device, &Arc::new(PrecisionPolicy::double()))
}

fn complex(device: &Device, (shape, values): (&[usize], &[f64])) -> Tensor {
    let dtype = DType::complex(Precision::F64);
    Tensor::from_scalars(device, values, &shape[..shape.len() - 1], dtype, Purpose::Data).unwrap()
}

fn l2() -> Box<dyn Op> {
    Box::new(LpLoss::default())
}

fn h1() -> Box<dyn Op> {
    Box::new(H1Loss::default())
}

/// The value of a loss and its gradient.
fn of_loss(cx: &Cx, op: Box<dyn Op>, x: &Tensor, y: &Tensor) -> (f64, Vec<f64>) {
    let mut tape = Tape::new(cx.clone());
    let (x, y) = (tape.leaf(x.clone()), tape.constant(y.clone()));
    let loss = tape.apply_many(op, &[&x, &y]).unwrap().remove(0);
    let value = loss.value().to_vec::<f64>().unwrap()[0];
    let mut grad = Vec::new();
    let keep = &mut |_, tensor: Tensor| {
        assert_eq!(tensor.dtype(), x.value().dtype());
        grad = tensor.to_vec::<f64>().unwrap();
        Ok(())
    };
    tape.backward(loss, 1.0, keep).unwrap();
    (value, grad)
}

/// A model with the recorded weights.
fn model(golden: &Golden, device: &Device) -> (Fno, Params) {
    let config: FnoConfig = serde_json::from_value(golden.fact("config").clone()).unwrap();
    let fno = Fno::new(config).unwrap();
    let mut params = Params::new(device, fno.param_specs(), &PrecisionPolicy::double(), 0).unwrap();
    assert_eq!(golden.names("param/").count(), params.list.len());
    for param in &mut params.list {
        param.set_file_values(golden.get(&format!("param/{}", param.spec.name)).1).unwrap();
    }
    (fno, params)
}

/// Loss and gradients of one step.
fn step(cx: &Cx, (fno, params): (&Fno, &Params), golden: &Golden, op: Box<dyn Op>) -> (f64, Vec<Option<Tensor>>) {
    let mut tape = Tape::new(cx.clone());
    let weights = params.leaves(&mut tape);
    let x = tape.constant(complex(&cx.device, golden.get("in/x")));
    let y = tape.constant(complex(&cx.device, golden.get("in/y")));
    let prediction = fno.forward(&mut tape, &weights, &[&x]).unwrap();
    let loss = tape.apply_many(op, &[&prediction, &y]).unwrap().remove(0);
    drop((weights, prediction));
    let value = loss.value().to_vec::<f64>().unwrap()[0];
    let mut grads = vec![None; params.list.len()];
    let keep = &mut |id: halfmode_autograd::LeafId, grad| {
        grads[id.0] = Some(grad);
        Ok(())
    };
    tape.backward(loss, 1.0, keep).unwrap();
    (value, grads)
}

#[test]
fn losses_gradients_and_steps_of_the_peer() {
    let device = Device::cpu(2).unwrap();
    let cx = double(&device);
    for name in Golden::list("complex_training") {
        let golden = Golden::load(&name);
        for (key, op) in [("l2", l2()), ("h1", h1())] {
            let (fno, params) = model(&golden, &device);
            let (value, grads) = step(&cx, (&fno, &params), &golden, op);
            assert_close!(format!("{name} {key}"), [value], *golden.get(&format!("f64/{key}")).1, 1e-10);
            let grads = params.list.iter().zip(grads).map(|(param, grad)| {
                let grad = grad.map_or_else(|| vec![0.0; param.spec.n_scalars()], |grad| grad.to_vec().unwrap());
                (param.spec.name.clone(), param.spec.to_file(&grad))
            });
            let prefix = format!("f64/grad_{key}/");
            golden.assert_gradients(&format!("{name} {key}"), &prefix, &grads.collect::<Vec<_>>(), 1e-9);
        }
        // Spectral weights are complex; `fr` and `fi` of dense layers are real parameters of their own.
        for (key, kind) in [("torch", AdamWKind::Torch), ("neuralop", AdamWKind::Neuralop)] {
            let (fno, mut params) = model(&golden, &device);
            let config = AdamWConfig { learning_rate: 0.01, weight_decay: 0.01, ..AdamWConfig::new(kind) };
            let mut optimizer = AdamW::new(config, &params, &PrecisionPolicy::double()).unwrap();
            let mut losses = Vec::new();
            for _ in 0..3 {
                let (value, grads) = step(&cx, (&fno, &params), &golden, l2());
                losses.push(value);
                optimizer.step(&mut params, &grads, 1.0).unwrap();
            }
            let case = format!("{name} {key}");
            assert_close!(case, losses, *golden.get(&format!("f64/losses_{key}")).1, 1e-10);
            for param in &params.list {
                let want = golden.get(&format!("f64/after_{key}/{}", param.spec.name)).1;
                assert_close!(format!("{case} {}", param.spec.name), param.file_values().unwrap(), *want, 1e-9);
            }
        }
    }
}

#[test]
fn every_loss_and_the_normaliser_of_the_peer() {
    let device = Device::cpu(2).unwrap();
    let cx = double(&device);
    for name in Golden::list("complex_training") {
        let golden = Golden::load(&name);
        let lp = |p: f64, relative: bool| -> Box<dyn Op> {
            let reduction = if relative { Reduction::Sum } else { Reduction::Mean };
            Box::new(LpLoss { p, relative, reduction, measure: 1.0 })
        };
        let losses: Vec<(&str, Box<dyn Op>)> = vec![
            ("lp2_rel_sum", l2()),
            ("h1_rel_sum", h1()),
            ("lp1_rel_sum", lp(1.0, true)),
            ("lp1_abs_mean", lp(1.0, false)),
            ("lp3_rel_sum", lp(3.0, true)),
            ("lp3_abs_mean", lp(3.0, false)),
        ];
        assert_eq!(losses.len(), golden.names("loss/").count());
        let (shape, values) = golden.get("in/x");
        let x = ArrayD::from_shape_vec(IxDyn(shape), values.to_vec()).unwrap();
        let first = x.slice_each_axis(|axis| if axis.axis.index() == 1 { (..1).into() } else { (..).into() });
        let first: (&[usize], Vec<f64>) = (first.shape(), first.iter().copied().collect());
        let (a, b) = (complex(&device, (first.0, &first.1)), complex(&device, golden.get("in/y")));
        for (key, op) in losses {
            let (value, grad) = of_loss(&cx, op, &a, &b);
            assert_close!(format!("{name} {key}"), [value], *golden.get(&format!("loss/{key}")).1, 1e-10);
            assert_close!(format!("{name} {key}"), grad, *golden.get(&format!("loss_grad/{key}")).1, 1e-9);
        }
        let fit = UnitGaussian::fit_complex_per_channel(&x.view()).unwrap();
        assert_close!("mean", fit.mean().iter().copied().collect::<Vec<_>>(), *golden.get("f64/mean").1, 1e-12);
        let twice: Vec<f64> = golden.get("f64/std").1.iter().flat_map(|&std| [std, std]).collect();
        assert_close!("std", fit.std().iter().copied().collect::<Vec<_>>(), twice, 1e-12);
    }
}

#[test]
fn gradients_of_losses_are_those_of_central_differences() {
    let device = Device::cpu(1).unwrap();
    let cx = double(&device);
    let open =
        || -> Box<dyn Op> { Box::new(H1Loss { relative: false, periodic: vec![false, true], ..H1Loss::default() }) };
    let p = |p: f64| -> Box<dyn Op> { Box::new(LpLoss { p, ..LpLoss::default() }) };
    let mut rng = Rng::new(5);
    let shape = [2, 2, 5, 7, 2];
    let n = shape.iter().product();
    let (x, y, direction) = (rng.normals(n), rng.normals(n), rng.normals(n));
    let y = complex(&device, (&shape, &y));
    for make in [&l2 as &dyn Fn() -> Box<dyn Op>, &h1, &open, &|| p(1.0), &|| p(1.5), &|| p(4.0)] {
        let at = |h: f64| {
            let moved: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + h * d).collect();
            of_loss(&cx, make(), &complex(&device, (&shape, &moved)), &y)
        };
        let h = 1e-6;
        let want = (at(h).0 - at(-h).0) / (2.0 * h);
        let got: f64 = at(0.0).1.iter().zip(&direction).map(|(g, d)| g * d).sum();
        assert!((got - want).abs() <= 1e-7 * want.abs().max(1.0), "{:?}: {got} {want}", make());
    }
}

#[test]
fn a_loss_of_a_complex_and_a_real_field_is_refused() {
    let device = Device::cpu(1).unwrap();
    let z = complex(&device, (&[1, 1, 4, 2], &[1.0; 8]));
    let x = Tensor::from_slice(&device, &[1.0; 4], [1, 1, 4], Precision::F64, Purpose::Data).unwrap();
    for pair in [[&z, &x], [&x, &z]] {
        let err = LpLoss::default().forward(&double(&device), &pair).unwrap_err();
        assert!(err.to_string().contains("target"), "{err}");
    }
    let periodic = H1Loss { periodic: vec![true, true], ..H1Loss::default() };
    assert!(periodic.forward(&double(&device), &[&z, &z]).is_err(), "the axis of the parts is none of the grid");
}

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Free waves: `i u_t = -u_xx` on the periodic interval, from sums of five waves, as real and imaginary part.
fn waves(path: &Path, n_samples: usize, seed: u64) {
    let (n, mut rng) = (16, Rng::new(seed));
    let mut fields = [Vec::new(), Vec::new()];
    for _ in 0..n_samples {
        let amplitudes = rng.normals(10);
        for (field, time) in fields.iter_mut().zip([0.0, 0.35]) {
            for j in 0..n {
                let (mut re, mut im) = (0.5, -0.25);
                for (a, k) in amplitudes.chunks_exact(2).zip(-2i32..) {
                    let k = f64::from(k);
                    let (sin, cos) = (std::f64::consts::TAU * k * j as f64 / n as f64 - k * k * time).sin_cos();
                    re += a[0] * cos - a[1] * sin;
                    im += a[0] * sin + a[1] * cos;
                }
                field.extend([re as f32, im as f32]);
            }
        }
    }
    let [x, y] = fields.map(|values| ArrayD::from_shape_vec(IxDyn(&[n_samples, 1, n, 2]), values).unwrap());
    write_npz(path, &[("x", NpzArray::F32(x.view())), ("y", NpzArray::F32(y.view()))]).unwrap();
}

fn job(folder: &Folder, preset: Preset) -> JobConfig {
    let (train, test) = (folder.0.join("train.npz"), folder.0.join("test.npz"));
    if !train.exists() {
        waves(&train, 32, 1);
        waves(&test, 8, 2);
    }
    let mut config = JobConfig::darcy();
    let mut fno = FnoConfig::new(&[8], 8);
    (fno.n_layers, fno.complex_data) = (2, true);
    config.model = ModelConfig::Fno(fno);
    config.data = DataConfig::File(FileData {
        train,
        test: vec![test],
        input: "x".to_owned(),
        output: "y".to_owned(),
        layout: FileLayout::ChannelsFirst,
    });
    config.train.epochs = 40;
    config.train.loss = LossKind::L2;
    config.train.batch_size = 4;
    config.precision = PrecisionConfig::new(preset, Precision::F16);
    config
}

fn train(config: &JobConfig, out: PathBuf, resume: bool) -> Summary {
    let data = load_data(config, Path::new("unused"), 1, &|_, _, _| {}).unwrap();
    let environment = Default::default();
    let options = RunOptions { out, resume, resume_from: None, force: false, environment, n_plots: 1 };
    let mut run = Run::new(config.clone(), &Device::cpu(2).unwrap(), data, options).unwrap();
    run.train(&mut Quiet, &|| None).unwrap().0
}

#[test]
fn a_job_learns_and_mixed_follows_full() {
    let folder = Folder::new("complex-job");
    let mut errors = [0.0; 2];
    let presets = [Preset::Full, Preset::Mixed].into_iter().enumerate();
    for ((idx, preset), seed) in presets.flat_map(|preset| (0..3).map(move |seed| (preset, seed))) {
        let (mut config, out) = (job(&folder, preset), folder.0.join(format!("{preset}-{seed}")));
        config.seed = seed;
        let summary = train(&config, out.clone(), false);
        let error = summary.eval["16"];
        let records = halfmode_train::read_metrics(out.join("metrics.jsonl")).unwrap();
        let first = records[0]["eval"]["16"]["l2"].as_f64().unwrap();
        assert!(error.l2 < 0.1 && error.l2 < 0.2 * first, "{preset}: {first} to {error:?}");
        assert_eq!(summary.skipped_steps, 0);
        assert_eq!(summary.peak_bytes, summary.planned_peak_bytes, "{preset}");
        let planned = plan(&config, &data_shapes(&config).unwrap(), 2).unwrap();
        assert_eq!(summary.peak_activation_bytes, planned.peak_activation_bytes(), "{preset}");
        let report = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(report.contains("moduli of complex fields") && out.join("precision.json").exists());

        // The saved normalisers are what the model file predicts with.
        let model = Model::load(&out.join("checkpoints/best"), &Device::cpu(1).unwrap(), None).unwrap();
        assert_eq!(model.normalisers().unwrap().input.mean().shape(), [1, 1, 1, 2]);
        let data = load_data(&config, Path::new("unused"), 1, &|_, _, _| {}).unwrap();
        let (again, prediction) = model.evaluate(&data.tests[0].1, 3).unwrap();
        assert_eq!(prediction.shape(), [8, 1, 16, 2]);
        assert!(again.l2 <= 1.01 * error.l2, "{preset}: {again:?} {error:?}");
        errors[idx] += error.l2 / 3.0;
    }
    // One run may differ by more: training is chaotic in its low bits.
    assert!((errors[1] / errors[0] - 1.0).abs() < 0.02, "{errors:?}");
}

#[test]
fn a_resumed_run_is_the_same_run() {
    let folder = Folder::new("complex-resume");
    let mut config = job(&folder, Preset::Mixed);
    config.train.epochs = 2;
    config.train.loss = LossKind::H1;
    // A cosine ends with the epochs, and this run is told of more.
    config.scheduler = Schedule::default();
    train(&config, folder.0.join("whole"), false);
    config.train.epochs = 1;
    train(&config, folder.0.join("parts"), false);
    config.train.epochs = 2;
    train(&config, folder.0.join("parts"), true);
    let tensors = |run: &str| {
        let (arrays, metadata) = halfmode_train::read_named(folder.0.join(run).join("checkpoints/latest")).unwrap();
        let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        let arrays: Vec<_> = arrays.into_iter().map(|(name, array)| (name, bits(array.to_f64()))).collect();
        (arrays, metadata["normalisers"].clone(), metadata["state"]["loss_sum"].clone())
    };
    assert!(tensors("whole") == tensors("parts"));
}

#[test]
fn real_data_of_complex_models_and_the_reverse_are_refused() {
    let folder = Folder::new("complex-refused");
    let mut config = job(&folder, Preset::Full);
    let DataConfig::File(file) = &mut config.data else { panic!("not a file") };
    let real = ArrayD::<f32>::ones(IxDyn(&[4, 1, 16]));
    file.train = folder.0.join("real.npz");
    write_npz(&file.train, &[("x", NpzArray::F32(real.view())), ("y", NpzArray::F32(real.view()))]).unwrap();
    let err = data_shapes(&config).unwrap_err();
    assert!(matches!(&err, JobError::Data(DataError::Domain { domain: Domain::Complex, .. })), "{err}");
    assert!(err.to_string().contains("set model.complex_data = false"), "{err}");

    let DataConfig::File(file) = &mut config.data else { panic!("not a file") };
    file.train = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/complex_training/arrays.npz");
    (file.input, file.output) = ("c8".to_owned(), "c16".to_owned());
    let ModelConfig::Fno(fno) = &mut config.model;
    fno.complex_data = false;
    let err = data_shapes(&config).unwrap_err();
    assert!(matches!(&err, JobError::Data(DataError::Domain { domain: Domain::Real, .. })), "{err}");
    assert!(err.to_string().contains("set model.complex_data = true"), "{err}");

    let mut config = JobConfig::darcy();
    let ModelConfig::Fno(fno) = &mut config.model;
    fno.complex_data = true;
    let err = config.validate().unwrap_err();
    assert!(matches!(&err, JobError::Config { key, .. } if key == "model.complex_data"), "{err}");
}
