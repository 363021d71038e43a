//! The fused FNO block against its readable composition, and what it does in every precision.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, algorithm, allowed, cases, grid_and_modes, policy, rounded, run, tensors, transform};
use halfmode_autograd::{Cx, Op, Tape};
use halfmode_fft::Algorithm;
use halfmode_nn::{Activation, Add, FnoBlock, Init, ParamSpec, Params, Stabilizer};
use halfmode_precision::{OpPrecision, Precision, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, devices, distance, gpu, gradcheck, norm, sensitivity};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Case {
    grid: Vec<usize>,
    modes: Vec<usize>,
    algorithm: Option<Algorithm>,
    batch: usize,
    c: usize,
    h: usize,
    stabilizer: Stabilizer,
    activation: Activation,
    seed: u64,
}

fn case(max_n: usize) -> impl Strategy<Value = Case> {
    let stabilizer = prop_oneof![Just(Stabilizer::Tanh), Just(Stabilizer::None)];
    let activation = prop_oneof![Just(Activation::Gelu), Just(Activation::None)];
    let sizes = (1usize..4, 1usize..6, 1usize..6);
    (grid_and_modes(max_n), algorithm(), sizes, stabilizer, activation, any::<u64>()).prop_map(
        |((grid, modes), algorithm, (batch, c, h), stabilizer, activation, seed)| Case {
            grid,
            modes,
            algorithm,
            batch,
            c,
            h,
            stabilizer,
            activation,
            seed,
        },
    )
}

const NAMES: [&str; 10] = ["y", "x", "spectral", "bias", "skip", "w_1", "b_1", "w_2", "b_2", "gate"];

impl Case {
    fn block(&self, device: &Device, precision: Precision) -> FnoBlock {
        FnoBlock {
            transform: transform(device, &self.grid, &self.modes, precision, self.algorithm),
            stabilizer: self.stabilizer,
            activation: self.activation,
        }
    }

    fn points(&self) -> usize {
        self.grid.iter().product()
    }

    /// All inputs, of sizes that keep every branch of the block near 1, rounded to `precision`.
    fn inputs(&self, precision: Precision) -> Vec<Value> {
        let (c, h) = (self.c, self.h);
        let n_modes = self.modes.iter().product::<usize>();
        let field: Vec<usize> = [vec![self.batch], self.grid.clone(), vec![c]].concat();
        let spectral = (self.points() as f64 / (2 * n_modes * c) as f64).sqrt();
        let (per_c, per_h) = (1.0 / (c as f64).sqrt(), 1.0 / (h as f64).sqrt());
        // Parameters may carry extents of 1, as convolution weights in files do.
        let shapes = [
            (field, 1.0),
            (vec![n_modes, c, 2 * c], spectral),
            (vec![c, 1, 1], 0.5),
            (vec![c, c, 1], per_c),
            (vec![h, c, 1], per_c),
            (vec![h], 0.5),
            (vec![c, h, 1], per_h),
            (vec![c], 0.5),
            (vec![1, c, 1], 1.0),
        ];
        let mut rng = Rng::new(self.seed);
        let value = |(shape, size): (Vec<usize>, f64)| {
            let values: Vec<f64> = rng.normals(shape.iter().product()).iter().map(|v| v * size).collect();
            (shape, rounded(&values, precision))
        };
        shapes.into_iter().map(value).collect()
    }

    fn cotangent(&self, precision: Precision) -> Vec<f64> {
        rounded(&Rng::new(self.seed ^ 7).normals(self.batch * self.points() * self.c), precision)
    }

    /// Longest sum: over points for gradients of parameters, over points or modes in transforms.
    fn n_terms(&self) -> usize {
        self.batch * self.points() * self.c.max(self.h) * 2
    }

    /// Stored between the input and an output of the composition, there and back: the field and
    /// its spectrum per axis on both sides of the contraction, and the pointwise ops.
    fn roundings(&self) -> usize {
        2 * (2 * self.grid.len() + 14)
    }

