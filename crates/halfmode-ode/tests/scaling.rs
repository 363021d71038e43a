//! The adjoint's scale: underflow, overflow, exactness and failure.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{ALL, LAST, Problem, Solution, double, linspace, mixed, on_one_thread, square, tanh_problem};
use halfmode_autograd::{Cx, Op, Outputs, Result, Saved, Tape, Var};
use halfmode_ode::{AdjointScaling, Error, Method, OdeOptions, OdePrecision, ScaleConfig, VectorField};
use halfmode_precision::{Format, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::rel_l2;
use std::sync::Arc;

fn dynamic() -> OdeOptions {
    mixed(Precision::F16)
}

fn unscaled(format: Precision) -> OdeOptions {
    mixed(format).scaling(AdjointScaling::UNSCALED)
}

fn fixed(exponent: i32) -> OdeOptions {
    mixed(Precision::F16).scaling(AdjointScaling::Fixed { exponent })
}

/// The typed error inside of what the tape says.
fn typed(err: &halfmode_autograd::Error) -> &Error {
    let source = match err {
        halfmode_autograd::Error::Op { source, .. } => source.downcast_ref(),
        _ => None,
    };
    source.unwrap()
}

fn small(exponent: i32) -> impl Fn(usize, &[f64]) -> Option<Vec<f64>> {
    move |_, y| Some(y.iter().map(|y| y * f64::from(-exponent).exp2()).collect())
}

/// a loss times 2^-e has gradients times 2^-e. Scaled they keep their accuracy, unscaled they underflow, at last to
/// zero. The reference expects an unscaled error of a half at e = 24; weight gradients that are summed in f32 keep it at
/// 0.35.
#[test]
fn small_cotangents_do_not_underflow() {
    on_one_thread(|device| {
        let problem = tanh_problem(64);
        let theta = |options: &OdeOptions, e: i32| problem.solve(device, options, LAST, &small(e)).unwrap().theta();
        // Layer by layer, so that every cotangent is stored: the perceptron in one pass rounds fewer of them.
        let layers = problem.layer_by_layer();
        let unscaled = |e: i32| layers.solve(device, &unscaled(Precision::F16), LAST, &small(e)).unwrap().theta();
        for e in (0..=28).step_by(4) {
            let want = theta(&double(), e);
            let scaled = rel_l2(&theta(&dynamic(), e), &want);
            assert!(scaled <= 2e-3, "2^-{e}: {scaled:.2e}");
            let lost = rel_l2(&unscaled(e), &want);
            let least = [(20, 1e-2), (24, 0.3), (28, 1.0)].into_iter().find(|it| it.0 == e).map_or(0.0, |it| it.1);
            assert!(lost >= least, "2^-{e}, unscaled: {lost:.2e}");
        }
        assert!(unscaled(28).iter().all(|it| *it == 0.0));
    });
}

/// where nothing under- or overflows, the scale leaves no trace in a single bit, nor does a scale of the loss.
#[test]
fn powers_of_two_leave_no_trace() {
    on_one_thread(|device| {
        let problem = tanh_problem(32);
        let solve = |exponent: i32, e: i32| problem.solve(device, &fixed(exponent), LAST, &small(e)).unwrap();
        let at = |k: i32| {
            // Cotangents of about one, whose smallest parts are still normal numbers.
            let got = solve(k, 0);
            (got.grad_y0.clone(), got.theta())
        };
        let want = at(4);
        for k in 5..=9 {
            assert!(at(k) == want, "scale 2^{k}");
        }
        // The dynamic scale follows the loss, and its choice is as invisible.
        let of_loss = |e: i32| {
            let got = problem.solve(device, &dynamic(), LAST, &small(e)).unwrap();
            let up = f64::from(e).exp2();
            [got.grad_y0.clone(), got.theta()].concat().into_iter().map(|it| it * up).collect::<Vec<f64>>()
        };
        for e in [-8, 3, 20] {
            assert!(of_loss(e) == of_loss(0), "loss times 2^{}", -e);
        }
    });
}

/// `y' = -(a t^2 + b t + c) y` with every operation of the velocity's Jacobian rounded to the velocity's format,
/// the gradients of a, b and c included.
#[derive(Debug)]
struct Polynomial(f64);

impl Polynomial {
    fn scalars(&self, cx: &Cx, inputs: &[Tensor]) -> Result<[f64; 4]> {
        let round = |x: f64| Format::from(cx.policy.pointwise.storage).round(x);
        let one = |it: &Tensor| Ok::<f64, halfmode_autograd::Error>(round(it.to_vec::<f64>()?[0]));
        Ok([one(&inputs[0])?, one(&inputs[1])?, one(&inputs[2])?, one(&inputs[3])?])
    }
}

impl Op for Polynomial {
    fn name(&self) -> &'static str {
        "polynomial"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let kept: Vec<Tensor> = inputs.iter().map(|it| (*it).clone()).collect();
        let [y, a, b, c] = self.scalars(cx, &kept)?;
        let round = |x: f64| Format::from(cx.policy.pointwise.storage).round(x);
        let t = self.0;
        let kappa = round(round(round(a * round(t * t)) + round(b * round(t))) + c);
        let out = Tensor::from_slice(
            &cx.device,
            &[-round(kappa * y)],
            [1],
            cx.policy.pointwise.storage,
            Purpose::Activation,
        )?;
        let saved = kept.iter().fold(Saved::new("polynomial"), |saved, it| saved.share(cx, "in", it));
        Ok((Outputs::from_iter([out]), saved))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [y, a, b, c] = self.scalars(cx, &saved.take_all("in"))?;
        let storage = cx.policy.pointwise.storage;
        let round = |x: f64| Format::from(storage).round(x);
        let t = self.0;
        let kappa = round(round(round(a * round(t * t)) + round(b * round(t))) + c);
        let g = grads[0].take().unwrap().to_vec::<f64>()?[0];
        let of_kappa = -round(g * y);
        let grads = [-round(g * kappa), round(of_kappa * round(t * t)), round(of_kappa * round(t)), of_kappa];
        grads
            .map(|it| Ok(Some(Tensor::from_slice(&cx.device, &[it], [1], storage, Purpose::Activation)?)))
            .into_iter()
            .collect()
    }
}

