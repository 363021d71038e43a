//! The spectral convolution against its definition, its adjoints, and the peer's recorded run.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Value, algorithm, allowed, cases, policy, rounded, run, tensors, transform};
use halfmode_autograd::{Cx, Tape};
use halfmode_fft::{Algorithm, reference};
use halfmode_nn::{ChannelBias, Init, ParamSpec, SpectralConv};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, Rng, adjoint, assert_close, devices, distance, gpu, gradcheck, norm, sensitivity};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

#[derive(Clone, Debug)]
struct Case {
    grid: Vec<usize>,
    /// The output grid.
    out: Vec<usize>,
    modes: Vec<usize>,
    algorithm: Option<Algorithm>,
    batch: usize,
    c_in: usize,
    c_out: usize,
    seed: u64,
}

fn case(max_n: usize, resampled: bool) -> impl Strategy<Value = Case> {
    let axis = (1..=max_n, 1..=max_n).prop_flat_map(move |(n, m)| {
        let m = if resampled { m } else { n };
        (Just(n), Just(m), 1..=n.min(m))
    });
    let sizes = (1usize..4, 1usize..6, 1usize..6);
    (proptest::collection::vec(axis, 1..=3), algorithm(), sizes, any::<u64>()).prop_map(
        |(axes, algorithm, (batch, c_in, c_out), seed)| {
            let grid: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
            let out: Vec<usize> = axes.iter().map(|axis| axis.1).collect();
            let mut modes: Vec<usize> = axes.iter().map(|axis| axis.2).collect();
            let last = grid.len() - 1;
            modes[last] = modes[last].min(grid[last] / 2 + 1).min(out[last] / 2 + 1);
            Case { grid, out, modes, algorithm, batch, c_in, c_out, seed }
        },
    )
}

fn product(extents: &[usize]) -> usize {
    extents.iter().product()
}

/// Interleaved real line (batch entry, channel) of a field `[batch, points, channels]`.
fn line(values: &[f64], points: usize, channels: usize, (b, c): (usize, usize)) -> Vec<f64> {
    (0..points).flat_map(|p| [values[(b * points + p) * channels + c], 0.0]).collect()
}

impl Case {
    fn op(&self, device: &Device, precision: Precision) -> SpectralConv {
        let plan = |grid: &[usize]| transform(device, grid, &self.modes, precision, self.algorithm);
        if self.grid == self.out {
            SpectralConv::new(plan(&self.grid))
        } else {
            SpectralConv::resampling(plan(&self.grid), plan(&self.out))
        }
    }

    fn n_modes(&self) -> usize {
        product(&self.modes)
    }

    fn inputs(&self, precision: Precision) -> Vec<Value> {
        let mut rng = Rng::new(self.seed);
        let field = [vec![self.batch], self.grid.clone(), vec![self.c_in]].concat();
        let shapes = [field, vec![self.n_modes(), self.c_in, 2 * self.c_out]];
        shapes.into_iter().map(|shape| (shape.clone(), rounded(&rng.normals(product(&shape)), precision))).collect()
    }

    fn cotangent(&self, precision: Precision) -> Vec<f64> {
        rounded(&Rng::new(self.seed ^ 7).normals(self.batch * product(&self.out) * self.c_out), precision)
    }

    fn n_terms(&self) -> usize {
        2 * product(&self.grid).max(product(&self.out)) * self.batch.max(self.c_in).max(self.c_out)
    }

    /// Stored on the way: each axis on both sides, the products, the result.
    fn roundings(&self) -> usize {
        2 * (2 * self.grid.len() + 2)
    }

    /// The half-spectrum weight of mode `m` (flat) on `grid`.
    fn half_weight(&self, m: usize, grid: &[usize]) -> f64 {
        let last = self.modes.len() - 1;
        let f = m % self.modes[last];
        if f == 0 || 2 * f == grid[last] { 1.0 } else { 2.0 }
    }

