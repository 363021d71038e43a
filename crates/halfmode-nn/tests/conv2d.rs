//! Convolutions, their transposes, pooling and the rectifier: definitions, adjoints, gradients, precisions.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, allowed, cases, policy, rounded, run, tensors};
use halfmode_autograd::{Cx, Op};
use halfmode_nn::{AveragePool, Conv2d, ConvKind, Init, ParamSpec, Relu, conv2d_reference};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Shape, Tensor};
use halfmode_testkit::{
    Rng, adjoint, assert_close, devices, distance, gpu, gradcheck, norm, rel_l2, run_op, sensitivity, tol,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

/// A legal call.
#[derive(Clone, Debug)]
struct Case {
    conv: Conv2d,
    field: [usize; 4],
    weight: [usize; 4],
    seed: u64,
}

impl Case {
    fn c_y(&self) -> usize {
        self.weight[if self.conv.kind == ConvKind::Forward { 3 } else { 2 }]
    }

    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.field.to_vec(), self.weight.to_vec(), vec![self.c_y()]]
    }

    fn op(&self) -> Box<dyn Op> {
        Box::new(self.conv)
    }

    fn inputs(&self, device: &Device, precision: Precision) -> Vec<Tensor> {
        let mut rng = Rng::new(self.seed);
        self.shapes().iter().map(|shape| rng.tensor(device, shape, precision)).collect()
    }

    /// Products in the longest sum: that of a weight's gradient, or that of a point.
    fn n_terms(&self) -> usize {
        (self.field[0] * (self.field[1] + 8) * (self.field[2] + 8)).max(self.weight.iter().product())
    }

    /// The same, without counting a weight's channels of both sides.
    fn n_products(&self) -> usize {
        let [k1, k2, c_in, c_out] = self.weight;
        (self.field[0] * (self.field[1] + 8) * (self.field[2] + 8)).max(k1 * k2 * c_in.max(c_out))
    }

    fn is_legal(&self) -> bool {
        let zeros = |shape: &[usize]| vec![0.0; shape.iter().product()];
        let (shape, _) =
            conv2d_reference(self.conv, (self.field, &zeros(&self.field)), (self.weight, &zeros(&self.weight)));
        shape.iter().all(|&n| n > 0)
    }
}

/// Fields of 1 to 9 points, kernels of 1 to 5, odd and even, any padding up to 4, channels beside and beyond those of
/// a vector register.
fn call() -> impl Strategy<Value = Case> {
    let pair = |range: std::ops::Range<usize>| [range.clone(), range];
    let channels = prop_oneof![4 => 1usize..6, 1 => 15usize..19];
    let kind = prop_oneof![Just(ConvKind::Forward), Just(ConvKind::Transposed)];
    let sizes = (pair(1..10), pair(1..6), pair(0..5), 1usize..4, channels.clone(), channels);
    (kind, sizes, any::<u64>())
        .prop_map(|(kind, ([n1, n2], [k1, k2], padding, batch, c_in, c_out), seed)| {
            let c_x = if kind == ConvKind::Forward { c_in } else { c_out };
            let conv = Conv2d { kind, padding };
            Case { conv, field: [batch, n1, n2, c_x], weight: [k1, k2, c_in, c_out], seed }
        })
        .prop_filter("something of the field is left", Case::is_legal)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().unwrap()
}

