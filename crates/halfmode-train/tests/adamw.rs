//! AdamW against both peers, across precisions, and its state in files.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use halfmode_nn::{Init, ParamSpec, Params};
use halfmode_precision::{Precision, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, Rng, assert_close, devices};
use halfmode_train::{AdamW, AdamWConfig, AdamWKind, Entry, Error, load_parameters, read_named, write_named};
use proptest::prelude::*;

const KINDS: [AdamWKind; 2] = [AdamWKind::Torch, AdamWKind::Neuralop];

fn grads(device: &Device, params: &Params, precision: Precision, file_values: &[Vec<f64>]) -> Vec<Option<Tensor>> {
    let make = params.list.iter().zip(file_values).map(|(param, values)| {
        let stored = param.spec.to_stored(values);
        Some(Tensor::from_slice(device, &stored, param.value.shape().clone(), precision, Purpose::Grad).unwrap())
    });
    make.collect()
}

#[test]
fn golden_adamw_complex() {
    let golden = Golden::load("adamw_complex");
    let full = PrecisionPolicy::full();
    for (precision, policy, tolerance) in
        [(Precision::F64, PrecisionPolicy::double(), 1e-10), (Precision::F32, full, 1e-6)]
    {
        for (device, kind, name) in
            devices().iter().flat_map(|it| [(it, KINDS[0], "torch"), (it, KINDS[1], "neuralop")])
        {
            let init = Init::Ones;
            let specs = vec![ParamSpec::real("w", &[3, 4], init), ParamSpec::spectral("z", &[3, 4], init)];
            let mut params = Params::new(device, specs, &policy, 0).unwrap();
            for param in &mut params.list {
                param.set_file_values(golden.get(&format!("in/{}", param.spec.name)).1).unwrap();
            }
            let config = AdamWConfig { learning_rate: 0.01, weight_decay: 0.01, ..AdamWConfig::new(kind) };
            let mut optimiser = AdamW::new(config, &params, &policy).unwrap();
            for step in 0..4 {
                // Scaled by a power of two and unscaled again: not a bit may change.
                let values = ["w", "z"]
                    .map(|it| golden.get(&format!("in/{it}_grad{step}")).1.iter().map(|g| 64.0 * g).collect());
                let grads = grads(device, &params, precision, &values);
                optimiser.step(&mut params, &grads, 1.0 / 64.0).unwrap();
                for param in &params.list {
                    let want = golden.get(&format!("f64/{name}/{}{step}", param.spec.name)).1;
                    let case = format!("{name} step {step} in {precision}");
                    assert_close!(case, param.file_values().unwrap(), *want, tolerance);
                }
            }
            assert_eq!(optimiser.n_steps(), 4);
        }
    }
}

/// Sizes over and under a tile, a complex weight with odd rows, a scalar.
fn specs() -> Vec<ParamSpec> {
    let init = Init::Uniform { bound: 1.0 };
    vec![
        ParamSpec::real("dense", &[5, 1777], init),
        ParamSpec::spectral("spectral", &[3, 5, 21, 11], init),
        ParamSpec::real("bias", &[1], init),
    ]
}

fn run(
    device: &Device,
    policy: &PrecisionPolicy,
    kind: AdamWKind,
    n_steps: usize,
    grad_precision: Precision,
) -> (Params, AdamW) {
    let mut params = Params::new(device, specs(), policy, 11).unwrap();
    let mut optimiser =
        AdamW::new(AdamWConfig { weight_decay: 0.1, ..AdamWConfig::new(kind) }, &params, policy).unwrap();
    for step in 0..n_steps {
        take_step(device, &mut params, &mut optimiser, step, grad_precision);
    }
    (params, optimiser)
}

fn take_step(device: &Device, params: &mut Params, optimiser: &mut AdamW, step: usize, precision: Precision) {
    let mut rng = Rng::new(100 + step as u64);
    let values: Vec<Vec<f64>> = params
        .list
        .iter()
        .map(|param| rng.normals(param.spec.n_scalars()).iter().map(|g| f64::from(*g as f32)).collect())
        .collect();
    let grads = grads(device, params, precision, &values);
    optimiser.step(params, &grads, 0.25).unwrap();
}

fn exact(params: &Params) -> Vec<f64> {
    params.list.iter().flat_map(|param| param.exact().to_vec::<f64>().unwrap()).collect()
}

fn values(params: &Params) -> Vec<f64> {
    params.list.iter().flat_map(|param| param.value.to_vec::<f64>().unwrap()).collect()
}

