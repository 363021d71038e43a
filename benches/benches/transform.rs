//! Truncated transforms of whole fields: the planner's choice against the fast transform of every
//! axis, both in f32, and against itself in half.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use halfmode_benches::{Bench, noise};
use halfmode_fft::{Algorithm, Transform, TransformConfig, Weights};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};

fn main() {
    let mut bench = Bench::from_args("transform: there and back; reference: fast transform of every axis, f32");
    let device = Device::cpu(0).unwrap();
    let shapes: [(&[usize], &[usize], usize, usize); 6] = [
        (&[1024], &[33], 16, 64),
        (&[64, 64], &[16, 9], 8, 32),
        (&[64, 64], &[32, 17], 8, 32),
        (&[128, 128], &[64, 33], 4, 64),
        (&[421, 421], &[32, 17], 1, 16),
        (&[32, 32, 32], &[16, 16, 9], 2, 32),
    ];
    for (grid, modes, batch, channels) in shapes {
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            let plan = |algorithm| {
                let (grid, modes) = (grid.to_vec(), modes.to_vec());
                let config =
                    TransformConfig { grid, modes, domain: Domain::Real, accumulate: Precision::F32, algorithm };
                Transform::new(&device, config).unwrap()
            };
            let (planned, fft) = (plan(None), plan(Some(Algorithm::Fft)));
            let shape = planned.field_shape(batch, channels);
            let values = noise(shape.numel());
            let field =
                |precision| Tensor::from_slice(&device, &values, shape.clone(), precision, Purpose::Data).unwrap();
            let round_trip = |transform: &Transform, x: &Tensor| {
                let scale = transform.scale();
                let storage = x.precision();
                let x_hat = transform.to_modes(x, Weights::Plain, &scale.to_modes, storage, Purpose::Activation);
                let x_hat = x_hat.unwrap();
                transform.to_grid(&x_hat, Weights::Doubled, &scale.to_grid, storage, Purpose::Activation).unwrap()
            };
            let (x, x32) = (field(precision), field(Precision::F32));
            let sizes = |n: &[usize]| n.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
            let name = format!("transform/cpu/{precision}/{}k{}b{batch}c{channels}", sizes(grid), sizes(modes));
            bench.pair(&name, &device, &mut || drop(round_trip(&planned, &x)), &mut || drop(round_trip(&fft, &x32)));
        }
    }
    bench.finish();
}
