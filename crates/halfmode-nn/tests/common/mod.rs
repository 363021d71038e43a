//! What the tests of the layers share.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use halfmode_autograd::{Cx, Op};
use halfmode_fft::{Algorithm, Transform, TransformConfig};
use halfmode_precision::{Domain, Format, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::run_op;
use proptest::prelude::*;
use std::sync::Arc;

/// Everything in one precision; halves are the published method with f32 sums and master weights.
pub(crate) fn policy(precision: Precision) -> Arc<PrecisionPolicy> {
    Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionPolicy::full(),
        half => PrecisionPolicy::mixed(half),
    })
}

pub(crate) fn transform(
    device: &Device,
    grid: &[usize],
    modes: &[usize],
    precision: Precision,
    algorithm: Option<Algorithm>,
) -> Arc<Transform> {
    let (grid, modes) = (grid.to_vec(), modes.to_vec());
    let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate: precision.accumulate(), algorithm };
    Arc::new(Transform::new(device, config).unwrap())
}

/// Sizes of a real grid and its kept modes: odd, prime, 1 and full spectra come up often.
pub(crate) fn grid_and_modes(max_n: usize) -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    let axis = (1..=max_n).prop_flat_map(|n| (Just(n), 1..=n));
    proptest::collection::vec(axis, 1..=3).prop_map(|axes| {
        let grid: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
        let mut modes: Vec<usize> = axes.iter().map(|axis| axis.1).collect();
        let last = grid.len() - 1;
        modes[last] = modes[last].min(grid[last] / 2 + 1);
        (grid, modes)
    })
}

pub(crate) fn algorithm() -> impl Strategy<Value = Option<Algorithm>> {
    prop_oneof![Just(None), Just(Some(Algorithm::Matrix)), Just(Some(Algorithm::Fft))]
}

/// Values and the shape of one input of an op.
pub(crate) type Value = (Vec<usize>, Vec<f64>);

pub(crate) fn rounded(values: &[f64], precision: Precision) -> Vec<f64> {
    let device = Device::cpu(1).unwrap();
    let stored = Tensor::from_slice(&device, values, [values.len()], precision, Purpose::Activation).unwrap();
    stored.to_vec().unwrap()
}

pub(crate) fn tensors(device: &Device, inputs: &[Value], precision: Precision) -> Vec<Tensor> {
    let tensor = |(shape, values): &Value| {
        Tensor::from_slice(device, values, shape.clone(), precision, Purpose::Activation).unwrap()
    };
    inputs.iter().map(tensor).collect()
}

/// Output and all gradients of an op, in double precision.
pub(crate) fn run(cx: &Cx, op: Box<dyn Op>, inputs: &[Tensor], cotangent: &[f64]) -> Vec<Vec<f64>> {
    let (out, grads) = run_op(cx, op, inputs, cotangent);
    let values = |t: &Tensor| t.to_vec::<f64>().unwrap();
    std::iter::once(values(&out)).chain(grads.iter().map(|g| values(g.as_ref().unwrap()))).collect()
}

/// The error that `roundings` stored intermediates and sums of `n_terms` may cause in a result of
/// this size and sensitivity. A rounding moves a stored value by at most the unit roundoff, which
/// moves the result by at most what moving all operands as much does; independent ones add as
/// squares. Sums err as in [`halfmode_testkit::tol`].
pub(crate) fn allowed(precision: Precision, n_terms: usize, roundings: usize, size: f64, sensitivity: f64) -> f64 {
    let (format, sums) = (Format::from(precision), Format::from(precision.accumulate()));
    let stored = format.unit_roundoff() * (roundings as f64).sqrt();
    let summed = 4.0 * sums.unit_roundoff() * (n_terms as f64).sqrt();
    (stored + summed) * size.max(sensitivity) + format.min_subnormal()
}

/// Property tests that keep what failed beside the test's source.
pub(crate) fn cases(n: u32) -> ProptestConfig {
    let failures = proptest::test_runner::FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases: n, failure_persistence: Some(Box::new(failures)), ..ProptestConfig::default() }
}
