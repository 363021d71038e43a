//! The fused perceptron against the composition of small ops.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{cases, policy};
use halfmode_autograd::{Cx, LeafId, Op, Tape};
use halfmode_nn::{ChannelBias, Linear, Tanh, TanhMlp, TimeColumn};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, assert_close, devices, gpu, gradcheck, norm, run_op, tol};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Case {
    time: TimeColumn,
    rows: Vec<usize>,
    /// Channels in, of every hidden layer, and out.
    widths: Vec<usize>,
    seed: u64,
}

impl Case {
    fn op(&self) -> TanhMlp {
        TanhMlp(self.time)
    }

    fn n_rows(&self) -> usize {
        self.rows.iter().product()
    }

    fn n_out(&self) -> usize {
        self.n_rows() * self.widths[self.widths.len() - 1]
    }

    /// The state, the time, weights and biases.
    fn inputs(&self, device: &Device, precision: Precision) -> Vec<Tensor> {
        let mut rng = Rng::new(self.seed);
        let mut inputs = vec![rng.tensor(device, &[&self.rows[..], &self.widths[..1]].concat(), precision)];
        if self.time == TimeColumn::Last {
            let t = Tensor::from_slice(device, &[0.375], [1], Precision::F64, Purpose::Activation).unwrap();
            inputs.push(t);
        }
        for (idx, pair) in self.widths.windows(2).enumerate() {
            let c_in = pair[0] + usize::from(idx == 0 && self.time == TimeColumn::Last);
            let scale = 1.0 / (c_in as f64).sqrt();
            let w: Vec<f64> = rng.normals(pair[1] * c_in).iter().map(|w| w * scale).collect();
            inputs.push(Tensor::from_slice(device, &w, [pair[1], c_in], precision, Purpose::Param).unwrap());
            inputs.push(rng.tensor(device, &[pair[1]], precision));
        }
        inputs
    }

    fn fused(&self, cx: &Cx, inputs: &[Tensor], g: &[f64]) -> Vec<Vec<f64>> {
        let (y, grads) = run_op(cx, Box::new(self.op()), inputs, g);
        std::iter::once(Some(y)).chain(grads).map(|it| it.unwrap().to_vec::<f64>().unwrap()).collect()
    }

    /// By small ops: the time is a channel like any other.
    fn composed(&self, cx: &Cx, inputs: &[Tensor], g: &[f64]) -> Vec<Vec<f64>> {
        let timed = self.time == TimeColumn::Last;
        let mut tape = Tape::new(cx.clone());
        let mut first = inputs[0].to_vec::<f64>().unwrap();
        let c = self.widths[0];
        if timed {
            first = first.chunks(c).flat_map(|row| [row, &[0.375]].concat()).collect();
        }
        let shape = [self.n_rows(), c + usize::from(timed)];
        let x = Tensor::from_slice(&cx.device, &first, shape, inputs[0].precision(), Purpose::Activation).unwrap();
        let leaf = tape.leaf(x);
        let weights: Vec<_> = inputs[1 + usize::from(timed)..].iter().map(|it| tape.leaf(it.clone())).collect();
        let mut x = leaf;
        for (idx, layer) in weights.chunks(2).enumerate() {
            if idx > 0 {
                x = tape.apply(Tanh, &[&x]).unwrap();
            }
            x = tape.apply(Linear, &[&x, &layer[0]]).unwrap();
            x = tape.apply(ChannelBias, &[&x, &layer[1]]).unwrap();
        }
        let mut out = vec![x.value().to_vec::<f64>().unwrap()];
        let mut grads = vec![Vec::new(); 1 + weights.len()];
        let shape = x.value().shape().clone();
        let seed = Tensor::from_slice(&cx.device, g, shape, x.value().precision(), Purpose::Activation).unwrap();
        tape.backward_from(vec![(x, seed)], &mut |LeafId(idx), grad| {
            grads[idx] = grad.to_vec::<f64>()?;
            Ok(())
        })
        .unwrap();
        let wide = grads.remove(0);
        if timed {
            out.push(wide.chunks(c + 1).flat_map(|row| row[..c].to_vec()).collect());
            out.push(vec![wide.iter().skip(c).step_by(c + 1).sum()]);
        } else {
            out.push(wide);
        }
        out.extend(grads);
        out
    }
}

/// Rows within and beyond a tile, widths within and beyond a panel.
fn call() -> impl Strategy<Value = Case> {
    let width = || prop_oneof![3 => 1usize..9, 1 => 30usize..70];
    let rows =
        prop_oneof![3 => proptest::collection::vec(1usize..6, 1..3), 1 => Just(vec![131]), 1 => Just(vec![2, 150])];
    let time = prop_oneof![Just(TimeColumn::None), Just(TimeColumn::Last)];
    (time, rows, proptest::collection::vec(width(), 2..6), any::<u64>()).prop_map(|(time, rows, widths, seed)| Case {
        time,
        rows,
        widths,
        seed,
    })
}

fn check_compositions(device: &Device, case: &Case) {
    [Precision::F64, Precision::F32].into_iter().for_each(|precision| check_composition(device, case, precision));
}

