//! What each precision costs in accuracy, against double precision on the same grid.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{LAST, Problem, Solution, double, linspace, mixed, on_one_thread, slope, square, tanh_problem};
use halfmode_autograd::{Tape, Var};
use halfmode_nn::Linear;
use halfmode_ode::{AdjointScaling, Error, OdeOptions, OdePrecision, StateSum};
use halfmode_precision::{Format, Precision, PrecisionPolicy};
use halfmode_tensor::Device;
use halfmode_testkit::rel_l2;
use std::sync::Arc;

/// The reference's problem in `n` steps.
fn solve(device: &Device, n: usize, options: &OdeOptions) -> Solution {
    tanh_problem(n).solve(device, options, LAST, &square).unwrap()
}

/// All in a half format, the state included: the control.
fn low(format: Precision) -> OdeOptions {
    let mut options = mixed(format);
    options.precision.state = StateSum::Plain(format);
    options
}

fn u(format: Precision) -> f64 {
    Format::from(format).unit_roundoff()
}

/// Gradients of the reference's parameters: without the output bias, which it does not have.
fn theta(solution: &Solution) -> Vec<f64> {
    solution.grad_params[..3].concat()
}

/// with a half velocity and an f32 state, errors of state and gradients do not grow with the number of
/// steps; a half state's grow in proportion to it and end at nothing right.
#[test]
fn errors_are_flat_in_the_number_of_steps_where_the_state_is_wide() {
    for (format, of_state, of_gradients) in [(Precision::F16, 1e-3, 2e-3), (Precision::Bf16, 8e-3, 1.5e-2)] {
        on_one_thread(|device| {
            let (mut states, mut gradients, mut control) = (Vec::new(), Vec::new(), Vec::new());
            for n in [8, 32, 64, 128, 256, 512, 2048] {
                let (want, got) = (solve(device, n, &double()), solve(device, n, &mixed(format)));
                let state = rel_l2(got.last(), want.last());
                assert!(state <= of_state, "{format}, {n} steps: state {state:.2e}");
                let y0 = rel_l2(&got.grad_y0, &want.grad_y0);
                let weights = rel_l2(&theta(&got), &theta(&want));
                assert!(y0.max(weights) <= of_gradients, "{format}, {n} steps: gradients {y0:.2e}, {weights:.2e}");
                if n >= 64 {
                    states.push((n, state));
                    gradients.push((n, weights));
                }
                if (32..=512).contains(&n) {
                    let bad = solve(device, n, &low(format));
                    control.push((n, rel_l2(bad.last(), want.last())));
                }
            }
            assert!(slope(&states).abs() <= 0.15, "{format}: {states:?}");
            assert!(slope(&gradients).abs() <= 0.2, "{format}: {gradients:?}");
            assert!(slope(&control) >= 0.7, "{format}: {control:?}");
            let bad = rel_l2(&theta(&solve(device, 2048, &low(format))), &theta(&solve(device, 2048, &double())));
            assert!(bad >= 1e-1, "{format}: gradients with a half state {bad:.2e}");
        });
    }
}

/// A-6 at its end: 16384 steps of an f16 velocity stay below 1e-3 with an f32 state, and an f16 state is lost.
#[test]
fn sixteen_thousand_steps_stay_accurate_where_the_state_is_wide() {
    on_one_thread(|device| {
        let n = 16384;
        let forward = |options: &OdeOptions| {
            let problem = tanh_problem(n);
            problem.forward(device, options)
        };
        let want = forward(&double());
        let (wide, narrow) =
            (rel_l2(&forward(&mixed(Precision::F16)), &want), rel_l2(&forward(&low(Precision::F16)), &want));
        assert!(wide <= 1e-3, "f32 state: {wide:.2e}");
        assert!(narrow >= 0.5, "f16 state: {narrow:.2e}");
    });
}

/// two half numbers hold the state as well as an f32, as long as the steps are not too many for bf16.
#[test]
fn a_compensated_half_state_is_as_good_as_a_wide_one() {
    for (format, counts) in [(Precision::F16, &[64, 1024, 16384][..]), (Precision::Bf16, &[64, 1024, 4096])] {
        on_one_thread(|device| {
            let mut options = mixed(format);
            options.precision.state = StateSum::Compensated(format);
            for &n in counts {
                let problem = tanh_problem(n);
                let error = rel_l2(&problem.forward(device, &options), &problem.forward(device, &double()));
                assert!(error <= u(format), "{format}, {n} steps: {error:.2e}");
            }
        });
    }
}

/// A-7b: an f32 velocity with an f64 state stays at single precision; an f32 state loses with the number of steps.
#[test]
fn the_wide_format_bounds_the_number_of_steps() {
    on_one_thread(|device| {
        let mut wide = OdePrecision::full();
        (wide.accumulate, wide.state, wide.stored) = (Precision::F64, StateSum::Plain(Precision::F64), Precision::F64);
        let wide = OdeOptions::new(wide);
        let error = |n: usize, options: &OdeOptions| {
            let problem = tanh_problem(n);
            rel_l2(&problem.forward(device, options), &problem.forward(device, &double()))
        };
        for n in [64, 1024, 16384] {
            let flat = error(n, &wide);
            assert!(flat <= 1e-7, "{n} steps: {flat:.2e}");
        }
        let (flat, grown) = (error(16384, &wide), error(16384, &OdeOptions::new(OdePrecision::full())));
        assert!(grown >= 10.0 * flat, "{flat:.2e}, {grown:.2e}");
    });
}

