//! The peers' solutions and gradients: in double precision, and in single precision within four times their own errors.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use common::{Ask, Problem};
use halfmode_ode::{
    AdjointScaling, Method, MlpField, OdeOptions, OdePrecision, PeerScaler, Points, StepControl, Steps, TimeInput,
};
use halfmode_precision::Precision;
use halfmode_tensor::Device;
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

fn method(golden: &Golden) -> Method {
    let config = golden.fact("config");
    match (config["solver"].as_str().unwrap(), config["method"].as_str().unwrap()) {
        (_, "euler") => Method::Euler,
        (_, "midpoint") => Method::Midpoint,
        ("rampde", "rk4") => Method::Rk4,
        ("torchdiffeq", "rk4") => Method::Rk4ThreeEighths,
        ("torchdiffeq", "dopri5") => Method::DormandPrince54,
        other => panic!("no method for {other:?}"),
    }
}

fn problem(golden: &Golden) -> Problem<MlpField> {
    let get = |name: &str| {
        let (shape, values) = golden.get(name);
        (shape.to_vec(), values.to_vec())
    };
    let config = golden.fact("config");
    let of = |key: &str| usize::try_from(config[key].as_u64().unwrap()).unwrap();
    let params = ["l1.weight", "l1.bias", "l2.weight", "l2.bias"].map(|name| get(&format!("param/{name}")));
    Problem {
        field: Arc::new(MlpField { channels: of("d"), hidden: vec![of("width")], time: TimeInput::Concatenated }),
        params: params.to_vec(),
        y0: get("in/y0"),
        times: get("in/t").1,
    }
}

fn check(name: &str, precision: OdePrecision, (of_values, of_gradients): (f64, f64)) {
    let golden = Golden::load(name);
    let problem = problem(&golden);
    let mut options = OdeOptions::new(precision).method(method(&golden)).scaling(AdjointScaling::UNSCALED);
    let config = golden.fact("config");
    if let (Some(rtol), Some(atol)) = (config["rtol"].as_f64(), config["atol"].as_f64()) {
        options.steps = Steps::Adaptive(StepControl::new(rtol, atol));
    }
    let len = problem.y0.1.len();
    let cotangents = golden.get("in/cotangent").1;
    let time_grad = golden.names("f64/grad_in/").any(|it| it == "t");
    let seed = |idx: usize, _: &[f64]| Some(cotangents[idx * len..(idx + 1) * len].to_vec());
    let ask = Ask { points: Points::All, time_grad };
    let got = problem.solve(&Device::cpu(1).unwrap(), &options, ask, &seed).unwrap();
    assert_close!(format!("{name}: out"), got.outputs.concat(), *golden.get("f64/out").1, of_values);
    assert_close!(format!("{name}: grad y0"), got.grad_y0, *golden.get("f64/grad_in/y0").1, of_gradients);
    if time_grad {
        assert_close!(format!("{name}: grad t"), got.grad_t, *golden.get("f64/grad_in/t").1, of_gradients);
    }
    let names = ["l1.weight", "l1.bias", "l2.weight", "l2.bias"].map(str::to_owned);
    let grads: Vec<(String, Vec<f64>)> = names.into_iter().zip(got.grad_params).collect();
    golden.assert_gradients(name, "f64/grad_param/", &grads, of_gradients);
}

/// The bounds of the recordings: 1e-10 and 1e-9 in f64; in f32 four times the peer's own error, at least 1e-6.
fn both(name: &str) {
    check(name, OdePrecision::double(), (1e-10, 1e-9));
    let golden = Golden::load(name);
    check(name, OdePrecision::full(), (golden.f32_tolerance("out"), golden.f32_tolerance("grad_max")));
}

#[test]
fn rampde_euler_is_euler() {
    both("rampde_euler");
}

#[test]
fn rampde_rk4_is_the_classical_method() {
    both("rampde_rk4");
}

#[test]
fn torchdiffeq_rk4_is_the_three_eighths_rule() {
    both("torchdiffeq_rk4");
}

/// The peer interpolates between its steps where this solve ends a step at every time point, so the two agree to what
/// the tolerances of 1e-6 leave, in f64 too: to the peer's own difference between its two precisions, times four.
#[test]
fn torchdiffeq_dopri5_agrees_to_its_tolerance() {
    let golden = Golden::load("torchdiffeq_dopri5");
    for precision in [OdePrecision::double(), OdePrecision::full()] {
        check("torchdiffeq_dopri5", precision, (golden.f32_tolerance("out"), golden.f32_tolerance("grad_max")));
    }
}

#[test]
fn rampde_decisions_about_the_scale_are_taken_alike() {
    let golden = Golden::load("rampde_dynamic_scaler");
    for (name, precision) in [
        ("a0", Precision::F16),
        ("a1", Precision::F16),
        ("a2", Precision::F16),
        ("a3", Precision::Bf16),
        ("a4", Precision::F32),
    ] {
        let (shape, values) = golden.get(&format!("in/{name}"));
        let facts = golden.fact("config");
        let want = |key: &str| facts[name][key].as_f64();
        let largest = values.iter().fold(0.0, |largest: f64, it| largest.max(it.abs()));
        let mut scaler = PeerScaler::new(precision);
        assert_eq!(scaler.start(largest, shape), want("S_init"), "{name}");
        assert_eq!(Some(scaler.wants_growth(largest)), facts[name]["check_for_increase"].as_bool(), "{name}");
        scaler.shrink();
        assert_eq!(scaler.scale(), want("S_after_overflow"), "{name}");
        scaler.grow();
        assert_eq!(scaler.scale(), want("S_after_increase"), "{name}");
    }
}
