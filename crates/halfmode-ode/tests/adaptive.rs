//! Steps that follow the error estimate.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{ALL, ALL_AND_TIME, Ask, LAST, Problem, double, mixed, on_one_thread, square, tanh_problem};
use halfmode_autograd::{Tape, Var};
use halfmode_nn::{Linear, Tanh};
use halfmode_ode::{
    Error, Method, OdeOptions, OdePrecision, Points, StateSum, StepControl, Steps, TimeChannel, VectorField,
};
use halfmode_precision::{Format, Precision};
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;

const PAIRS: [Method; 3] = [Method::BogackiShampine32, Method::DormandPrince54, Method::Tsitouras54];

fn adaptive(options: OdeOptions, method: Method, rtol: f64) -> OdeOptions {
    let steps = Steps::Adaptive(StepControl::new(rtol, rtol));
    OdeOptions { steps, ..options.method(method) }
}

/// `f = B tanh(A (y, t))` with two channels on [0, 10]: the reference's P3, with its time linear.
fn oscillating(times: Vec<f64>) -> Problem<impl VectorField> {
    let field = |tape: &mut Tape, t: &Var, y: &Var, params: &[Var]| {
        let x = tape.apply(TimeChannel, &[y, t])?;
        let x = tape.apply(Linear, &[&x, &params[0]])?;
        let x = tape.apply(Tanh, &[&x])?;
        tape.apply(Linear, &[&x, &params[1]])
    };
    let a = (vec![2, 3], vec![0.3, -0.8, 0.1, 0.9, 0.2, -0.2]);
    let b = (vec![2, 2], vec![0.1, 1.2, -1.1, 0.2]);
    Problem { field: Arc::new(field), params: vec![a, b], y0: (vec![1, 2], vec![1.0, 0.5]), times }
}

/// `y' = (y_2, -y_1)` from (1, 0) to t = 10: no error is damped. And where it ends.
fn circle() -> (Problem<impl VectorField>, [f64; 2]) {
    let field = |tape: &mut Tape, _: &Var, y: &Var, params: &[Var]| tape.apply(Linear, &[y, &params[0]]);
    let params = vec![(vec![2, 2], vec![0.0, 1.0, -1.0, 0.0])];
    let problem = Problem { field: Arc::new(field), params, y0: (vec![1, 2], vec![1.0, 0.0]), times: vec![0.0, 10.0] };
    (problem, [10f64.cos(), -10f64.sin()])
}

/// The error follows the tolerance, over four orders of magnitude, and so does the number of steps.
#[test]
fn errors_follow_the_tolerance() {
    on_one_thread(|device| {
        let (problem, want) = circle();
        for method in PAIRS {
            let mut before: Option<(f64, usize)> = None;
            for rtol in [1e-4, 1e-6, 1e-8] {
                let got = problem.solve(device, &adaptive(double(), method, rtol), LAST, &square).unwrap();
                let (error, n_steps) = (rel_l2(got.last(), &want), got.record.n_steps);
                // Local errors of rtol in at most some hundred steps that hardly grow.
                assert!(error <= 100.0 * rtol, "{method:?}, {rtol:e}: {error:.2e}");
                if let Some((coarse, few)) = before {
                    assert!(
                        error < 0.1 * coarse && n_steps > few,
                        "{method:?}, {rtol:e}: {error:.2e}, {n_steps} steps"
                    );
                }
                before = Some((error, n_steps));
            }
        }
    });
}

