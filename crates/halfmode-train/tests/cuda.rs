//! Optimisers and norms of gradients on a GPU against the CPU. Without a GPU nothing runs; with `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_nn::{Init, ParamSpec, Params};
use halfmode_precision::{DType, Format, Precision, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu};
use halfmode_train::{AdamW, AdamWConfig, AdamWKind, GradStats, grad_stats};

const KINDS: [AdamWKind; 2] = [AdamWKind::Torch, AdamWKind::Neuralop];

fn policies() -> Vec<(PrecisionPolicy, Precision)> {
    let half = |format| PrecisionPolicy::preset(Preset::Half, format);
    vec![
        (PrecisionPolicy::double(), Precision::F64),
        (PrecisionPolicy::full(), Precision::F32),
        (PrecisionPolicy::mixed(Precision::F16), Precision::F32),
        (PrecisionPolicy::mixed(Precision::Bf16), Precision::F32),
        (half(Precision::Bf16), Precision::Bf16),
    ]
}

/// A number in `1..=most`.
fn size(rng: &mut Rng, most: usize) -> usize {
    1 + (rng.uniform() * most as f64) as usize
}

/// Odd and even rows, over and under what a block works on at a time; a scalar; one that has no gradient.
fn specs(rng: &mut Rng) -> Vec<ParamSpec> {
    let init = Init::Uniform { bound: 1.0 };
    let mut specs = vec![
        ParamSpec::real("scalar", &[1], init),
        ParamSpec::real("left_alone", &[5, 3], init),
        ParamSpec::real("large", &[37, 4099], init),
        ParamSpec::spectral("even_rows", &[3, 8, 17, 5], init),
        ParamSpec::spectral("odd_rows", &[3, 7, 19, 11], init),
        ParamSpec::separable("separable", &[12, 31], init),
    ];
    for idx in 0..10 {
        let extents = [size(rng, 40), size(rng, 90)];
        specs.push(match idx % 3 {
            0 => ParamSpec::real(format!("w{idx}"), &extents, init),
            1 => ParamSpec::spectral(format!("z{idx}"), &[size(rng, 9), extents[0], extents[1]], init),
            _ => ParamSpec::separable(format!("s{idx}"), &extents, init),
        });
    }
    specs
}

/// Everything that an optimiser changes, parameter by parameter: name, precision and values.
fn state(params: &Params, optimizer: &AdamW) -> Vec<(String, Precision, Vec<f64>)> {
    let all = params.list.iter().zip(optimizer.moments()).flat_map(|(param, moments)| {
        let tensors = [("value", Some(&param.value)), ("master", param.master.as_ref())];
        let tensors = tensors.into_iter().chain([("m", Some(&moments.m)), ("v", Some(&moments.v))]);
        tensors.filter_map(|(what, tensor)| {
            let tensor = tensor?;
            Some((format!("{} {what}", param.spec.name), tensor.precision(), tensor.to_vec().unwrap()))
        })
    });
    all.collect()
}

#[test]
fn adamw_of_all_parameters_and_of_one_at_a_time() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    let specs = specs(&mut Rng::new(11));
    for ((policy, precision), kind) in policies().into_iter().flat_map(|it| KINDS.map(|kind| (it.clone(), kind))) {
        let config = AdamWConfig { weight_decay: 0.1, learning_rate: 0.01, ..AdamWConfig::new(kind) };
        let run = |device: &Device, together: bool| {
            let mut params = Params::new(device, specs.clone(), &policy, 3).unwrap();
            let mut optimizer = AdamW::new(config, &params, &policy).unwrap();
            let mut rng = Rng::new(5);
            for _ in 0..3 {
                let make = |param: &halfmode_nn::Parameter| {
                    let values = rng.normals(param.value.numel());
                    let shape = param.value.shape().clone();
                    let grad = Tensor::from_slice(device, &values, shape, precision, Purpose::Grad).unwrap();
                    (param.spec.name != "left_alone").then_some(grad)
                };
                let grads: Vec<_> = params.list.iter().map(make).collect();
                if together {
                    optimizer.step(&mut params, &grads, 0.25).unwrap();
                    continue;
                }
                optimizer.begin_step();
                for (idx, grad) in grads.iter().enumerate() {
                    if let Some(grad) = grad {
                        optimizer.update(idx, &mut params.list[idx], grad, 0.25).unwrap();
                    }
                }
            }
            assert_eq!(optimizer.n_steps(), 3);
            state(&params, &optimizer)
        };
        let (want, together, one_by_one) = (run(&cpu, true), run(&device, true), run(&device, false));
        assert_eq!(want.len(), together.len());
        for ((want, got), other) in want.iter().zip(&together).zip(&one_by_one) {
            let (name, stored, want) = want;
            let case = format!("{kind:?} {:?} {precision}: {name}", policy.preset);
            // Of f32 a handful of operations in another order; a half may round to the other side each time. A moment is
            // a sum of terms of up to about 0.1 that may cancel, so that is the size that its roundings have.
            let ulps = if *stored == Precision::F64 { 64.0 } else { 16.0 };
            for (idx, (want, got)) in want.iter().zip(&got.2).enumerate() {
                let allowed = ulps * Format::from(*stored).unit_roundoff() * want.abs().max(0.1);
                assert!((want - got).abs() <= allowed, "{case} at {idx}: {got} for {want}");
            }
            assert!(got.2.iter().zip(&other.2).all(|(a, b)| a.to_bits() == b.to_bits()), "{case} one by one");
        }
    }
}

#[test]
fn the_norm_of_all_gradients() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    let make = |device: &Device, spoilt: Option<(usize, f64)>| -> Vec<Tensor> {
        let mut rng = Rng::new(3);
        let lengths = [1, 3, 8191, 8192, 8193, 0, 70_001, 5, 5_000_000];
        let tensors = lengths.into_iter().enumerate().map(|(idx, n)| {
            let mut values = rng.normals(n);
            if let Some((_, bad)) = spoilt.filter(|it| it.0 == idx) {
                values[n - 1] = bad;
            }
            Tensor::from_slice(device, &values, [n], Precision::ALL[idx % 4], Purpose::Grad).unwrap()
        });
        tensors.collect()
    };
    let (want, got) = (grad_stats(&make(&cpu, None)).unwrap(), grad_stats(&make(&device, None)).unwrap());
    assert!(want.finite && got.finite && (want.norm - got.norm).abs() <= 1e-12 * want.norm, "{got:?} for {want:?}");
    let again = grad_stats(&make(&device, None)).unwrap();
    assert_eq!(got.norm.to_bits(), again.norm.to_bits());
    for (idx, bad) in [(0, f64::NAN), (3, f64::INFINITY), (6, f64::NEG_INFINITY), (8, f64::NAN)] {
        assert!(!grad_stats(&make(&device, Some((idx, bad)))).unwrap().finite, "{bad} in {idx}");
    }
    // Tensors of two devices together, and none at all.
    let both: Vec<Tensor> = make(&cpu, None).into_iter().chain(make(&device, None)).collect();
    let norm = grad_stats(&both).unwrap().norm;
    assert!((norm - want.norm * 2f64.sqrt()).abs() <= 1e-12 * norm);
    let empty = device.alloc([0], DType::real(Precision::F32), Purpose::Grad).unwrap();
    assert_eq!(grad_stats([&empty]).unwrap(), GradStats { norm: 0.0, finite: true });
}