fn check_composition(device: &Device, case: &Case, precision: Precision) {
    let cx = Cx::new(device, &policy(precision));
    let inputs = case.inputs(device, precision);
    let g = Rng::new(case.seed ^ 2).normals(case.n_out());
    let (got, want) = (case.fused(&cx, &inputs, &g), case.composed(&cx, &inputs, &g));
    assert_eq!(got.len(), want.len(), "{case:?}");
    let terms = case.n_rows() * case.widths.iter().max().unwrap() * case.widths.len();
    // What may cancel in a sum is its terms: the time's slope and biases sum over rows.
    let largest = want.iter().map(|it| norm(it)).fold(0.0, f64::max);
    for (idx, (got, want)) in got.iter().zip(&want).enumerate() {
        let off = norm(&got.iter().zip(want).map(|(a, b)| a - b).collect::<Vec<_>>());
        let bound = 4.0 * tol(precision, terms) * largest;
        assert!(off <= bound, "result {idx} in {precision}: {off:e} > {bound:e}, {case:?}");
    }
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn the_fused_perceptron_is_the_composition(case in call()) {
        devices().iter().for_each(|device| check_compositions(device, &case));
    }

    #[test]
    fn gradients_match_differences(case in call()) {
        let device = Device::cpu(2).unwrap();
        let inputs = case.inputs(&device, Precision::F64);
        gradcheck(&device, &|| Box::new(case.op()), &inputs, case.seed);
    }
}

/// A perceptron in every format against f64 on the CPU, `n` roundings apart; operands are stored in `given` or, without
/// it, in the format.
fn check_roundings(device: &Device, case: &Case, given: Option<Precision>, n: f64) {
    let cpu = Device::cpu(2).unwrap();
    for (precision, unit) in
        [(Precision::F32, 2f64.powi(-24)), (Precision::F16, 2f64.powi(-11)), (Precision::Bf16, 2f64.powi(-8))]
    {
        let inputs = case.inputs(device, given.unwrap_or(precision));
        let wide = |it: &Tensor| {
            let values = it.to_vec::<f64>().unwrap();
            Tensor::from_slice(&cpu, &values, it.shape().clone(), Precision::F64, Purpose::Param).unwrap()
        };
        let wide: Vec<Tensor> = inputs.iter().map(wide).collect();
        let g: Vec<f64> = Rng::new(9).normals(case.n_out()).iter().map(|g| (g * 16.0).round() / 16.0).collect();
        let got = case.fused(&Cx::new(device, &policy(precision)), &inputs, &g);
        let want = case.fused(&Cx::new(&cpu, &policy(Precision::F64)), &wide, &g);
        for (idx, (got, expected)) in got.iter().zip(&want).enumerate() {
            let bound = n * unit + 8.0 * 2f64.powi(-24) * (case.n_rows() as f64).sqrt();
            if idx == 2 {
                // The time's slope is the first bias's gradient times the time's weights; of that, terms cancel.
                let (w, row) = (wide[2].to_vec::<f64>().unwrap(), case.widths[0] + 1);
                let size = norm(&want[4]) * norm(&w.chunks(row).map(|row| row[row.len() - 1]).collect::<Vec<_>>());
                assert!((got[0] - expected[0]).abs() <= bound * size, "the time in {precision}");
                continue;
            }
            assert_close!(format!("result {idx} in {precision}"), got, expected, bound);
        }
    }
}

/// Widths that fill words, and odd ones.
fn rounded_cases() -> [Case; 2] {
    [(vec![300], vec![64, 256, 256, 64]), (vec![37], vec![5, 7, 3])].map(|(rows, widths)| Case {
        time: TimeColumn::Last,
        rows,
        widths,
        seed: 4,
    })
}

/// Halves round what they keep and return; everything between is f32: inputs of products, slopes of two tanh, and the
/// result are rounded; sums over rows in f32.
#[test]
fn halves_are_as_close_as_their_roundings() {
    let device = Device::cpu(2).unwrap();
    rounded_cases().iter().for_each(|case| check_roundings(&device, case, None, 6.0));
}

/// Small and large layers, with and without the time, widths that fill words and those that do not, and a batch beyond the
/// blocks of a sum.
fn gpu_cases() -> Vec<Case> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| call().new_tree(&mut runner).unwrap().current());
    let large = [
        (TimeColumn::Last, vec![1], vec![1, 1]),
        (TimeColumn::Last, vec![40], vec![64, 256, 256, 64]),
        (TimeColumn::None, vec![40], vec![64, 256, 64]),
        (TimeColumn::Last, vec![3], vec![1031, 8, 2]),
        (TimeColumn::Last, vec![5], vec![3, 1300, 3]),
        (TimeColumn::Last, vec![2, 611], vec![5, 7, 4]),
    ];
    random.chain(large.map(|(time, rows, widths)| Case { time, rows, widths, seed: 12 })).collect()
}

#[test]
fn the_perceptron_is_the_composition_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_cases().iter().for_each(|case| check_compositions(&device, case));
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for case in gpu_cases() {
        let inputs = case.inputs(&device, Precision::F64);
        gradcheck(&device, &|| Box::new(case.op()), &inputs, case.seed);
    }
}