/// A-3 for chosen steps: the gradient is the exact one of the steps that were taken. A solve on just these, as a
/// fixed grid, has the same bits.
#[test]
fn the_gradient_is_that_of_the_accepted_steps() {
    on_one_thread(|device| {
        for method in PAIRS {
            let problem = oscillating(vec![0.0, 1.5, 2.0]);
            let got = problem.solve(device, &adaptive(double(), method, 1e-5), ALL_AND_TIME, &square).unwrap();
            assert_eq!((got.outputs.len(), got.grad_t.len()), (3, 3));
            let grid = got.record.grid.clone();
            assert_eq!(grid.len(), got.record.n_steps + 1);
            let of_output = |idx: usize, y: &[f64]| [0.0, 1.5, 2.0].contains(&grid[idx]).then(|| y.to_vec());
            let again = oscillating(grid.clone()).solve(device, &double().method(method), ALL, &of_output).unwrap();
            assert_eq!(again.last(), got.last(), "{method:?}");
            assert!(again.grad_y0 == got.grad_y0 && again.grad_params == got.grad_params, "{method:?}");
            let moved = |which: usize, idx: usize, by: f64| {
                let mut problem = oscillating(vec![0.0, 1.5, 2.0]);
                match which {
                    0 => problem.y0.1[idx] += by,
                    param => problem.params[param - 1].1[idx] += by,
                }
                // Differences of a fine solve: the adaptive one jumps where its number of steps changes.
                let options = adaptive(double(), method, 1e-11);
                let got = problem.solve(device, &options, ALL, &square).unwrap();
                got.outputs.concat().iter().map(|y| 0.5 * y * y).sum::<f64>()
            };
            let h = 1e-5;
            let difference = |which: usize, n: usize| -> Vec<f64> {
                (0..n).map(|idx| (moved(which, idx, h) - moved(which, idx, -h)) / (2.0 * h)).collect()
            };
            for (name, got, want) in [
                ("y0", &got.grad_y0, difference(0, 2)),
                ("A", &got.grad_params[0], difference(1, 6)),
                ("B", &got.grad_params[1], difference(2, 4)),
            ] {
                // As the errors of the solve whose gradient it is: a hundred times its tolerance.
                assert!(rel_l2(got, &want) <= 1e-3, "{method:?}: gradient of {name}: {got:?}, {want:?}");
            }
            // By the time of an output, the slope there: dL/dt = <y, f> at the last.
            let last = got.last();
            let at = |t: f64| {
                let ask = Ask { points: Points::Last, time_grad: false };
                let problem = oscillating(vec![0.0, t]);
                let got = problem.solve(device, &adaptive(double(), method, 1e-11), ask, &square).unwrap();
                got.last().to_vec()
            };
            let (up, down) = (at(2.0 + h), at(2.0 - h));
            let want: f64 = last.iter().zip(up.iter().zip(&down)).map(|(y, (u, d))| y * (u - d) / (2.0 * h)).sum();
            assert!((got.grad_t[2] - want).abs() <= 1e-3 * want.abs(), "{method:?}: {} for {want}", got.grad_t[2]);
        }
    });
}

/// With `atol = 0` a value that is 0 allows no error: its first step cannot follow from it.
#[test]
fn a_value_of_zero_needs_no_absolute_tolerance() {
    on_one_thread(|device| {
        let (problem, want) = circle();
        for method in PAIRS {
            let steps = Steps::Adaptive(StepControl::new(1e-6, 0.0));
            let got = problem.solve(device, &OdeOptions { steps, ..double().method(method) }, LAST, &square).unwrap();
            assert!(rel_l2(got.last(), &want) <= 1e-4, "{method:?}");
        }
    });
}

/// An infinite state allows every error, and is no step all the same: steps get shorter until a state in f16 loses them.
#[test]
fn no_step_leads_out_of_the_range_of_the_state() {
    on_one_thread(|device| {
        let field = |tape: &mut Tape, _: &Var, y: &Var, params: &[Var]| {
            let y = tape.apply(Linear, &[y, &params[0]])?;
            tape.apply(Tanh, &[&y])
        };
        // The slope is 1, the state at the end 66000: beyond f16.
        let problem = Problem {
            field: Arc::new(field),
            params: vec![(vec![1, 1], vec![1.0])],
            y0: (vec![1, 1], vec![65_000.0]),
            times: vec![0.0, 1000.0],
        };
        let mut options = adaptive(double(), Method::DormandPrince54, 1e-2);
        options.precision =
            OdePrecision { state: StateSum::Plain(Precision::F16), ..OdePrecision::mixed(Precision::F16) };
        let got = problem.solve(device, &options, LAST, &square).unwrap();
        let largest = Format::from(Precision::F16).max();
        assert!(got.last()[0] > 65_000.0 && got.last()[0] <= largest && got.record.n_rejected > 0, "{:?}", got.last());
    });
}

