//! The fused symmetric layer against the composition of small ops.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{cases, policy};
use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::SymmetricConv;
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, devices, gpu, gradcheck, rel_l2, run_op};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

#[derive(Clone, Debug)]
struct Case {
    op: SymmetricConv,
    field: [usize; 4],
    weight: [usize; 4],
    seed: u64,
}

fn call() -> impl Strategy<Value = Case> {
    let channels = || prop_oneof![4 => 1usize..6, 1 => 15usize..19];
    // At least three points, so that the norm of a channel is not that of a single number.
    ([3usize..9, 1usize..9], [1usize..4, 1usize..4], 1usize..4, channels(), channels(), any::<u64>()).prop_map(
        |([n1, n2], [k1, k2], batch, c_in, c_out, seed)| Case {
            op: SymmetricConv { padding: [k1 / 2, k2 / 2] },
            field: [batch, n1, n2, c_in],
            weight: [k1, k2, c_in, c_out],
            seed,
        },
    )
}

impl Case {
    fn inputs(&self, device: &Device, precision: Precision) -> Vec<Tensor> {
        let mut rng = Rng::new(self.seed);
        let shapes = [&self.field[..], &self.weight[..], &self.weight[3..]];
        shapes.map(|shape| rng.tensor(device, shape, precision)).to_vec()
    }

    /// Output and gradients by small ops.
    fn composed(&self, cx: &Cx, inputs: &[Tensor], g: &[f64]) -> Vec<Vec<f64>> {
        let mut tape = Tape::new(cx.clone());
        let vars: Vec<_> = inputs.iter().map(|it| tape.leaf(it.clone())).collect();
        let y = self.op.composed(&mut tape, [&vars[0], &vars[1], &vars[2]]).unwrap();
        let mut out = vec![y.value().to_vec::<f64>().unwrap(), vec![], vec![], vec![]];
        let seed = Tensor::from_slice(&cx.device, g, y.value().shape().clone(), y.value().precision(), Purpose::Grad);
        let seeds = vec![(y, seed.unwrap())];
        tape.backward_from(seeds, &mut |LeafId(idx), grad| {
            out[idx + 1] = grad.to_vec::<f64>()?;
            Ok(())
        })
        .unwrap();
        out
    }

    fn fused(&self, cx: &Cx, inputs: &[Tensor], g: &[f64]) -> Vec<Vec<f64>> {
        let (y, grads) = run_op(cx, Box::new(self.op), inputs, g);
        std::iter::once(Some(y)).chain(grads).map(|it| it.unwrap().to_vec::<f64>().unwrap()).collect()
    }
}

/// Weights keep a format of their own: results are those of the same numbers in the accumulator's.
#[test]
fn weights_of_another_format_are_read_too() {
    let device = Device::cpu(2).unwrap();
    for (storage, weight) in [(Precision::F64, Precision::F32), (Precision::F32, Precision::F64)] {
        let case = Case { op: SymmetricConv { padding: [1, 1] }, field: [2, 5, 4, 3], weight: [3, 3, 3, 6], seed: 7 };
        let (cx, inputs) = (Cx::new(&device, &policy(storage)), case.inputs(&device, storage));
        let g = Rng::new(8).normals(inputs[0].numel());
        let [narrow, wide] = [weight, storage].map(|precision| {
            let w = inputs[1].cast(weight, Purpose::Param).unwrap().cast(precision, Purpose::Param).unwrap();
            case.fused(&cx, &[inputs[0].clone(), w, inputs[2].clone()], &g)
        });
        assert!(narrow.concat().iter().all(|it| it.is_finite()), "{weight} under {storage}");
        assert_eq!(narrow, wide, "{weight} under {storage}");
    }
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn the_fused_layer_is_the_composition(case in call()) {
        for device in devices() {
            let cx = Cx::new(&device, &policy(Precision::F64));
            let inputs = case.inputs(&device, Precision::F64);
            let g = Rng::new(case.seed ^ 2).normals(inputs[0].numel());
            let (got, want) = (case.fused(&cx, &inputs, &g), case.composed(&cx, &inputs, &g));
            for (idx, (got, want)) in got.iter().zip(&want).enumerate() {
                // A rectifier that lets next to nothing through has a variance near zero, and a norm that divides by
                // its root: up to 300 for the 1e-5 beside it, squared in gradients.
                let size = want.iter().map(|it| it * it).sum::<f64>().sqrt();
                let error = got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                prop_assert!(error <= 1e-10 * (1.0 + size), "result {idx}: {error:e} of {size:e}");
            }
        }
    }
}

