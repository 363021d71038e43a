//! Norms, padding, interpolation, selected modes, separable weights: gradients, adjoints, values.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, allowed, cases, grid_and_modes, policy, rounded, run, tensors, transform};
use halfmode_autograd::{Cx, Op};
use halfmode_nn::{FieldNorm, FourierResample, Interpolate, Margin, ModeProduct, NormKind, SelectModes, SpectralConv};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, distance, gpu, gradcheck, norm, sensitivity, tol};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::sync::Arc;

/// Grid, the other grid or padding, modes that both grids resolve, batch, channels.
fn sizes() -> impl Strategy<Value = (Vec<usize>, Vec<usize>, Vec<usize>, usize, usize, u64)> {
    (grid_and_modes(7), 1usize..3, 1usize..4, any::<u64>()).prop_flat_map(|((grid, modes), batch, c, seed)| {
        let other = proptest::collection::vec(1usize..9, grid.len());
        (Just(grid), other, Just(modes), Just(batch), Just(c), Just(seed))
    })
}

fn field(batch: usize, grid: &[usize], c: usize) -> Vec<usize> {
    [&[batch][..], grid, &[c]].concat()
}

fn smaller(modes: &[usize], grid: &[usize]) -> Vec<usize> {
    let last = grid.len() - 1;
    modes.iter().zip(grid).enumerate().map(|(i, (&k, &n))| k.min(if i == last { n / 2 + 1 } else { n })).collect()
}

type Make = Box<dyn Fn() -> Box<dyn Op>>;

/// The linear ops on a field of this grid, with the shapes of their inputs.
fn linear_ops(
    device: &Device,
    precision: Precision,
    (grid, other, modes): (&[usize], &[usize], &[usize]),
    (batch, c): (usize, usize),
) -> Vec<(Make, Vec<Vec<usize>>)> {
    let x = field(batch, grid, c);
    let amount: Vec<usize> = other.iter().map(|n| n % 3).collect();
    let padded: Vec<usize> = grid.iter().zip(&amount).map(|(n, p)| n + 2 * p).collect();
    let mut ops: Vec<(Make, Vec<Vec<usize>>)> = Vec::new();
    let pad = amount.clone();
    ops.push((Box::new(move || Box::new(Margin::Pad(pad.clone()))), vec![x.clone()]));
    ops.push((Box::new(move || Box::new(Margin::Crop(amount.clone()))), vec![field(batch, &padded, c)]));
    let both = smaller(modes, other);
    let plan = |grid: &[usize]| transform(device, grid, &both, precision, None);
    let (analysis, synthesis) = (plan(grid), plan(other));
    let weight = vec![both.iter().product(), 2 * c];
    let (a, s) = (Arc::clone(&analysis), Arc::clone(&synthesis));
    let resample = move || FourierResample { analysis: Arc::clone(&a), synthesis: Arc::clone(&s) };
    ops.push((Box::new(move || Box::new(resample())), vec![x.clone()]));
    let convolution = move || SpectralConv::resampling(Arc::clone(&analysis), Arc::clone(&synthesis));
    let separable = move || convolution().with_product(ModeProduct::Separable);
    ops.push((Box::new(move || Box::new(separable())), vec![x.clone(), weight]));
    if grid.len() < 3 {
        let (from, to) = (grid.to_vec(), other.to_vec());
        ops.push((Box::new(move || Box::new(Interpolate { from: from.clone(), to: to.clone() })), vec![x]));
    }
    let (stored, used) = (modes.to_vec(), both);
    let select = move || SelectModes::new(&stored, &used, Domain::Real);
    ops.push((Box::new(move || Box::new(select())), vec![vec![modes.iter().product(), c, 4]]));
    ops
}

/// Grid, the other grid or padding, modes, batch, channels, seed.
type Sizes = (Vec<usize>, Vec<usize>, Vec<usize>, usize, usize, u64);

/// Few values have a variance near zero, and differences across it are no derivative.
fn grown(grid: &[usize]) -> Vec<usize> {
    grid.iter().map(|n| n + 2).collect()
}

fn check_gradients(device: &Device, (grid, other, modes, batch, c, seed): &Sizes) {
    let mut rng = Rng::new(*seed);
    for (op, shapes) in linear_ops(device, Precision::F64, (grid, other, modes), (*batch, *c)) {
        let inputs: Vec<Tensor> = shapes.iter().map(|shape| rng.tensor(device, shape, Precision::F64)).collect();
        gradcheck(device, &op, &inputs, *seed);
    }
    let mut tensor = |shape: &[usize]| rng.tensor(device, shape, Precision::F64);
    let x = tensor(&field(*batch, &grown(grid), *c));
    gradcheck(device, &|| Box::new(FieldNorm(NormKind::Instance)), std::slice::from_ref(&x), *seed);
    let affine = [x, tensor(&[*c]), tensor(&[*c])];
    gradcheck(device, &|| Box::new(FieldNorm(NormKind::AffineInstance)), &affine, *seed);
    gradcheck(device, &|| Box::new(FieldNorm(NormKind::Group)), &affine, *seed);
}