/// Output with and without bias, from the definition.
fn check_definition(device: &Device, case: &Case, precision: Precision) {
    let cx = Cx::new(device, &policy(precision));
    let inputs = case.inputs(device, precision);
    let [x, w, bias] = [0, 1, 2].map(|idx| values(&inputs[idx]));
    let (shape, mut want) = conv2d_reference(case.conv, (case.field, &x), (case.weight, &w));
    let y = case.op().forward(&cx, &[&inputs[0], &inputs[1]]).unwrap().0.remove(0);
    assert_eq!(y.shape(), &Shape::from(shape));
    assert_close!("y", values(&y), want, tol(precision, case.n_terms()));
    want.chunks_mut(case.c_y()).for_each(|y| y.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
    let refs: Vec<&Tensor> = inputs.iter().collect();
    let y = case.op().forward(&cx, &refs).unwrap().0.remove(0);
    assert_close!("y with bias", values(&y), want, tol(precision, case.n_terms()));
}

fn check_gradients(device: &Device, case: &Case) {
    let inputs = case.inputs(device, Precision::F64);
    gradcheck(device, &|| case.op(), &inputs, case.seed);
    gradcheck(device, &|| case.op(), &inputs[..2], case.seed);
}

fn check_adjoints(device: &Device, case: &Case) {
    for precision in Precision::ALL {
        let cx = Cx::new(device, &policy(precision));
        let inputs = case.inputs(device, precision);
        for idx in 0..2 {
            adjoint(&cx, &|| case.op(), &inputs[..2], idx, case.n_terms(), case.seed);
        }
    }
}

impl Case {
    /// Field, weight, bias and cotangent, in numbers that `precision` holds.
    fn operands(&self, precision: Precision) -> Vec<Vec<f64>> {
        let mut rng = Rng::new(self.seed);
        let mut operands: Vec<Vec<f64>> =
            self.shapes().iter().map(|shape| rounded(&rng.normals(shape.iter().product()), precision)).collect();
        let (shape, _) = conv2d_reference(self.conv, (self.field, &operands[0]), (self.weight, &operands[1]));
        operands.push(rounded(&rng.normals(shape.iter().product()), precision));
        operands
    }

    /// Output and gradients.
    fn results(&self, device: &Device, precision: Precision, operands: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let inputs: Vec<Value> = self.shapes().into_iter().zip(operands.iter().cloned()).collect();
        run(&Cx::new(device, &policy(precision)), self.op(), &tensors(device, &inputs, precision), &operands[3])
    }
}

/// Every result is that of double precision but for the rounding of stored values and of sums.
fn check_precisions(device: &Device, case: &Case) {
    let cpu = Device::cpu(2).unwrap();
    for precision in Precision::ALL {
        let operands = case.operands(precision);
        let f = |operands: &[Vec<f64>]| case.results(&cpu, Precision::F64, operands);
        let (got, want) = (case.results(device, precision, &operands), f(&operands));
        let sensitivities = sensitivity(f, &operands, case.seed);
        for idx in 0..got.len() {
            let bound = allowed(precision, case.n_terms(), 2, norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{case:?}: result {idx} in {precision}: {error:.3e} > {bound:.3e}");
        }
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn the_map_is_its_definition(case in call()) {
        devices().iter().for_each(|device| check_definition(device, &case, Precision::F64));
    }

    #[test]
    fn gradients_match_differences(case in call()) {
        check_gradients(&Device::cpu(2).unwrap(), &case);
    }

    #[test]
    fn the_maps_are_adjoint_in_every_precision(case in call()) {
        check_adjoints(&Device::cpu(2).unwrap(), &case);
    }

    /// The gradient by the field is the transpose as the definition has it.
    #[test]
    fn the_gradient_is_the_transposed_definition(case in call()) {
        let device = Device::cpu(2).unwrap();
        let cx = Cx::new(&device, &policy(Precision::F64));
        let inputs = case.inputs(&device, Precision::F64);
        let y = case.op().forward(&cx, &[&inputs[0], &inputs[1]]).unwrap().0.remove(0);
        let g = Rng::new(case.seed ^ 1).normals(y.numel());
        let (_, grads) = run_op(&cx, case.op(), &inputs[..2], &g);
        let kind = if case.conv.kind == ConvKind::Forward { ConvKind::Transposed } else { ConvKind::Forward };
        let adjoint = Conv2d { kind, ..case.conv };
        let image = y.shape()[..].try_into().unwrap();
        let (_, want) = conv2d_reference(adjoint, (image, &g), (case.weight, &values(&inputs[1])));
        assert_close!("gx", values(grads[0].as_ref().unwrap()), want, tol(Precision::F64, case.n_terms()));
    }

    #[test]
    fn every_precision_is_within_its_roundings(case in call()) {
        check_precisions(&Device::cpu(2).unwrap(), &case);
    }
}

/// Kind, field, weight, padding.
type Sizes = (ConvKind, [usize; 4], [usize; 4], [usize; 2]);

/// Channels in eights, which tensor cores take, around the tiles of 64 and 128 channels and of 128 and 256 points; in
/// fours, which kernels of f32 take; large windows, and one too large for these kernels; and some beside them.
const TILES: [Sizes; 19] = [
    (ConvKind::Forward, [1, 1, 1, 8], [1, 1, 8, 8], [0, 0]),
    (ConvKind::Transposed, [1, 1, 1, 8], [3, 3, 16, 8], [1, 1]),
    (ConvKind::Forward, [3, 17, 16, 64], [3, 3, 64, 64], [1, 1]),
    (ConvKind::Transposed, [2, 13, 11, 64], [3, 3, 64, 64], [1, 1]),
    (ConvKind::Forward, [2, 16, 8, 128], [3, 3, 128, 128], [1, 1]),
    (ConvKind::Transposed, [2, 7, 19, 128], [3, 3, 128, 128], [1, 1]),
    (ConvKind::Forward, [2, 5, 31, 40], [5, 2, 40, 72], [3, 0]),
    (ConvKind::Transposed, [3, 6, 5, 72], [2, 5, 24, 72], [1, 3]),
    (ConvKind::Forward, [1, 40, 3, 72], [1, 3, 72, 136], [0, 2]),
    (ConvKind::Transposed, [2, 3, 37, 136], [4, 1, 200, 136], [0, 0]),
    (ConvKind::Forward, [1, 2, 300, 16], [2, 7, 16, 264], [0, 3]),
    (ConvKind::Forward, [2, 23, 21, 3], [3, 3, 3, 64], [1, 1]),
    (ConvKind::Transposed, [2, 9, 10, 65], [3, 3, 67, 65], [1, 1]),
    (ConvKind::Forward, [1, 8, 8, 256], [3, 3, 256, 256], [1, 1]),
    (ConvKind::Forward, [2, 9, 14, 12], [3, 3, 12, 36], [1, 1]),
    (ConvKind::Transposed, [3, 12, 13, 68], [3, 2, 20, 68], [0, 1]),
    (ConvKind::Forward, [5, 3, 4, 4], [2, 1, 4, 132], [3, 0]),
    (ConvKind::Transposed, [2, 9, 10, 8], [8, 8, 8, 8], [4, 3]),
    (ConvKind::Forward, [1, 5, 44, 8], [3, 40, 8, 16], [1, 3]),
];

fn tiles() -> impl Iterator<Item = Case> {
    let case = |(kind, field, weight, padding): Sizes| Case { conv: Conv2d { kind, padding }, field, weight, seed: 6 };
    TILES.into_iter().map(case)
}

fn random_gpu_cases() -> Vec<Case> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    (0..10).map(|_| call().new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn the_map_is_its_definition_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for case in tiles().chain(random_gpu_cases()) {
        [Precision::F64, Precision::F32].iter().for_each(|&precision| check_definition(&device, &case, precision));
    }
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().for_each(|case| check_gradients(&device, case));
    check_gradients(&device, &tiles().nth(6).unwrap());
}

#[test]
fn the_maps_are_adjoint_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    tiles().chain(random_gpu_cases()).for_each(|case| check_adjoints(&device, &case));
}

#[test]
fn every_precision_is_within_its_roundings_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().for_each(|case| check_precisions(&device, case));
}

/// The same as on the CPU in f64 and f32; halves are off by at most twice as much. Sums of halves are f32 in both, but
/// tensor cores cut where others round: a unit in the last place in every step of 16 products.
#[test]
fn a_gpu_is_as_close_as_a_cpu() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    for case in tiles().chain(random_gpu_cases()) {
        for precision in Precision::ALL {
            let operands = case.operands(precision);
            let want = case.results(&cpu, Precision::F64, &operands);
            let [on_cpu, on_gpu] = [&cpu, &device].map(|device| case.results(device, precision, &operands));
            for idx in 0..want.len() {
                let [cpu, gpu] = [&on_cpu, &on_gpu].map(|it| rel_l2(&it[idx], &want[idx]));
                let allowed = match precision {
                    Precision::F64 => 1e-10,
                    Precision::F32 => 1e-5,
                    _ => 2.0 * cpu + (case.n_products() / 16 + 4) as f64 * 2f64.powi(-23),
                };
                assert!(gpu <= allowed, "{case:?}: result {idx} in {precision}: {gpu:.2e}, on the CPU {cpu:.2e}");
            }
        }
    }
}

