//! Steps that are taken back instead of stored.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{ALL, ALL_AND_TIME, LAST, Problem, double, linspace, mixed, on_one_thread, slope, square, tanh_problem};
use halfmode_autograd::{Cx, Tape, Var};
use halfmode_nn::Linear;
use halfmode_ode::{Method, OdeOptions, StateSum, StepControl, Steps, Storage, Times, VectorField, odeint_last};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::rel_l2;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// As of the other methods: errors of states and gradients keep to their bounds and do not grow with the
/// number of steps, in the default lattice.
#[test]
fn errors_are_flat_in_the_number_of_steps() {
    for (format, of_state, of_gradients) in [(Precision::F16, 1e-3, 2e-3), (Precision::Bf16, 8e-3, 1.5e-2)] {
        on_one_thread(|device| {
            let (mut states, mut gradients) = (Vec::new(), Vec::new());
            for n in [8, 32, 64, 128, 256, 512, 2048] {
                let solve = |options: OdeOptions| tanh_problem(n).solve(device, &options, LAST, &square).unwrap();
                let (want, got) = (solve(double().method(Method::Midpoint)), solve(mixed(format).reversible()));
                // Both are of order 2, and differ by as much: the half format must not add to it.
                let exact = solve(common::reversible(double()));
                let state = rel_l2(got.last(), exact.last());
                let (y0, theta) = (rel_l2(&got.grad_y0, &exact.grad_y0), rel_l2(&got.theta(), &exact.theta()));
                assert!(rel_l2(want.last(), exact.last()) <= 2.0 / (n * n) as f64, "{n} steps");
                assert!(state <= of_state, "{format}, {n} steps: state {state:.2e}");
                assert!(y0.max(theta) <= of_gradients, "{format}, {n} steps: gradients {y0:.2e}, {theta:.2e}");
                if n >= 64 {
                    states.push((n, state));
                    gradients.push((n, theta));
                }
            }
            assert!(slope(&states) <= 0.15, "{format}: {states:?}");
            assert!(slope(&gradients) <= 0.2, "{format}: {gradients:?}");
        });
    }
}

/// The default lattice is finer than what f32 sums can tell.
#[test]
fn the_lattice_is_below_single_precision() {
    on_one_thread(|device| {
        let solve = |options: &OdeOptions| tanh_problem(500).solve(device, options, ALL_AND_TIME, &square).unwrap();
        let (coarse, fine) = (solve(&double().reversible()), solve(&common::reversible(double())));
        assert!(rel_l2(coarse.last(), fine.last()) <= 1e-8);
        assert!(rel_l2(&coarse.theta(), &fine.theta()) <= 1e-7);
        assert!(rel_l2(&coarse.grad_t, &fine.grad_t) <= 1e-7);
        // One velocity in a step, and the first; the way back asks as often, and never twice at a point.
        assert_eq!((fine.record.n_velocities, fine.record.n_vjps), (2 * 501, 501));
    });
}

/// small losses keep their bits, and steps behind the last loss cost no product.
#[test]
fn the_adjoint_is_scaled_in_every_step() {
    on_one_thread(|device| {
        let problem = tanh_problem(64);
        for exponent in [0, 12, 24] {
            let seed = |_: usize, y: &[f64]| Some(y.iter().map(|y| y * f64::from(-exponent).exp2()).collect());
            let want = problem.solve(device, &common::reversible(double()), LAST, &seed).unwrap();
            let got = problem.solve(device, &mixed(Precision::F16).reversible(), LAST, &seed).unwrap();
            let error = rel_l2(&got.theta(), &want.theta());
            assert!(error <= 2e-3, "loss times 2^-{exponent}: {error:.2e}");
        }
        let seed = |idx: usize, y: &[f64]| (idx < 10).then(|| y.to_vec());
        let want = problem.solve(device, &common::reversible(double()), ALL, &seed).unwrap();
        let got = problem.solve(device, &mixed(Precision::F16).reversible(), ALL, &seed).unwrap();
        let error = rel_l2(&got.theta(), &want.theta());
        assert!(error <= 5e-3, "{error:.2e}");
        assert_eq!(want.record.n_vjps, 9 + 1);
    });
}

