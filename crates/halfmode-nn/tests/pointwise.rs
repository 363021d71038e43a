//! Elementwise and dense ops: gradients, adjoints, and values in every precision.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, allowed, cases, policy, rounded, run, tensors};
use halfmode_autograd::{Cx, Op};
use halfmode_nn::{Add, ChannelBias, ChannelGate, Gelu, Linear, Subtract, Tanh};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, devices, distance, gpu, gradcheck, norm, sensitivity};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

/// `[batch, points…, c_in]` and output channels.
fn sizes() -> impl Strategy<Value = (Vec<usize>, usize, u64)> {
    (proptest::collection::vec(1usize..8, 2..=5), 1usize..8, any::<u64>())
}

fn zeros(device: &Device, shape: &[usize], precision: Precision) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_slice(device, &vec![0.0; n], shape, precision, Purpose::Activation).unwrap()
}

fn channels(shape: &[usize]) -> usize {
    shape[shape.len() - 1]
}

/// Shape of a field, output channels, seed.
type Sizes = (Vec<usize>, usize, u64);

fn check_gradients(device: &Device, (shape, c_out, seed): &Sizes) {
    let (c, c_out) = (channels(shape), *c_out);
    let mut rng = Rng::new(*seed);
    let mut tensor = |shape: &[usize]| rng.tensor(device, shape, Precision::F64);
    let check = |op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor]| gradcheck(device, op, inputs, *seed);
    check(&|| Box::new(Gelu), &[tensor(shape)]);
    check(&|| Box::new(Tanh), &[tensor(shape)]);
    check(&|| Box::new(Add), &[tensor(shape), tensor(shape)]);
    check(&|| Box::new(Subtract), &[tensor(shape), tensor(shape)]);
    check(&|| Box::new(ChannelGate), &[tensor(shape), tensor(&[1, c, 1])]);
    check(&|| Box::new(ChannelBias), &[tensor(shape), tensor(&[c, 1])]);
    check(&|| Box::new(Linear), &[tensor(shape), tensor(&[c_out, c, 1])]);
}

fn check_adjoints(device: &Device, (shape, c_out, seed): &Sizes) {
    let (c, c_out, n_terms) = (channels(shape), *c_out, shape.iter().product::<usize>());
    for precision in Precision::ALL {
        let cx = Cx::new(device, &policy(precision));
        let mut rng = Rng::new(*seed);
        let mut tensor = |shape: &[usize]| rng.tensor(device, shape, precision);
        let check =
            |op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor], idx| adjoint(&cx, op, inputs, idx, n_terms, *seed);
        let zero = |shape: &[usize]| zeros(device, shape, precision);
        check(&|| Box::new(Add), &[tensor(shape), zero(shape)], 0);
        check(&|| Box::new(Add), &[zero(shape), tensor(shape)], 1);
        check(&|| Box::new(Subtract), &[tensor(shape), zero(shape)], 0);
        check(&|| Box::new(Subtract), &[zero(shape), tensor(shape)], 1);
        check(&|| Box::new(ChannelBias), &[tensor(shape), zero(&[c])], 0);
        check(&|| Box::new(ChannelBias), &[zero(shape), tensor(&[c])], 1);
        let gate = [tensor(shape), tensor(&[c])];
        let linear = [tensor(shape), tensor(&[c_out, c])];
        for idx in 0..2 {
            check(&|| Box::new(ChannelGate), &gate, idx);
            check(&|| Box::new(Linear), &linear, idx);
        }
    }
}

/// Every result is that of double precision on the CPU but for the rounding of stored values and of sums.
fn check_precisions(device: &Device, (shape, c_out, seed): &Sizes) {
    let cpu = Device::cpu(2).unwrap();
    let (c, c_out, seed) = (channels(shape), *c_out, *seed);
    type Make = fn() -> Box<dyn Op>;
    let ops: [(Make, Vec<Vec<usize>>); 7] = [
        (|| Box::new(Gelu), vec![shape.clone()]),
        (|| Box::new(Tanh), vec![shape.clone()]),
        (|| Box::new(Add), vec![shape.clone(), shape.clone()]),
        (|| Box::new(Subtract), vec![shape.clone(), shape.clone()]),
        (|| Box::new(ChannelGate), vec![shape.clone(), vec![c]]),
        (|| Box::new(ChannelBias), vec![shape.clone(), vec![c]]),
        (|| Box::new(Linear), vec![shape.clone(), vec![c_out, c]]),
    ];
    for (precision, (op, shapes)) in Precision::ALL.into_iter().flat_map(|p| ops.iter().map(move |op| (p, op))) {
        let mut rng = Rng::new(seed);
        let mut value = |n: usize| rounded(&rng.normals(n), precision);
        let n_out = shape.iter().product::<usize>() * if op().name() == "linear" { c_out } else { c } / c;
        let lengths = shapes.iter().map(|shape| shape.iter().product()).chain(std::iter::once(n_out));
        let operands: Vec<Vec<f64>> = lengths.map(&mut value).collect();
        let result = |device: &Device, precision: Precision, operands: &[Vec<f64>]| {
            let inputs: Vec<Value> = shapes.iter().cloned().zip(operands.iter().cloned()).collect();
            let cx = Cx::new(device, &policy(precision));
            run(&cx, op(), &tensors(device, &inputs, precision), &operands[shapes.len()])
        };
        let f = |operands: &[Vec<f64>]| result(&cpu, Precision::F64, operands);
        let (got, want) = (result(device, precision, &operands), f(&operands));
        let mut sensitivities = sensitivity(f, &operands, seed);
        if op().name() == "tanh" {
            // The slope comes from the stored result, as 1 - y^2, and |y| <= 1.
            sensitivities[1] = sensitivities[1].max(2.0 * norm(&operands[1]));
        }
        // The longest sum is over all rows. Tanh keeps its result for backward: one more rounding.
        let (n_terms, roundings) = (operands[0].len(), 2);
        for idx in 0..got.len() {
            let bound = allowed(precision, n_terms, roundings, norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{} result {idx} in {precision}: {error:.3e} > {bound:.3e}", op().name());
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn gradients_match_differences(sizes in sizes()) {
        check_gradients(&Device::cpu(2).unwrap(), &sizes);
    }

    #[test]
    fn linear_ops_are_adjoint_in_every_precision(sizes in sizes()) {
        check_adjoints(&Device::cpu(2).unwrap(), &sizes);
    }

    #[test]
    fn every_precision_is_within_its_roundings(sizes in sizes()) {
        check_precisions(&Device::cpu(2).unwrap(), &sizes);
    }
}

/// Random shapes, then more channels than a block's threads, and rows beyond the blocks of a sum.
fn gpu_sizes() -> Vec<Sizes> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| sizes().new_tree(&mut runner).unwrap().current());
    random.chain([(vec![2, 3, 1031], 7, 3), (vec![3, 1499, 3], 5, 4), (vec![2, 611, 8], 4, 5)]).collect()
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_sizes().iter().for_each(|sizes| check_gradients(&device, sizes));
}

#[test]
fn linear_ops_are_adjoint_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_sizes().iter().for_each(|sizes| check_adjoints(&device, sizes));
}