/// A GPU also rounds what products give, gradients between layers, and weights that are stored wider than fields.
#[test]
fn halves_are_as_close_as_their_roundings_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for case in rounded_cases() {
        check_roundings(&device, &case, None, 12.0);
        check_roundings(&device, &case, Some(Precision::F32), 14.0);
        let case = Case { time: TimeColumn::None, ..case };
        for precision in [Precision::F16, Precision::Bf16] {
            check_composition(&device, &case, precision);
        }
    }
}

/// What is kept in another format than fields are stored in is that, rounded; a plan counts every byte.
#[test]
fn what_is_kept_has_its_format_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let case = Case { time: TimeColumn::Last, rows: vec![30], widths: vec![8, 16, 8], seed: 3 };
    let g = Rng::new(2).normals(case.n_out());
    let mut policy = (*policy(Precision::F32)).clone();
    let plain = case.fused(&Cx::new(&device, &Arc::new(policy.clone())), &case.inputs(&device, Precision::F32), &g);
    policy.saved_overrides.insert("tanh_mlp.hidden".to_owned(), Precision::F16);
    let peaks = [device.clone(), device.twin()].map(|device| {
        device.reset_peak();
        let cx = Cx::new(&device, &Arc::new(policy.clone()));
        let (y, grads) = run_op(&cx, Box::new(case.op()), &case.inputs(&device, Precision::F32), &g);
        if device.launches() {
            assert_eq!(y.to_vec::<f64>().unwrap(), plain[0], "what is returned is not what is kept");
            let grad = grads[2].as_ref().unwrap().to_vec::<f64>().unwrap();
            let error = halfmode_testkit::rel_l2(&grad, &plain[3]);
            assert!(error > 0.0 && error <= 4.0 * 2f64.powi(-11), "{error:e}");
        }
        drop((y, grads));
        device.memory()
    });
    for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
        assert_eq!(run.peak, planned.peak, "{purpose}");
    }
}

#[test]
fn threads_change_no_bit_and_plans_count_every_byte() {
    // Also a few outputs of rows that threads could share otherwise: products of few numbers are summed in another order.
    for (rows, widths) in [(vec![7, 43], vec![5, 40, 33, 5]), (vec![200], vec![64, 64, 2]), (vec![33], vec![7, 64, 7])]
    {
        let case = Case { time: TimeColumn::Last, rows, widths, seed: 8 };
        for precision in Precision::ALL {
            let policy = policy(precision);
            let g = Rng::new(2).normals(case.n_out());
            let results: Vec<_> = devices()
                .iter()
                .map(|device| case.fused(&Cx::new(device, &policy), &case.inputs(device, precision), &g))
                .collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}, {case:?}");
            let cpu = Device::cpu(2).unwrap();
            let peaks = [cpu.clone(), cpu.twin()].map(|device| {
                drop(run_op(&Cx::new(&device, &policy), Box::new(case.op()), &case.inputs(&device, precision), &g));
                device.memory()
            });
            for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
                assert_eq!(run.peak, planned.peak, "{purpose} in {precision}, {case:?}");
            }
        }
    }
}

#[test]
fn wrong_sizes_are_errors_that_name_the_operand() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let zeros = |shape: &[usize]| Rng::new(1).tensor(&device, shape, Precision::F32);
    let (x, w, b) = (zeros(&[2, 3]), zeros(&[4, 3]), zeros(&[4]));
    let said = |inputs: &[&Tensor]| TanhMlp(TimeColumn::None).forward(&cx, inputs).unwrap_err().to_string();
    assert!(said(&[&x, &zeros(&[4, 5]), &b]).contains("expected shape [4, 3] for `weight`"));
    assert!(said(&[&x, &w, &zeros(&[3])]).contains("`bias`"));
    assert!(said(&[&x, &w]).contains("takes 3 inputs"));
    let (t, wide) = (|n| zeros(&[n]), zeros(&[4, 4]));
    for n in [0, 5] {
        let err = TanhMlp(TimeColumn::Last).forward(&cx, &[&x, &t(n), &wide, &b]).unwrap_err().to_string();
        assert!(err.contains("expected shape [1] for `t`"), "{err}");
    }
}

fn check_empty(device: &Device) {
    for precision in Precision::ALL {
        let case = Case { time: TimeColumn::Last, rows: vec![0], widths: vec![3, 70, 2], seed: 4 };
        let results = case.fused(&Cx::new(device, &policy(precision)), &case.inputs(device, precision), &[]);
        assert!(results[0].is_empty() && results[1].is_empty(), "{precision}");
        let lens: Vec<usize> = results[2..].iter().map(Vec::len).collect();
        assert_eq!(lens, [1, 280, 70, 140, 2], "{precision}");
        assert!(results.concat().iter().all(|it| *it == 0.0), "{precision}: {results:?}");
    }
}

/// Sums over no rows are zero, in every format.
#[test]
fn an_empty_batch_has_gradients_of_zero() {
    check_empty(&Device::cpu(2).unwrap());
}

#[test]
fn an_empty_batch_has_gradients_of_zero_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_empty(&device);
}
