//! What a half FFT does to numbers, and what the truncated transform does not.
#![allow(clippy::unwrap_used, reason = "a test")]

use half::f16;
use halfmode_fft::{Transform, TransformConfig, Weights, true_half_fft};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, rel_l2};
use num_complex::Complex;

/// Relative error of a half FFT of white noise of `n` points.
fn half_fft_error(n: usize, seed: u64) -> f64 {
    let x: Vec<f16> = Rng::new(seed).normals(n).into_iter().map(f16::from_f64).collect();
    let mut half: Vec<Complex<f16>> = x.iter().map(|&re| Complex::new(re, f16::ZERO)).collect();
    true_half_fft(&mut half, n, true);
    let got: Vec<f64> = half.iter().flat_map(|z| [z.re.to_f64(), z.im.to_f64()]).collect();
    // All n complex modes by definition, through the full complex plan in f64.
    let device = Device::cpu(1).unwrap();
    let config = TransformConfig {
        grid: vec![n],
        modes: vec![n],
        domain: Domain::Complex,
        accumulate: Precision::F64,
        algorithm: None,
    };
    let transform = Transform::new(&device, config).unwrap();
    let values: Vec<f64> = x.iter().flat_map(|v| [v.to_f64(), 0.0]).collect();
    let dtype = halfmode_precision::DType::complex(Precision::F64);
    let field = Tensor::from_scalars(&device, &values, [1, n, 1], dtype, Purpose::Activation).unwrap();
    let modes = transform
        .to_modes(&field, Weights::Plain, &[1.0], Precision::F64, Purpose::Activation)
        .unwrap()
        .to_vec::<f64>()
        .unwrap();
    // Centred order to FFT order.
    let want: Vec<f64> = (0..n)
        .flat_map(|bin| {
            let idx = (bin + n / 2) % n;
            [modes[idx], modes[n + idx]]
        })
        .collect();
    rel_l2(&got, &want)
}

/// Relative error of the truncated transform of white noise stored in half.
fn truncated_error(n: usize, seed: u64) -> f64 {
    let device = Device::cpu(1).unwrap();
    let values = Rng::new(seed).normals(n);
    let run = |precision: Precision| {
        let config = TransformConfig {
            grid: vec![n],
            modes: vec![n / 2 + 1],
            domain: Domain::Real,
            accumulate: precision.accumulate(),
            algorithm: None,
        };
        let transform = Transform::new(&device, config).unwrap();
        let x = Tensor::from_slice(&device, &values, [1, n, 1], Precision::F16, Purpose::Activation).unwrap();
        let x = x.cast(precision, Purpose::Activation).unwrap();
        let scale = transform.scale();
        transform
            .to_modes(&x, Weights::Plain, &scale.to_modes, precision, Purpose::Activation)
            .unwrap()
            .to_vec::<f64>()
            .unwrap()
    };
    rel_l2(&run(Precision::F16), &run(Precision::F64))
}

#[test]
fn a_half_fft_loses_digits_with_its_size_and_the_truncated_transform_does_not() {
    let mean = |error: &dyn Fn(u64) -> f64| (0..4).map(error).sum::<f64>() / 4.0;
    let small = mean(&|seed| half_fft_error(64, seed));
    let large = mean(&|seed| half_fft_error(4096, seed));
    assert!(large > 1.25 * small, "{small:.2e} at 64, {large:.2e} at 4096");
    let ours = [64, 4096].map(|n| mean(&|seed| truncated_error(n, seed)));
    assert!((ours[1] / ours[0] - 1.0).abs() < 0.2, "{ours:?}");
    assert!(ours[1] < 0.5 * large, "{:.2e} against {large:.2e}", ours[1]);
}

#[test]
fn a_half_fft_overflows_where_the_sum_does_and_the_truncated_transform_does_not() {
    // A constant field overflows from a mean of 65504 / n on.
    let n = 4096;
    for (mean, overflows) in [(15.0, false), (17.0, true)] {
        let mut half = vec![Complex::new(f16::from_f64(mean), f16::ZERO); n];
        true_half_fft(&mut half, n, true);
        assert_eq!(!half[0].re.is_finite(), overflows, "{mean}");
    }
    let device = Device::cpu(1).unwrap();
    let config = TransformConfig {
        grid: vec![n],
        modes: vec![3],
        domain: Domain::Real,
        accumulate: Precision::F32,
        algorithm: None,
    };
    let transform = Transform::new(&device, config).unwrap();
    let x = Tensor::from_slice(&device, &vec![1000.0f32; n], [1, n, 1], Precision::F16, Purpose::Activation).unwrap();
    let scale = transform.scale();
    let x_hat = transform.to_modes(&x, Weights::Plain, &scale.to_modes, Precision::F16, Purpose::Activation).unwrap();
    let back =
        transform.to_grid(&x_hat, Weights::Doubled, &scale.to_grid, Precision::F16, Purpose::Activation).unwrap();
    assert!(back.to_vec::<f32>().unwrap().iter().all(|v| (v - 1000.0).abs() < 1.0));
}