fn polynomial_problem() -> Problem<impl VectorField> {
    let field = |tape: &mut Tape, t: &Var, y: &Var, params: &[Var]| {
        let t = t.value().to_vec::<f64>()?[0];
        tape.apply(Polynomial(t), &[y, &params[0], &params[1], &params[2]])
    };
    Problem {
        field: Arc::new(field),
        params: [8.0, -10.0, f64::from(-16).exp2()].map(|it| (vec![1], vec![it])).to_vec(),
        y0: (vec![1], vec![65504.0 / 180.0]),
        times: linspace(0.0, 2.65, 399),
    }
}

fn four(solution: &Solution) -> [f64; 4] {
    let theta = solution.theta();
    [solution.grad_y0[0], theta[0], theta[1], theta[2]]
}

/// A-8b: over 399 steps the adjoint falls to 9e-11, a thousandth of what f16 holds. And A-10b, with the bound:
/// the scale that follows it costs at most a tenth more products than there are steps.
#[test]
fn an_adjoint_far_below_the_format_is_followed_at_little_cost() {
    on_one_thread(|device| {
        let problem = polynomial_problem();
        let solve = |options: &OdeOptions| problem.solve(device, options, LAST, &square).unwrap();
        // In closed form, y(T) = y0 exp(-a T^3/3 - b T^2/2 - c T); dL/dy0, dL/da, dL/db, dL/dc of L = y(T)^2 / 2.
        let (t, y0) = (2.65f64, 65504.0f64 / 180.0);
        let end = y0 * (-8.0 * t.powi(3) / 3.0 + 5.0 * t * t - f64::from(-16).exp2() * t).exp();
        let want = [end * end / y0, -end * end * t.powi(3) / 3.0, -end * end * t * t / 2.0, -end * end * t];
        let errors = |got: &Solution| -> [f64; 4] {
            let got = four(got);
            std::array::from_fn(|idx| (got[idx] - want[idx]).abs() / want[idx].abs())
        };
        let got = solve(&dynamic());
        let state = (got.last()[0] - end).abs() / end;
        let off = errors(&got);
        assert!(off.iter().all(|it| *it <= 1e-2 && *it <= 3.0 * state), "{off:?}, state {state:.2e}");
        let record = &got.record;
        assert_eq!((record.n_steps, record.n_vjps), (399, 399 + record.n_retries));
        assert!(record.n_vjps <= 438, "{} products for 399 steps", record.n_vjps);

        let lost = errors(&solve(&unscaled(Precision::F16)));
        assert!(lost[0] > 100.0 && lost[1..].iter().all(|it| *it > 0.9), "{lost:?}");
        let of_bf16 = errors(&solve(&unscaled(Precision::Bf16)));
        assert!(of_bf16.iter().all(|it| *it <= 3e-2), "{of_bf16:?}");
        let full = OdeOptions::new(OdePrecision::full());
        let of_f32 = errors(&solve(&full));
        assert!(of_f32.iter().all(|it| *it <= 2e-4), "{of_f32:?}");
        // Formats with the range of f32 need no second try, and the scale stays in its bounds.
        for options in [mixed(Precision::Bf16), full] {
            let got = solve(&options.scaling(AdjointScaling::Dynamic(ScaleConfig::DEFAULT))).record;
            assert_eq!(got.n_vjps, 399);
            assert!(got.scales.iter().all(|it| *it <= 60f64.exp2()));
        }
        // The peer's rule finds the same gradients at its own price.
        let peer = solve(&mixed(Precision::F16).scaling(AdjointScaling::Peer));
        let off = errors(&peer);
        assert!(off.iter().all(|it| *it <= 1e-2), "{off:?}");
        assert!(peer.record.n_vjps > 500, "{} products for 399 steps", peer.record.n_vjps);
    });
}

