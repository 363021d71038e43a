//! Flows by jets: divergences and gradients against differences, and against the closed form of a planar flow.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod tuples;

use common::{double, linspace, mixed, on_one_thread};
use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::jets::{JetBias, JetTanh, random_signs};
use halfmode_nn::{ChannelBias, Linear, Tanh};
use halfmode_ode::{Cnf, Divergence, JetField, MlpField, PlanarField, TimeInput, TupleField, VectorField};
use halfmode_precision::Precision;
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;
use tuples::Problem;

const FIELD: MlpField = MlpField { channels: 3, hidden: Vec::new(), time: TimeInput::Concatenated };

fn field() -> MlpField {
    MlpField { hidden: vec![6, 5], ..FIELD }
}

fn problem(batch: usize, times: Vec<f64>) -> Problem {
    let mut rng = Rng::new(31);
    let params = field().param_specs().into_iter().map(|spec| {
        let values = rng.normals(spec.n_scalars()).into_iter().map(|it| 0.5 * it).collect();
        (spec.file_shape, values)
    });
    let params = params.collect();
    let leaves = vec![(vec![batch, 3], rng.normals(3 * batch)), (vec![batch, 1], vec![0.0; batch])];
    Problem { leaves, times, params }
}

/// Gradients of points, times and parameters through exact divergences and through an estimate.
#[test]
fn gradients_through_divergences_are_those_of_differences() {
    on_one_thread(|device| {
        let problem = problem(4, vec![1.0, 0.6, 0.0]);
        let signs = random_signs(device, &[4, 3], Precision::F64, 5).unwrap();
        for divergence in [Divergence::Exact, Divergence::Hutchinson(signs)] {
            let cotangents = Rng::new(32).normals(problem.n_outputs());
            let flow = Arc::new(Cnf { field: field(), divergence });
            problem.check_differences(device, &flow, (&double(), 1e-6), &cotangents);
        }
    });
}

/// The log-density that a solve gains is the logarithm of the determinant of its own map, by differences: of a map by
/// many small steps, to their error.
#[test]
fn the_gained_log_density_is_that_of_the_map() {
    on_one_thread(|device| {
        let problem = problem(1, linspace(0.0, 1.0, 64));
        let flow = Arc::new(Cnf { field: field(), divergence: Divergence::Exact });
        let cotangents = vec![0.0; problem.n_outputs()];
        let cotangents = &cotangents[..];
        let last = |problem: &Problem| {
            let mut cotangents = cotangents.to_vec();
            *cotangents.last_mut().unwrap() = 1.0;
            problem.solve(device, &flow, &double(), &cotangents).unwrap().outputs.pop().unwrap()
        };
        // Its columns: the determinant is that of the transpose.
        let jacobian: [[f64; 3]; 3] = std::array::from_fn(|column| {
            let shifted = |by: f64| {
                let mut moved = problem.clone();
                moved.leaves[0].1[column] += by;
                last(&moved)[0].clone()
            };
            let (up, down) = (shifted(1e-5), shifted(-1e-5));
            std::array::from_fn(|row| (up[row] - down[row]) / 2e-5)
        });
        let [a, b, c] = jacobian;
        let determinant = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
            + a[2] * (b[0] * c[1] - b[1] * c[0]);
        let gained = last(&problem)[1][0];
        assert!((gained + determinant.ln()).abs() <= 1e-7, "{gained} and {}", -determinant.ln());
    });
}

/// A planar flow of a single unit whose coefficients stand still, written as a field that takes jets.
struct OneUnit;

fn unit(tape: &mut Tape, y: &Var, params: &[Var], jet: bool) -> Result<Var> {
    let x = tape.apply(Linear, &[y, &params[0]])?;
    let x = if jet { tape.apply(JetBias, &[&x, &params[1]])? } else { tape.apply(ChannelBias, &[&x, &params[1]])? };
    let h = if jet { tape.apply(JetTanh, &[&x])? } else { tape.apply(Tanh, &[&x])? };
    tape.apply(Linear, &[&h, &params[2]])
}