    /// Output and gradients in double precision by the composition.
    fn oracle(&self, inputs: &[Value], cotangent: &[f64]) -> Vec<Vec<f64>> {
        let device = Device::cpu(1).unwrap();
        let cx = Cx::new(&device, &policy(Precision::F64));
        let op = Box::new(self.block(&device, Precision::F64).composed());
        run(&cx, op, &tensors(&device, inputs, Precision::F64), cotangent)
    }

    fn check_gradients(&self, device: &Device) {
        let inputs = tensors(device, &self.inputs(Precision::F64), Precision::F64);
        let block = self.block(device, Precision::F64);
        gradcheck(device, &|| Box::new(block.clone()), &inputs, self.seed);
    }

    /// Without a last activation the output is linear in each of `w_2`, `b_2` and `gate`, where the others are zero.
    fn check_adjoint(&self, device: &Device) {
        let case = Case { activation: Activation::None, ..self.clone() };
        for precision in Precision::ALL {
            let block = case.block(device, precision);
            for linear in [6, 7, 8] {
                let mut inputs = case.inputs(precision);
                inputs.iter_mut().enumerate().skip(6).filter(|it| it.0 != linear).for_each(|it| it.1.1.fill(0.0));
                let inputs = tensors(device, &inputs, precision);
                let cx = Cx::new(device, &policy(precision));
                adjoint(&cx, &|| Box::new(block.clone()), &inputs, linear, case.n_terms(), case.seed);
            }
        }
    }

    /// How far every result moves with its operands.
    fn sensitivities(&self, inputs: &[Value], cotangent: &[f64]) -> Vec<f64> {
        let operands: Vec<Vec<f64>> =
            inputs.iter().map(|it| it.1.clone()).chain(std::iter::once(cotangent.to_vec())).collect();
        let f = |operands: &[Vec<f64>]| {
            let moved: Vec<Value> =
                inputs.iter().zip(operands).map(|(it, values)| (it.0.clone(), values.clone())).collect();
            self.oracle(&moved, &operands[inputs.len()])
        };
        sensitivity(f, &operands, self.seed)
    }
}

/// Fused and composed block in `precision` against the composition in double precision on the same
/// rounded inputs. Returns the worst error of each over what is allowed.
fn check_precision(case: &Case, device: &Device, precision: Precision) -> [f64; 2] {
    let block = case.block(device, precision);
    let ops: [Box<dyn Op>; 2] = [Box::new(block.clone()), Box::new(block.composed())];
    let worst = check_ops(ops, case, device, precision);
    [worst[0], worst[1]]
}

fn check_ops(
    ops: impl IntoIterator<Item = Box<dyn Op>>,
    case: &Case,
    device: &Device,
    precision: Precision,
) -> Vec<f64> {
    let (inputs, cotangent) = (case.inputs(precision), case.cotangent(precision));
    let want = case.oracle(&inputs, &cotangent);
    let sensitivities = case.sensitivities(&inputs, &cotangent);
    let cx = Cx::new(device, &policy(precision));
    // A GPU's transforms have matrices in the storage of the field: one more rounding per axis and pass.
    let roundings = if device.is_cpu() { case.roundings() } else { case.roundings() + 4 * case.grid.len() };
    let mut all = Vec::new();
    for op in ops {
        let mut worst = 0.0f64;
        let got = run(&cx, op, &tensors(device, &inputs, precision), &cotangent);
        for (idx, name) in NAMES.iter().enumerate() {
            let bound = allowed(precision, case.n_terms(), roundings, norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{name} in {precision}: off by {error:.3e}, allowed {bound:.3e}; {case:?}");
            worst = worst.max(error / bound);
        }
        all.push(worst);
    }
    all
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn fused_equals_composed_in_double(case in case(7)) {
        let device = Device::cpu(2).unwrap();
        let cx = Cx::new(&device, &policy(Precision::F64));
        let (inputs, cotangent) = (case.inputs(Precision::F64), case.cotangent(Precision::F64));
        let op = Box::new(case.block(&device, Precision::F64));
        let got = run(&cx, op, &tensors(&device, &inputs, Precision::F64), &cotangent);
        for ((name, got), want) in NAMES.iter().zip(&got).zip(&case.oracle(&inputs, &cotangent)) {
            assert_close!(name, got[..], want[..], 1e-11);
        }
    }
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn every_precision_is_within_its_roundings(case in case(6)) {
        let device = Device::cpu(2).unwrap();
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            check_precision(&case, &device, precision);
        }
    }

    #[test]
    fn gradients_match_differences(case in case(4)) {
        case.check_gradients(&Device::cpu(2).unwrap());
    }

    #[test]
    fn is_adjoint_where_it_is_linear_in_every_precision(case in case(6)) {
        case.check_adjoint(&Device::cpu(2).unwrap());
    }
}

