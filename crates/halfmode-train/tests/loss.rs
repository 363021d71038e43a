//! Losses against the peer's numbers, by central differences, in every precision, and on the
//! planning device.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use expect_test::expect;
use halfmode_autograd::{Cx, Op, Outputs, Saved, Tape};
use halfmode_precision::{Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{
    Golden, Rng, assert_close, devices, distance, gradcheck, norm, rel_l2, run_op, sensitivity, tol,
};
use halfmode_train::{H1Loss, LpLoss, Reduction, relative_h1, relative_l2};
use proptest::prelude::*;
use std::sync::Arc;

/// A loss whose target is fixed, so that every input has a gradient.
#[derive(Debug)]
struct Against<L>(L, Tensor);

impl<L: Op> Op for Against<L> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        self.0.forward(cx, &[inputs[0], &self.1])
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let mut grads = self.0.backward(cx, saved, grads, &[true, false])?;
        assert!(matches!(grads.pop(), Some(None)), "a target has a gradient");
        Ok(grads)
    }
}

fn double(device: &Device) -> Cx {
    Cx::new(device, &Arc::new(PrecisionPolicy::double()))
}

fn lp(p: f64, relative: bool, reduction: Reduction, measure: f64) -> LpLoss {
    LpLoss { p, relative, reduction, measure }
}

fn h1(relative: bool, reduction: Reduction, periodic: Vec<bool>) -> H1Loss {
    H1Loss { relative, reduction, periodic, measure: 1.0 }
}

