//! States of several tensors: the same solve as of one tensor that holds them all, and exact gradients.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod tuples;

use common::{double, linspace, mixed, on_one_thread, reversible};
use halfmode_autograd::{Cx, LeafId, Result, Tape, Var};
use halfmode_nn::{Add, ChannelBias, Linear, Tanh};
use halfmode_ode::{
    AdjointScaling, Method, MlpField, OdeOptions, StateSum, StepControl, Steps, Storage, TimeChannel, TimeInput, Times,
    odeint,
};
use halfmode_precision::Precision;
use halfmode_tensor::{Purpose, Tensor};
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;
use tuples::{Array, Problem, tensor};

/// `W_2 tanh(W_1 [y, t] + V s + b) + c` for `y` of two channels and the same hidden layer for `s` of one.
fn coupled(tape: &mut Tape, t: &Var, y: &[Var], params: &[Var]) -> Result<Vec<Var>> {
    let [w1, v, b, w2, c2, w3, c3] = params else { unreachable!("seven parameters") };
    let x = tape.apply(TimeChannel, &[&y[0], t])?;
    let of_y = tape.apply(Linear, &[&x, w1])?;
    let of_s = tape.apply(Linear, &[&y[1], v])?;
    let sum = tape.apply(Add, &[&of_y, &of_s])?;
    let sum = tape.apply(ChannelBias, &[&sum, b])?;
    let h = tape.apply(Tanh, &[&sum])?;
    let out = [(w2, c2), (w3, c3)].map(|(w, c)| {
        let out = tape.apply(Linear, &[&h, w])?;
        tape.apply(ChannelBias, &[&out, c])
    });
    out.into_iter().collect()
}

const HIDDEN: usize = 5;

fn problem(batch: usize, times: Vec<f64>) -> Problem {
    let mut rng = Rng::new(11);
    let mut array = |shape: &[usize]| (shape.to_vec(), rng.normals(shape.iter().product()));
    let leaves = vec![array(&[batch, 2]), array(&[batch, 1])];
    let shapes: [&[usize]; 7] = [&[HIDDEN, 3], &[HIDDEN, 1], &[HIDDEN], &[2, HIDDEN], &[2], &[1, HIDDEN], &[1]];
    Problem { leaves, times, params: shapes.map(array).to_vec() }
}

/// A-3 with a batch of five and a state of two tensors: all parameters, both tensors, every time point.
#[test]
fn gradients_of_a_tuple_are_those_of_finite_differences() {
    on_one_thread(|device| {
        for (options, times) in [
            (double().method(Method::Euler), linspace(0.0, 1.0, 16)),
            (double(), linspace(0.0, 1.0, 16)),
            (double(), vec![1.0, 0.7, 0.1]),
            // Differences see the lattice, the more the more steps there are: a finer one than elsewhere.
            (reversible(double()).storage(Storage::Reversible { lattice_bits: 49 }), linspace(0.0, 1.0, 16)),
            (reversible(double()), vec![1.0, 0.7, 0.1]),
        ] {
            let problem = problem(5, times);
            let cotangents = Rng::new(12).normals(problem.n_outputs());
            problem.check_differences(device, &Arc::new(coupled), (&options, 1e-7), &cotangents);
        }
    });
}

/// The same field on one tensor `[y, s]`: columns of its first layer and rows of its last are the tuple's.
fn joined(problem: &Problem) -> (MlpField, Array, Vec<Array>) {
    let field = MlpField { channels: 3, hidden: vec![HIDDEN], time: TimeInput::Concatenated };
    let batch = problem.leaves[0].0[0];
    let row = |i: usize| [&problem.leaves[0].1[2 * i..2 * i + 2], &problem.leaves[1].1[i..i + 1]].concat();
    let y0 = (vec![batch, 3], (0..batch).flat_map(row).collect());
    let [w1, v, b, w2, c2, w3, c3] = &problem.params[..] else { unreachable!("seven parameters") };
    let first = |k: usize| [w1.1[3 * k], w1.1[3 * k + 1], v.1[k], w1.1[3 * k + 2]];
    let params = vec![
        (vec![HIDDEN, 4], (0..HIDDEN).flat_map(first).collect()),
        b.clone(),
        (vec![3, HIDDEN], [&w2.1[..], &w3.1[..]].concat()),
        (vec![3], [&c2.1[..], &c3.1[..]].concat()),
    ];
    (field, y0, params)
}