/// Lines longer than a tile, tiles of many short lines with a rest, one point, one mode.
fn edge_cases() -> Vec<Case> {
    let grids: [(&[usize], &[usize]); 7] = [
        (&[300], &[9]),
        (&[3, 131], &[3, 11]),
        (&[97, 2], &[12, 2]),
        (&[1], &[1]),
        (&[1, 1, 1], &[1, 1, 1]),
        (&[5, 7, 11], &[4, 3, 5]),
        (&[64, 31], &[12, 7]),
    ];
    let variants = [(Stabilizer::Tanh, Activation::Gelu), (Stabilizer::None, Activation::None)];
    let mut edges = Vec::new();
    for (idx, (grid, modes)) in grids.into_iter().enumerate() {
        for algorithm in [Algorithm::Matrix, Algorithm::Fft] {
            let (stabilizer, activation) = variants[idx % 2];
            let (grid, modes) = (grid.to_vec(), modes.to_vec());
            let algorithm = Some(algorithm);
            edges.push(Case {
                grid,
                modes,
                algorithm,
                batch: 2,
                c: 5,
                h: 3,
                stabilizer,
                activation,
                seed: 11 + idx as u64,
            });
        }
    }
    edges
}

#[test]
fn tile_edges_in_every_precision() {
    let device = Device::cpu(2).unwrap();
    println!("worst error over allowed: grid, precision, fused, composed");
    for case in edge_cases() {
        for precision in Precision::ALL {
            let [fused, composed] = check_precision(&case, &device, precision);
            println!("{:?} {:?} {precision}: {fused:.3} {composed:.3}", case.grid, case.algorithm);
        }
    }
}

fn random_gpu_cases() -> Vec<Case> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| case(9).new_tree(&mut runner).unwrap().current());
    random.map(|case| Case { algorithm: None, ..case }).collect()
}

/// Widths of the kernels that take a point through all layers on tensor cores, with rows left over.
fn wide_gpu_cases() -> Vec<Case> {
    let widths = [(16, 16), (32, 16), (48, 96), (64, 32), (128, 64)].into_iter().enumerate();
    let wide = widths.map(|(idx, (c, h))| Case {
        batch: 3,
        c,
        h,
        grid: vec![7, 9],
        modes: vec![4, 3],
        algorithm: None,
        stabilizer: if idx % 2 == 0 { Stabilizer::Tanh } else { Stabilizer::None },
        activation: if idx == 3 { Activation::None } else { Activation::Gelu },
        ..edge_cases()[0].clone()
    });
    wide.collect()
}

/// The block on a GPU: edges, then random shapes, each against the composition in double precision.
#[test]
fn on_a_gpu_in_every_precision() {
    let Some(device) = gpu() else { return };
    println!("worst error over allowed on a GPU: shapes, precision, fused, composed");
    for case in edge_cases().into_iter().chain(random_gpu_cases()).chain(wide_gpu_cases()) {
        let case = Case { algorithm: None, ..case };
        for precision in Precision::ALL {
            let [fused, composed] = check_precision(&case, &device, precision);
            println!(
                "{:?} {:?} c {} h {} {precision}: {fused:.3} {composed:.3}",
                case.grid, case.modes, case.c, case.h
            );
        }
    }
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().for_each(|case| case.check_gradients(&device));
}