/// Away from the kink of the rectifier: with a large bias nothing is cut off, with a mixed one what is cut off stays so.
#[test]
fn gradients_match_differences() {
    check_gradients(&Device::cpu(2).unwrap());
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_gradients(&device);
}

fn check_gradients(device: &Device) {
    for (seed, weight) in [(1, [3, 3, 2, 3]), (2, [1, 3, 4, 2]), (3, [3, 1, 1, 17])] {
        let op = SymmetricConv { padding: [weight[0] / 2, weight[1] / 2] };
        let case = Case { op, field: [2, 4, 5, weight[2]], weight, seed };
        let mut inputs = case.inputs(device, Precision::F64);
        let far: Vec<f64> = (0..weight[3]).map(|c| if c % 2 == 0 { 40.0 } else { -40.0 }).collect();
        inputs[2] = Tensor::from_slice(device, &far, [weight[3]], Precision::F64, Purpose::Param).unwrap();
        gradcheck(device, &|| Box::new(op), &inputs, seed);
    }
}

/// Halves keep their inputs and the hidden field in half; everything between is f32. Against double precision on the
/// same inputs each result is within a few roundings of the hidden field, as the norm and two sums pass them on.
#[test]
fn halves_are_as_close_as_their_roundings() {
    let device = Device::cpu(2).unwrap();
    let case = Case { op: SymmetricConv { padding: [1, 1] }, field: [2, 8, 8, 16], weight: [3, 3, 16, 16], seed: 4 };
    for (precision, unit) in
        [(Precision::F32, 2f64.powi(-24)), (Precision::F16, 2f64.powi(-11)), (Precision::Bf16, 2f64.powi(-8))]
    {
        let inputs = case.inputs(&device, precision);
        let wide: Vec<Tensor> = inputs.iter().map(|it| it.cast(Precision::F64, Purpose::Param).unwrap()).collect();
        // A number that all formats hold.
        let g: Vec<f64> = Rng::new(9).normals(inputs[0].numel()).iter().map(|g| (g * 16.0).round() / 16.0).collect();
        let got = case.fused(&Cx::new(&device, &policy(precision)), &inputs, &g);
        let want = case.fused(&Cx::new(&device, &policy(Precision::F64)), &wide, &g);
        for (idx, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = rel_l2(got, want);
            // Hidden and output are rounded; sums of 144 and 128 terms in f32 add less than the last term.
            let bound = 4.0 * unit + 8.0 * 2f64.powi(-24) * 12.0;
            assert!(error <= bound, "result {idx} in {precision}: {error:e} > {bound:e}");
        }
    }
}

#[test]
fn threads_change_no_bit_and_plans_count_every_byte() {
    let case = Case { op: SymmetricConv { padding: [1, 1] }, field: [3, 9, 7, 5], weight: [3, 3, 5, 18], seed: 8 };
    for precision in Precision::ALL {
        let policy = policy(precision);
        let g = Rng::new(2).normals(3 * 9 * 7 * 5);
        let results: Vec<_> = devices()
            .iter()
            .map(|device| case.fused(&Cx::new(device, &policy), &case.inputs(device, precision), &g))
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}");
        let cpu = Device::cpu(2).unwrap();
        let peaks = [cpu.clone(), cpu.twin()].map(|device| {
            drop(run_op(&Cx::new(&device, &policy), Box::new(case.op), &case.inputs(&device, precision), &g));
            device.memory()
        });
        for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
            assert_eq!(run.peak, planned.peak, "{purpose} in {precision}");
        }
    }
}

/// Field and weight: channels that tensor cores take, around tiles of 64 and 128 channels and of 128 and 256 points, in one
/// sample and in many; and channels beside them.
const TILES: [([usize; 4], [usize; 4]); 12] = [
    ([1, 3, 1, 8], [1, 1, 8, 8]),
    ([2, 5, 7, 8], [3, 3, 8, 16]),
    ([3, 17, 16, 64], [3, 3, 64, 64]),
    ([2, 16, 8, 128], [3, 3, 128, 128]),
    ([2, 11, 13, 128], [3, 3, 128, 128]),
    ([1, 31, 23, 24], [5, 3, 24, 40]),
    ([2, 2, 300, 40], [1, 5, 40, 72]),
    ([2, 29, 3, 136], [3, 1, 136, 200]),
    ([1, 8, 8, 256], [3, 3, 256, 256]),
    ([17, 4, 4, 16], [3, 3, 16, 8]),
    ([2, 9, 8, 5], [3, 3, 5, 7]),
    ([1, 6, 9, 8], [3, 3, 8, 12]),
];

