//! Jets: tangents against finite differences, and the reverse pass through them.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op, Tape, Var};
use halfmode_nn::Linear;
use halfmode_nn::jets::{
    JetBias, JetConstant, JetDivergence, JetProduct, JetSoftplus, JetStart, JetTanh, Tangents, random_signs,
};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, distance, norm, slope, slopes, tol};
use proptest::prelude::*;
use std::sync::Arc;

fn policy(precision: Precision) -> Arc<PrecisionPolicy> {
    Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionPolicy::full(),
        half => PrecisionPolicy::mixed(half),
    })
}

fn tensor(device: &Device, values: &[f64], shape: &[usize]) -> Tensor {
    Tensor::from_slice(device, values, shape, Precision::F64, Purpose::Activation).unwrap()
}

fn values(var: &Tensor) -> Vec<f64> {
    var.to_vec().unwrap()
}

type Apply = fn(&mut Tape, &[Var]) -> Var;

/// One layer of each kind, on a jet and further inputs.
fn layers() -> Vec<(&'static str, Apply)> {
    vec![
        ("tanh", |tape, x| tape.apply(JetTanh, &[&x[0]]).unwrap()),
        ("softplus", |tape, x| tape.apply(JetSoftplus, &[&x[0]]).unwrap()),
        ("square", |tape, x| tape.apply(JetProduct, &[&x[0], &x[0]]).unwrap()),
        ("linear", |tape, x| tape.apply(Linear, &[&x[0], &x[1]]).unwrap()),
        ("bias", |tape, x| tape.apply(JetBias, &[&x[0], &x[2]]).unwrap()),
        ("time", |tape, x| tape.apply(JetConstant, &[&x[0], &x[3]]).unwrap()),
        ("all", |tape, x| {
            let time = tape.apply(JetConstant, &[&x[0], &x[3]]).unwrap();
            let first = tape.apply(Linear, &[&time, &x[4]]).unwrap();
            let first = tape.apply(JetBias, &[&first, &x[2]]).unwrap();
            let a = tape.apply(JetTanh, &[&first]).unwrap();
            let b = tape.apply(JetSoftplus, &[&first]).unwrap();
            tape.apply(JetProduct, &[&a, &b]).unwrap()
        }),
    ]
}

/// Weights `[c, c]`, bias `[c]`, time `[1]` and weights `[c, c + 1]` behind a jet.
fn others(device: &Device, c: usize, rng: &mut Rng) -> Vec<Tensor> {
    let shapes: [&[usize]; 4] = [&[c, c], &[c], &[1], &[c, c + 1]];
    shapes.map(|shape| rng.tensor(device, shape, Precision::F64)).to_vec()
}

/// A layer's output and the gradients of all inputs under a cotangent.
fn run(device: &Device, layer: Apply, inputs: &[Tensor], cotangent: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut tape = Tape::new(Cx::new(device, &policy(Precision::F64)));
    let vars: Vec<Var> = inputs.iter().map(|it| tape.leaf(it.clone())).collect();
    let out = layer(&mut tape, &vars);
    drop(vars);
    let got = values(out.value());
    let mut cotangent = cotangent.to_vec();
    cotangent.resize(got.len(), 0.3);
    let seed = tensor(device, &cotangent, out.value().shape());
    let mut grads = vec![Vec::new(); inputs.len()];
    tape.backward_from(vec![(out, seed)], &mut |id, grad| {
        grads[id.0] = grad.to_vec::<f64>()?;
        Ok(())
    })
    .unwrap();
    (got, grads)
}