/// Backward in time, and back again.
#[test]
fn time_may_fall() {
    on_one_thread(|device| {
        let options = adaptive(double(), Method::Tsitouras54, 1e-9);
        let there = oscillating(vec![0.0, 3.0]).forward(device, &options);
        let mut back = oscillating(vec![3.0, 0.0]);
        back.y0.1 = there;
        assert!(rel_l2(&back.forward(device, &options), &[1.0, 0.5]) <= 1e-7);
    });
}

/// with a half velocity the error follows the tolerance down to what four roundings allow; less is refused, and
/// at the floor the steps are as many as in double precision, up to a half.
#[test]
fn the_tolerance_has_a_floor_that_follows_the_velocity() {
    on_one_thread(|device| {
        let (problem, want) = circle();
        for format in [Precision::F16, Precision::Bf16] {
            let floor = 4.0 * Format::from(format).unit_roundoff();
            for rtol in [floor, 4.0 * floor] {
                let got =
                    problem.solve(device, &adaptive(mixed(format), Method::Tsitouras54, rtol), LAST, &square).unwrap();
                let exact =
                    problem.solve(device, &adaptive(double(), Method::Tsitouras54, rtol), LAST, &square).unwrap();
                let error = rel_l2(got.last(), &want);
                // An undamped problem, and the estimate is that of the lower order.
                assert!(error <= 2.0 * rtol, "{format}, {rtol:e}: {error:.2e}");
                let [n, of_double] = [&got, &exact].map(|it| it.record.n_steps + it.record.n_rejected);
                assert!(2 * n <= 3 * of_double, "{format}, {rtol:e}: {n} steps for {of_double}");
            }
            let asked = adaptive(mixed(format), Method::Tsitouras54, 0.5 * floor);
            let said = problem.solve(device, &asked, LAST, &square).unwrap_err().to_string();
            assert!(said.contains(format.name()) && said.contains("use a larger rtol"), "{said}");
        }
        assert!(StepControl::floor(&OdePrecision::full()) < 1e-6);
    });
}

#[test]
fn what_cannot_be_solved_says_so() {
    on_one_thread(|device| {
        let said = |problem: &dyn Fn(&OdeOptions) -> String, options: OdeOptions| problem(&options);
        let tanh = |options: &OdeOptions| {
            let err = tanh_problem(1).solve(device, options, LAST, &square).unwrap_err();
            err.to_string()
        };
        assert!(said(&tanh, adaptive(double(), Method::Rk4, 1e-3)).contains("no error estimate"));
        assert!(said(&tanh, adaptive(double(), Method::Tsitouras54, f64::NAN)).contains("rtol NaN"));
        let mut few = adaptive(double(), Method::Tsitouras54, 1e-12);
        few.steps = Steps::Adaptive(StepControl { max_steps: 3, ..StepControl::new(1e-12, 1e-12) });
        assert!(said(&tanh, few).contains("3 steps were tried"));
        // y' = y^2 from 1 has no solution at t = 1.
        let square_field = |tape: &mut Tape, _: &Var, y: &Var, _: &[Var]| {
            let y = y.value().to_vec::<f64>()?;
            let (device, f) = (tape.cx().device.clone(), vec![y[0] * y[0]]);
            let f = halfmode_tensor::Tensor::from_slice(
                &device,
                &f,
                [1],
                Precision::F64,
                halfmode_tensor::Purpose::Activation,
            )?;
            Ok(tape.constant(f))
        };
        let problem = Problem {
            field: Arc::new(square_field),
            params: Vec::new(),
            y0: (vec![1], vec![1.0]),
            times: vec![0.0, 2.0],
        };
        let err = problem.solve(device, &adaptive(double(), Method::Tsitouras54, 1e-6), LAST, &square).unwrap_err();
        let halfmode_autograd::Error::Op { source, .. } = &err else { unreachable!("{err}") };
        let found: &Error = source.downcast_ref().unwrap();
        assert!(matches!(found, Error::StepTooSmall { time, .. } if (time - 1.0).abs() < 1e-3), "{found}");
        let mut rng = Rng::new(1);
        for bad in [vec![0.0], vec![0.0, 1.0, 0.5], vec![0.0, f64::NAN], vec![rng.normal(); 2]] {
            let problem = Problem { times: bad, ..tanh_problem(1) };
            let said = problem.solve(device, &double(), LAST, &square).unwrap_err().to_string();
            assert!(said.contains("time points must be finite"), "{said}");
        }
    });
}
