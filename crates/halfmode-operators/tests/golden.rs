//! Outputs and all gradients of the peer's FNO, in double precision.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, Params};
use halfmode_operators::{Fno, FnoConfig, Norm, Numbers, PositionalEmbedding, Skip, StabilizerKind};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

fn check(name: &str, config: FnoConfig) {
    check_to(name, config, None);
}

fn check_to(name: &str, config: FnoConfig, output_shape: Option<&[usize]>) {
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
    let y = fno.forward_to(&mut tape, &weights, &x, output_shape).unwrap();
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
    // A gradient that is exactly zero, such as that of a bias before an instance norm, has errors relative to the others.
    let all = golden.names("f64/grad_param/").flat_map(|it| golden.get(&format!("f64/grad_param/{it}")).1);
    let largest = all.fold(0.0, |max: f64, value| max.max(value.abs()));
    for (param, grad) in params.list.iter().zip(grads) {
        let got = param.spec.to_file(&grad.unwrap().to_vec::<f64>().unwrap());
        let want = golden.get(&format!("f64/grad_param/{}", param.spec.name)).1;
        if want.iter().all(|value| value.abs() < 1e-12 * largest) {
            assert!(got.iter().all(|value| value.abs() < 1e-12 * largest), "{name} grad {}", param.spec.name);
        } else {
            assert_close!(format!("{name} grad {}", param.spec.name), got, want, 1e-9);
        }
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

/// Every option of the peer that the model has, as recorded by `tests/golden/fno_options/make.py`.
#[test]
fn fno_options() {
    let config = |modes: &[usize]| FnoConfig { in_channels: 2, n_layers: 3, ..FnoConfig::new(modes, 4) };
    let two = || config(&[6, 6]);
    let one = || config(&[8]);
    let padding = Numbers::Each(vec![0.5, 0.0]);
    let scaling = Numbers::Each(vec![2.0, 0.5, 1.5]);
    let cases = [
        ("fno2d_instance_norm", FnoConfig { norm: Norm::InstanceNorm, ..two() }),
        ("fno2d_group_norm_preactivation", FnoConfig { norm: Norm::GroupNorm, preactivation: true, ..two() }),
        ("fno1d_group_norm", FnoConfig { norm: Norm::GroupNorm, ..one() }),
        ("fno2d_preactivation", FnoConfig { preactivation: true, ..two() }),
        ("fno2d_padding", FnoConfig { domain_padding: Numbers::All(0.25), ..two() }),
        ("fno2d_padding_axes", FnoConfig { domain_padding: padding, ..two() }),
        ("fno2d_no_mlp", FnoConfig { use_channel_mlp: false, ..two() }),
        (
            "fno2d_skips_identity_linear",
            FnoConfig { fno_skip: Skip::Identity, channel_mlp_skip: Skip::Linear, ..two() },
        ),
        ("fno2d_skips_gate_none", FnoConfig { fno_skip: Skip::SoftGating, channel_mlp_skip: Skip::None, ..two() }),
        ("fno1d_skips_none_identity", FnoConfig { fno_skip: Skip::None, channel_mlp_skip: Skip::Identity, ..one() }),
        (
            "fno2d_no_grid",
            FnoConfig { positional_embedding: PositionalEmbedding::None, stabilizer: StabilizerKind::Tanh, ..two() },
        ),
        ("fno2d_separable", FnoConfig { separable: true, ..two() }),
        ("fno2d_max_modes", FnoConfig { max_n_modes: vec![8, 6], ..config(&[4, 6]) }),
        ("fno2d_more_modes_than_points", config(&[12, 12])),
        ("fno2d_odd_modes", config(&[5, 7])),
        ("fno3d_instance_norm", FnoConfig { norm: Norm::InstanceNorm, n_layers: 2, ..config(&[4, 4, 4]) }),
        ("fno1d_scaling", FnoConfig { resolution_scaling_factor: Numbers::All(2.0), ..one() }),
        ("fno1d_scaling_layers", FnoConfig { resolution_scaling_factor: scaling, ..one() }),
    ];
    for (name, config) in cases {
        println!("{name}");
        check(&format!("fno_options/{name}"), config);
    }
    check_to("fno_options/fno1d_output_shape", one(), Some(&[17]));
}