/// The peer's losses in one, two and three dimensions: values and gradients, in double precision and, to
/// 1e-6, in single precision.
#[test]
fn golden_losses() {
    let tau = std::f64::consts::TAU;
    for (name, d) in [("losses/losses_1d", 1), ("losses_2d", 2), ("losses/losses_3d", 3)] {
        let golden = Golden::load(name);
        let variants = || -> Vec<(&str, Box<dyn Op>)> {
            vec![
                ("lp2_rel_sum", Box::new(lp(2.0, true, Reduction::Sum, 1.0))),
                ("lp2_rel_mean", Box::new(lp(2.0, true, Reduction::Mean, 1.0))),
                ("lp2_abs_mean", Box::new(lp(2.0, false, Reduction::Mean, 1.0))),
                ("lp1_rel_mean", Box::new(lp(1.0, true, Reduction::Mean, 1.0))),
                ("lp3_abs_sum", Box::new(lp(3.0, false, Reduction::Sum, 1.0))),
                // Two cases do not name their reduction; their values are a sixth of the sum over 3 x 2 fields.
                ("lp2_abs_measure2pi", Box::new(lp(2.0, false, Reduction::Mean, tau))),
                ("h1_rel_sum", Box::new(h1(true, Reduction::Sum, vec![]))),
                ("h1_abs_mean", Box::new(h1(false, Reduction::Mean, vec![]))),
                ("h1_rel_nonperiodic", Box::new(h1(true, Reduction::Mean, vec![false; d]))),
            ]
        };
        assert_eq!(golden.names("f64/grad_in/").count(), variants().len());
        let full = Arc::new(PrecisionConfig::new(Preset::Full, Precision::F16).resolve().unwrap());
        for device in devices() {
            let single = Cx::new(&device, &full);
            for (precision, cx, tolerances) in
                [(Precision::F64, double(&device), [1e-10, 1e-9]), (Precision::F32, single, [1e-6, 1e-6])]
            {
                let tensor = |name: &str| {
                    let (shape, values) = golden.get(name);
                    Tensor::from_slice(&device, values, shape, precision, Purpose::Data).unwrap()
                };
                for (name, loss) in variants() {
                    let mut tape = Tape::new(cx.clone());
                    let (x, y) = (tape.leaf(tensor("in/x")), tape.constant(tensor("in/y")));
                    let loss = tape.apply_many(loss, &[&x, &y]).unwrap().remove(0);
                    let case = format!("{name} of {d} axes in {precision}");
                    let value = loss.value().to_vec::<f64>().unwrap();
                    assert_close!(case, value, *golden.get(&format!("f64/{name}")).1, tolerances[0]);
                    let mut grad = Vec::new();
                    let keep = &mut |_, tensor: Tensor| {
                        grad = tensor.to_vec::<f64>().unwrap();
                        Ok(())
                    };
                    tape.backward(loss, 1.0, keep).unwrap();
                    assert_close!(case, grad, *golden.get(&format!("f64/grad_in/{name}")).1, tolerances[1]);
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Case {
    shape: Vec<usize>,
    relative: bool,
    mean: bool,
    periodic: Vec<bool>,
    measure: f64,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let axis = (any::<bool>(), 1usize..12).prop_map(|(periodic, n)| (periodic, if periodic { n } else { n.max(4) }));
    let axes = proptest::collection::vec(axis, 1..=3);
    (axes, 1usize..3, 1usize..3, any::<[bool; 2]>(), 0.3f64..7.0, any::<u64>()).prop_map(
        |(axes, batch, channels, [relative, mean], measure, seed)| {
            let shape = [batch, channels].into_iter().chain(axes.iter().map(|axis| axis.1)).collect();
            let periodic = axes.iter().map(|axis| axis.0).collect();
            Case { shape, relative, mean, periodic, measure, seed }
        },
    )
}

impl Case {
    fn reduction(&self) -> Reduction {
        if self.mean { Reduction::Mean } else { Reduction::Sum }
    }

    fn h1(&self) -> H1Loss {
        let (relative, reduction) = (self.relative, self.reduction());
        H1Loss { relative, reduction, periodic: self.periodic.clone(), measure: self.measure }
    }

    fn pair(&self, device: &Device, precision: Precision) -> [Tensor; 2] {
        let mut rng = Rng::new(self.seed);
        [rng.tensor(device, &self.shape, precision), rng.tensor(device, &self.shape, precision)]
    }
}

/// The H1 loss by its definition: one point, one axis and one neighbour at a time.
fn naive_h1(case: &Case, x: &[f64], y: &[f64]) -> f64 {
    let grid = &case.shape[2..];
    let n_points: usize = grid.iter().product();
    let norm = |u: &[f64]| {
        let mut sum = 0.0;
        for point in 0..n_points {
            sum += u[point] * u[point];
            for (axis, &n) in grid.iter().enumerate() {
                let stride: usize = grid[axis + 1..].iter().product();
                let i = point / stride % n;
                let h = case.measure / n as f64;
                let at = |j: usize| u[point + j * stride - i * stride];
                let slope = match i {
                    0 if !case.periodic[axis] => (-11.0 * at(0) + 18.0 * at(1) - 9.0 * at(2) + 2.0 * at(3)) / (6.0 * h),
                    i if i == n - 1 && !case.periodic[axis] => {
                        (11.0 * at(n - 1) - 18.0 * at(n - 2) + 9.0 * at(n - 3) - 2.0 * at(n - 4)) / (6.0 * h)
                    }
                    i => (at((i + 1) % n) - at((i + n - 1) % n)) / (2.0 * h),
                };
                sum += slope * slope;
            }
        }
        sum.sqrt()
    };
    let n_fields = case.shape[0] * case.shape[1];
    let quadrature: f64 = grid.iter().map(|&n| case.measure / n as f64).product();
    let errors = x.chunks(n_points).zip(y.chunks(n_points)).map(|(x, y)| {
        let error = norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>());
        if case.relative { error / (norm(y) + 1e-8) } else { error * quadrature.sqrt() }
    });
    let sum: f64 = errors.sum();
    if case.mean { sum / n_fields as f64 } else { sum }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn h1_is_its_definition_and_its_gradient_is_right(case in case()) {
        let device = Device::cpu(2).unwrap();
        let [x, y] = case.pair(&device, Precision::F64);
        let out = case.h1().forward(&double(&device), &[&x, &y]).unwrap().0.remove(0).to_vec::<f64>().unwrap();
        let want = naive_h1(&case, &x.to_vec::<f64>().unwrap(), &y.to_vec::<f64>().unwrap());
        assert_close!("h1", out, [want], 1e-12);
        gradcheck(&device, &|| Box::new(Against(case.h1(), y.clone())), &[x], case.seed);
    }

    #[test]
    fn lp_gradient_is_right(case in case(), p in prop_oneof![Just(2.0), Just(1.0), 1.5f64..4.0]) {
        let device = Device::cpu(2).unwrap();
        let [x, y] = case.pair(&device, Precision::F64);
        // Third derivatives of |e|^p are large near zero, and the check's error with them: keep off.
        let x = if p.to_bits() == 2f64.to_bits() { x } else {
            let (x, y) = (x.to_vec::<f64>().unwrap(), y.to_vec::<f64>().unwrap());
            let apart: Vec<f64> = x.iter().zip(&y).map(|(x, y)| x + (x - y).signum()).collect();
            Tensor::from_slice(&device, &apart, case.shape.as_slice(), Precision::F64, Purpose::Activation).unwrap()
        };
        let loss = lp(p, case.relative, case.reduction(), case.measure);
        gradcheck(&device, &|| Box::new(Against(loss, y.clone())), &[x], case.seed);
    }

    #[test]
    fn every_precision_agrees_with_double(case in case(), p in prop_oneof![Just(1.0), Just(2.0), Just(3.0)]) {
        let mut bits: Vec<Vec<u64>> = Vec::new();
        for device in devices() {
            let mut of_device = Vec::new();
            for (precision, policy) in [
                (Precision::F32, PrecisionPolicy::full()),
                (Precision::F16, PrecisionPolicy::mixed(Precision::F16)),
                (Precision::Bf16, PrecisionPolicy::mixed(Precision::Bf16)),
            ] {
                let [x, y] = case.pair(&device, precision);
                let cx = Cx::new(&device, &Arc::new(policy));
                let lp = lp(p, case.relative, case.reduction(), case.measure);
                for h1 in [false, true] {
                    let op = |y: Tensor| -> Box<dyn Op> {
                        if h1 { Box::new(Against(case.h1(), y)) } else { Box::new(Against(lp, y)) }
                    };
                    let (got, grads) = run_op(&cx, op(y.clone()), std::slice::from_ref(&x), &[1.0]);
                    let f = |operands: &[Vec<f64>]| {
                        let tensor = |values: &[f64]| {
                            let shape = case.shape.as_slice();
                            Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
                        };
                        let [x, y] = [tensor(&operands[0]), tensor(&operands[1])];
                        let (loss, grads) = run_op(&double(&device), op(y), &[x], &[1.0]);
                        [loss, grads[0].clone().unwrap()].map(|it| it.to_vec::<f64>().unwrap()).to_vec()
                    };
                    let operands = [&x, &y].map(|it| it.to_vec::<f64>().unwrap());
                    let (want, mut moves) = (f(&operands), sensitivity(f, &operands, case.seed));
                    if !h1 && p.to_bits() == 1f64.to_bits() {
                        // Signs of errors times a constant: they jump where an error is zero, and are not rounded.
                        moves[1] = 0.0;
                    }
                    let grad = grads[0].as_ref().unwrap();
                    prop_assert_eq!(got.precision(), Precision::F32);
                    prop_assert_eq!(grad.precision(), precision);
                    let n = x.numel();
                    // Halves round only the gradient; differences at an edge cancel.
                    let floor = if precision == Precision::F16 { 1e-7 * (n as f64).sqrt() } else { 0.0 };
                    let allowed = |idx: usize, precision| tol(precision, n) * norm(&want[idx]).max(moves[idx]);
                    let (loss, got) = (got.to_vec::<f64>().unwrap(), grad.to_vec::<f64>().unwrap());
                    let errors = [distance(&loss, &want[0]), distance(&got, &want[1])];
                    let allowed = [allowed(0, Precision::F32), allowed(1, precision) + floor];
                    prop_assert!(errors[0] <= allowed[0], "loss in {precision}: {:e} > {:e}", errors[0], allowed[0]);
                    prop_assert!(errors[1] <= allowed[1], "gradient in {precision}: {:e} > {:e}", errors[1], allowed[1]);
                    of_device.extend(got.iter().map(|v| v.to_bits()));
                }
            }
            bits.push(of_device);
        }
        prop_assert_eq!(&bits[0], &bits[1], "another number of threads gave other bits");
    }
}

#[test]
fn a_perfect_prediction_has_no_error_and_no_gradient() {
    let device = Device::cpu(1).unwrap();
    let x = Rng::new(1).tensor(&device, &[2, 1, 8], Precision::F64);
    for op in [
        Box::new(Against(LpLoss::default(), x.clone())) as Box<dyn Op>,
        Box::new(Against(lp(1.0, true, Reduction::Sum, 1.0), x.clone())),
        Box::new(Against(lp(3.5, false, Reduction::Mean, 1.0), x.clone())),
        Box::new(Against(H1Loss::default(), x.clone())),
    ] {
        let (loss, grads) = run_op(&double(&device), op, std::slice::from_ref(&x), &[1.0]);
        assert_eq!(loss.to_vec::<f64>().unwrap(), [0.0]);
        assert_eq!(grads[0].as_ref().unwrap().to_vec::<f64>().unwrap(), [0.0; 16]);
    }
}

#[test]
fn what_is_not_finite_is_seen() {
    let device = Device::cpu(1).unwrap();
    let make = |values: &[f64]| Tensor::from_slice(&device, values, [1, 1, 4], Precision::F32, Purpose::Data).unwrap();
    let (x, y) = (make(&[1.0, f64::NAN, 0.0, 2.0]), make(&[1.0; 4]));
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::full()));
    for op in [
        Box::new(Against(LpLoss::default(), y.clone())) as Box<dyn Op>,
        Box::new(Against(lp(1.0, true, Reduction::Sum, 1.0), y.clone())),
        Box::new(Against(lp(3.0, true, Reduction::Sum, 1.0), y.clone())),
        Box::new(Against(H1Loss::default(), y.clone())),
    ] {
        let (loss, grads) = run_op(&cx, op, std::slice::from_ref(&x), &[1.0]);
        assert!(!loss.all_finite() && !grads[0].as_ref().unwrap().all_finite());
    }
}

#[test]
fn saved_memory_and_the_plan() {
    let policy = Arc::new(PrecisionPolicy::mixed(Precision::F16));
    let mut peaks = Vec::new();
    let cpu = Device::cpu(2).unwrap();
    for device in [cpu.clone(), cpu.twin()] {
        for h1 in [false, true] {
            let make = |precision, purpose| {
                let values = Rng::new(3).normals(4 * 300);
                Tensor::from_slice(&device, &values, [2, 2, 15, 20], precision, purpose).unwrap()
            };
            let mut tape = Tape::new(Cx::new(&device, &policy));
            let x = tape.leaf(make(Precision::F16, Purpose::Activation));
            let y = tape.constant(make(Precision::F32, Purpose::Data));
            device.reset_peak();
            let op: Box<dyn Op> = if h1 { Box::new(H1Loss::default()) } else { Box::new(LpLoss::default()) };
            let loss = tape.apply_many(op, &[&x, &y]).unwrap().remove(0);
            if h1 {
                // The prediction's buffer is the model's output: this op is the one that keeps it.
                expect![[r#"
                    op       role        shape           dtype  bytes  own
                    h1_loss  prediction  [2, 2, 15, 20]  f16     2400  yes
                    h1_loss  target      [2, 2, 15, 20]  f32        0  shared
                    h1_loss  norms       [2, 2, 2]       f32       32  yes
                    total 2432 bytes"#]]
                .assert_eq(&tape.memory_report().to_string());
            }
            tape.backward(loss, 256.0, &mut |_, _| Ok(())).unwrap();
            peaks.push(Purpose::ALL.map(|purpose| device.memory().of(purpose).peak));
        }
    }
    assert_eq!(peaks[..2], peaks[2..], "the plan counts other bytes than the run");
}

#[test]
fn wrong_use_is_refused() {
    let device = Device::cpu(1).unwrap();
    let cx = double(&device);
    let tensor = |shape: &[usize]| Rng::new(0).tensor(&device, shape, Precision::F64);
    let message =
        |op: &dyn Op, x: &[usize], y: &[usize]| op.forward(&cx, &[&tensor(x), &tensor(y)]).unwrap_err().to_string();
    let loss = H1Loss::default();
    assert!(message(&loss, &[1, 1, 4], &[1, 1, 5]).contains("expected shape [1, 1, 4] for `target`, found [1, 1, 5]"));
    assert!(message(&loss, &[3, 4], &[3, 4]).contains("needs shape [batch, channels, n_1"));
    assert!(message(&loss, &[0, 1, 4], &[0, 1, 4]).contains("needs shape [batch, channels, n_1"));
    assert!(message(&h1(true, Reduction::Sum, vec![true]), &[1, 1, 4, 4], &[1, 1, 4, 4]).contains("the grid has 2"));
    assert!(
        message(&h1(true, Reduction::Sum, vec![false]), &[1, 1, 3], &[1, 1, 3]).contains("axis 0 of the grid has 3")
    );
    assert!(message(&lp(0.5, true, Reduction::Sum, 1.0), &[1, 1, 4], &[1, 1, 4]).contains("p = 0.5 is not"));
    assert!(message(&lp(2.0, true, Reduction::Sum, 0.0), &[1, 1, 4], &[1, 1, 4]).contains("measure = 0 is not"));
}

#[test]
fn evaluation_is_the_loss_per_sample() {
    let device = Device::cpu(1).unwrap();
    let mut rng = Rng::new(9);
    let shape = [3, 2, 6, 5];
    let [x, y] = [(); 2].map(|()| rng.tensor(&device, &shape, Precision::F32).to_vec::<f32>().unwrap());
    let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    let l2 = relative_l2(&x, &y, 3).unwrap();
    let h1 = relative_h1(&x, &y, &shape, &[false, true]).unwrap();
    for sample in 0..3 {
        let range = sample * 60..(sample + 1) * 60;
        assert!((l2[sample] - rel_l2(&wide(&x[range.clone()]), &wide(&y[range.clone()]))).abs() < 1e-7);
        // Both channels under one root: the absolute losses of the two, as a two-vector.
        let case = |relative| Case {
            shape: vec![1, 1, 6, 5],
            relative,
            mean: false,
            periodic: vec![false, true],
            measure: 1.0,
            seed: 0,
        };
        let channel = |values: &[f32], c: usize| wide(&values[range.start + 30 * c..range.start + 30 * (c + 1)]);
        let size = |x: &[f32], y: &[f32]| {
            let square = |c| naive_h1(&case(false), &channel(x, c), &channel(y, c)).powi(2);
            (square(0) + square(1)).sqrt()
        };
        let want = size(&x, &y) / size(&y, &[0.0; 180]);
        assert!((h1[sample] - want).abs() < 1e-7, "{} {want}", h1[sample]);
    }
    assert!(relative_l2(&x, &y[1..], 3).is_err() && relative_l2(&x, &y, 7).is_err() && relative_l2(&x, &y, 0).is_err());
    assert!(relative_l2::<f32>(&[], &[], 0).unwrap().is_empty());
    assert!(relative_h1(&x, &y, &[3, 60], &[]).is_err() && relative_h1(&x, &y, &[usize::MAX, 2, 2], &[]).is_err());
}