/// `y' = kappa(t) y`; the way back forms `G kappa g` in the velocity's format before it divides by G.
#[derive(Debug)]
struct Stiff {
    kappa: f64,
    detour: f64,
}

impl Op for Stiff {
    fn name(&self) -> &'static str {
        "stiff"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let mut out = inputs[0].copy(Purpose::Activation)?;
        out.scale_assign(self.kappa)?;
        let out = out.cast(cx.policy.pointwise.storage, Purpose::Activation)?;
        Ok((Outputs::from_iter([out]), Saved::new("stiff")))
    }

    fn backward(&self, _: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        let mut g = g.copy(Purpose::Activation)?;
        g.scale_assign(self.detour * self.kappa)?;
        g.scale_assign(1.0 / self.detour)?;
        Ok(vec![Some(g)])
    }
}

/// a stiff stretch overflows at the scale that suited the rest; the sweep recovers and the scale returns.
#[test]
fn overflow_is_recovered_from_and_the_scale_returns() {
    on_one_thread(|device| {
        for (detour, least, at_most) in [(1.0, 5, 240), (16.0, 1, 240), (256.0, -3, 240)] {
            let kappa = |step: usize| if (90..110).contains(&step) { 40.0 } else { 0.5 };
            let field = move |tape: &mut Tape, t: &Var, y: &Var, _: &[Var]| {
                let step = (t.value().to_vec::<f64>()?[0] * 200.0).round() as usize;
                tape.apply(Stiff { kappa: kappa(step), detour }, &[y])
            };
            let problem = Problem {
                field: Arc::new(field),
                params: Vec::new(),
                y0: (vec![1], vec![1.0]),
                times: linspace(0.0, 1.0, 200),
            };
            let config = ScaleConfig { first_exponent: Some(10), ..ScaleConfig::DEFAULT };
            let options = dynamic().method(Method::Euler).scaling(AdjointScaling::Dynamic(config));
            let one = |_: usize, _: &[f64]| Some(vec![1.0]);
            let got = problem.solve(device, &options, LAST, &one).unwrap();
            let want: f64 = (0..200).map(|step| 1.0 + kappa(step) / 200.0).product();
            let error = (got.grad_y0[0] - want).abs() / want;
            assert!(error <= 2e-3, "detour {detour}: {error:.2e}");
            let scales = &got.record.scales;
            let smallest = scales.iter().copied().fold(f64::INFINITY, f64::min);
            assert!((smallest.log2() - f64::from(least)).abs() < 0.5, "detour {detour}: smallest scale {smallest}");
            assert!(got.record.n_vjps <= at_most, "detour {detour}: {} products", got.record.n_vjps);
            if detour > 1.0 {
                assert!(scales[199] > smallest, "detour {detour}: the scale stays at {smallest}");
            }
        }
    });
}

