//! Gradients against finite differences, in double precision.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{ALL_AND_TIME, Problem, Solution, double, on_one_thread, reversible, slope, tanh_problem};
use halfmode_autograd::{Tape, Var};
use halfmode_nn::{Gelu, Init, Linear, Module, ParamSpec};
use halfmode_ode::{Autonomous, Method, MlpField, OdeOptions, VectorField};
use halfmode_tensor::Device;
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;

/// The sum of outputs times `cotangents`.
fn loss(outputs: &[Vec<f64>], cotangents: &[f64]) -> f64 {
    outputs.iter().flatten().zip(cotangents).map(|(y, c)| y * c).sum()
}

/// Every entry of every gradient against a central difference of step `1e-6 max(1, |x|)`: relative error of the
/// whole at most 1e-7. Returns the solution at the point.
fn check<F: VectorField + 'static>(
    device: &Device,
    problem: &Problem<F>,
    options: &OdeOptions,
    cotangents: &[f64],
    name: &str,
) -> Solution {
    let len = problem.y0.1.len();
    let seed = |idx: usize, _: &[f64]| Some(cotangents[idx * len..(idx + 1) * len].to_vec());
    let solve = |problem: &Problem<F>| problem.solve(device, options, ALL_AND_TIME, &seed).unwrap();
    let at = solve(problem);
    let difference = |x: &[f64], change: &dyn Fn(&mut Problem<F>, usize, f64)| -> Vec<f64> {
        (0..x.len())
            .map(|idx| {
                let h = 1e-6 * x[idx].abs().max(1.0);
                let shifted = |by: f64| {
                    let field = Arc::clone(&problem.field);
                    let (params, y0, times) = (problem.params.clone(), problem.y0.clone(), problem.times.clone());
                    let mut moved = Problem { field, params, y0, times };
                    change(&mut moved, idx, by);
                    loss(&solve(&moved).outputs, cotangents)
                };
                (shifted(h) - shifted(-h)) / (2.0 * h)
            })
            .collect()
    };
    let near = |what: &str, got: &[f64], want: &[f64]| {
        let error = rel_l2(got, want);
        assert!(error <= 1e-7, "{name}: {what} is off by {error:.2e}");
    };
    near("grad y0", &at.grad_y0, &difference(&problem.y0.1, &|problem, idx, by| problem.y0.1[idx] += by));
    near("grad t", &at.grad_t, &difference(&problem.times, &|problem, idx, by| problem.times[idx] += by));
    for (which, (_, values)) in problem.params.iter().enumerate() {
        let want = difference(values, &|problem, idx, by| problem.params[which].1[idx] += by);
        near(&format!("grad of parameter {which}"), &at.grad_params[which], &want);
    }
    at
}

fn small_mlp(shape: &[usize], times: Vec<f64>) -> Problem<MlpField> {
    let mut rng = Rng::new(3);
    let mut problem = tanh_problem(1);
    let n: usize = shape.iter().product();
    problem.y0 = (shape.to_vec(), rng.normals(n));
    problem.field = Arc::new(MlpField { hidden: vec![5], ..(*problem.field).clone() });
    let shapes = [vec![5, 3], vec![5], vec![2, 5], vec![2]];
    problem.params = shapes.map(|it| (it.clone(), rng.normals(it.iter().product()))).to_vec();
    problem.times = times;
    problem
}

/// all parameters, the initial state and every time point, for states of one to three axes, forward
/// and backward in time.
#[test]
fn gradients_are_those_of_finite_differences_for_every_method() {
    on_one_thread(|device| {
        let options = Method::ALL.into_iter().map(|it| double().method(it)).chain([reversible(double())]);
        for options in options {
            for (shape, times) in [
                (&[2][..], vec![0.0, 0.1, 0.4, 0.5]),
                (&[5, 2], vec![1.0, 0.7, 0.6]),
                (&[2, 3, 2], vec![0.0, 0.2, 0.3]),
            ] {
                let problem = small_mlp(shape, times);
                let cotangents = Rng::new(4).normals(problem.times.len() * problem.y0.1.len());
                check(device, &problem, &options, &cotangents, &format!("{:?} {shape:?}", options.method));
            }
        }
    });
}

/// A-3 on the reference's problem, sixteen steps.
#[test]
fn gradients_of_sixteen_steps_are_those_of_finite_differences() {
    on_one_thread(|device| {
        for options in [double().method(Method::Euler), double(), reversible(double())] {
            let mut problem = tanh_problem(16);
            // Its output bias is no parameter of the reference, but it has a gradient like the others.
            problem.params[3].1 = vec![0.1, -0.2];
            let mut cotangents = vec![0.0; 2 * 17];
            cotangents[32..].copy_from_slice(&[3.3, -1.4]);
            check(device, &problem, &options, &cotangents, &format!("{:?}", options.method));
        }
    });
}