fn check_adjoints(device: &Device, (grid, other, modes, batch, c, seed): &Sizes) {
    for precision in Precision::ALL {
        let cx = Cx::new(device, &policy(precision));
        let mut rng = Rng::new(*seed);
        for (op, shapes) in linear_ops(device, precision, (grid, other, modes), (*batch, *c)) {
            let inputs: Vec<Tensor> = shapes.iter().map(|shape| rng.tensor(device, shape, precision)).collect();
            let n_terms = 16 * inputs[0].numel().max(other.iter().product::<usize>() * batch * c);
            for idx in 0..inputs.len() {
                adjoint(&cx, &op, &inputs, idx, n_terms, *seed);
            }
        }
    }
}

fn check_normalised(device: &Device, (grid, _, _, batch, c, seed): &Sizes) {
    let (grid, batch, c) = (grown(grid), *batch, *c);
    let rows: usize = grid.iter().product();
    for precision in Precision::ALL {
        let cx = Cx::inference(device, &policy(precision));
        let x = Rng::new(*seed).tensor(device, &field(batch, &grid, c), precision);
        let [one, zero] = [1.0, 0.0]
            .map(|value| Tensor::from_slice(device, &vec![value; c], [c], precision, Purpose::Param).unwrap());
        let run = |op: FieldNorm, inputs: &[&Tensor]| op.forward(&cx, inputs).unwrap().0[0].to_vec::<f64>().unwrap();
        let instance = run(FieldNorm(NormKind::Instance), &[&x]);
        let group = run(FieldNorm(NormKind::Group), &[&x, &one, &zero]);
        let x = x.to_vec::<f64>().unwrap();
        let moments = |values: &[f64]| {
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            (mean, values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n)
        };
        let check = |normalised: Vec<f64>, x: Vec<f64>| {
            let ((mean, var), (_, spread)) = (moments(&normalised), moments(&x));
            // The 1e-5 under the root matters where values are alike. Storage rounds values near 1, sums round those
            // that the mean is taken off.
            let want = spread / (spread + 1e-5);
            let largest = x.iter().fold(0.0, |most: f64, x| most.max(x.abs())) / (spread + 1e-5).sqrt();
            let tolerance = 2.0 * tol(precision, 1) + tol(precision.accumulate(), x.len()) * largest;
            assert!(
                mean.abs() <= tolerance && (var - want).abs() <= 2.0 * tolerance,
                "{precision}: {mean} {var} {want}"
            );
        };
        for b in 0..batch {
            let sample = b * rows * c..(b + 1) * rows * c;
            check(group[sample.clone()].to_vec(), x[sample.clone()].to_vec());
            for channel in 0..c {
                let of = |values: &[f64]| values[sample.clone()].iter().skip(channel).step_by(c).copied().collect();
                check(of(&instance), of(&x));
            }
        }
    }
}