/// Of differences: truncation of order `STEP^4` and rounding of some hundred numbers over `STEP` are below 1e-9 each.
const STEP: f64 = 3e-4;

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tangents are the derivatives of values along their directions.
    #[test]
    fn tangents_are_derivatives_of_values(
        lead in proptest::collection::vec(1usize..5, 0..3), c in 1usize..5, m in 1usize..4, seed in any::<u64>(),
    ) {
        let device = Device::cpu(2).unwrap();
        let mut rng = Rng::new(seed);
        let shape = [&[1 + m], &lead[..], &[c]].concat();
        let jet = rng.normals(shape.iter().product());
        let n = jet.len() / (1 + m);
        let others = others(&device, c, &mut rng);
        for (name, layer) in layers() {
            let apply = |jet: &[f64]| {
                let inputs = [vec![tensor(&device, jet, &shape)], others.clone()].concat();
                run(&device, layer, &inputs, &[]).0
            };
            let at = apply(&jet);
            let n_out = at.len() / (1 + m);
            for k in 0..m {
                let shifted = |by: f64| {
                    let mut moved = jet.clone();
                    (0..n).for_each(|i| moved[i] += by * jet[(k + 1) * n + i]);
                    apply(&moved)[..n_out].to_vec()
                };
                let (got, want) = (&at[(k + 1) * n_out..(k + 2) * n_out], slopes(shifted, STEP));
                let (error, allowed) = (distance(got, &want), 1e-7 * norm(&want) + 1e-9);
                prop_assert!(error <= allowed, "{name}, direction {k}: off by {error:.2e}: {got:?} {want:?}");
            }
        }
    }

    /// The reverse pass, of values and tangents together, against differences in every entry.
    #[test]
    fn gradients_through_tangents_are_those_of_differences(
        lead in proptest::collection::vec(1usize..4, 0..2), c in 1usize..4, m in 1usize..3, seed in any::<u64>(),
    ) {
        let device = Device::cpu(2).unwrap();
        let mut rng = Rng::new(seed);
        let shape = [&[1 + m], &lead[..], &[c]].concat();
        let jet = rng.tensor(&device, &shape, Precision::F64);
        let inputs = [vec![jet], others(&device, c, &mut rng)].concat();
        for (name, layer) in layers() {
            let cotangent = rng.normals(4 * inputs[0].numel() + 40);
            let len = run(&device, layer, &inputs, &[]).0.len();
            let cotangent = &cotangent[..len];
            let (_, grads) = run(&device, layer, &inputs, cotangent);
            for (idx, got) in grads.iter().enumerate().filter(|(_, got)| !got.is_empty()) {
                let x = values(&inputs[idx]);
                let shifted = |at: usize, by: f64| {
                    let mut moved = x.clone();
                    moved[at] += by;
                    let mut inputs = inputs.clone();
                    inputs[idx] = tensor(&device, &moved, inputs[idx].shape());
                    run(&device, layer, &inputs, cotangent).0.iter().zip(cotangent).map(|(y, c)| y * c).sum::<f64>()
                };
                let want: Vec<f64> = (0..x.len()).map(|at| slope(|by| shifted(at, by), STEP)).collect();
                let (error, allowed) = (distance(got, &want), 1e-7 * norm(&want) + 1e-9);
                prop_assert!(error <= allowed, "{name}, input {idx}: off by {error:.2e}: {got:?} {want:?}");
            }
        }
    }
}

/// Ops that are linear in their jet: `<A x, y> = <x, A^T y>` in every precision.
#[test]
fn linear_ends_have_their_adjoints() {
    let device = Device::cpu(2).unwrap();
    for precision in Precision::ALL {
        let cx = Cx::new(&device, &policy(precision));
        let mut rng = Rng::new(3);
        let mut input = |shape: &[usize]| rng.tensor(&device, shape, precision);
        let jet = input(&[4, 7, 3]);
        let zero = Tensor::from_slice(&device, &[0.0; 3], [3], precision, Purpose::Activation).unwrap();
        adjoint(&cx, &|| Box::new(JetBias), &[jet.clone(), zero], 0, 3, 1);
        let zero = Tensor::from_slice(&device, &[0.0], [1], precision, Purpose::Activation).unwrap();
        adjoint(&cx, &|| Box::new(JetConstant), &[jet, zero], 0, 3, 2);
        // Of the jet's end the first output.
        let end = || -> Box<dyn Op> { Box::new(JetDivergence { tangents: Tangents::Unit, channels: 3 }) };
        adjoint(&cx, &end, &[input(&[4, 7, 3])], 0, 3, 3);
    }
}