/// Sums have one order, and the planning device counts what a GPU allocates.
#[test]
fn runs_change_no_bit_and_plans_count_every_byte_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for case in tiles() {
        for precision in Precision::ALL {
            let operands = case.operands(precision);
            let peaks = [device.clone(), device.twin()].map(|device| {
                device.reset_peak();
                let inputs: Vec<Value> = case.shapes().into_iter().zip(operands.iter().cloned()).collect();
                let inputs = tensors(&device, &inputs, precision);
                drop(run_op(&Cx::new(&device, &policy(precision)), case.op(), &inputs, &operands[3]));
                device.memory()
            });
            for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
                assert_eq!(run.peak, planned.peak, "{case:?}: {purpose} in {precision}");
            }
            let [first, second] = [(); 2].map(|()| case.results(&device, precision, &operands));
            assert_eq!(first, second, "{case:?} in {precision}");
        }
    }
}

/// The sizes of a residual network's blocks, in which every path of the matrix products is the fast one.
#[test]
fn the_sizes_of_networks_are_right_too() {
    let device = Device::cpu(2).unwrap();
    for (n, c_in, c_out, k) in [(32, 16, 16, 3), (16, 32, 32, 3), (8, 64, 64, 3), (32, 3, 16, 3), (12, 16, 32, 1)] {
        for kind in [ConvKind::Forward, ConvKind::Transposed] {
            let conv = Conv2d { kind, padding: [k / 2; 2] };
            let c_x = if kind == ConvKind::Forward { c_in } else { c_out };
            let case = Case { conv, field: [2, n, n, c_x], weight: [k, k, c_in, c_out], seed: 5 };
            let inputs = case.inputs(&device, Precision::F32);
            let (x, w) = (values(&inputs[0]), values(&inputs[1]));
            let cx = Cx::new(&device, &policy(Precision::F32));
            let (_, want) = conv2d_reference(conv, (case.field, &x), (case.weight, &w));
            let y = case.op().forward(&cx, &[&inputs[0], &inputs[1]]).unwrap().0.remove(0);
            assert_close!("y", values(&y), want, tol(Precision::F32, k * k * c_x));
            adjoint(&cx, &|| case.op(), &inputs[..2], 1, case.n_terms(), 3);
        }
    }
}