/// a velocity that is not finite is named with its step at once; the inputs stay as they are, and the next solve
/// succeeds.
#[test]
fn a_velocity_that_is_not_finite_is_named_with_its_step() {
    on_one_thread(|device| {
        let field = |tape: &mut Tape, t: &Var, y: &Var, _: &[Var]| {
            let bad = (t.value().to_vec::<f64>()?[0] * 64.0).round() as usize == 37;
            tape.apply(Stiff { kappa: if bad { f64::NAN } else { 1.0 }, detour: 1.0 }, &[y])
        };
        let problem = |n: usize| Problem {
            field: Arc::new(field),
            params: Vec::new(),
            y0: (vec![1], vec![1.0]),
            times: linspace(0.0, 1.0, 64)[..=n].to_vec(),
        };
        let err = problem(64).solve(device, &dynamic().method(Method::Euler), LAST, &square).unwrap_err();
        assert!(matches!(typed(&err), Error::NonFiniteVelocity { step: 37, n_steps: 64, .. }), "{err}");
        assert!(problem(37).solve(device, &dynamic().method(Method::Euler), LAST, &square).is_ok());

        let mut huge = tanh_problem(4);
        huge.params[2].1.fill(1e30);
        let err = huge.solve(device, &dynamic(), LAST, &square).unwrap_err();
        assert!(matches!(typed(&err), Error::NonFiniteVelocity { step: 0, n_steps: 4, .. }), "{err}");
    });
}

/// Numbers that no scale can have are refused before anything is computed.
#[test]
fn wrong_numbers_of_the_scale_are_errors() {
    on_one_thread(|device| {
        let good = ScaleConfig::DEFAULT;
        for (config, field) in [
            (ScaleConfig { min_exponent: 8, max_exponent: -8, ..good }, "min_exponent"),
            (ScaleConfig { max_exponent: 128, ..good }, "max_exponent"),
            (ScaleConfig { growth_interval: u32::MAX, ..good }, "growth_interval"),
            (ScaleConfig { target: Some(0.0), ..good }, "target"),
        ] {
            let options = dynamic().scaling(AdjointScaling::Dynamic(config));
            let err = tanh_problem(2).solve(device, &options, LAST, &square).unwrap_err();
            assert!(err.to_string().contains(field), "{err}");
        }
    });
}

