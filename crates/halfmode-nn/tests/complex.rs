//! Complex fields from two real ones and back, their spectral convolution, appended channels, batch norm: values,
//! gradients, adjoints.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Value, allowed, policy, rounded, tensors};
use halfmode_autograd::{Cx, Op, Tape};
use halfmode_fft::{Transform, TransformConfig};
use halfmode_nn::{
    BatchNorm, BatchStatistics, Embed, ExtraChannels, JoinComplex, ModeProduct, SpectralConv, SplitComplex, Subtract,
};
use halfmode_precision::{Domain, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, adjoint, assert_close, distance, gpu, gradcheck, norm, run_op, sensitivity, tol};
use std::sync::Arc;

fn double(device: &Device) -> Cx {
    Cx::new(device, &Arc::new(PrecisionPolicy::double()))
}

fn shapes() -> [Vec<usize>; 4] {
    [vec![2, 3, 5], vec![1, 2, 4, 3], vec![3, 1, 2, 3, 4], vec![2, 7, 1]]
}

const EXTRA: [ExtraChannels; 3] = [ExtraChannels::None, ExtraChannels::Coordinates, ExtraChannels::Zeros];

fn check_gradients(device: &Device, shapes: &[Vec<usize>]) {
    for (seed, shape) in shapes.iter().enumerate() {
        let mut rng = Rng::new(seed as u64);
        let c = shape[shape.len() - 1];
        let mut tensor = |shape: &[usize]| rng.tensor(device, shape, Precision::F64);
        let check = |op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor]| gradcheck(device, op, inputs, seed as u64);
        check(&|| Box::new(Subtract), &[tensor(shape), tensor(shape)]);
        check(&|| Box::new(BatchNorm(BatchStatistics::Batch)), &[tensor(shape), tensor(&[c]), tensor(&[c])]);
        for extra in EXTRA {
            check(&|| Box::new(Embed(extra)), &[tensor(shape)]);
        }
    }
}

#[test]
fn gradients_match_differences() {
    check_gradients(&Device::cpu(2).unwrap(), &shapes());
}

/// Ten random shapes of fields with odd, prime and single extents, and one with more channels than a block's threads.
fn gpu_shapes() -> Vec<Vec<usize>> {
    let mut rng = Rng::new(77);
    let mut extent = |most: u64| 1 + (rng.bits() % most) as usize;
    // A variance needs more than one value, and differences need it away from zero.
    let random = (0..10).map(|idx| (0..3 + idx % 3).map(|axis| if axis == 0 { 2 } else { extent(7) }).collect());
    random.chain([vec![3, 5, 2, 301], vec![2, 3, 43, 57]]).collect()
}

#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_gradients(&device, &gpu_shapes());
}

/// Size of `g w / deviation`, from which batch norm's gradient takes the parts along 1 and along the field: of two rows
/// nearly nothing is left.
fn gradient_terms(operands: &[Vec<f64>], c: usize) -> f64 {
    let (x, w, g) = (&operands[0], &operands[1], &operands[operands.len() - 1]);
    let of_channel = |channel: usize| {
        let rows = x.chunks_exact(c).map(|row| row[channel]);
        let n = rows.len() as f64;
        let mean = rows.clone().sum::<f64>() / n;
        let var = rows.map(|it| (it - mean) * (it - mean)).sum::<f64>() / n;
        let squares: f64 = g.chunks_exact(c).map(|row| row[channel] * row[channel]).sum();
        squares * w[channel] * w[channel] / (var + 1e-5)
    };
    (0..c).map(of_channel).sum::<f64>().sqrt()
}