/// Peak bytes of a solve with its gradient, by purpose, and those between the passes.
fn peaks(options: &OdeOptions, n_steps: usize) -> (Vec<usize>, usize) {
    on_one_thread(|device: &Device| {
        let problem = tanh_problem(n_steps);
        let policy = &options.precision.velocity;
        let mut tape = Tape::new(Cx::new(device, policy));
        let tensor = |values: &[f64], shape: &[usize], precision| {
            Tensor::from_slice(device, values, shape.to_vec(), precision, Purpose::Param).unwrap()
        };
        let y0 = tape.leaf(tensor(&[0.5; 200], &[100, 2], options.precision.accumulate));
        let params: Vec<Tensor> = problem.params.iter().map(|(shape, x)| tensor(x, shape, policy.weights)).collect();
        let params: Vec<Var> = params.into_iter().map(|it| tape.leaf(it)).collect();
        let times = Times::Fixed(&problem.times);
        let y = odeint_last(&mut tape, &problem.field, &y0, times, &params, options).unwrap();
        let between = device.memory().of(Purpose::Saved).live;
        assert_eq!(tape.memory_report().total_bytes(), between);
        let seed = y.value().copy(Purpose::Activation).unwrap();
        tape.backward_from(vec![(y, seed)], &mut |_, _| Ok(())).unwrap();
        (device.memory().iter().map(|(_, usage)| usage.peak).collect(), between)
    })
}

/// Ten steps and ten thousand peak at the same bytes, of every purpose; what waits for the way back is as planned.
#[test]
fn memory_does_not_grow_with_the_number_of_steps() {
    let options = mixed(Precision::F16).reversible();
    let (few, many) = (peaks(&options, 10), peaks(&options, 10_000));
    assert_eq!(few, many);
    let plan = options.storage.plan(10_000, 200, &options.precision).unwrap();
    assert_eq!((plan.n_states, plan.peak_bytes, plan.n_repeated), (1, 2 * 200 * 8, 0));
    assert_eq!(many.1, plan.peak_bytes);
    let stored = peaks(&mixed(Precision::F16), 100).1;
    assert_eq!(stored, 100 * 200 * 2);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let device = Device::cpu(1).unwrap();
    let refused = |options: OdeOptions, wants: &str| {
        let said = tanh_problem(3).solve(&device, &options, LAST, &square).unwrap_err().to_string();
        assert!(said.contains(wants), "{said}");
    };
    let reversible = || mixed(Precision::F16).reversible();
    refused(double().method(Method::AsynchronousLeapfrog), "a storage of states; use OdeOptions::reversible");
    refused(reversible().storage(Storage::Budget { bytes: 1000 }), "a storage of states");
    refused(reversible().method(Method::Rk4), "rk4 does not go with Storage::Reversible");
    for lattice_bits in [0, 52] {
        refused(reversible().storage(Storage::Reversible { lattice_bits }), "1 to 51");
    }
    let mut options = reversible();
    options.steps = Steps::Adaptive(StepControl::new(1e-2, 1e-2));
    refused(options, "asynchronous leapfrog has no error estimate");
    let mut options = reversible();
    options.precision.state = StateSum::Compensated(Precision::F16);
    refused(options, "a compensated state");
}

/// `y' = w y`, for one number.
fn linear(w: f64, times: Vec<f64>) -> Problem<impl VectorField> {
    let field = |tape: &mut Tape, _: &Var, y: &Var, params: &[Var]| tape.apply(Linear, &[y, &params[0]]);
    Problem { field: Arc::new(field), params: vec![(vec![1, 1], vec![w])], y0: (vec![1, 1], vec![1.0]), times }
}

#[test]
fn what_leaves_the_lattice_is_told_from_what_is_not_finite() {
    let device = Device::cpu(1).unwrap();
    let said = |w: f64, options: OdeOptions| {
        linear(w, linspace(0.0, 4.0, 16)).solve(&device, &options, LAST, &square).unwrap_err().to_string()
    };
    let narrow = double().reversible().storage(Storage::Reversible { lattice_bits: 48 });
    let beyond = said(1.0, narrow);
    assert!(beyond.contains("not within 1.6e1 in step ") && beyond.contains("lattice_bits"), "{beyond}");
    let not_finite = said(f64::NAN, mixed(Precision::F16).reversible());
    assert!(not_finite.contains("the velocity is not finite in step 0 of 16"), "{not_finite}");
}

/// A field that gives other numbers when it is asked again cannot be taken back, and the gradient is not made up.
#[test]
fn a_field_that_is_not_deterministic_is_refused() {
    let device = Device::cpu(1).unwrap();
    let (asked, of_field) = (Arc::new(AtomicUsize::new(0)), linear(-0.5, linspace(0.0, 1.0, 4)));
    let field = move |tape: &mut Tape, t: &Var, y: &Var, params: &[Var]| {
        let y =
            if asked.fetch_add(1, Ordering::Relaxed) == 7 { tape.apply(Linear, &[y, &params[0]])? } else { y.clone() };
        of_field.field.velocity(tape, t, &y, params)
    };
    let Problem { params, y0, times, .. } = linear(-0.5, linspace(0.0, 1.0, 4));
    let problem = Problem { field: Arc::new(field), params, y0, times };
    let said = problem.solve(&device, &mixed(Precision::F16).reversible(), LAST, &square).unwrap_err().to_string();
    assert!(said.contains("make it deterministic"), "{said}");
}
