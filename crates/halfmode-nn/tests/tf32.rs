//! Products of f32 values on a GPU: TF32 where the policy says so, true f32 where it does not.
//!
//! TF32 keeps 10 bits of a mantissa. Whether an operand is rounded or cut to them, it changes by at most `2^-10` of
//! itself, a product of two by at most `2 · 2^-10 + 2^-20`. Sums are f32: `n` terms add at most `n` units in the last
//! place, doubled because tensor cores cut where others round.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{rounded, run, tensors, transform};
use halfmode_autograd::{Cx, Op};
use halfmode_fft::{Transform, Weights};
use halfmode_nn::{Channels, Conv2d, ConvKind, GridEmbedding, PointwiseMlp};
use halfmode_precision::{Compute, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Real, Tensor};
use halfmode_testkit::{Rng, gpu};
use std::f64::consts::TAU;
use std::sync::Arc;

/// The largest relative error of a product in a sum of `n` terms, relative to the sum of moduli.
fn bound(compute: Compute, n: usize) -> f64 {
    let sums = (n + 4) as f64 * 2f64.powi(-23);
    match compute {
        Compute::F32 => sums,
        Compute::Tf32 => 2.0 * 2f64.powi(-10) + 2f64.powi(-20) + 2.0 * sums,
    }
}

/// Every value is within its tolerance; TF32 leaves those of f32 somewhere, or it was not used.
fn check(what: &str, compute: Compute, values: &[f64], oracle: &[(f64, f64, f64)]) {
    let mut beyond_f32 = 0;
    for (i, (value, (exact, f32_bound, tf32_bound))) in values.iter().zip(oracle).enumerate() {
        let error = (value - exact).abs();
        let allowed = if compute == Compute::F32 { f32_bound } else { tf32_bound };
        assert!(
            error <= *allowed,
            "{what} in {compute}, value {i}: {value} is {error:e} from {exact}, not {allowed:e}"
        );
        beyond_f32 += usize::from(error > *f32_bound);
    }
    assert!(compute == Compute::F32 || beyond_f32 > 0, "{what}: {compute} gave true f32");
}

fn tensor(device: &Device, values: &[f64], shape: &[usize]) -> Tensor {
    Tensor::from_slice(device, values, shape, Precision::F32, Purpose::Activation).unwrap()
}

/// A CPU has no TF32: its products are exact whatever the policy says.
fn used(device: &Device, compute: Compute) -> Compute {
    if device.is_cpu() { Compute::F32 } else { compute }
}

#[test]
fn on_a_gpu_products_use_what_the_policy_says() {
    let Some(device) = gpu() else { return };
    check_transforms(&device);
    check_dense_layers(&device);
    check_convolutions(&device);
}

#[test]
fn on_a_cpu_products_are_exact() {
    let device = Device::cpu(2).unwrap();
    check_transforms(&device);
    check_dense_layers(&device);
    check_convolutions(&device);
}

fn check_transforms(device: &Device) {
    let (batch, n, k, channels) = (8, 64, 32, 128);
    let x = rounded(&Rng::new(1).normals(batch * n * channels), Precision::F32);
    let mut oracle = Vec::new();
    for b in 0..batch {
        for row in 0..2 * k {
            for c in 0..channels {
                let (mut sum, mut moduli) = (0.0, 0.0);
                for j in 0..n {
                    let angle = TAU * ((row % k) * j % n) as f64 / n as f64;
                    let term = x[(b * n + j) * channels + c] * if row < k { angle.cos() } else { -angle.sin() };
                    sum += term;
                    moduli += term.abs();
                }
                oracle.push((sum, moduli * bound(Compute::F32, n), moduli * bound(Compute::Tf32, n)));
            }
        }
    }
    for compute in [Compute::F32, Compute::Tf32] {
        let planned = Transform::clone(&transform(device, &[n], &[k], Precision::F32, None)).with_compute(compute);
        let x = tensor(device, &x, &[batch, n, channels]);
        let x_hat = planned.to_modes(&x, Weights::Plain, &[1.0], Precision::F32, Purpose::Activation).unwrap();
        check("a transform", used(device, compute), &x_hat.to_vec::<f64>().unwrap(), &oracle);
    }
}