/// the step length stays outside of what is rounded, so that gradients do not lose bits as it falls.
#[test]
fn small_steps_do_not_cost_bits_of_the_cotangent() {
    on_one_thread(|device| {
        let seed = |_: usize, y: &[f64]| Some(y.iter().map(|y| y / 1024.0).collect());
        for n in [256, 2048] {
            let solve = |options: &OdeOptions| tanh_problem(n).solve(device, options, LAST, &seed).unwrap();
            let got = solve(&mixed(Precision::F16).scaling(AdjointScaling::UNSCALED));
            let error = rel_l2(&theta(&got), &theta(&solve(&double())));
            assert!(error <= 1.5e-3, "{n} steps: {error:.2e}");
        }
    });
}

/// stages of one step are summed in f32. The gradient of `w` is that of four stages, the last of which sees a
/// cotangent a 4096th of the others': a sum in half would not notice it.
#[test]
fn small_stages_survive_in_the_sum_of_a_step() {
    on_one_thread(|device| {
        // y' = w x(t) with x = 1 but for the last stage of the step, where it is 2^-12.
        let field = |tape: &mut Tape, t: &Var, _: &Var, params: &[Var]| {
            let last = t.value().to_vec::<f64>()?[0] > 0.75;
            let x = if last { 1.0 / 4096.0 } else { 1.0 };
            let (device, storage) = (tape.cx().device.clone(), tape.cx().policy.pointwise.storage);
            let x = halfmode_tensor::Tensor::from_slice(
                &device,
                &[x],
                [1, 1],
                storage,
                halfmode_tensor::Purpose::Activation,
            )?;
            let x = tape.constant(x);
            tape.apply(Linear, &[&x, &params[0]])
        };
        let problem = Problem {
            field: Arc::new(field),
            params: vec![(vec![1, 1], vec![1.0])],
            y0: (vec![1, 1], vec![0.0]),
            times: vec![0.0, 1.0],
        };
        let one = |_: usize, _: &[f64]| Some(vec![1.0]);
        let got = problem.solve(device, &mixed(Precision::F16), LAST, &one).unwrap().theta()[0];
        let want = (1.0 + 2.0 + 2.0 + 1.0 / 4096.0) / 6.0;
        // Beyond the rounding of 1/6 and 1/3 to f16, which scales all stages alike to a part in 4096 of the small one.
        let coarse = (1.0 + 2.0 + 2.0) / 6.0;
        let rounded_sixth = Format::F16.round(1.0 / 6.0);
        assert!((got - want).abs() <= 2.0 * u(Precision::F16) * want, "{got} for {want}");
        assert!((got - 5.0 * rounded_sixth - rounded_sixth / 4096.0).abs() < 0.1 * (want - coarse), "{got}");
    });
}

#[test]
fn sums_below_their_terms_are_refused() {
    let device = Device::cpu(1).unwrap();
    for change in [
        (|it: &mut OdePrecision| it.accumulate = Precision::F16) as fn(&mut OdePrecision),
        |it| it.state = StateSum::Plain(Precision::F64),
        |it| it.velocity = Arc::new(PrecisionPolicy::double()),
    ] {
        let mut options = mixed(Precision::F16);
        change(&mut options.precision);
        let refused = options.precision.validate();
        assert!(matches!(refused, Err(Error::TooNarrow { .. })), "{refused:?}");
        let problem = tanh_problem(2);
        let said = problem.solve(&device, &options, LAST, &square).unwrap_err().to_string();
        assert!(said.contains("use f"), "{said}");
    }
}

/// over many turns of a harmonic oscillator the energy stays where the state is wide, and leaves where it is not.
#[test]
fn a_long_orbit_keeps_its_energy_where_the_state_is_wide() {
    on_one_thread(|device| {
        let drift = |n: usize, options: &OdeOptions| {
            let field = |tape: &mut Tape, _: &Var, y: &Var, params: &[Var]| tape.apply(Linear, &[y, &params[0]]);
            let params = vec![(vec![2, 2], vec![0.0, 1.0, -1.0, 0.0])];
            let y0 = (vec![1, 2], vec![1.0, 0.0]);
            let problem = Problem { field: Arc::new(field), params, y0, times: linspace(0.0, 10.0, n) };
            let y = problem.forward(device, options);
            (0.5 * (y[0] * y[0] + y[1] * y[1]) - 0.5).abs()
        };
        let (few, many) = (drift(100, &mixed(Precision::F16)), drift(10_000, &mixed(Precision::F16)));
        assert!(few <= 5e-4 && many <= 1e-4, "{few:.2e}, {many:.2e}");
        let lost = drift(10_000, &low(Precision::F16));
        assert!(lost >= 2e-2, "an f16 state: {lost:.2e}");
    });
}