/// Fixed and chosen steps: the tuple's solution is the joined tensor's to the last digits, and so are its gradients.
#[test]
fn a_tuple_is_the_tensor_that_holds_it() {
    on_one_thread(|device| {
        let mut chosen = double().method(Method::DormandPrince54);
        chosen.steps = Steps::Adaptive(StepControl::new(1e-6, 1e-6));
        for options in [double(), double().method(Method::Tsitouras54), chosen] {
            let problem = problem(5, vec![0.0, 0.3, 1.0]);
            let cotangents = Rng::new(13).normals(problem.n_outputs());
            let got = problem.solve(device, &Arc::new(coupled), &options, &cotangents).unwrap();
            let (field, y0, params) = joined(&problem);
            let mut tape = Tape::new(Cx::new(device, &options.precision.velocity));
            let y0 = tape.leaf(tensor(device, &y0, Precision::F64));
            let t = tape.leaf(tensor(device, &(vec![3], problem.times.clone()), Precision::F64));
            let params: Vec<Var> = params.iter().map(|it| tape.leaf(tensor(device, it, Precision::F64))).collect();
            let states = odeint(&mut tape, &Arc::new(field), &y0, Times::Var(&t), &params, &options).unwrap();
            // The points' cotangents are ten numbers of y, then five of s.
            let of = |point: usize| {
                let own = &cotangents[15 * point..15 * (point + 1)];
                (0..5).flat_map(|i| [own[2 * i], own[2 * i + 1], own[10 + i]]).collect::<Vec<f64>>()
            };
            let mut outputs = Vec::new();
            let mut seeds = Vec::new();
            for (point, state) in states.into_iter().enumerate() {
                outputs.push(state.value().to_vec::<f64>().unwrap());
                seeds.push((state, tensor(device, &(vec![5, 3], of(point)), Precision::F64)));
            }
            let mut want = vec![Vec::new(); 6];
            tape.backward_from(seeds, &mut |LeafId(idx), grad| {
                want[idx] = grad.to_vec::<f64>()?;
                Ok(())
            })
            .unwrap();
            let near = |what: &str, got: &[f64], want: &[f64]| {
                let error = rel_l2(got, want);
                assert!(error <= 1e-12, "{what}: {error:.2e}");
            };
            let columns = |x: &[f64], of: &[usize]| -> Vec<f64> {
                x.chunks(3).flat_map(|row| of.iter().map(|&c| row[c]).collect::<Vec<_>>()).collect()
            };
            for (point, output) in outputs.iter().enumerate() {
                near("y", &got.outputs[point][0], &columns(output, &[0, 1]));
                near("s", &got.outputs[point][1], &columns(output, &[2]));
            }
            near("grad y", &got.grads[0], &columns(&want[0], &[0, 1]));
            near("grad s", &got.grads[1], &columns(&want[0], &[2]));
            near("grad t", &got.grads[2], &want[1]);
            let of_v: Vec<f64> = want[2].chunks(4).map(|row| row[2]).collect();
            near("grad v", &got.grads[4], &of_v);
            near("grad b", &got.grads[5], &want[3]);
            near("last layer", &[&got.grads[6][..], &got.grads[8]].concat(), &want[4]);
            near("last bias", &[&got.grads[7][..], &got.grads[9]].concat(), &want[5]);
        }
    });
}

