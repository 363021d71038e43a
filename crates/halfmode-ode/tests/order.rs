//! Convergence and single steps against what is known in closed form.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{LAST, Problem, double, linspace, on_one_thread, reversible, slope, tanh_problem};
use halfmode_autograd::{Tape, Var};
use halfmode_nn::Linear;
use halfmode_ode::{Method, VectorField};
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;

const D: usize = 4;

/// `y' = A y` with `A = -0.05 M M^T`.
fn linear(times: Vec<f64>) -> (Problem<impl VectorField>, Vec<f64>) {
    let mut rng = Rng::new(1);
    let m = rng.normals(D * D);
    let entry = |i: usize, j: usize| -0.05 * (0..D).map(|k| m[i * D + k] * m[j * D + k]).sum::<f64>();
    let a: Vec<f64> = (0..D * D).map(|idx| entry(idx / D, idx % D)).collect();
    let field = |tape: &mut Tape, _: &Var, y: &Var, params: &[Var]| tape.apply(Linear, &[y, &params[0]]);
    let y0 = (vec![1, D], rng.normals(D));
    (Problem { field: Arc::new(field), params: vec![(vec![D, D], a.clone())], y0, times }, a)
}

fn product(a: &[f64], x: &[f64]) -> Vec<f64> {
    a.chunks(D).map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum()).collect()
}

/// The first `n_terms` terms of `exp(t A) y` after `y` itself.
fn exponential(a: &[f64], y: &[f64], t: f64, n_terms: usize) -> Vec<f64> {
    let (mut sum, mut term) = (y.to_vec(), y.to_vec());
    for k in 1..=n_terms {
        term = product(a, &term).into_iter().map(|x| x * t / k as f64).collect();
        sum.iter_mut().zip(&term).for_each(|(sum, term)| *sum += term);
    }
    sum
}

/// the error falls as the power of the step that the method states, forward and backward in time.
#[test]
fn errors_fall_with_the_order_of_each_method() {
    on_one_thread(|device| {
        let options = Method::ALL.into_iter().map(|it| double().method(it)).chain([reversible(double())]);
        for (options, ends) in options.flat_map(|it| [(it.clone(), (0.0, 1.0)), (it, (1.0, 0.0))]) {
            let method = options.method;
            let mut errors = Vec::new();
            for n in (3..=9).map(|k| 1 << k) {
                let (problem, a) = linear(linspace(ends.0, ends.1, n));
                let got = problem.solve(device, &options, LAST, &common::square).unwrap();
                let want = exponential(&a, &problem.y0.1, ends.1 - ends.0, 40);
                errors.push((n, rel_l2(got.last(), &want)));
            }
            // Rounding of some hundred steps.
            errors.retain(|(_, error)| *error > 1e-13);
            let order = f64::from(method.tableau().order);
            let allowed = if order > 1.0 { 0.2 } else { 0.1 };
            let got = -slope(&errors);
            assert!((got - order).abs() <= allowed, "{method:?}: {got} of {errors:?}");
        }
    });
}

/// one step of a method of order 4 with four stages is the Taylor polynomial for a linear field; the two such
/// methods differ for others, by the fifth power of the step.
#[test]
fn both_methods_of_order_four_agree_on_linear_fields_only() {
    on_one_thread(|device| {
        let (problem, a) = linear(vec![0.0, 0.3]);
        let want = exponential(&a, &problem.y0.1, 0.3, 4);
        for method in [Method::Rk4, Method::Rk4ThreeEighths] {
            let got = problem.solve(device, &double().method(method), LAST, &common::square).unwrap();
            assert!(rel_l2(got.last(), &want) <= 4.0 * f64::EPSILON, "{method:?}");
        }
        let differences: Vec<(usize, f64)> = [32, 64, 128, 256]
            .map(|n| {
                let problem = Problem { times: vec![0.0, 1.0 / f64::from(n)], ..tanh_problem(1) };
                let last = |method| {
                    let got = problem.solve(device, &double().method(method), LAST, &common::square).unwrap();
                    got.last().to_vec()
                };
                (n as usize, rel_l2(&last(Method::Rk4), &last(Method::Rk4ThreeEighths)))
            })
            .to_vec();
        let got = -slope(&differences);
        assert!((got - 5.0).abs() < 0.2, "{got} of {differences:?}");
    });
}