/// Numbers by hand: which axis is which, and that a kernel is not turned round.
#[test]
fn small_values_by_hand() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F64));
    let tensor = |shape: &[usize], values: &[f64]| {
        Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
    };
    let x = tensor(&[1, 2, 3, 1], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let w = tensor(&[1, 2, 1, 1], &[1.0, 10.0]);
    let value = |op: Conv2d, x: &Tensor| values(&op.forward(&cx, &[x, &w]).unwrap().0[0]);
    assert_eq!(value(Conv2d::new(0), &x), [21.0, 32.0, 54.0, 65.0]);
    let two = tensor(&[1, 2, 1, 1], &[1.0, 2.0]);
    assert_eq!(value(Conv2d::transposed(0), &two), [1.0, 10.0, 2.0, 20.0]);
    let pool = AveragePool::halving([2, 3]).forward(&cx, &[&x]).unwrap().0.remove(0);
    assert_eq!((pool.shape(), values(&pool)), (&Shape::from([1, 1, 1, 1]), vec![3.0]));
    let relu = Relu.forward(&cx, &[&tensor(&[4], &[-1.0, 0.0, 2.0, f64::NAN])]).unwrap().0.remove(0);
    assert!(values(&relu)[..3] == [0.0, 0.0, 2.0] && values(&relu)[3].is_nan());
}

/// The file's order is torch's.
#[test]
fn weights_are_stored_in_the_order_of_the_kernel() {
    let spec = ParamSpec::convolution("w", [2, 3, 2, 1], Init::Zeros);
    assert_eq!(spec.stored_shape(), Shape::from([2, 1, 3, 2]));
    let file: Vec<usize> = (0..12).collect();
    let stored = spec.to_stored(&file);
    // Output channel 1, input channel 2, kernel row 1.
    assert_eq!(stored[(3 + 2) * 2 + 1], 6 + 2 * 2 + 1);
    assert_eq!(spec.to_file(&stored), file);
}

