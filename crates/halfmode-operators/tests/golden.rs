//! Outputs and all gradients of the peer's FNO, in double precision.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

fn check(name: &str, config: FnoConfig) {
    let golden = Golden::load(name);
    let device = Device::cpu(2).unwrap();
    let policy = Arc::new(PrecisionPolicy::double());
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

    let mut tape = Tape::new(Cx::new(&device, &policy));
    let weights = params.leaves(&mut tape);
    let tensor = |name: &str| {
        let (shape, values) = golden.get(name);
        Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
    };
    let x = tape.leaf(tensor("in/x"));
    let y = fno.forward(&mut tape, &weights, &[&x]).unwrap();
    assert_close!(format!("{name} out"), y.value().to_vec::<f64>().unwrap(), golden.get("f64/out").1, 1e-10);
    let mut grads: Vec<Option<Tensor>> = vec![None; params.list.len() + 1];
    let seeds = vec![(y, tensor("in/cotangent"))];
    drop((weights, x));
    tape.backward_from(seeds, &mut |LeafId(id), grad| {
        grads[id] = Some(grad);
        Ok(())
    })
    .unwrap();
    let got = grads.pop().unwrap().unwrap().to_vec::<f64>().unwrap();
    assert_close!(format!("{name} grad x"), got, golden.get("f64/grad_in/x").1, 1e-9);
    for (param, grad) in params.list.iter().zip(grads) {
        let got = param.spec.to_file(&grad.unwrap().to_vec::<f64>().unwrap());
        let want = golden.get(&format!("f64/grad_param/{}", param.spec.name)).1;
        assert_close!(format!("{name} grad {}", param.spec.name), got, want, 1e-9);
    }
}

#[test]
fn fno1d() {
    check("fno1d", FnoConfig { in_channels: 2, n_layers: 2, ..FnoConfig::new(&[12], 6) });
}

#[test]
fn fno2d() {
    check("fno2d", FnoConfig { in_channels: 2, n_layers: 2, ..FnoConfig::new(&[8, 8], 6) });
}

#[test]
fn fno3d() {
    check("fno3d", FnoConfig { n_layers: 2, ..FnoConfig::new(&[4, 4, 6], 4) });
}