/// A cotangent that is not finite, or a Jacobian that is not, is no matter of the scale.
#[test]
fn an_adjoint_that_is_not_finite_is_a_typed_error() {
    on_one_thread(|device| {
        let problem = tanh_problem(4);
        for bad in [f64::NAN, f64::INFINITY] {
            let seed = |idx: usize, _: &[f64]| (idx == 2).then(|| vec![1.0, bad]);
            let err = problem.solve(device, &dynamic(), ALL, &seed).unwrap_err();
            assert!(matches!(typed(&err), Error::NonFiniteAdjoint { step: 1, n_steps: 4, attempts: 0, .. }), "{err}");
        }
        let field =
            |tape: &mut Tape, _: &Var, y: &Var, _: &[Var]| tape.apply(Stiff { kappa: 0.5, detour: f64::NAN }, &[y]);
        let broken = Problem {
            field: Arc::new(field),
            params: Vec::new(),
            y0: (vec![1], vec![1.0]),
            times: vec![0.0, 0.5, 1.0],
        };
        let err = broken.solve(device, &dynamic(), LAST, &square).unwrap_err();
        assert!(matches!(typed(&err), Error::NonFiniteAdjoint { step: 1, n_steps: 2, attempts: 2..=16, .. }), "{err}");
        let said = err.to_string();
        assert!(said.contains("step 1 of 2") && said.contains("bf16 or f32"), "{said}");
    });
}

/// A-11b: in safe mode an overflow makes every gradient infinite, so that a loss scaler around it skips the step and
/// halves; at a smaller scale the next one is right.
#[test]
fn safe_mode_hands_overflow_to_a_scaler_around_it() {
    on_one_thread(|device| {
        let problem = tanh_problem(8);
        let safe = mixed(Precision::F16).scaling(AdjointScaling::Safe);
        let at = |e: i32| problem.solve(device, &safe, LAST, &small(e)).unwrap();
        let spoilt = at(-20);
        let infinite = |values: &[f64]| values.iter().all(|it| *it == f64::INFINITY);
        assert!(infinite(&spoilt.grad_y0) && infinite(&spoilt.theta()));
        assert_eq!(spoilt.theta().len(), 32 * 3 + 32 + 64 + 2);
        let (good, want) = (at(0), problem.solve(device, &double(), LAST, &square).unwrap());
        assert!(rel_l2(&good.theta(), &want.theta()) <= 2e-3);
    });
}

/// a zero cotangent gives a zero gradient, without a product and without a trace.
#[test]
fn a_zero_cotangent_gives_a_zero_gradient() {
    on_one_thread(|device| {
        let problem = tanh_problem(5000);
        let zero = |_: usize, _: &[f64]| Some(vec![0.0, 0.0]);
        let got = problem.solve(device, &dynamic(), LAST, &zero).unwrap();
        assert_eq!((got.grad_y0, got.record.n_vjps), (vec![0.0, 0.0], 0));
        assert_eq!(got.grad_params.concat(), vec![0.0; 32 * 3 + 32 + 64 + 2]);
        // A loss on an earlier point only, where the peer fails.
        let problem = tanh_problem(16);
        let seed = |idx: usize, y: &[f64]| match idx {
            16 => Some(vec![0.0, 0.0]),
            7 => Some(y.to_vec()),
            _ => None,
        };
        let (got, want) = (problem.solve(device, &dynamic(), ALL, &seed), problem.solve(device, &double(), ALL, &seed));
        let (got, want) = (got.unwrap(), want.unwrap());
        assert_eq!(got.record.n_vjps, 7);
        assert!(rel_l2(&got.theta(), &want.theta()) <= 5e-3 && rel_l2(&got.grad_y0, &want.grad_y0) <= 5e-3);
    });
}

/// the same inputs give the same bits, at any number of threads.
#[test]
fn the_same_solve_gives_the_same_bits() {
    let problem = tanh_problem(20);
    let solve = |threads: usize| {
        let device: Device = Device::cpu(threads).unwrap();
        let got = problem.solve(&device, &dynamic(), ALL, &square).unwrap();
        (got.outputs, got.grad_y0, got.grad_params)
    };
    let want = solve(1);
    assert!(solve(1) == want && solve(3) == want);
}