#[test]
fn every_layout_of_precisions_follows_double() {
    for kind in KINDS {
        let one = Device::cpu(1).unwrap();
        let want = exact(&run(&one, &PrecisionPolicy::double(), kind, 3, Precision::F64).0);
        for (policy, tolerance) in [
            (PrecisionPolicy::full(), 1e-6),
            (PrecisionPolicy::mixed(Precision::F16), 1e-6),
            (PrecisionPolicy::mixed(Precision::Bf16), 1e-6),
            // Moments and weights themselves are rounded to halves here.
            (PrecisionPolicy::preset(Preset::Half, Precision::F16), 1e-2),
            (PrecisionPolicy::preset(Preset::Half, Precision::Bf16), 1e-2),
        ] {
            for grad in [Precision::F32, Precision::F64] {
                let (params, _) = run(&one, &policy, kind, 3, grad);
                assert_close!(format!("{kind:?} {} {}", policy.preset, policy.format), exact(&params), want, tolerance);
                for param in params.list.iter().filter(|param| param.master.is_some()) {
                    let rounded = param.exact().cast(param.value.precision(), Purpose::Param).unwrap();
                    assert_eq!(rounded.to_vec::<f64>().unwrap(), param.value.to_vec::<f64>().unwrap());
                }
                let (three, _) = run(&Device::cpu(3).unwrap(), &policy, kind, 3, grad);
                assert_eq!(exact(&params), exact(&three), "another number of threads gave other bits");
            }
        }
    }
}

#[test]
fn plans_what_it_allocates() {
    let cpu = Device::cpu(2).unwrap();
    for policy in [PrecisionPolicy::mixed(Precision::F16), PrecisionPolicy::preset(Preset::Half, Precision::F16)] {
        let peaks = [cpu.clone(), cpu.twin()].map(|device| {
            device.reset_peak();
            let kept = run(&device, &policy, AdamWKind::Neuralop, 1, Precision::F32);
            let peaks = Purpose::ALL.map(|purpose| device.memory().of(purpose).peak);
            drop(kept);
            peaks
        });
        assert_eq!(peaks[0], peaks[1]);
    }
}

#[test]
fn no_gradient_leaves_a_parameter_alone_and_wrong_use_is_refused() {
    let device = Device::cpu(1).unwrap();
    let policy = PrecisionPolicy::full();
    let (mut params, mut optimiser) = run(&device, &policy, AdamWKind::Torch, 1, Precision::F32);
    let before = exact(&params);
    optimiser.step(&mut params, &[None, None, None], 1.0).unwrap();
    assert_eq!(exact(&params), before);
    let few = optimiser.step(&mut params, &[None], 1.0);
    assert!(matches!(few, Err(Error::Parameters { what: "gradients", expected: 3, found: 1 })));
    let odd = Rng::new(0).tensor(&device, &[2], Precision::F32);
    let odd = optimiser.step(&mut params, &[Some(odd), None, None], 1.0);
    assert!(matches!(odd, Err(Error::Shape { operand: "gradient", .. })));
    assert_eq!(optimiser.n_steps(), 2, "a refused step is not counted");
    let held = params.list[2].value.clone();
    let grad = Rng::new(0).tensor(&device, &[1], Precision::F32);
    assert!(matches!(optimiser.step(&mut params, &[None, None, Some(grad)], 1.0), Err(Error::Tensor(_))));
    drop(held);
    let config = AdamWConfig { betas: [0.9, 1.0], ..AdamWConfig::new(AdamWKind::Torch) };
    assert!(matches!(AdamW::new(config, &params, &policy), Err(Error::Setting { setting: "betas", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// N steps, a file and N steps are 2N steps, bit for bit.
    #[test]
    fn a_resumed_run_is_the_same_run(
        kind in prop_oneof![Just(AdamWKind::Torch), Just(AdamWKind::Neuralop)],
        preset in prop_oneof![Just(Preset::Full), Just(Preset::Amp), Just(Preset::Mixed), Just(Preset::Half)],
        format in prop_oneof![Just(Precision::F16), Just(Precision::Bf16)],
        n_steps in 1usize..4,
    ) {
        let device = Device::cpu(2).unwrap();
        let policy = PrecisionPolicy::preset(preset, format);
        let (whole, _) = run(&device, &policy, kind, 2 * n_steps, Precision::F32);
        let (params, optimiser) = run(&device, &policy, kind, n_steps, Precision::F32);
        let path = std::env::temp_dir().join(format!("halfmode-adamw-{}-{kind:?}{preset}{format}{n_steps}", std::process::id()));
        let mut entries = Entry::parameters(&params).unwrap();
        entries.extend(optimiser.entries(&params).unwrap());
        write_named(&path, &entries, &serde_json::Value::Null).unwrap();
        drop(entries);

        let mut params = Params::new(&device, specs(), &policy, 99).unwrap();
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::new(kind) };
        let mut optimiser = AdamW::new(config, &params, &policy).unwrap();
        let (arrays, _) = read_named(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        load_parameters(&mut params, &arrays).unwrap();
        optimiser.load(&params, &arrays).unwrap();
        for step in n_steps..2 * n_steps {
            take_step(&device, &mut params, &mut optimiser, step, Precision::F32);
        }
        prop_assert!(exact(&whole) == exact(&params) && values(&whole) == values(&params));
    }
}