/// Every result is that of double precision on the CPU but for the rounding of stored values and of sums.
fn check_precisions(device: &Device, (grid, other, modes, batch, c, seed): &Sizes) {
    let cpu = Device::cpu(2).unwrap();
    let (batch, c) = (*batch, *c);
    let all_ops = |device: &Device, precision: Precision| {
        let mut ops = linear_ops(device, precision, (grid, other, modes), (batch, c));
        let x = field(batch, &grown(grid), c);
        ops.push((Box::new(|| Box::new(FieldNorm(NormKind::Instance))), vec![x.clone()]));
        let affine = vec![x, vec![c], vec![c]];
        ops.push((Box::new(|| Box::new(FieldNorm(NormKind::AffineInstance))), affine.clone()));
        ops.push((Box::new(|| Box::new(FieldNorm(NormKind::Group))), affine));
        ops
    };
    for precision in Precision::ALL {
        let references = all_ops(&cpu, Precision::F64);
        for ((op, shapes), (reference, _)) in all_ops(device, precision).into_iter().zip(references) {
            let mut rng = Rng::new(*seed);
            let mut value = |shape: &[usize]| rounded(&rng.normals(shape.iter().product()), precision);
            let mut operands: Vec<Vec<f64>> = shapes.iter().map(|shape| value(shape)).collect();
            let given = |operands: &[Vec<f64>]| -> Vec<Value> {
                shapes.iter().cloned().zip(operands.iter().cloned()).collect()
            };
            let cx = Cx::new(&cpu, &policy(Precision::F64));
            let inputs = tensors(&cpu, &given(&operands), Precision::F64);
            let out = reference().forward(&cx, &inputs.iter().collect::<Vec<_>>()).unwrap().0.remove(0);
            operands.push(value(out.shape()));
            let f = |operands: &[Vec<f64>]| {
                run(&cx, reference(), &tensors(&cpu, &given(operands), Precision::F64), &operands[shapes.len()])
            };
            let want = f(&operands);
            let sensitivities = sensitivity(f, &operands, *seed);
            let inputs = tensors(device, &given(&operands), precision);
            let got = run(&Cx::new(device, &policy(precision)), op(), &inputs, &operands[shapes.len()]);
            // Stored on the way of a transform: each axis on both sides, the products, the result, and on a GPU the
            // matrices. Everything else rounds its operands and its result.
            let roundings = 2 * (3 * grid.len() + 2);
            let n_terms = 16 * operands[0].len().max(operands[shapes.len()].len());
            for idx in 0..got.len() {
                let bound = allowed(precision, n_terms, roundings, norm(&want[idx]), sensitivities[idx]);
                let error = distance(&got[idx], &want[idx]);
                let name = op().name();
                assert!(error <= bound, "{name} result {idx} in {precision}: {error:.3e} > {bound:.3e}");
            }
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
    fn norms_leave_mean_zero_and_variance_one(sizes in sizes()) {
        check_normalised(&Device::cpu(2).unwrap(), &sizes);
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn every_precision_is_within_its_roundings(sizes in sizes()) {
        check_precisions(&Device::cpu(2).unwrap(), &sizes);
    }
}

/// Random shapes, then more channels than a block's threads, and more rows than a block's.
fn gpu_sizes() -> Vec<Sizes> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| sizes().new_tree(&mut runner).unwrap().current());
    let wide = (vec![5], vec![7], vec![2], 2, 300, 11);
    let long = (vec![61, 53], vec![40, 59], vec![8, 6], 3, 4, 12);
    random.chain([wide, long]).collect()
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
fn norms_leave_mean_zero_and_variance_one_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_sizes().iter().for_each(|sizes| check_normalised(&device, sizes));
}

#[test]
fn every_precision_is_within_its_roundings_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_sizes().iter().for_each(|sizes| check_precisions(&device, sizes));
}

/// A field of few modes on a finer grid is the same function there, negative frequencies included.
#[test]
fn resampling_keeps_band_limited_fields() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::inference(&device, &policy(Precision::F64));
    let function = |p: f64, q: f64| (std::f64::consts::TAU * (2.0 * p - q)).sin() + 0.5;
    let sampled = |(n, m): (usize, usize)| -> Vec<f64> {
        (0..n * m).map(|i| function((i / m) as f64 / n as f64, (i % m) as f64 / m as f64)).collect()
    };
    let x = Tensor::from_slice(&device, &sampled((9, 8)), [1, 9, 8, 1], Precision::F64, Purpose::Data).unwrap();
    for (n, m) in [(9, 8), (16, 21), (5, 6)] {
        let plan = |grid: &[usize]| transform(&device, grid, &[5, 3], Precision::F64, None);
        let op = FourierResample { analysis: plan(&[9, 8]), synthesis: plan(&[n, m]) };
        let y = op.forward(&cx, &[&x]).unwrap().0[0].to_vec::<f64>().unwrap();
        assert_close!("resampled", y, sampled((n, m)), 1e-12);
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let x = Rng::new(1).tensor(&device, &[1, 4, 4, 2], Precision::F32);
    let short = Rng::new(1).tensor(&device, &[1], Precision::F32);
    let message = |op: &dyn Op, inputs: &[&Tensor]| op.forward(&cx, inputs).unwrap_err().to_string();
    assert!(message(&Margin::Pad(vec![1]), &[&x]).contains("pad"));
    assert!(message(&Margin::Crop(vec![2, 0]), &[&x]).contains("crop"));
    assert!(message(&Interpolate { from: vec![4, 5], to: vec![8, 8] }, &[&x]).contains("interpolate"));
    assert!(message(&FieldNorm(NormKind::Group), &[&x, &short, &short]).contains("weight"));
    let select = SelectModes::new(&[9], &[8], Domain::Real);
    assert!(message(&select, &[&x]).contains("index"));
}
