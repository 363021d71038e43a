//! Complex fields from two real ones and back, appended channels, batch norm: values and gradients.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op, Tape};
use halfmode_nn::{BatchNorm, BatchStatistics, Embed, ExtraChannels, JoinComplex, SplitComplex, Subtract};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, assert_close, gradcheck, run_op};
use std::sync::Arc;

fn double(device: &Device) -> Cx {
    Cx::new(device, &Arc::new(PrecisionPolicy::double()))
}

#[test]
fn gradients_match_differences() {
    let device = Device::cpu(2).unwrap();
    for (seed, shape) in [vec![2, 3, 5], vec![1, 2, 4, 3], vec![3, 1, 2, 3, 4], vec![2, 7, 1]].iter().enumerate() {
        let mut rng = Rng::new(seed as u64);
        let c = shape[shape.len() - 1];
        let mut tensor = |shape: &[usize]| rng.tensor(&device, shape, Precision::F64);
        let check = |op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor]| gradcheck(&device, op, inputs, seed as u64);
        check(&|| Box::new(Subtract), &[tensor(shape), tensor(shape)]);
        check(&|| Box::new(BatchNorm(BatchStatistics::Batch)), &[tensor(shape), tensor(&[c]), tensor(&[c])]);
        for extra in [ExtraChannels::None, ExtraChannels::Coordinates, ExtraChannels::Zeros] {
            check(&|| Box::new(Embed(extra)), &[tensor(shape)]);
        }
    }
}

/// With given statistics: the formula, and gradients that treat them as constants.
#[test]
fn batch_norm_by_running_statistics() {
    let device = Device::cpu(1).unwrap();
    let make = |shape: &[usize], values: &[f64]| {
        Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
    };
    let (x, w, b) = ([1.0, 2.0, -1.0, 0.5], [2.0, 3.0], [0.25, -1.0]);
    let (mean, var) = ([0.5, 1.0], [4.0, 0.25]);
    let inputs = [make(&[1, 2, 2], &x), make(&[2], &w), make(&[2], &b), make(&[2], &mean), make(&[2], &var)];
    let g = [1.0, -2.0, 0.5, 4.0];
    let (y, grads) = run_op(&double(&device), Box::new(BatchNorm(BatchStatistics::Running)), &inputs, &g);
    let rstd = var.map(|var: f64| 1.0 / (var + 1e-5).sqrt());
    let x_hat: Vec<f64> = (0..4).map(|i| (x[i] - mean[i % 2]) * rstd[i % 2]).collect();
    let want: Vec<f64> = (0..4).map(|i| x_hat[i] * w[i % 2] + b[i % 2]).collect();
    assert_close!("y", y.to_vec::<f64>().unwrap(), want, 1e-14);
    let grad = |idx: usize| grads[idx].as_ref().unwrap().to_vec::<f64>().unwrap();
    let want: Vec<f64> = (0..4).map(|i| g[i] * w[i % 2] * rstd[i % 2]).collect();
    assert_close!("grad x", grad(0), want, 1e-14);
    assert_close!("grad w", grad(1), [g[0] * x_hat[0] + g[2] * x_hat[2], g[1] * x_hat[1] + g[3] * x_hat[3]], 1e-14);
    assert_close!("grad b", grad(2), [1.5, 2.0], 1e-14);
    assert!(grads[3].is_none() && grads[4].is_none());
}

/// A phase turns every point, the opposite one turns it back, and gradients go through the adjoint.
#[test]
fn phases_turn_fields_and_back() {
    let device = Device::cpu(1).unwrap();
    let (n, c) = (5, 3);
    let shape = [2, 4, n, c];
    for turns in [-7, -1, 0, 2, 5] {
        let mut rng = Rng::new(9);
        let [re, im, a, b] = [(); 4].map(|()| rng.tensor(&device, &shape, Precision::F64));
        let mut tape = Tape::new(double(&device));
        let (x, y) = (tape.leaf(re.clone()), tape.leaf(im.clone()));
        let z = tape.apply(JoinComplex { turns }, &[&x, &y]).unwrap();
        let (z_values, points) = (z.value().to_vec::<f64>().unwrap(), re.to_vec::<f64>().unwrap());
        let imaginary = im.to_vec::<f64>().unwrap();
        for (idx, z) in z_values.chunks_exact(2).enumerate() {
            let (sin, cos) = (std::f64::consts::TAU * (turns * (idx / c % n) as isize) as f64 / n as f64).sin_cos();
            let (re, im) = (points[idx], imaginary[idx]);
            assert!((z[0] - (re * cos - im * sin)).abs() < 1e-13 && (z[1] - (re * sin + im * cos)).abs() < 1e-13);
        }
        let mut back = tape.apply_many(Box::new(SplitComplex { turns: -turns }), &[&z]).unwrap();
        assert_close!("re", back[0].value().to_vec::<f64>().unwrap(), points, 1e-14);
        assert_close!("im", back[1].value().to_vec::<f64>().unwrap(), imaginary, 1e-14);
        let mut grads = vec![Vec::new(); 2];
        let seeds = vec![(back.remove(0), a.clone()), (back.remove(0), b.clone())];
        tape.backward_from(seeds, &mut |id, grad| {
            grads[id.0] = grad.to_vec::<f64>()?;
            Ok(())
        })
        .unwrap();
        // The map is the identity, so its adjoint is.
        assert_close!("grad re", grads[0], a.to_vec::<f64>().unwrap(), 1e-14);
        assert_close!("grad im", grads[1], b.to_vec::<f64>().unwrap(), 1e-14);
    }
}