    /// By the definition: y, grad x, grad w of `sum(y * cotangent)`.
    fn oracle(&self, x: &[f64], w: &[f64], cotangent: &[f64]) -> Vec<Vec<f64>> {
        let (n, m, modes) = (product(&self.grid), product(&self.out), self.n_modes());
        let (c_in, c_out) = (self.c_in, self.c_out);
        let (mut y, mut gx, mut gw) = (vec![0.0; self.batch * m * c_out], vec![0.0; x.len()], vec![0.0; w.len()]);
        let at = |k: usize, i: usize, o: usize| (k * c_in + i) * 2 * c_out + o;
        for b in 0..self.batch {
            let x_hat: Vec<Vec<f64>> = (0..c_in)
                .map(|i| reference::to_modes(&line(x, n, c_in, (b, i)), &self.grid, &self.modes, true))
                .collect();
            let g_hat: Vec<Vec<f64>> = (0..c_out)
                .map(|o| {
                    let line = line(cotangent, m, c_out, (b, o));
                    let mut g = reference::to_modes(&line, &self.out, &self.modes, true);
                    g.iter_mut().enumerate().for_each(|(s, g)| *g *= self.half_weight(s / 2, &self.out) / n as f64);
                    g
                })
                .collect();
            for o in 0..c_out {
                let mut y_hat = vec![0.0; 2 * modes];
                for k in 0..modes {
                    for i in 0..c_in {
                        let (a, b) = (x_hat[i][2 * k], x_hat[i][2 * k + 1]);
                        let (c, d) = (w[at(k, i, o)], w[at(k, i, c_out + o)]);
                        y_hat[2 * k] += a * c - b * d;
                        y_hat[2 * k + 1] += a * d + b * c;
                        let (p, q) = (g_hat[o][2 * k], g_hat[o][2 * k + 1]);
                        gw[at(k, i, o)] += a * p + b * q;
                        gw[at(k, i, c_out + o)] += a * q - b * p;
                    }
                }
                let grid = reference::to_grid(&y_hat, &self.out, &self.modes, true);
                (0..m).for_each(|p| y[(b * m + p) * c_out + o] = grid[2 * p] / n as f64);
            }
            for i in 0..c_in {
                let mut gx_hat = vec![0.0; 2 * modes];
                for k in 0..modes {
                    for o in 0..c_out {
                        let (p, q) = (g_hat[o][2 * k], g_hat[o][2 * k + 1]);
                        let (c, d) = (w[at(k, i, o)], w[at(k, i, c_out + o)]);
                        gx_hat[2 * k] += p * c + q * d;
                        gx_hat[2 * k + 1] += q * c - p * d;
                    }
                }
                // The reference's sum over modes doubles the half spectrum; the adjoint of analysis does not.
                gx_hat.iter_mut().enumerate().for_each(|(s, g)| *g /= self.half_weight(s / 2, &self.grid));
                let grid = reference::to_grid(&gx_hat, &self.grid, &self.modes, true);
                (0..n).for_each(|p| gx[(b * n + p) * c_in + i] = grid[2 * p]);
            }
        }
        vec![y, gx, gw]
    }

    fn check_adjoint(&self, device: &Device) {
        for precision in Precision::ALL {
            let op = self.op(device, precision);
            let cx = Cx::new(device, &policy(precision));
            let inputs = tensors(device, &self.inputs(precision), precision);
            for idx in 0..2 {
                adjoint(&cx, &|| Box::new(op.clone()), &inputs, idx, self.n_terms(), self.seed);
            }
        }
    }