#[test]
fn is_adjoint_where_it_is_linear_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().chain(&wide_gpu_cases()).for_each(|case| case.check_adjoint(&device));
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in edge_cases() {
        for precision in [Precision::F64, Precision::F32, Precision::F16] {
            let (inputs, cotangent) = (case.inputs(precision), case.cotangent(precision));
            let results: Vec<_> = devices()
                .iter()
                .map(|device| {
                    let cx = Cx::new(device, &policy(precision));
                    let op = Box::new(case.block(device, precision));
                    run(&cx, op, &tensors(device, &inputs, precision), &cotangent)
                })
                .collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision} {case:?}");
        }
    }
}

#[test]
fn without_saved_spectrum_the_result_is_the_same() {
    let case = &edge_cases()[2];
    let device = Device::cpu(2).unwrap();
    let inputs = tensors(&device, &case.inputs(Precision::F32), Precision::F32);
    let refs: Vec<&Tensor> = inputs.iter().collect();
    let block = case.block(&device, Precision::F32);
    let cx = Cx::new(&device, &policy(Precision::F32));
    let (saved, _) = block.forward(&cx, &refs).unwrap();
    let (unsaved, kept) = block.forward(&Cx { save: false, ..cx }, &refs).unwrap();
    assert_eq!(saved[0].to_vec::<f32>().unwrap(), unsaved[0].to_vec::<f32>().unwrap());
    assert_eq!(format!("{kept:?}"), r#"Saved { op: "fno_block", entries: [] }"#);
}

/// The block overwrites the gradient it is given: not when somebody else holds it too.
#[test]
fn a_residual_connection_sees_the_whole_gradient() {
    let case = Case { activation: Activation::Gelu, ..edge_cases()[2].clone() };
    let device = Device::cpu(2).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F64));
    let (inputs, cotangent) = (case.inputs(Precision::F64), case.cotangent(Precision::F64));
    let tensors = tensors(&device, &inputs, Precision::F64);
    let mut tape = Tape::new(cx);
    let vars: Vec<_> = tensors.iter().map(|it| tape.leaf(it.clone())).collect();
    let y = tape.apply(case.block(&device, Precision::F64), &vars.iter().collect::<Vec<_>>()).unwrap();
    let z = tape.apply(Add, &[&y, &vars[0]]).unwrap();
    let seed = Tensor::from_slice(&device, &cotangent, z.value().shape().clone(), Precision::F64, Purpose::Activation);
    let mut gx = None;
    tape.backward_from(vec![(z, seed.unwrap())], &mut |id, grad| {
        if id.0 == 0 {
            gx = Some(grad.to_vec::<f64>()?);
        }
        Ok(())
    })
    .unwrap();
    let want: Vec<f64> = case.oracle(&inputs, &cotangent)[1].iter().zip(&cotangent).map(|(a, b)| a + b).collect();
    assert_close!("gx", gx.unwrap(), want, 1e-12);
}

