//! The pointwise perceptron in both layouts against naive loops.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, allowed, cases, policy, rounded, run, tensors};
use halfmode_autograd::{Cx, Op, Tape};
use halfmode_nn::{Channels, GridEmbedding, PointwiseMlp};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Real, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, devices, distance, gpu, gradcheck, norm, sensitivity};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    grid: Vec<usize>,
    c_in: usize,
    c_hidden: usize,
    c_out: usize,
    op: PointwiseMlp,
    seed: u64,
}

fn case(max_n: usize) -> impl Strategy<Value = Case> {
    let layout = || prop_oneof![Just(Channels::First), Just(Channels::Last)];
    let embedding = prop_oneof![Just(GridEmbedding::Coordinates), Just(GridEmbedding::None)];
    let op = (layout(), layout(), embedding).prop_map(|(input, output, embedding)| PointwiseMlp {
        input,
        output,
        embedding,
    });
    let grid = proptest::collection::vec(1..=max_n, 1..=3);
    (1usize..4, grid, 1usize..5, 1usize..8, 1usize..5, op, any::<u64>()).prop_map(
        |(batch, grid, c_in, c_hidden, c_out, op, seed)| Case { batch, grid, c_in, c_hidden, c_out, op, seed },
    )
}

impl Case {
    fn points(&self) -> usize {
        self.grid.iter().product()
    }

    fn coordinates(&self) -> usize {
        if self.op.embedding == GridEmbedding::Coordinates { self.grid.len() } else { 0 }
    }

    fn field_shape(&self, layout: Channels, channels: usize) -> Vec<usize> {
        match layout {
            Channels::First => [vec![self.batch, channels], self.grid.clone()].concat(),
            Channels::Last => [vec![self.batch], self.grid.clone(), vec![channels]].concat(),
        }
    }

    fn at(&self, layout: Channels, channels: usize, b: usize, p: usize, c: usize) -> usize {
        match layout {
            Channels::First => (b * channels + c) * self.points() + p,
            Channels::Last => (b * self.points() + p) * channels + c,
        }
    }

    fn inputs(&self, precision: Precision) -> Vec<Value> {
        let c_first = self.c_in + self.coordinates();
        let shapes = [
            (self.field_shape(self.op.input, self.c_in), 1.0),
            (vec![self.c_hidden, c_first, 1], (c_first as f64).powf(-0.5)),
            (vec![self.c_hidden], 0.5),
            (vec![self.c_out, self.c_hidden, 1], (self.c_hidden as f64).powf(-0.5)),
            (vec![self.c_out], 0.5),
        ];
        let mut rng = Rng::new(self.seed);
        let value = |(shape, size): (Vec<usize>, f64)| {
            let values: Vec<f64> = rng.normals(shape.iter().product()).iter().map(|v| v * size).collect();
            (shape, rounded(&values, precision))
        };
        shapes.into_iter().map(value).collect()
    }

    fn cotangent(&self, precision: Precision) -> Vec<f64> {
        rounded(&Rng::new(self.seed ^ 7).normals(self.batch * self.points() * self.c_out), precision)
    }

    /// `j / n` along `axis` at flat point `p`.
    fn coordinate(&self, p: usize, axis: usize) -> f64 {
        let behind: usize = self.grid[axis + 1..].iter().product();
        (p / behind % self.grid[axis]) as f64 / self.grid[axis] as f64
    }