    fn check_definition(&self, device: &Device, precision: Precision) {
        let (inputs, cotangent) = (self.inputs(precision), self.cotangent(precision));
        let operands = vec![inputs[0].1.clone(), inputs[1].1.clone(), cotangent.clone()];
        let f = |v: &[Vec<f64>]| self.oracle(&v[0], &v[1], &v[2]);
        let want = f(&operands);
        let cx = Cx::new(device, &policy(precision));
        let got = run(&cx, Box::new(self.op(device, precision)), &tensors(device, &inputs, precision), &cotangent);
        let sensitivities = if precision == Precision::F64 {
            want.iter().map(|v| norm(v)).collect()
        } else {
            sensitivity(f, &operands, self.seed)
        };
        for (idx, name) in ["y", "grad x", "grad w"].iter().enumerate() {
            if precision == Precision::F64 {
                assert_close!(name, got[idx][..], want[idx][..], 1e-11);
                continue;
            }
            // A GPU's matrices are stored as the field is.
            let roundings = self.roundings() + if device.is_cpu() { 0 } else { 2 * self.grid.len() };
            let bound = allowed(precision, self.n_terms(), roundings, norm(&want[idx]), sensitivities[idx]);
            let error = distance(&got[idx], &want[idx]);
            assert!(error <= bound, "{name} in {precision}: off by {error:.3e}, allowed {bound:.3e}; {self:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn agrees_with_the_definition(case in case(7, false)) {
        case.check_definition(&Device::cpu(2).unwrap(), Precision::F64);
    }

    #[test]
    fn agrees_with_the_definition_on_another_output_grid(case in case(7, true)) {
        case.check_definition(&Device::cpu(2).unwrap(), Precision::F64);
    }

    #[test]
    fn is_adjoint_in_both_operands_in_every_precision(case in case(9, true)) {
        case.check_adjoint(&Device::cpu(2).unwrap());
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn every_precision_is_within_its_roundings(case in case(5, true)) {
        let device = Device::cpu(2).unwrap();
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            case.check_definition(&device, precision);
        }
    }

    #[test]
    fn gradients_match_differences(case in case(5, true)) {
        let device = Device::cpu(2).unwrap();
        let inputs = tensors(&device, &case.inputs(Precision::F64), Precision::F64);
        let op = case.op(&device, Precision::F64);
        gradcheck(&device, &|| Box::new(op.clone()), &inputs, case.seed);
    }
}

fn gpu_cases() -> Vec<Case> {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let random = (0..10).map(|_| case(9, true).new_tree(&mut runner).unwrap().current());
    // More batch entries than a mode's sums in registers, more channels than a block's threads and a chunk.
    let (grid, modes) = (vec![16, 9], vec![5, 4]);
    let wide = Case { out: grid.clone(), grid, modes, algorithm: None, batch: 11, c_in: 37, c_out: 131, seed: 9 };
    // Halves with channels in sixteens go to tensor cores, in tiles of 16, 32 and 64 channels and 8 entries. Few points
    // and modes: the definition is slow.
    let sizes = [(3, 16, 48), (8, 48, 16), (9, 32, 96), (11, 96, 32), (5, 64, 128), (17, 128, 64)];
    let tiles = sizes.map(|(batch, c_in, c_out)| {
        let (grid, modes) = (vec![7], vec![3]);
        Case { out: grid.clone(), grid, modes, algorithm: None, batch, c_in, c_out, seed: 9 }
    });
    random.chain([wide]).chain(tiles).map(|case| Case { algorithm: None, ..case }).collect()
}

#[test]
fn on_a_gpu_in_every_precision() {
    let Some(device) = gpu() else { return };
    for case in gpu_cases() {
        for precision in Precision::ALL {
            case.check_definition(&device, precision);
        }
    }
}

#[test]
fn is_adjoint_in_both_operands_in_every_precision_on_a_gpu() {
    let Some(device) = gpu() else { return };
    gpu_cases().iter().for_each(|case| case.check_adjoint(&device));
}

#[test]
fn threads_do_not_change_a_bit() {
    let (grid, out, modes) = (vec![37, 24], vec![20, 41], vec![9, 11]);
    let case = Case { grid, out, modes, algorithm: None, batch: 3, c_in: 5, c_out: 7, seed: 1 };
    for precision in Precision::ALL {
        let results: Vec<_> = devices()
            .iter()
            .map(|device| {
                let inputs = tensors(device, &case.inputs(precision), precision);
                let cx = Cx::new(device, &policy(precision));
                run(&cx, Box::new(case.op(device, precision)), &inputs, &case.cotangent(precision))
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let case =
        Case { grid: vec![6], out: vec![6], modes: vec![3], algorithm: None, batch: 2, c_in: 3, c_out: 2, seed: 1 };
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F32));
    let op = case.op(&device, Precision::F32);
    let err = |x: &[usize], w: &[usize]| {
        let make = |shape: &[usize]| Rng::new(0).tensor(&device, shape, Precision::F32);
        let mut tape = Tape::new(cx.clone());
        let (x, w) = (tape.leaf(make(x)), tape.leaf(make(w)));
        tape.apply(op.clone(), &[&x, &w]).unwrap_err().to_string()
    };
    assert_eq!(
        err(&[2, 6, 3], &[4, 3, 4]),
        "spectral_conv: mode_mix: expected shape [3, 3, 4] for `weight`, found [4, 3, 4]"
    );
    assert_eq!(
        err(&[2, 6, 2], &[3, 3, 4]),
        "spectral_conv: mode_mix: expected shape [3, 2, 4] for `weight`, found [3, 3, 4]"
    );
    assert_eq!(err(&[2, 7, 3], &[3, 3, 4]), "spectral_conv: field: expected shape [2, 6, 3], found [2, 7, 3]");
}

/// `[batch, channels, points]` to `[batch, points, channels]`; its own inverse with the two swapped.
fn channels_last(values: &[f64], batch: usize, channels: usize, points: usize) -> Vec<f64> {
    let mut out = vec![0.0; values.len()];
    for b in 0..batch {
        for c in 0..channels {
            for p in 0..points {
                out[(b * points + p) * channels + c] = values[(b * channels + c) * points + p];
            }
        }
    }
    out
}

/// neuraloperator's `SpectralConv` in double precision: `n_modes` (6, 8) of a real field are 6 x 5
/// stored modes.
#[test]
fn golden_spectral2d() {
    let golden = Golden::load("spectral2d");
    for algorithm in [Algorithm::Matrix, Algorithm::Fft] {
        let device = Device::cpu(2).unwrap();
        let (w_shape, w_file) = golden.get("param/weight.tensor");
        let (&[c_in, c_out, k1, k2, 2], (&[batch, _, n1, n2], x)) = (w_shape, golden.get("in/x")) else {
            panic!("unexpected shapes")
        };
        let spec = ParamSpec::spectral("weight.tensor", &w_shape[..4], Init::Ones);
        assert_eq!(spec.to_file(&spec.to_stored(w_file)), w_file);
        let (b_shape, bias) = golden.get("param/bias");
        let values = |name: &str| golden.get(name).1;
        let make = |shape: &[usize], values: &[f64]| {
            Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
        };
        let mut tape = Tape::new(Cx::new(&device, &policy(Precision::F64)));
        let x = tape.leaf(make(&[batch, n1, n2, c_in], &channels_last(x, batch, c_in, n1 * n2)));
        let w = tape.leaf(make(&spec.stored_shape(), &spec.to_stored(w_file)));
        let bias = tape.leaf(make(b_shape, bias));
        let conv = SpectralConv::new(transform(&device, &[n1, n2], &[k1, k2], Precision::F64, Some(algorithm)));
        let y = tape.apply(conv, &[&x, &w]).unwrap();
        let y = tape.apply(ChannelBias, &[&y, &bias]).unwrap();
        let out = channels_last(&y.value().to_vec::<f64>().unwrap(), batch, n1 * n2, c_out);
        assert_close!("out", out, *values("f64/out"), 1e-10);
        let cotangent = channels_last(values("in/cotangent"), batch, c_out, n1 * n2);
        let seed = make(&[batch, n1, n2, c_out], &cotangent);
        let mut grads = vec![Vec::new(); 3];
        tape.backward_from(vec![(y, seed)], &mut |id, grad| {
            grads[id.0] = grad.to_vec::<f64>()?;
            Ok(())
        })
        .unwrap();
        assert_close!("grad x", channels_last(&grads[0], batch, n1 * n2, c_in), *values("f64/grad_in/x"), 1e-9);
        assert_close!("grad w", spec.to_file(&grads[1]), *values("f64/grad_param/weight.tensor"), 1e-9);
        assert_close!("grad bias", grads[2], *values("f64/grad_param/bias"), 1e-9);
        let error = |got: &[f64], name: &str| halfmode_testkit::rel_l2(got, values(name));
        println!(
            "{algorithm:?}: out {:.1e}, grad x {:.1e}, grad w {:.1e}, grad bias {:.1e}",
            error(&out, "f64/out"),
            error(&channels_last(&grads[0], batch, n1 * n2, c_in), "f64/grad_in/x"),
            error(&spec.to_file(&grads[1]), "f64/grad_param/weight.tensor"),
            error(&grads[2], "f64/grad_param/bias"),
        );
    }
}
