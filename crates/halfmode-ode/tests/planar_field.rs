//! The field of the toy flows: gradients, and time gradients of a batched tuple in every format.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod tuples;

use common::{double, linspace, mixed, on_one_thread};
use halfmode_nn::{Init, ParamSpec};
use halfmode_ode::{OdeOptions, PlanarField, TupleField};
use halfmode_precision::Precision;
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;
use tuples::Problem;

const FIELD: PlanarField = PlanarField { dim: 2, hidden: 6, n_flows: 4 };

fn initial(rng: &mut Rng, spec: &ParamSpec) -> (Vec<usize>, Vec<f64>) {
    let Init::Uniform { bound } = spec.init else { unreachable!("a linear layer") };
    (spec.file_shape.clone(), (0..spec.n_scalars()).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect())
}

/// `batch` points in the plane with their log-densities, at times that fall from one to zero.
fn problem(batch: usize, n_steps: usize) -> Problem {
    let mut rng = Rng::new(21);
    let leaves = vec![(vec![batch, 2], rng.normals(2 * batch)), (vec![batch, 1], vec![0.0; batch])];
    let params = FIELD.param_specs().iter().map(|spec| initial(&mut rng, spec)).collect();
    Problem { leaves, times: linspace(1.0, 0.0, n_steps), params }
}

/// A cotangent of the last state, as a mean over a batch has: of points and of log-densities.
fn cotangents(problem: &Problem) -> Vec<f64> {
    let batch = problem.leaves[1].1.len();
    let mut out = vec![0.0; problem.n_outputs()];
    let last = out.len() - 3 * batch;
    out[last..].copy_from_slice(&Rng::new(22).normals(3 * batch));
    out.iter_mut().for_each(|it| *it /= batch as f64);
    out
}

fn wide(format: Precision) -> OdeOptions {
    let options = mixed(format);
    OdeOptions { precision: options.precision.clone().wide_leaf(1), ..options }
}

/// 64 points in the plane; gradients of every time by differences in f64, and in half formats beside those.
#[test]
fn time_gradients_of_a_batched_tuple_sum_over_the_batch() {
    on_one_thread(|device| {
        let (problem, field) = (problem(64, 8), Arc::new(FIELD));
        let cotangents = cotangents(&problem);
        let want = problem.check_differences(device, &field, (&double(), 1e-6), &cotangents);
        for (options, allowed) in [(wide(Precision::F16), 1e-2), (wide(Precision::Bf16), 8e-2)] {
            let got = problem.solve(device, &field, &options, &cotangents).unwrap().grads;
            let error = rel_l2(&got[2], &want[2]);
            assert!(error <= allowed, "{}: {error:.2e}", options.precision.velocity_storage());
        }
    });
}

/// Values and gradients in half formats lie as close as their roundings, the log-density an f32 as it comes.
#[test]
fn half_flows_are_the_double_ones_but_for_rounding() {
    on_one_thread(|device| {
        let (problem, field) = (problem(64, 16), Arc::new(FIELD));
        let cotangents = cotangents(&problem);
        let want = problem.solve(device, &field, &double(), &cotangents).unwrap();
        for (options, allowed) in [(wide(Precision::F16), 4e-3), (wide(Precision::Bf16), 3e-2)] {
            let got = problem.solve(device, &field, &options, &cotangents).unwrap();
            let name = options.precision.velocity_storage();
            for leaf in 0..2 {
                let error = rel_l2(&got.outputs[16][leaf], &want.outputs[16][leaf]);
                assert!(error <= allowed, "{name}, output {leaf}: {error:.2e}");
            }
            for (idx, (got, want)) in got.grads.iter().zip(&want.grads).enumerate().filter(|(idx, _)| *idx != 2) {
                let error = rel_l2(got, want);
                assert!(error <= allowed, "{name}, gradient {idx}: {error:.2e}");
            }
        }
    });
}

#[test]
fn a_state_without_log_density_is_refused() {
    on_one_thread(|device| {
        let mut problem = problem(3, 1);
        problem.leaves.pop();
        let said = problem.solve(device, &Arc::new(FIELD), &double(), &[0.0; 12]).unwrap_err().to_string();
        assert!(said.contains("planar_field"), "{said}");
    });
}