fn tiles() -> Vec<Case> {
    let case = |(field, weight): ([usize; 4], [usize; 4])| Case {
        op: SymmetricConv { padding: [weight[0] / 2, weight[1] / 2] },
        field,
        weight,
        seed: 3,
    };
    TILES.into_iter().map(case).collect()
}

/// The same as on the CPU in f64 and f32, but for what a channel with next to no variance makes of roundings. Halves are
/// off by at most twice as much as the CPU is by small ops, which round where tensor cores need halves: the normalised
/// field and its gradient.
#[test]
fn a_gpu_is_as_close_as_a_cpu() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| call().new_tree(&mut runner).unwrap().current());
    for case in tiles().into_iter().chain(random) {
        for precision in Precision::ALL {
            let inputs = case.inputs(&cpu, precision);
            let wide: Vec<Tensor> = inputs.iter().map(|it| it.cast(Precision::F64, Purpose::Param).unwrap()).collect();
            let g: Vec<f64> =
                Rng::new(9).normals(inputs[0].numel()).iter().map(|g| (g * 16.0).round() / 16.0).collect();
            let want = case.fused(&Cx::new(&cpu, &policy(Precision::F64)), &wide, &g);
            let cx = Cx::new(&cpu, &policy(precision));
            let (fused, composed) = (case.fused(&cx, &inputs, &g), case.composed(&cx, &inputs, &g));
            let on_gpu = case.fused(&Cx::new(&device, &policy(precision)), &case.inputs(&device, precision), &g);
            for (idx, want) in want.iter().enumerate() {
                let [gpu, fused, composed] = [&on_gpu, &fused, &composed].map(|it| rel_l2(&it[idx], want));
                let unit = halfmode_precision::Format::from(precision).unit_roundoff();
                let allowed = match precision {
                    Precision::F64 => 1e-10,
                    Precision::F32 => 1e-5f64.max(2.0 * fused),
                    _ => 2.0 * fused.max(composed) + unit,
                };
                let text = format!("result {idx} in {precision}: {gpu:.2e}, on the CPU {fused:.2e}, {composed:.2e}");
                assert!(gpu <= allowed, "{case:?}: {text}");
            }
        }
    }
}

/// Fused and composed halves are equally far from double precision.
#[test]
fn the_fused_layer_is_the_composition_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    for case in tiles() {
        for precision in [Precision::F16, Precision::Bf16] {
            let inputs = case.inputs(&device, precision);
            let wide: Vec<Tensor> = case
                .inputs(&cpu, precision)
                .iter()
                .map(|it| it.cast(Precision::F64, Purpose::Param).unwrap())
                .collect();
            let g: Vec<f64> =
                Rng::new(9).normals(inputs[0].numel()).iter().map(|g| (g * 16.0).round() / 16.0).collect();
            let want = case.fused(&Cx::new(&cpu, &policy(Precision::F64)), &wide, &g);
            let cx = Cx::new(&device, &policy(precision));
            let (fused, composed) = (case.fused(&cx, &inputs, &g), case.composed(&cx, &inputs, &g));
            for (idx, want) in want.iter().enumerate() {
                let [fused, composed] = [&fused, &composed].map(|it| rel_l2(&it[idx], want));
                let text = format!("{case:?}: result {idx} in {precision}: fused {fused:.2e}, composed {composed:.2e}");
                assert!(fused <= 1.5 * composed + 1e-6, "{text}");
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
            let g = Rng::new(2).normals(case.field.iter().product());
            let peaks = [device.clone(), device.twin()].map(|device| {
                device.reset_peak();
                let cx = Cx::new(&device, &policy(precision));
                drop(run_op(&cx, Box::new(case.op), &case.inputs(&device, precision), &g));
                device.memory()
            });
            for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
                assert_eq!(run.peak, planned.peak, "{case:?}: {purpose} in {precision}");
            }
            let cx = Cx::new(&device, &policy(precision));
            let [first, second] = [(); 2].map(|()| case.fused(&cx, &case.inputs(&device, precision), &g));
            assert_eq!(first, second, "{case:?} in {precision}");
        }
    }
}