/// Weights keep a format of their own: results are those of the same numbers in the accumulator's.
#[test]
fn weights_of_another_format_are_read_too() {
    let device = Device::cpu(2).unwrap();
    for (storage, weight) in [
        (Precision::F64, Precision::F32),
        (Precision::F64, Precision::F16),
        (Precision::F32, Precision::F64),
        (Precision::Bf16, Precision::F64),
    ] {
        let cx = Cx::new(&device, &policy(storage));
        for kind in [ConvKind::Forward, ConvKind::Transposed] {
            let (conv, mut rng) = (Conv2d { kind, padding: [1, 0] }, Rng::new(4));
            let (x, w) = (rng.tensor(&device, &[2, 5, 6, 3], storage), rng.tensor(&device, &[3, 2, 3, 3], weight));
            let wide = w.cast(storage.accumulate(), Purpose::Param).unwrap();
            let n = conv.forward(&cx, &[&x, &w]).unwrap().0[0].numel();
            let [got, want] = [w, wide].map(|w| run(&cx, Box::new(conv), &[x.clone(), w], &Rng::new(5).normals(n)));
            assert!(got.concat().iter().all(|it| it.is_finite()), "{kind:?}: {weight} under {storage}");
            assert_eq!(got, want, "{kind:?}: {weight} under {storage}");
        }
    }
}

/// Means and the way back, loop by loop in double precision.
fn pool_reference(pool: AveragePool, [batch, c]: [usize; 2], x: &[f64], g: &[f64]) -> [Vec<f64>; 2] {
    let AveragePool { field: [n1, n2], window: [w1, w2] } = pool;
    let (m1, m2, share) = (n1 / w1, n2 / w2, 1.0 / (w1 * w2) as f64);
    let (mut y, mut gx) = (vec![0.0; batch * m1 * m2 * c], vec![0.0; x.len()]);
    for (b, i, j) in (0..batch).flat_map(|b| (0..m1).flat_map(move |i| (0..m2).map(move |j| (b, i, j)))) {
        for (d1, d2, channel) in (0..w1).flat_map(|d1| (0..w2).flat_map(move |d2| (0..c).map(move |c| (d1, d2, c)))) {
            let to = ((b * m1 + i) * m2 + j) * c + channel;
            let from = ((b * n1 + i * w1 + d1) * n2 + j * w2 + d2) * c + channel;
            y[to] += share * x[from];
            gx[from] = share * g[to];
        }
    }
    [y, gx]
}

/// A mean and its gradient round once; a sum of a window's points as sums do.
#[test]
fn pools_are_their_definition() {
    let devices = devices().into_iter().chain(gpu());
    for device in devices {
        for (field, window) in
            [([4, 6], [2, 2]), ([5, 7], [2, 3]), ([3, 5], [3, 5]), ([1, 9], [1, 4]), ([6, 1], [5, 1])]
        {
            let pool = AveragePool { field, window };
            for precision in Precision::ALL {
                let cx = Cx::new(&device, &policy(precision));
                let x = Rng::new(3).tensor(&device, &[2, field[0], field[1], 3], precision);
                let n = 2 * (field[0] / window[0]) * (field[1] / window[1]) * 3;
                let g = rounded(&Rng::new(4).normals(n), precision);
                let want = pool_reference(pool, [2, 3], &values(&x), &g);
                let got = run(&cx, Box::new(pool), &[x], &g);
                let bound = tol(precision, window[0] * window[1]);
                assert_close!(format!("y of {pool:?} in {precision}"), got[0], want[0], bound);
                assert_close!(format!("gx of {pool:?} in {precision}"), got[1], want[1], bound);
            }
        }
    }
}

#[test]
fn pools_and_rectifiers_have_gradients_and_precisions() {
    check_pools(&Device::cpu(2).unwrap());
}

#[test]
fn pools_and_rectifiers_have_gradients_and_precisions_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_pools(&device);
    // The definition, from the CPU; a window of one thread and of a block.
    for (field, window) in [([7, 9], [2, 4]), ([19, 13], [9, 8]), ([11, 17], [11, 17])] {
        let pool = AveragePool { field, window };
        for (precision, tolerance) in [(Precision::F64, 1e-14), (Precision::F32, 1e-6), (Precision::F16, 1e-3)] {
            let [want, got] = [Device::cpu(2).unwrap(), device.clone()].map(|device| {
                let cx = Cx::new(&device, &policy(precision));
                let x = Rng::new(3).tensor(&device, &[3, field[0], field[1], 37], precision);
                let n = pool.forward(&cx, &[&x]).unwrap().0[0].numel();
                run(&cx, Box::new(pool), &[x], &rounded(&Rng::new(4).normals(n), precision)).concat()
            });
            assert!(rel_l2(&got, &want) <= tolerance, "{pool:?} in {precision}");
        }
    }
    let cx = Cx::new(&device, &policy(Precision::F32));
    let x = Tensor::from_slice(&device, &[-1.0, 0.0, 2.0, f64::NAN], [4], Precision::F32, Purpose::Activation);
    let y = values(&Relu.forward(&cx, &[&x.unwrap()]).unwrap().0[0]);
    assert!(y[..3] == [0.0, 0.0, 2.0] && y[3].is_nan());
}