impl VectorField for OneUnit {
    fn velocity(&self, tape: &mut Tape, _: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        unit(tape, y, params, false)
    }
}

impl JetField for OneUnit {
    fn channels(&self) -> usize {
        2
    }

    fn velocity_jet(&self, tape: &mut Tape, _: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        unit(tape, y, params, true)
    }
}

/// By jets and in closed form a planar flow is the same, whole solves of it.
#[test]
fn jets_and_the_closed_form_agree() {
    on_one_thread(|device| {
        let (a, u, gate, shift) = ([0.7, -1.1], [1.3, 0.4], [0.2, -0.6], 0.3);
        let g: Vec<f64> = u.iter().zip(gate).map(|(u, gate): (&f64, f64)| u / (1.0 + (-gate).exp())).collect();
        let z = (vec![6, 2], Rng::new(33).normals(12));
        let leaves = vec![z, (vec![6, 1], vec![0.0; 6])];
        let times = vec![0.0, 0.4, 1.0];
        let by_jets = Problem {
            leaves: leaves.clone(),
            times: times.clone(),
            params: vec![(vec![1, 2], a.to_vec()), (vec![1], vec![shift]), (vec![2, 1], g)],
        };
        // Coefficients that do not depend on time: the biases of the last layer.
        let closed = PlanarField { dim: 2, hidden: 1, n_flows: 1 };
        let coefficients = [&a[..], &u, &gate, &[shift]].concat();
        let zeros = |spec: &halfmode_nn::ParamSpec| (spec.file_shape.clone(), vec![0.0; spec.n_scalars()]);
        let mut params: Vec<_> = closed.param_specs().iter().map(zeros).collect();
        params[5].1 = coefficients;
        let in_closed_form = Problem { leaves, times, params };
        let cotangents = Rng::new(34).normals(by_jets.n_outputs());
        let flow = Arc::new(Cnf { field: OneUnit, divergence: Divergence::Exact });
        let jets = by_jets.solve(device, &flow, &double(), &cotangents).unwrap();
        let want = in_closed_form.solve(device, &Arc::new(closed), &double(), &cotangents).unwrap();
        for (jets, want) in jets.outputs.iter().flatten().zip(want.outputs.iter().flatten()) {
            let error = jets.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error <= 1e-13, "{error:.2e}");
        }
        for leaf in 0..3 {
            let error = rel_l2(&jets.grads[leaf], &want.grads[leaf]);
            assert!(error <= 1e-12, "gradient {leaf}: {error:.2e}");
        }
    });
}

/// In half formats the flow is the double one but for rounding.
#[test]
fn half_flows_by_jets_are_the_double_ones_but_for_rounding() {
    on_one_thread(|device| {
        let problem = problem(32, linspace(1.0, 0.0, 8));
        let flow = Arc::new(Cnf { field: field(), divergence: Divergence::Exact });
        let cotangents: Vec<f64> = Rng::new(35).normals(problem.n_outputs()).iter().map(|it| it / 32.0).collect();
        let want = problem.solve(device, &flow, &double(), &cotangents).unwrap();
        for (format, allowed) in [(Precision::F16, 4e-3), (Precision::Bf16, 3e-2)] {
            let mut options = mixed(format);
            options.precision = options.precision.wide_leaf(1);
            let got = problem.solve(device, &flow, &options, &cotangents).unwrap();
            for leaf in 0..2 {
                let error = rel_l2(&got.outputs[8][leaf], &want.outputs[8][leaf]);
                assert!(error <= allowed, "{format}, output {leaf}: {error:.2e}");
            }
            let error = rel_l2(&got.grads[3..].concat(), &want.grads[3..].concat());
            assert!(error <= allowed, "{format}, gradients: {error:.2e}");
        }
    });
}