/// `(v, -div v)` of `tanh(A z)` by jets.
fn divergence(
    device: &Device,
    precision: Precision,
    (z, a): (&Tensor, &Tensor),
    along: Option<Tensor>,
) -> [Vec<f64>; 2] {
    let mut tape = Tape::new(Cx::inference(device, &policy(precision)));
    let (z, a) = (tape.constant(z.clone()), tape.constant(a.clone()));
    let tangents = if along.is_some() { Tangents::Given } else { Tangents::Unit };
    let along = along.map(|it| tape.constant(it));
    let with = |x: &Var| std::iter::once(x.clone()).chain(along.clone()).collect::<Vec<Var>>();
    let start = tape.apply(JetStart(tangents), &with(&z).iter().collect::<Vec<_>>()).unwrap();
    let x = tape.apply(Linear, &[&start, &a]).unwrap();
    let y = tape.apply(JetTanh, &[&x]).unwrap();
    let end = JetDivergence { tangents, channels: z.value().shape()[z.value().shape().len() - 1] };
    let out = tape.apply_many(Box::new(end), &with(&y).iter().collect::<Vec<_>>()).unwrap();
    [values(out[0].value()), values(out[1].value())]
}

/// Exact divergences are the closed form's, in every precision; the mean of many estimates comes close, and a field of
/// one channel has no error at all.
#[test]
fn divergences_are_those_of_the_closed_form() {
    let (rows, d) = (5, 3);
    let device = Device::cpu(2).unwrap();
    for precision in Precision::ALL {
        let mut rng = Rng::new(9);
        let z = rng.tensor(&device, &[rows, d], precision);
        let a = rng.tensor(&device, &[d, d], precision);
        let (zs, weights) = (values(&z), values(&a));
        let (mut v, mut m) = (Vec::new(), Vec::new());
        for z in zs.chunks(d) {
            let h: Vec<f64> =
                weights.chunks(d).map(|a| a.iter().zip(z).map(|(a, z)| a * z).sum::<f64>().tanh()).collect();
            m.push(-(0..d).map(|c| (1.0 - h[c] * h[c]) * weights[c * d + c]).sum::<f64>());
            v.extend(h);
        }
        let [got_v, got_m] = divergence(&device, precision, (&z, &a), None);
        // A slope 1 - h² loses what h near one was rounded by: a factor of the sizes, not of the terms.
        assert_close!(format!("{precision}: v"), got_v, v, 2.0 * tol(precision, d));
        assert_close!(format!("{precision}: m"), got_m, m, 8.0 * tol(precision, d));
        if precision == Precision::F64 {
            let mut mean = vec![0.0; rows];
            for seed in 0..2000 {
                let along = random_signs(&device, &[rows, d], precision, seed).unwrap();
                let [_, estimate] = divergence(&device, precision, (&z, &a), Some(along));
                mean.iter_mut().zip(estimate).for_each(|(mean, it)| *mean += it / 2000.0);
            }
            // The deviation of an estimate is below twice the largest weight, here 2; of the mean a 45th of it.
            mean.iter()
                .zip(&m)
                .for_each(|(mean, want)| assert!((mean - want).abs() < 5.0 * 4.0 / 45.0, "{mean} {want}"));
        }
    }
    let mut rng = Rng::new(10);
    let (z, a) = (rng.tensor(&device, &[4, 1], Precision::F64), rng.tensor(&device, &[1, 1], Precision::F64));
    let along = random_signs(&device, &[4, 1], Precision::F64, 1).unwrap();
    assert_close!(
        "one channel",
        divergence(&device, Precision::F64, (&z, &a), Some(along))[1],
        divergence(&device, Precision::F64, (&z, &a), None)[1],
        1e-15
    );
}

#[test]
fn jets_of_other_shapes_are_refused() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::inference(&device, &policy(Precision::F64));
    let jet = Rng::new(1).tensor(&device, &[3, 4, 3], Precision::F64);
    let end = JetDivergence { tangents: Tangents::Unit, channels: 3 };
    assert!(end.forward(&cx, &[&jet]).is_err());
    assert!(JetStart(Tangents::Given).forward(&cx, &[&jet]).is_err());
    assert!(JetBias.forward(&cx, &[&jet, &jet]).is_err());
}