/// Automatic mixed precision: f32 spectral weights beside half dense ones with f32 masters.
#[test]
fn amp_mixes_precisions() {
    let device = Device::cpu(2).unwrap();
    for half in [Precision::F16, Precision::Bf16] {
        let case = &edge_cases()[2];
        let amp = Arc::new(PrecisionPolicy::preset(Preset::Amp, half));
        let inputs = case.inputs(half);
        let normal = Init::Normal { std: 1.0 };
        let spectral_shape = [vec![case.c, case.c], case.modes.clone()].concat();
        let mut specs = vec![ParamSpec::spectral("spectral", &spectral_shape, normal)];
        specs.extend((2..9).map(|idx| ParamSpec::real(NAMES[idx + 1], &inputs[idx].0, normal)));
        let mut params = Params::new(&device, specs, &amp, 3).unwrap();
        for (param, (_, values)) in params.list.iter_mut().zip(&inputs[1..]) {
            let file = param.spec.to_file(values);
            param.set_file_values(&file).unwrap();
            let spectral = param.spec.name == "spectral";
            assert_eq!(param.value.precision(), if spectral { Precision::F32 } else { half });
            assert_eq!(param.master.as_ref().map(Tensor::precision), (!spectral).then_some(Precision::F32));
        }
        let field = Tensor::from_slice(&device, &inputs[0].1, inputs[0].0.clone(), half, Purpose::Activation).unwrap();
        let operands: Vec<Tensor> =
            std::iter::once(field).chain(params.list.iter().map(|it| it.value.clone())).collect();
        let cotangent = case.cotangent(half);
        let cx = Cx::new(&device, &amp);
        let got = run(&cx, Box::new(case.block(&device, half)), &operands, &cotangent);
        let want = case.oracle(&inputs, &cotangent);
        let sensitivities = case.sensitivities(&inputs, &cotangent);
        for idx in 0..NAMES.len() {
            let bound = allowed(half, case.n_terms(), case.roundings(), norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{} in amp {half}: off by {error:.3e}, allowed {bound:.3e}", NAMES[idx]);
        }
    }
}

#[test]
fn wrong_shapes_are_errors_that_name_the_operand() {
    let case = &edge_cases()[0];
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let block = case.block(&device, Precision::F32);
    let good = case.inputs(Precision::F32);
    for (idx, text) in [
        (0, "field"),
        (1, "weight"),
        (2, "bias"),
        (3, "skip"),
        (4, "w_1"),
        (5, "b_1"),
        (6, "w_2"),
        (7, "b_2"),
        (8, "gate"),
    ] {
        let mut inputs = good.clone();
        let (shape, values) = &mut inputs[idx];
        // One more row everywhere; the hidden width is read from w_1, so there it is a column.
        let axis = if idx == 4 { 1 } else { shape.len() - 1 };
        shape[axis] += 1;
        if idx == 0 {
            shape[axis] -= 1;
            shape[1] += 1;
        }
        *values = vec![0.5; shape.iter().product()];
        let tensors = tensors(&device, &inputs, Precision::F32);
        let err = block.forward(&cx, &tensors.iter().collect::<Vec<_>>()).unwrap_err().to_string();
        assert!(err.contains(text), "{text}: {err}");
    }
    let tensors = tensors(&device, &good[..8], Precision::F32);
    let err = block.forward(&cx, &tensors.iter().collect::<Vec<_>>()).unwrap_err().to_string();
    assert_eq!(err, "fno_block: takes 9 inputs, found 8");
}

/// A legal policy whose sums are wider than its storage in one kind of op: results are as good as in
/// f32 at least.
fn check_wide_sums(widen: impl Fn(&mut PrecisionPolicy)) {
    let device = Device::cpu(2).unwrap();
    for case in edge_cases() {
        let mut policy = PrecisionPolicy::full();
        widen(&mut policy);
        policy.validate().unwrap();
        let policy = Arc::new(policy);
        let (inputs, cotangent) = (case.inputs(Precision::F32), case.cotangent(Precision::F32));
        let op = Box::new(case.block(&device, policy.transform.accumulate));
        let got = run(&Cx::new(&device, &policy), op, &tensors(&device, &inputs, Precision::F32), &cotangent);
        let (want, sensitivities) = (case.oracle(&inputs, &cotangent), case.sensitivities(&inputs, &cotangent));
        for (idx, name) in NAMES.iter().enumerate() {
            let bound = allowed(Precision::F32, case.n_terms(), case.roundings(), norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{name}: off by {error:.3e}, allowed {bound:.3e}; {case:?}");
        }
    }
}

const WIDE_SUMS: OpPrecision = OpPrecision { storage: Precision::F32, accumulate: Precision::F64 };

#[test]
fn dense_sums_wider_than_their_storage() {
    check_wide_sums(|policy| policy.pointwise = WIDE_SUMS);
    check_wide_sums(|policy| policy.contraction = WIDE_SUMS);
}

#[test]
fn transform_sums_wider_than_their_storage() {
    check_wide_sums(|policy| policy.transform = WIDE_SUMS);
}