/// Appended channels are copies; batch norm is the CPU's in double precision but for its roundings.
fn check_precisions(device: &Device, shapes: &[Vec<usize>]) {
    let cpu = Device::cpu(2).unwrap();
    for (seed, shape) in shapes.iter().enumerate() {
        let c = shape[shape.len() - 1];
        for precision in Precision::ALL {
            let cx = Cx::new(device, &policy(precision));
            let mut rng = Rng::new(seed as u64);
            for extra in EXTRA {
                let x = rng.tensor(device, shape, precision);
                let out = Embed(extra).forward(&cx, &[&x]).unwrap().0.remove(0);
                let on_cpu = Cx::new(&cpu, &policy(precision));
                let copy = Tensor::from_slice(&cpu, &x.to_vec::<f64>().unwrap(), &shape[..], precision, x.purpose());
                let want = Embed(extra).forward(&on_cpu, &[&copy.unwrap()]).unwrap().0.remove(0);
                assert_eq!(out.shape(), want.shape());
                assert_eq!(out.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap(), "{extra:?} {precision}");
                if extra != ExtraChannels::Coordinates {
                    adjoint(&cx, &|| Box::new(Embed(extra)), &[x], 0, 1, seed as u64);
                }
            }
            for statistics in [BatchStatistics::Batch, BatchStatistics::Running] {
                let mut value = |shape: &[usize]| rounded(&rng.normals(shape.iter().product()), precision);
                let per_channel = vec![c];
                let mut operands = vec![value(shape), value(&per_channel), value(&per_channel)];
                let mut extents = vec![shape.clone(), per_channel.clone(), per_channel.clone()];
                if statistics == BatchStatistics::Running {
                    operands.push(value(&per_channel));
                    operands.push(value(&per_channel).iter().map(|it| it.abs() + 0.5).collect());
                    operands[4] = rounded(&operands[4], precision);
                    extents.extend([per_channel.clone(), per_channel]);
                }
                operands.push(value(shape));
                // The output, what is observed, and the gradients.
                let run = |device: &Device, precision: Precision, operands: &[Vec<f64>]| -> Vec<Vec<f64>> {
                    let given: Vec<Value> = extents.iter().cloned().zip(operands.iter().cloned()).collect();
                    let inputs = tensors(device, &given, precision);
                    let cx = Cx::new(device, &policy(precision));
                    let values = |it: &Tensor| it.to_vec::<f64>().unwrap();
                    let outputs = BatchNorm(statistics).forward(&cx, &inputs.iter().collect::<Vec<_>>()).unwrap().0;
                    let (_, grads) =
                        run_op(&cx, Box::new(BatchNorm(statistics)), &inputs, &operands[operands.len() - 1]);
                    outputs.iter().chain(grads.iter().flatten()).map(values).collect()
                };
                let f = |operands: &[Vec<f64>]| run(&cpu, Precision::F64, operands);
                let (got, want) = (run(device, precision, &operands), f(&operands));
                let sensitivities = sensitivity(f, &operands, seed as u64);
                assert_eq!(got.len(), want.len());
                // Gradients of field, weight and bias come last.
                let first_grad = got.len() - 3;
                for idx in 0..got.len() {
                    // What is kept for backward and the result are rounded; sums are over all rows.
                    let n_terms = 4 * operands[0].len();
                    // The field's gradient is what is left of larger terms.
                    let terms = if idx == first_grad { gradient_terms(&operands, c) } else { 0.0 };
                    let bound = allowed(precision, n_terms, 2, norm(&want[idx]).max(terms), sensitivities[idx]);
                    let error = distance(&got[idx], &want[idx]);
                    assert!(
                        error <= bound,
                        "{statistics:?} result {idx} in {precision} of {shape:?}: {error:.3e} > {bound:.3e}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_precision_is_within_its_roundings() {
    check_precisions(&Device::cpu(2).unwrap(), &shapes());
}

#[test]
fn every_precision_is_within_its_roundings_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_precisions(&device, &gpu_shapes());
}

/// A complex spectral convolution between two phases, as models of complex data use it.
struct Convolution {
    grid: Vec<usize>,
    modes: Vec<usize>,
    batch: usize,
    c: usize,
    product: ModeProduct,
    turns: isize,
}

impl Convolution {
    /// Shapes of real and imaginary part, and of the weight.
    fn shapes(&self) -> [Vec<usize>; 3] {
        let field = [&[self.batch][..], &self.grid, &[self.c]].concat();
        let n_modes = self.modes.iter().product();
        let weight = match self.product {
            ModeProduct::Dense => vec![n_modes, self.c, 2 * self.c],
            ModeProduct::Separable => vec![n_modes, 2 * self.c],
        };
        [field.clone(), field, weight]
    }

    fn n_terms(&self) -> usize {
        4 * self.grid.iter().product::<usize>() * self.batch * self.c
    }

    /// Both parts of the output, then the gradients of real part, imaginary part and weight.
    fn run(&self, device: &Device, precision: Precision, operands: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let config = TransformConfig {
            grid: self.grid.clone(),
            modes: self.modes.clone(),
            domain: Domain::Complex,
            accumulate: precision.accumulate(),
            algorithm: None,
        };
        let transform = Arc::new(Transform::new(device, config).unwrap());
        let make = |shape: &[usize], values: &[f64]| {
            Tensor::from_slice(device, values, shape, precision, Purpose::Activation).unwrap()
        };
        let shapes = self.shapes();
        let mut tape = Tape::new(Cx::new(device, &policy(precision)));
        let leaves: Vec<_> =
            shapes.iter().zip(operands).map(|(shape, values)| tape.leaf(make(shape, values))).collect();
        let z = tape.apply(JoinComplex { turns: self.turns }, &[&leaves[0], &leaves[1]]).unwrap();
        let op = SpectralConv::new(transform).with_product(self.product);
        let z = tape.apply(op, &[&z, &leaves[2]]).unwrap();
        let parts = tape.apply_many(Box::new(SplitComplex { turns: 1 - self.turns }), &[&z]).unwrap();
        let values = |it: &Tensor| it.to_vec::<f64>().unwrap();
        let mut results: Vec<Vec<f64>> = parts.iter().map(|it| values(it.value())).collect();
        results.resize(5, Vec::new());
        let seeds = parts.into_iter().zip(&operands[3..]).map(|(part, seed)| (part, make(&shapes[0], seed)));
        tape.backward_from(seeds.collect(), &mut |id, grad| {
            results[2 + id.0] = values(&grad);
            Ok(())
        })
        .unwrap();
        results
    }

    /// In every precision: within its roundings of double precision on the CPU, and adjoint in field and weight.
    fn check(&self, device: &Device, seed: u64) {
        let cpu = Device::cpu(2).unwrap();
        for precision in Precision::ALL {
            let mut rng = Rng::new(seed);
            let [re, im, weight] = self.shapes();
            let shapes = [&re, &im, &weight, &re, &im];
            let operands: Vec<Vec<f64>> =
                shapes.iter().map(|shape| rounded(&rng.normals(shape.iter().product()), precision)).collect();
            let f = |operands: &[Vec<f64>]| self.run(&cpu, Precision::F64, operands);
            let (got, want) = (self.run(device, precision, &operands), f(&operands));
            let sensitivities = sensitivity(f, &operands, seed);
            // Phases, each axis on both sides with its matrix on a GPU, the products, the result.
            let roundings = 2 * (3 * self.grid.len() + 4);
            for (idx, name) in ["re", "im", "grad re", "grad im", "grad weight"].into_iter().enumerate() {
                let bound = allowed(precision, self.n_terms(), roundings, norm(&want[idx]), sensitivities[idx]);
                let error = distance(&got[idx], &want[idx]);
                assert!(error <= bound, "{name} in {precision}: {error:.3e} > {bound:.3e}, {:?}", self.grid);
            }
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let left = dot(&got[0], &operands[3]) + dot(&got[1], &operands[4]);
            let field = dot(&got[2], &operands[0]) + dot(&got[3], &operands[1]);
            let length = |parts: [&Vec<f64>; 2]| parts.map(|it| dot(it, it)).iter().sum::<f64>().sqrt();
            let size = (length([&got[0], &got[1]]) * length([&operands[3], &operands[4]]))
                .max(length([&got[2], &got[3]]) * length([&operands[0], &operands[1]]))
                .max(norm(&got[4]) * norm(&operands[2]));
            for right in [field, dot(&got[4], &operands[2])] {
                let tolerance = 4.0 * tol(precision, self.n_terms()) * size;
                assert!((left - right).abs() <= tolerance, "{precision}: {left} against {right}, size {size}");
            }
        }
    }
}

/// Random grids with all, few and odd numbers of modes.
fn convolutions() -> Vec<Convolution> {
    let mut rng = Rng::new(41);
    let mut below = |most: usize| 1 + rng.bits() as usize % most;
    (0..10)
        .map(|idx| {
            let grid: Vec<usize> = (0..1 + idx % 3).map(|_| below(9)).collect();
            let modes = grid.iter().map(|&n| below(n)).collect();
            let product = if idx % 2 == 0 { ModeProduct::Dense } else { ModeProduct::Separable };
            Convolution { grid, modes, batch: below(3), c: below(5), product, turns: below(7) as isize - 4 }
        })
        .collect()
}

#[test]
fn complex_convolutions_in_every_precision() {
    let device = Device::cpu(2).unwrap();
    convolutions().iter().enumerate().for_each(|(idx, it)| it.check(&device, idx as u64));
}

#[test]
fn complex_convolutions_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    convolutions().iter().enumerate().for_each(|(idx, it)| it.check(&device, idx as u64));
}

/// With given statistics: the formula, and gradients that treat them as constants.
#[test]
fn batch_norm_by_running_statistics() {
    check_running_statistics(&Device::cpu(1).unwrap());
}

#[test]
fn batch_norm_by_running_statistics_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_running_statistics(&device);
}

fn check_running_statistics(device: &Device) {
    let make = |shape: &[usize], values: &[f64]| {
        Tensor::from_slice(device, values, shape, Precision::F64, Purpose::Activation).unwrap()
    };
    let (x, w, b) = ([1.0, 2.0, -1.0, 0.5], [2.0, 3.0], [0.25, -1.0]);
    let (mean, var) = ([0.5, 1.0], [4.0, 0.25]);
    let inputs = [make(&[1, 2, 2], &x), make(&[2], &w), make(&[2], &b), make(&[2], &mean), make(&[2], &var)];
    let g = [1.0, -2.0, 0.5, 4.0];
    let (y, grads) = run_op(&double(device), Box::new(BatchNorm(BatchStatistics::Running)), &inputs, &g);
    let rstd = var.map(|var: f64| 1.0 / (var + 1e-5).sqrt());
    let x_hat: Vec<f64> = (0..4).map(|i| (x[i] - mean[i % 2]) * rstd[i % 2]).collect();
    let want: Vec<f64> = (0..4).map(|i| x_hat[i] * w[i % 2] + b[i % 2]).collect();
    assert_close!("y", y.to_vec::<f64>().unwrap(), want, 1e-14);
    let grad = |idx: usize| grads[idx].as_ref().unwrap().to_vec::<f64>().unwrap();
    let want: Vec<f64> = (0..4).map(|i| g[i] * w[i % 2] * rstd[i % 2]).collect();
    assert_close!("grad x", grad(0), want, 1e-14);
    assert_close!("grad w", grad(1), [g[0] * x_hat[0] + g[2] * x_hat[2], g[1] * x_hat[1] + g[3] * x_hat[3]], 1e-14);
    assert_close!("grad b", grad(2), [1.5, 2.0], 1e-14);
    assert!(grads[3].is_none() && grads[4].is_none());
}

/// A phase turns every point, the opposite one turns it back, and gradients go through the adjoint.
#[test]
fn phases_turn_fields_and_back() {
    check_phases(&Device::cpu(1).unwrap());
}

#[test]
fn phases_turn_fields_and_back_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_phases(&device);
}

fn check_phases(device: &Device) {
    let (n, c) = (5, 3);
    let shape = [2, 4, n, c];
    for turns in [-7, -1, 0, 2, 5] {
        let mut rng = Rng::new(9);
        let [re, im, a, b] = [(); 4].map(|()| rng.tensor(device, &shape, Precision::F64));
        let mut tape = Tape::new(double(device));
        let (x, y) = (tape.leaf(re.clone()), tape.leaf(im.clone()));
        let z = tape.apply(JoinComplex { turns }, &[&x, &y]).unwrap();
        let (z_values, points) = (z.value().to_vec::<f64>().unwrap(), re.to_vec::<f64>().unwrap());
        let imaginary = im.to_vec::<f64>().unwrap();
        for (idx, z) in z_values.chunks_exact(2).enumerate() {
            let (sin, cos) = (std::f64::consts::TAU * (turns * (idx / c % n) as isize) as f64 / n as f64).sin_cos();
            let (re, im) = (points[idx], imaginary[idx]);
            assert!((z[0] - (re * cos - im * sin)).abs() < 1e-13 && (z[1] - (re * sin + im * cos)).abs() < 1e-13);
        }
        let mut back = tape.apply_many(Box::new(SplitComplex { turns: -turns }), &[&z]).unwrap();
        assert_close!("re", back[0].value().to_vec::<f64>().unwrap(), points, 1e-14);
        assert_close!("im", back[1].value().to_vec::<f64>().unwrap(), imaginary, 1e-14);
        let mut grads = vec![Vec::new(); 2];
        let seeds = vec![(back.remove(0), a.clone()), (back.remove(0), b.clone())];
        tape.backward_from(seeds, &mut |id, grad| {
            grads[id.0] = grad.to_vec::<f64>()?;
            Ok(())
        })
        .unwrap();
        // The map is the identity, so its adjoint is.
        assert_close!("grad re", grads[0], a.to_vec::<f64>().unwrap(), 1e-14);
        assert_close!("grad im", grads[1], b.to_vec::<f64>().unwrap(), 1e-14);
    }
}

/// A recorded step finds a running statistic where it was.
#[cfg(feature = "cuda")]
#[test]
fn running_statistics_move_in_place_on_a_gpu() {
    use halfmode_autograd::LeafId;
    use halfmode_nn::{Init, ParamSpec, Params};
    let Some(device) = gpu() else { return };
    let specs = vec![ParamSpec::statistic("mean", &[5], Init::Ones)];
    let mut params = Params::new(&device, specs, &PrecisionPolicy::full(), 0).unwrap();
    let before = params.list[0].value.address().unwrap();
    let seen = [0.0, 1.0, 2.0, -3.0, 40.0];
    let tensor = Tensor::from_slice(&device, &seen, [5], Precision::F32, Purpose::State).unwrap();
    params.observe(&[(LeafId(0), tensor)]).unwrap();
    assert_eq!(params.list[0].value.address().unwrap(), before);
    let want: Vec<f64> = seen.iter().map(|seen| 0.9 + 0.1 * seen).collect();
    assert_close!("statistic", params.list[0].value.to_vec::<f64>().unwrap(), want, 1e-6);
}
