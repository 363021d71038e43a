//! Outputs and all gradients of the peer's FNO: in double precision, and in single precision within four times
//! the peer's own errors.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, ParamRole, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{DType, Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

/// The constructor's arguments of a case.
fn config(golden: &Golden) -> FnoConfig {
    let mut arguments = golden.fact("config").clone();
    let known = arguments.as_object_mut().unwrap();
    known.remove("forward_kwargs");
    known.remove("cls");
    serde_json::from_value(arguments).unwrap()
}

fn check(name: &str, precision: Precision) {
    let golden = Golden::load(name);
    let case = format!("{name} in {precision}");
    let device = Device::cpu(2).unwrap();
    let (policy, tolerances) = match precision {
        Precision::F64 => (PrecisionPolicy::double(), [1e-10, 1e-9]),
        _ => {
            let full = PrecisionConfig::new(Preset::Full, Precision::F16).resolve().unwrap();
            (full, ["out", "grad_max"].map(|it| golden.f32_tolerance(it)))
        }
    };
    let policy = Arc::new(policy);
    let config = config(&golden);
    let complex = config.complex_data;
    let fno = Fno::new(config).unwrap();
    let mut params = Params::new(&device, fno.param_specs(), &policy, 0).unwrap();
    let mut names: Vec<&str> = golden.names("param/").collect();
    for param in &mut params.list {
        let (shape, values) = golden.get(&format!("param/{}", param.spec.name));
        let trailing: &[usize] = if param.spec.complex { &[2] } else { &[] };
        assert_eq!([&param.spec.file_shape[..], trailing].concat(), shape, "{}", param.spec.name);
        param.set_file_values(values).unwrap();
        names.retain(|it| *it != param.spec.name);
    }
    assert!(names.is_empty(), "parameters that the model lacks: {names:?}");

    let tensor = |name: &str| {
        let (shape, values) = golden.get(name);
        let (shape, dtype) = match complex {
            true => (&shape[..shape.len() - 1], DType::complex(precision)),
            false => (shape, DType::real(precision)),
        };
        Tensor::from_scalars(&device, values, shape, dtype, Purpose::Activation).unwrap()
    };
    if golden.names("f64/").any(|it| it == "evaluation") {
        let mut tape = Tape::new(Cx::inference(&device, &policy));
        let weights = params.leaves(&mut tape);
        let x = tape.constant(tensor("in/x"));
        let y = fno.forward(&mut tape, &weights, &[&x]).unwrap().value().to_vec::<f64>().unwrap();
        assert_close!(format!("{case}: evaluation"), y, *golden.get("f64/evaluation").1, tolerances[0]);
    }
    let mut tape = Tape::new(Cx::new(&device, &policy));
    let weights = params.leaves(&mut tape);
    let x = tape.leaf(tensor("in/x"));
    let output_shape: Option<Vec<usize>> = serde_json::from_value(golden.fact("output_shape").clone()).unwrap();
    let y = fno.forward_to(&mut tape, &weights, &x, output_shape.as_deref()).unwrap();
    assert_close!(format!("{case}: out"), y.value().to_vec::<f64>().unwrap(), *golden.get("f64/out").1, tolerances[0]);
    let mut grads: Vec<Option<Tensor>> = vec![None; params.list.len() + 1];
    let seeds = vec![(y, tensor("in/cotangent"))];
    drop((weights, x));
    let observed = tape.take_observed();
    tape.backward_from(seeds, &mut |LeafId(id), grad| {
        grads[id] = Some(grad);
        Ok(())
    })
    .unwrap();
    let grad_x = grads.pop().unwrap().unwrap().to_vec::<f64>().unwrap();
    assert_close!(format!("{case}: grad x"), grad_x, *golden.get("f64/grad_in/x").1, tolerances[1]);
    let moved = params.list.iter().zip(grads).filter(|(param, _)| param.spec.role != ParamRole::Statistic);
    let grads = moved.map(|(param, grad)| {
        let grad = grad.map_or_else(|| vec![0.0; param.spec.n_scalars()], |grad| grad.to_vec::<f64>().unwrap());
        (param.spec.name.clone(), param.spec.to_file(&grad))
    });
    golden.assert_gradients(&case, "f64/grad_param/", &grads.collect::<Vec<_>>(), tolerances[1]);
    params.observe(&observed).unwrap();
    for name in golden.names("f64/after/") {
        let after = params.get(name).unwrap().file_values().unwrap();
        assert_close!(format!("{case}: {name}"), after, *golden.get(&format!("f64/after/{name}")).1, tolerances[0]);
    }
}

/// Batch norm: a pass in training, what it leaves in the running statistics, and an evaluation with them.
#[test]
fn fno_batch_norm() {
    let names = Golden::list("batch_norm");
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        assert!(Golden::load(&name).names("f64/after/").count() >= 4);
        check(&name, Precision::F64);
        check(&name, Precision::F32);
    }
}

#[test]
fn fno_of_the_acceptance_set() {
    for name in ["fno1d", "fno2d", "fno3d"] {
        check(name, Precision::F64);
        check(name, Precision::F32);
    }
}

/// Every option of the peer that the model has, as recorded by `tests/golden/fno_options/make.py`.
#[test]
fn fno_options() {
    let names = Golden::list("fno_options");
    assert!(names.len() >= 39, "{names:?}");
    for name in names {
        println!("{name}");
        check(&name, Precision::F64);
        check(&name, Precision::F32);
    }
}