    /// Output and all gradients, point by point.
    fn oracle(&self, v: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let [x, w1, b1, w2, b2, g] = v else { panic!("six operands") };
        let (c_first, c_hidden) = (self.c_in + self.coordinates(), self.c_hidden);
        let mut y = vec![0.0; g.len()];
        let mut grads: Vec<Vec<f64>> = v[..5].iter().map(|v| vec![0.0; v.len()]).collect();
        for b in 0..self.batch {
            for p in 0..self.points() {
                let data = (0..self.c_in).map(|c| x[self.at(self.op.input, self.c_in, b, p, c)]);
                let input: Vec<f64> =
                    data.chain((0..self.coordinates()).map(|axis| self.coordinate(p, axis))).collect();
                for h in 0..c_hidden {
                    let sum = b1[h] + (0..c_first).map(|i| w1[h * c_first + i] * input[i]).sum::<f64>();
                    let (mut a, mut slope) = ([sum], [0.0]);
                    f64::gelu_both(&mut a, &mut slope);
                    let mut g_sum = 0.0;
                    for o in 0..self.c_out {
                        let at = self.at(self.op.output, self.c_out, b, p, o);
                        y[at] += w2[o * c_hidden + h] * a[0];
                        grads[3][o * c_hidden + h] += g[at] * a[0];
                        g_sum += g[at] * w2[o * c_hidden + h] * slope[0];
                    }
                    grads[2][h] += g_sum;
                    for i in 0..c_first {
                        grads[1][h * c_first + i] += g_sum * input[i];
                        if i < self.c_in {
                            grads[0][self.at(self.op.input, self.c_in, b, p, i)] += g_sum * w1[h * c_first + i];
                        }
                    }
                }
                for o in 0..self.c_out {
                    let at = self.at(self.op.output, self.c_out, b, p, o);
                    y[at] += b2[o];
                    grads[4][o] += g[at];
                }
            }
        }
        std::iter::once(y).chain(grads).collect()
    }

    fn check_gradients(&self, device: &Device) {
        let inputs = tensors(device, &self.inputs(Precision::F64), Precision::F64);
        gradcheck(device, &|| Box::new(self.op), &inputs, self.seed);
    }

    /// Without its bias the output is linear in the weights of the second layer.
    fn check_adjoint(&self, device: &Device) {
        for precision in Precision::ALL {
            let mut inputs = self.inputs(precision);
            inputs[4].1.fill(0.0);
            let inputs = tensors(device, &inputs, precision);
            let n_terms = self.batch * self.points() * self.c_hidden * self.c_out;
            adjoint(&Cx::new(device, &policy(precision)), &|| Box::new(self.op), &inputs, 3, n_terms, self.seed);
        }
    }