#[test]
fn every_precision_is_within_its_roundings_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_sizes().iter().for_each(|sizes| check_precisions(&device, sizes));
}

/// Values by hand: which axis is which.
#[test]
fn small_values_by_hand() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F64));
    let t = |shape: &[usize], values: &[f64]| {
        Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
    };
    let x = t(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let value = |op: Box<dyn Op>, inputs: &[&Tensor]| op.forward(&cx, inputs).unwrap().0[0].to_vec::<f64>().unwrap();
    assert_eq!(
        value(Box::new(Linear), &[&x, &t(&[3, 2], &[1.0, 0.0, 0.0, 1.0, 10.0, 100.0])]),
        [1.0, 2.0, 210.0, 3.0, 4.0, 430.0]
    );
    assert_eq!(value(Box::new(ChannelGate), &[&x, &t(&[2], &[2.0, -1.0])]), [2.0, -2.0, 6.0, -4.0]);
    assert_eq!(value(Box::new(ChannelBias), &[&x, &t(&[2], &[10.0, 20.0])]), [11.0, 22.0, 13.0, 24.0]);
    assert_eq!(value(Box::new(Add), &[&x, &x]), [2.0, 4.0, 6.0, 8.0]);
    assert_close!(
        "tanh",
        value(Box::new(Tanh), &[&x]),
        x.to_vec::<f64>().unwrap().iter().map(|v| v.tanh()).collect::<Vec<_>>(),
        1e-15
    );
    // Phi(1) and Phi(2) of the tables.
    let gelu = value(Box::new(Gelu), &[&t(&[1, 4], &[1.0, -1.0, 2.0, 0.0])]);
    assert_close!("gelu", gelu, [0.841_344_746_068_543, -0.158_655_253_931_457, 1.954_499_736_103_642, 0.0], 1e-14);
}

#[test]
fn wrong_lengths_are_errors_that_name_the_operand() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let zero = |shape: &[usize]| zeros(&device, shape, Precision::F32);
    let err = |op: Box<dyn Op>, inputs: &[&Tensor]| op.forward(&cx, inputs).unwrap_err().to_string();
    let x = zero(&[2, 5, 3]);
    assert_eq!(
        err(Box::new(ChannelGate), &[&x, &zero(&[4])]),
        "channel_gate: channel_gate: expected shape [3] for `gate`, found [4]"
    );
    assert!(err(Box::new(ChannelBias), &[&x, &zero(&[2])]).contains("`bias`"));
    assert!(err(Box::new(Linear), &[&x, &zero(&[4, 4])]).contains("`weight`"));
    assert!(err(Box::new(Add), &[&x, &zero(&[2, 5, 4])]).contains("add: expected shape [2, 5, 3]"));
    assert_eq!(err(Box::new(Gelu), &[&x, &x]), "gelu: takes 1 inputs, found 2");
}

#[test]
fn threads_do_not_change_a_bit() {
    for precision in Precision::ALL {
        let results: Vec<_> = devices()
            .iter()
            .map(|device| {
                let mut rng = Rng::new(2);
                let cx = Cx::new(device, &policy(precision));
                let x = rng.tensor(device, &[3, 71, 67, 5], precision);
                let cotangent = rng.normals(x.numel());
                let gelu = run(&cx, Box::new(Gelu), std::slice::from_ref(&x), &cotangent);
                let tanh = run(&cx, Box::new(Tanh), std::slice::from_ref(&x), &cotangent);
                let linear = run(&cx, Box::new(Linear), &[x, rng.tensor(device, &[5, 5], precision)], &cotangent);
                [gelu, tanh, linear].concat()
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}");
    }
}