/// losses on all points but the last; a gradient that comes in nowhere costs no product.
#[test]
fn outputs_without_a_loss_cost_no_product() {
    on_one_thread(|device| {
        let problem = small_mlp(&[5, 2], vec![0.0, 0.1, 0.3, 0.4, 0.6]);
        let mut cotangents = Rng::new(5).normals(50);
        cotangents[40..].fill(0.0);
        let with_zeros = check(device, &problem, &double(), &cotangents, "last cotangent zero");
        let seed = |idx: usize, _: &[f64]| (idx < 4).then(|| cotangents[idx * 10..(idx + 1) * 10].to_vec());
        let without = problem.solve(device, &double(), ALL_AND_TIME, &seed).unwrap();
        assert_eq!((with_zeros.record.n_vjps, without.record.n_vjps), (4, 3));
        assert_eq!(with_zeros.grad_y0, without.grad_y0);
        assert_eq!(with_zeros.theta(), without.theta());
    });
}

/// `gelu(A y)`, a module without a time.
struct Layer;

impl Module for Layer {
    fn param_specs(&self) -> Vec<ParamSpec> {
        vec![ParamSpec::real("weight", &[3, 3], Init::Normal { std: 1.0 })]
    }

    fn forward(&self, tape: &mut Tape, params: &[Var], inputs: &[&Var]) -> halfmode_autograd::Result<Var> {
        let x = tape.apply(Linear, &[inputs[0], &params[0]])?;
        tape.apply(Gelu, &[&x])
    }
}

#[test]
fn any_module_is_a_field() {
    on_one_thread(|device| {
        let field = Arc::new(Autonomous(Layer));
        assert_eq!(field.param_specs().len(), 1);
        let mut rng = Rng::new(6);
        let params = vec![(vec![3, 3], rng.normals(9))];
        let problem = Problem { field, params, y0: (vec![4, 3], rng.normals(12)), times: vec![0.0, 0.3, 0.5] };
        let got = check(device, &problem, &double(), &rng.normals(36), "autonomous");
        // A field that does not see the time feels only the lengths of steps: moving all points moves nothing.
        let sum: f64 = got.grad_t.iter().sum();
        let size: f64 = got.grad_t.iter().map(|it| it.abs()).sum();
        assert!(sum.abs() <= 1e-13 * size, "{sum} of {size}");
    });
}

/// what a first-order expansion leaves falls with the square of the step, along states, weights, times and all.
#[test]
fn the_remainder_of_a_first_order_expansion_is_of_second_order() {
    on_one_thread(|device| {
        let problem = small_mlp(&[5, 2], vec![0.0, 0.2, 0.5, 0.6]);
        let mut rng = Rng::new(7);
        let cotangents = rng.normals(40);
        let seed = |idx: usize, _: &[f64]| Some(cotangents[idx * 10..(idx + 1) * 10].to_vec());
        let at = problem.solve(device, &double(), ALL_AND_TIME, &seed).unwrap();
        let base = loss(&at.outputs, &cotangents);
        // One direction for everything; times move little, so that they stay in order.
        let of_y0 = rng.normals(10);
        let of_t: Vec<f64> = rng.normals(4).into_iter().map(|it| 0.05 * it).collect();
        let of_params: Vec<Vec<f64>> = problem.params.iter().map(|it| rng.normals(it.1.len())).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (name, [y0, t, params]) in [
            ("state", [1.0, 0.0, 0.0]),
            ("times", [0.0, 1.0, 0.0]),
            ("weights", [0.0, 0.0, 1.0]),
            ("all", [1.0, 1.0, 1.0]),
        ] {
            let along = y0 * dot(&at.grad_y0, &of_y0)
                + t * dot(&at.grad_t, &of_t)
                + params * dot(&at.theta(), &of_params.concat());
            let (mut zeroth, mut first) = (Vec::new(), Vec::new());
            for k in 7..=14 {
                let h = f64::from(-k).exp2();
                let mut moved = problem.clone();
                let shift = |x: &mut [f64], by: &[f64], part: f64| {
                    x.iter_mut().zip(by).for_each(|(x, d)| *x += h * part * d);
                };
                shift(&mut moved.y0.1, &of_y0, y0);
                shift(&mut moved.times, &of_t, t);
                moved.params.iter_mut().zip(&of_params).for_each(|(it, by)| shift(&mut it.1, by, params));
                let got = moved.solve(device, &double(), ALL_AND_TIME, &seed).unwrap();
                let change = loss(&got.outputs, &cotangents) - base;
                zeroth.push((1 << k, change.abs()));
                first.push((1 << k, (change - h * along).abs()));
            }
            let (zeroth, first) = (-slope(&zeroth), -slope(&first));
            assert!((zeroth - 1.0).abs() <= 0.05 && (first - 2.0).abs() <= 0.05, "{name}: {zeroth}, {first}");
        }
    });
}