    fn check(&self, device: &Device, precision: Precision) {
        let (inputs, cotangent) = (self.inputs(precision), self.cotangent(precision));
        let operands: Vec<Vec<f64>> =
            inputs.iter().map(|it| it.1.clone()).chain(std::iter::once(cotangent.clone())).collect();
        let want = self.oracle(&operands);
        let cx = Cx::new(device, &policy(precision));
        let got = run(&cx, Box::new(self.op), &tensors(device, &inputs, precision), &cotangent);
        let sensitivities = if precision == Precision::F64 {
            vec![0.0; want.len()]
        } else {
            sensitivity(|v| self.oracle(v), &operands, self.seed)
        };
        // Sums over hidden channels, and over all points for the parameters; one rounding to storage. A GPU also
        // stores the first layer, the hidden one before and after its activation, the second and their gradients.
        let roundings = if device.is_cpu() { 1 } else { 8 };
        let n_terms = self.batch * self.points() * self.c_hidden * self.c_out.max(self.c_in + 3);
        for (idx, name) in ["y", "x", "w_1", "b_1", "w_2", "b_2"].iter().enumerate() {
            if precision == Precision::F64 {
                assert_close!(name, got[idx][..], want[idx][..], 1e-11);
                continue;
            }
            let bound = allowed(precision, n_terms, roundings, norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{name} in {precision}: off by {error:.3e}, allowed {bound:.3e}; {self:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn agrees_with_naive_loops_in_every_precision(case in case(7)) {
        let device = Device::cpu(2).unwrap();
        for precision in Precision::ALL {
            case.check(&device, precision);
        }
    }
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn gradients_match_differences(case in case(4)) {
        case.check_gradients(&Device::cpu(2).unwrap());
    }

    #[test]
    fn is_adjoint_in_its_last_layer_in_every_precision(case in case(6)) {
        case.check_adjoint(&Device::cpu(2).unwrap());
    }
}

/// Point counts around the tile of 128, in every combination of layouts.
fn tile_edges() -> Vec<Case> {
    let mut edges = Vec::new();
    for grid in [vec![1], vec![127], vec![128], vec![129], vec![3, 86], vec![1, 257], vec![5, 7, 11]] {
        for (input, output) in [
            (Channels::First, Channels::Last),
            (Channels::Last, Channels::First),
            (Channels::First, Channels::First),
            (Channels::Last, Channels::Last),
        ] {
            for embedding in [GridEmbedding::Coordinates, GridEmbedding::None] {
                let op = PointwiseMlp { input, output, embedding };
                edges.push(Case { batch: 2, grid: grid.clone(), c_in: 3, c_hidden: 5, c_out: 2, op, seed: 3 });
            }
        }
    }
    edges
}

#[test]
fn tile_edges_in_every_precision() {
    let device = Device::cpu(2).unwrap();
    for case in tile_edges() {
        for precision in Precision::ALL {
            case.check(&device, precision);
        }
    }
}

fn random_gpu_cases() -> Vec<Case> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    (0..10).map(|_| case(9).new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn on_a_gpu_in_every_precision() {
    let Some(device) = gpu() else { return };
    // More points than one chunk of a hidden layer this wide holds.
    let op = PointwiseMlp { input: Channels::Last, output: Channels::First, embedding: GridEmbedding::None };
    let chunks = Case { batch: 3, grid: vec![15, 17], c_in: 4, c_hidden: 12_000, c_out: 1, op, seed: 5 };
    for case in tile_edges().into_iter().chain(random_gpu_cases()).chain([chunks]) {
        for precision in Precision::ALL {
            case.check(&device, precision);
        }
    }
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().for_each(|case| case.check_gradients(&device));
}

#[test]
fn is_adjoint_in_its_last_layer_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    random_gpu_cases().iter().for_each(|case| case.check_adjoint(&device));
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in tile_edges() {
        for precision in [Precision::F64, Precision::F32, Precision::F16] {
            let results: Vec<_> = devices()
                .iter()
                .map(|device| {
                    let inputs = tensors(device, &case.inputs(precision), precision);
                    run(&Cx::new(device, &policy(precision)), Box::new(case.op), &inputs, &case.cotangent(precision))
                })
                .collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision} {case:?}");
        }
    }
}

/// Data in f32 under a half policy: the batch is shared, not copied, and wants no gradient.
#[test]
fn an_input_without_gradient_changes_nothing_else() {
    let device = Device::cpu(2).unwrap();
    for case in tile_edges() {
        for precision in [Precision::F64, Precision::F16] {
            let (inputs, cotangent) = (case.inputs(precision), case.cotangent(precision));
            let cx = Cx::new(&device, &policy(precision));
            let with = run(&cx, Box::new(case.op), &tensors(&device, &inputs, precision), &cotangent);
            let data_precision = if precision == Precision::F64 { Precision::F64 } else { Precision::F32 };
            let x =
                Tensor::from_slice(&device, &inputs[0].1, inputs[0].0.clone(), data_precision, Purpose::Data).unwrap();
            let mut tape = Tape::new(cx);
            let mut vars = vec![tape.constant(x)];
            vars.extend(tensors(&device, &inputs[1..], precision).into_iter().map(|w| tape.leaf(w)));
            let y = tape.apply(case.op, &vars.iter().collect::<Vec<_>>()).unwrap();
            let row = tape.memory_report().rows[0].clone();
            assert!((row.role, row.shared, row.dtype.precision) == ("x", true, data_precision), "{row:?}");
            assert_eq!(y.value().to_vec::<f64>().unwrap(), with[0]);
            let shape = y.value().shape().clone();
            let seed = Tensor::from_slice(&device, &cotangent, shape, precision, Purpose::Activation).unwrap();
            let mut n_leaves = 0;
            tape.backward_from(vec![(y, seed)], &mut |id, grad| {
                n_leaves += 1;
                assert_eq!(grad.to_vec::<f64>()?, with[2 + id.0]);
                assert_eq!(grad.purpose(), Purpose::Grad);
                Ok(())
            })
            .unwrap();
            assert_eq!(n_leaves, 4);
        }
    }
}

#[test]
fn wrong_shapes_are_errors_that_name_the_operand() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let case = &tile_edges()[0];
    for (idx, operand) in [(1, "w_1"), (2, "b_1"), (3, "w_2"), (4, "b_2")] {
        let mut inputs = case.inputs(Precision::F32);
        let axis = if idx % 2 == 1 { 1 } else { 0 };
        inputs[idx].0[axis] += 1;
        inputs[idx].1 = vec![0.0; inputs[idx].0.iter().product()];
        let tensors = tensors(&device, &inputs, Precision::F32);
        let err = case.op.forward(&cx, &tensors.iter().collect::<Vec<_>>()).unwrap_err().to_string();
        assert!(err.contains(&format!("`{operand}`")), "{err}");
    }
}
