//! The mode contraction of the spectral convolution against the general einsum of the contraction
//! crate: the fast kernel and its readable reference.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op};
use halfmode_contract::{Equation, Operand, OutputSpec, Plan, Policy, execute};
use halfmode_fft::{Transform, TransformConfig, Weights};
use halfmode_nn::SpectralConv;
use halfmode_precision::{DType, Domain, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, assert_close};
use std::sync::Arc;

#[test]
fn the_spectral_convolution_is_transform_einsum_transform() {
    let device = Device::cpu(2).unwrap();
    let (batch, c_in, c_out) = (2, 5, 3);
    let config = TransformConfig {
        grid: vec![12, 9],
        modes: vec![6, 4],
        domain: Domain::Real,
        accumulate: Precision::F64,
        algorithm: None,
    };
    let transform = Arc::new(Transform::new(&device, config).unwrap());
    let mut rng = Rng::new(11);
    let x = rng.tensor(&device, &[batch, 12, 9, c_in], Precision::F64);
    let w = rng.tensor(&device, &[24, c_in, 2 * c_out], Precision::F64);
    let cx = Cx::inference(&device, &Arc::new(PrecisionPolicy::double()));
    let got = SpectralConv::new(Arc::clone(&transform)).forward(&cx, &[&x, &w]).unwrap().0.remove(0);

    let scale = transform.scale();
    let purpose = Purpose::Activation;
    let x_hat = transform.to_modes(&x, Weights::Plain, &scale.to_modes, Precision::F64, purpose).unwrap();
    // Split complex [b, 2, m, i] to interleaved [b, m, i], and [m, i, (re | im) o] to [m, i, o].
    let (x_hat, w) = (x_hat.to_vec::<f64>().unwrap(), w.to_vec::<f64>().unwrap());
    let mut spectrum = Vec::new();
    for b in 0..batch {
        for mode_channel in 0..24 * c_in {
            spectrum.extend([0, 1].map(|part| x_hat[(b * 2 + part) * 24 * c_in + mode_channel]));
        }
    }
    let mut weights = Vec::new();
    for row in w.chunks_exact(2 * c_out) {
        for o in 0..c_out {
            weights.extend([row[o], row[c_out + o]]);
        }
    }
    let complex = |values: &[f64], shape: &[usize]| {
        Tensor::from_scalars(&device, values, shape, DType::complex(Precision::F64), purpose).unwrap()
    };
    let (spectrum, weights) = (complex(&spectrum, &[batch, 24, c_in]), complex(&weights, &[24, c_in, c_out]));
    let equation: Equation = "bmi,mio->bmo".parse().unwrap();
    let shapes = [spectrum.shape().clone(), weights.shape().clone()];
    let plan = Plan::new(&equation, &shapes, Policy::Memory).unwrap();
    let operands = [Operand::new(&spectrum), Operand::new(&weights)];
    let mixed = execute(&plan, &operands, &OutputSpec::new(Precision::F64, purpose)).unwrap().to_vec::<f64>().unwrap();
    let mut y_hat = vec![0.0; mixed.len()];
    for b in 0..batch {
        for mode_channel in 0..24 * c_out {
            for part in 0..2 {
                y_hat[(b * 2 + part) * 24 * c_out + mode_channel] = mixed[2 * (b * 24 * c_out + mode_channel) + part];
            }
        }
    }
    let y_hat = Tensor::from_slice(&device, &y_hat, [batch, 2, 6, 4, c_out], Precision::F64, purpose).unwrap();
    let want = transform.to_grid(&y_hat, Weights::Doubled, &scale.to_grid, Precision::F64, purpose).unwrap();
    assert_close!("spectral convolution", got.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap(), 1e-13);
}