fn check_pools(device: &Device) {
    for (field, window) in [([4, 6], [2, 2]), ([5, 7], [2, 3]), ([3, 5], [3, 5]), ([1, 1], [1, 1])] {
        let pool = AveragePool { field, window };
        for precision in Precision::ALL {
            let cx = Cx::new(device, &policy(precision));
            let x = Rng::new(3).tensor(device, &[2, field[0], field[1], 3], precision);
            adjoint(&cx, &|| Box::new(pool), std::slice::from_ref(&x), 0, field[0] * field[1], 4);
        }
        let x = Rng::new(3).tensor(device, &[2, field[0], field[1], 3], Precision::F64);
        gradcheck(device, &|| Box::new(pool), std::slice::from_ref(&x), 5);
        gradcheck(device, &|| Box::new(Relu), std::slice::from_ref(&x), 6);
    }
}

#[test]
fn wrong_sizes_are_errors_that_say_what_to_do() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let zeros = |shape: &[usize]| {
        let n = shape.iter().product::<usize>();
        Tensor::from_slice(&device, &vec![0.0; n], shape, Precision::F32, Purpose::Activation).unwrap()
    };
    let said = |op: &dyn Op, inputs: &[&Tensor]| op.forward(&cx, inputs).unwrap_err().to_string();
    let (x, w) = (zeros(&[1, 4, 4, 3]), zeros(&[5, 5, 3, 2]));
    let message = said(&Conv2d::new(0), &[&x, &w]);
    assert!(message.contains("a field of 4 x 4 points under a kernel of 5 x 5 with padding 0 and 0"), "{message}");
    assert!(said(&Conv2d::new(2), &[&zeros(&[1, 4, 4, 2]), &w]).contains("expected shape [1, 4, 4, 3] for `x`"));
    assert!(said(&Conv2d::new(2), &[&x, &zeros(&[5, 5, 3])]).contains("`weight`"));
    assert!(said(&Conv2d::new(2), &[&x, &w, &zeros(&[3])]).contains("`bias`"));
    assert!(said(&Conv2d::new(2), &[&x]).contains("takes 3 inputs"));
    assert!(said(&Conv2d::transposed(4), &[&zeros(&[1, 4, 4, 2]), &w]).contains("conv_transpose2d"));
    // Paddings beyond every address space, or beyond that of the field with them.
    let nothing = Conv2d { kind: ConvKind::Transposed, padding: [usize::MAX; 2] };
    assert!(said(&nothing, &[&zeros(&[1, 4, 4, 2]), &w]).contains("nothing is left"));
    for padding in [usize::MAX, usize::MAX / 2, 1 << 62, 1 << 40] {
        assert!(said(&Conv2d::new(padding), &[&x, &w]).contains("overflows the address space"), "{padding}");
    }
    assert!(said(&AveragePool::halving([1, 4]), &[&zeros(&[1, 1, 4, 3])]).contains("kernel of 2 x 2"));
    assert!(said(&AveragePool::halving([2, 4]), &[&x]).contains("`x`"));
}

/// Neither threads nor the planning device's twin change anything: bits there, bytes here.
#[test]
fn threads_change_no_bit_and_plans_count_every_byte() {
    let case = Case { conv: Conv2d::new(1), field: [3, 17, 13, 5], weight: [3, 3, 5, 18], seed: 8 };
    for precision in Precision::ALL {
        let policy = policy(precision);
        let results: Vec<_> = devices()
            .iter()
            .map(|device| {
                let n = 3 * 17 * 13 * 18;
                run(&Cx::new(device, &policy), case.op(), &case.inputs(device, precision), &Rng::new(2).normals(n))
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}");
        let cpu = Device::cpu(2).unwrap();
        let peaks = [cpu.clone(), cpu.twin()].map(|device| {
            let inputs = case.inputs(&device, precision);
            let (y, _) = run_op(&Cx::new(&device, &policy), case.op(), &inputs, &vec![0.5; 3 * 17 * 13 * 18]);
            drop(y);
            device.memory()
        });
        for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
            assert_eq!(run.peak, planned.peak, "{purpose} in {precision}");
        }
    }
}