/// A-13 for tuples: whichever states were kept, with a compensated tensor beside a plain one, the bits are the same.
#[test]
fn checkpoints_of_a_tuple_leave_no_trace() {
    on_one_thread(|device| {
        let mut compensated = mixed(Precision::F16);
        compensated.precision = compensated.precision.wide_leaf(1);
        compensated.precision.state = StateSum::Compensated(Precision::F16);
        for options in [double(), mixed(Precision::F16), compensated] {
            let problem = problem(3, linspace(0.0, 1.0, 11));
            let cotangents = Rng::new(14).normals(problem.n_outputs());
            let solve = |storage| {
                let options = options.clone().storage(storage);
                problem.solve(device, &Arc::new(coupled), &options, &cotangents).unwrap()
            };
            let want = solve(Storage::Trajectory);
            for bytes in [72, 150, 10_000] {
                assert_eq!(solve(Storage::Budget { bytes }), want, "{bytes} bytes");
            }
        }
        // What it stores is what the plan states: six numbers in f16 and three in f32, eleven times.
        let options = mixed(Precision::F16);
        let precision = options.precision.clone().wide_leaf(1);
        let plan = Storage::Trajectory.plan_tuple(11, &[6, 3], &precision).unwrap();
        assert_eq!(plan.peak_bytes, 11 * (6 * 2 + 3 * 4));
    });
}

/// A tensor in the precision of sums beside a half velocity keeps its digits: `s' = 1 + 2^-12` sums up in it, where a
/// half slope is exactly one.
#[test]
fn a_wide_leaf_keeps_what_a_half_one_loses() {
    on_one_thread(|device| {
        let step = |wide: bool| {
            let slope = move |tape: &mut Tape, _: &Var, y: &[Var], _: &[Var]| -> Result<Vec<Var>> {
                let device = tape.cx().device.clone();
                let one = |precision| {
                    Tensor::from_slice(&device, &[1.0 + 1.0 / 4096.0], [1, 1], precision, Purpose::Activation)
                };
                let s = tape.constant(one(if wide { Precision::F32 } else { Precision::F16 })?);
                let y = tape.apply(Tanh, &[&y[0]])?;
                Ok(vec![y, s])
            };
            let mut options = mixed(Precision::F16);
            options.precision = if wide { options.precision.wide_leaf(1) } else { options.precision };
            let problem = Problem {
                leaves: vec![(vec![1, 2], vec![0.1, 0.2]), (vec![1, 1], vec![0.0])],
                times: linspace(0.0, 1.0, 64),
                params: Vec::new(),
            };
            let cotangents = vec![1.0; problem.n_outputs()];
            problem.solve(device, &Arc::new(slope), &options, &cotangents).unwrap().outputs[64][1][0]
        };
        assert!((step(true) - (1.0 + 1.0 / 4096.0)).abs() < 1e-6, "{}", step(true));
        assert!((step(false) - 1.0).abs() < 1e-6, "{}", step(false));
    });
}

/// The adjoint's scale comes from the largest value of all tensors; a loss of 2^-20 costs no digits in f16.
#[test]
fn small_losses_of_a_tuple_keep_their_digits() {
    on_one_thread(|device| {
        let problem = problem(5, linspace(0.0, 1.0, 32));
        let mut cotangents = vec![0.0; problem.n_outputs()];
        let last = cotangents.len() - 15;
        cotangents[last..].copy_from_slice(&Rng::new(15).normals(15));
        cotangents.iter_mut().for_each(|it| *it *= (-20f64).exp2());
        let solve = |options: &OdeOptions| {
            problem.solve(device, &Arc::new(coupled), options, &cotangents).unwrap().grads[3..].concat()
        };
        let want = solve(&double());
        let scaled = rel_l2(&solve(&mixed(Precision::F16)), &want);
        let unscaled = rel_l2(&solve(&mixed(Precision::F16).scaling(AdjointScaling::UNSCALED)), &want);
        assert!(scaled <= 5e-3 && unscaled >= 2.0 * scaled, "{scaled:.2e}, unscaled {unscaled:.2e}");
    });
}

#[test]
fn a_field_with_too_few_velocities_is_refused() {
    on_one_thread(|device| {
        let one = |_: &mut Tape, _: &Var, y: &[Var], _: &[Var]| -> Result<Vec<Var>> { Ok(vec![y[0].clone()]) };
        let problem = Problem { params: Vec::new(), ..problem(2, vec![0.0, 1.0]) };
        let said = problem.solve(device, &Arc::new(one), &double(), &[0.0; 12]).unwrap_err().to_string();
        assert!(said.contains("1 velocities for a state of 2 tensors"), "{said}");
    });
}
