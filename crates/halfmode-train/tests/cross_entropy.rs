//! The cross entropy: values by hand, gradients, errors.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op};
use halfmode_precision::{DType, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu, gradcheck, rel_l2, run_op};
use halfmode_train::{CrossEntropy, Reduction};
use std::sync::Arc;

fn loss(labels: &[usize], reduction: Reduction) -> CrossEntropy {
    CrossEntropy { labels: labels.into(), reduction }
}

#[test]
fn values_by_hand_however_large_the_logits() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::double()));
    let logits = Tensor::from_slice(&device, &[0.0, 0.0, 1e4, 0.0], [2, 1, 2], Precision::F64, Purpose::Activation);
    let logits = logits.unwrap();
    let value = |labels: &[usize], reduction| {
        loss(labels, reduction).forward(&cx, &[&logits]).unwrap().0[0].to_vec::<f64>().unwrap()[0]
    };
    assert!((value(&[0, 0], Reduction::Sum) - 2f64.ln()).abs() < 1e-15);
    assert!((value(&[1, 1], Reduction::Mean) - (2f64.ln() + 1e4) / 2.0).abs() < 1e-11);
    let said = |labels: &[usize]| loss(labels, Reduction::Sum).forward(&cx, &[&logits]).unwrap_err().to_string();
    assert!(said(&[0]).contains("expected 2 values in `labels`, found 1"), "{}", said(&[0]));
    assert!(said(&[0, 2]).contains("label 2 of sample 1 is no class: there are 2"), "{}", said(&[0, 2]));
}

#[test]
fn complex_logits_are_refused() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::double()));
    let logits = device.alloc([2, 3], DType::complex(Precision::F64), Purpose::Activation).unwrap();
    let said = loss(&[0, 2], Reduction::Sum).forward(&cx, &[&logits]).unwrap_err().to_string();
    assert!(said.contains("`logits`") && said.contains("expected real"), "{said}");
}

#[test]
fn gradients_match_differences() {
    let device = Device::cpu(1).unwrap();
    let logits = Rng::new(3).tensor(&device, &[4, 1, 1, 7], Precision::F64);
    for reduction in [Reduction::Sum, Reduction::Mean] {
        let op = || -> Box<dyn Op> { Box::new(loss(&[6, 0, 3, 3], reduction)) };
        gradcheck(&device, &op, std::slice::from_ref(&logits), 1);
    }
}

/// Loss and gradient in every format, for more rows than a launch takes labels for.
#[test]
fn a_gpu_gives_what_a_cpu_gives() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(1).unwrap();
    for (rows, classes) in [(1, 2), (4, 10), (63, 2), (64, 5), (65, 7), (131, 1001)] {
        let labels: Vec<usize> = (0..rows).map(|row| (row * 7919 + 5) % classes).collect();
        for (precision, policy) in [
            (Precision::F64, PrecisionPolicy::double()),
            (Precision::F32, PrecisionPolicy::full()),
            (Precision::F16, PrecisionPolicy::mixed(Precision::F16)),
            (Precision::Bf16, PrecisionPolicy::mixed(Precision::Bf16)),
        ] {
            for reduction in [Reduction::Sum, Reduction::Mean] {
                let policy = Arc::new(policy.clone());
                let [want, got] = [&cpu, &gpu].map(|device| {
                    let logits = Rng::new(3).tensor(device, &[rows, 1, 1, classes], precision);
                    let op = Box::new(loss(&labels, reduction));
                    let (value, grads) = run_op(&Cx::new(device, &policy), op, &[logits], &[0.5]);
                    [&value, grads[0].as_ref().unwrap()].map(|it| it.to_vec::<f64>().unwrap()).concat()
                });
                // Both sum in f64 and round once to f32.
                let tolerance = if precision == Precision::F64 { 1e-13 } else { 2f64.powi(-22) };
                let error = rel_l2(&got, &want);
                assert!(error <= tolerance, "{rows} rows, {classes} classes in {precision}: {error:.2e}");
            }
        }
    }
}