fn check_dense_layers(device: &Device) {
    let (rows, c_in, hidden, c_out) = (256, 64, 128, 64);
    let mut rng = Rng::new(2);
    let mut noise = |n: usize| rounded(&rng.normals(n), Precision::F32);
    let (x, w1, b1, w2, b2) =
        (noise(rows * c_in), noise(hidden * c_in), noise(hidden), noise(c_out * hidden), noise(c_out));
    let op = PointwiseMlp { input: Channels::Last, output: Channels::Last, embedding: GridEmbedding::None };
    // The steepest slope of GELU is below 1.13; the device's own is within a few units of f32 of the definition.
    let (slope, gelu) = (1.13, 8.0 * 2f64.powi(-23));
    let mut oracle = Vec::new();
    for row in x.chunks_exact(c_in) {
        // Values of the hidden layer, and what they may be off by in either arithmetic.
        let layer = w1.chunks_exact(c_in).zip(&b1).map(|(w, b)| {
            let terms = || w.iter().zip(row).map(|(w, x)| w * x);
            let (sum, moduli) = (terms().sum::<f64>() + b, terms().map(f64::abs).sum::<f64>() + b.abs());
            let (mut value, mut unused) = ([sum], [0.0]);
            f64::gelu_both(&mut value, &mut unused);
            let off = |compute| slope * moduli * bound(compute, c_in + 1) + gelu * (1.0 + sum.abs());
            (value[0], [off(Compute::F32), off(Compute::Tf32)])
        });
        let layer: Vec<(f64, [f64; 2])> = layer.collect();
        for (w, b) in w2.chunks_exact(hidden).zip(&b2) {
            let (mut sum, mut moduli, mut inherited) = (*b, b.abs(), [0.0; 2]);
            for (w, (value, off)) in w.iter().zip(&layer) {
                sum += w * value;
                moduli += (w * value).abs();
                inherited = [0, 1].map(|i| inherited[i] + w.abs() * off[i]);
            }
            let allowed = |compute, inherited: f64| {
                let relative = bound(compute, hidden + 1);
                moduli * relative + inherited * (1.0 + relative)
            };
            oracle.push((sum, allowed(Compute::F32, inherited[0]), allowed(Compute::Tf32, inherited[1])));
        }
    }
    for compute in [Compute::F32, Compute::Tf32] {
        let policy = Arc::new(PrecisionPolicy { compute, ..PrecisionPolicy::full() });
        let inputs = [
            tensor(device, &x, &[1, rows, c_in]),
            tensor(device, &w1, &[hidden, c_in, 1]),
            tensor(device, &b1, &[hidden]),
            tensor(device, &w2, &[c_out, hidden, 1]),
            tensor(device, &b2, &[c_out]),
        ];
        let (outputs, _) = op.forward(&Cx::new(device, &policy), &inputs.each_ref()).unwrap();
        check("dense layers", used(device, compute), &outputs[0].to_vec::<f64>().unwrap(), &oracle);
    }
}

/// Results and gradients, around the tiles of 64 and 128 channels. Sums are short, so that a rounded operand shows.
fn check_convolutions(device: &Device) {
    let cpu = Device::cpu(2).unwrap();
    for (kind, field, weight) in [
        (ConvKind::Forward, [2, 5, 6, 20], [2, 2, 20, 36]),
        (ConvKind::Transposed, [2, 4, 7, 64], [1, 2, 64, 64]),
        (ConvKind::Forward, [1, 7, 6, 36], [1, 1, 36, 136]),
        (ConvKind::Transposed, [3, 4, 5, 140], [1, 1, 132, 140]),
    ] {
        let (conv, mut rng) = (Conv2d { kind, padding: [0, 0] }, Rng::new(3));
        let mut noise = |n: usize| rounded(&rng.normals(n), Precision::F32);
        let (x, w) = (noise(field.iter().product()), noise(weight.iter().product()));
        let results = |device: &Device, policy: PrecisionPolicy, precision: Precision, [x, w, g]: [&[f64]; 3]| {
            let inputs = [(field.to_vec(), x.to_vec()), (weight.to_vec(), w.to_vec())];
            let inputs = tensors(device, &inputs, precision);
            run(&Cx::new(device, &Arc::new(policy)), Box::new(conv), &inputs, g)
        };
        let n_y = halfmode_nn::conv2d_reference(conv, (field, &x), (weight, &w)).1.len();
        let g = noise(n_y);
        let exact = results(&cpu, PrecisionPolicy::double(), Precision::F64, [&x, &w, &g]);
        let absolute = [&x, &w, &g].map(|it| it.iter().map(|it| it.abs()).collect::<Vec<f64>>());
        let moduli = results(&cpu, PrecisionPolicy::double(), Precision::F64, absolute.each_ref().map(|it| &it[..]));
        let (taps, c_y) = (weight[0] * weight[1], weight[if kind == ConvKind::Forward { 3 } else { 2 }]);
        let n_terms = [taps * field[3], taps * c_y, (n_y / c_y).max(field[0] * field[1] * field[2])];
        for compute in [Compute::F32, Compute::Tf32] {
            let policy = PrecisionPolicy { compute, ..PrecisionPolicy::full() };
            let got = results(device, policy, Precision::F32, [&x, &w, &g]);
            for (idx, what) in ["a convolution", "its field's gradient", "its weight's gradient"].iter().enumerate() {
                let bounds = [Compute::F32, Compute::Tf32].map(|compute| bound(compute, n_terms[idx]));
                let allowed = moduli[idx].iter().map(|it| bounds.map(|bound| it * bound));
                let oracle: Vec<_> = exact[idx].iter().zip(allowed).map(|(it, [f32, tf32])| (*it, f32, tf32)).collect();
                check(what, used(device, compute), &got[idx], &oracle);
            }
        }
    }
}
