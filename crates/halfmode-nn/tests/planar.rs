//! The mean of planar flows: values, divergence and gradients against plain loops in double precision.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op, Outputs, Result, Saved, Tape};
use halfmode_nn::PlanarFlow;
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, assert_close, distance, norm, run_op, slope, tol};
use proptest::prelude::*;
use std::sync::Arc;

/// The op with its second output first: what checks of one output see.
#[derive(Debug)]
struct Divergence;

impl Op for Divergence {
    fn name(&self) -> &'static str {
        "planar_flow (divergence)"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let (mut outputs, saved) = PlanarFlow.forward(cx, inputs)?;
        outputs.reverse();
        Ok((outputs, saved))
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        grads.reverse();
        PlanarFlow.backward(cx, saved, grads, needs)
    }
}

fn policy(precision: Precision) -> Arc<PrecisionPolicy> {
    Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionPolicy::full(),
        half => PrecisionPolicy::mixed(half),
    })
}

/// `(v, m)` by the definition, one row after another, and the 2-norms of the sums of their terms without signs, where
/// slopes of a tanh count as one: against these, errors of single terms are measured.
fn naive(z: &[f64], coefficients: &[f64], d: usize) -> ([Vec<f64>; 2], [f64; 2]) {
    let n = coefficients.len() / (3 * d + 1);
    let (mut v, mut m) = (vec![0.0; z.len()], vec![0.0; z.len() / d]);
    let (mut v_terms, mut m_terms) = (v.clone(), m.clone());
    for (row, z) in z.chunks(d).enumerate() {
        for flow in coefficients.chunks(3 * d + 1) {
            let g: Vec<f64> = (0..d).map(|c| flow[d + c] / (1.0 + (-flow[2 * d + c]).exp())).collect();
            let s: f64 = flow[3 * d] + (0..d).map(|c| flow[c] * z[c]).sum::<f64>();
            let h = s.tanh();
            for c in 0..d {
                v[row * d + c] += h * g[c] / n as f64;
                v_terms[row * d + c] += (h * g[c]).abs() / n as f64;
                m_terms[row] += (flow[c] * g[c]).abs() / n as f64;
            }
            let q: f64 = (0..d).map(|c| flow[c] * g[c]).sum();
            m[row] -= (1.0 - h * h) * q / n as f64;
        }
    }
    ([v, m], [norm(&v_terms), norm(&m_terms)])
}

fn inputs(device: &Device, (shape, n): (&[usize], usize), precision: Precision, seed: u64) -> [Tensor; 2] {
    let d = shape[shape.len() - 1];
    let mut rng = Rng::new(seed);
    [rng.tensor(device, shape, precision), rng.tensor(device, &[n, 3 * d + 1], precision)]
}

/// Output and gradients of both outputs together, with the same cotangents in every precision.
fn run(cx: &Cx, inputs: &[Tensor; 2], cotangents: [&[f64]; 2]) -> ([Vec<f64>; 2], [Vec<f64>; 2]) {
    let mut tape = Tape::new(cx.clone());
    let vars: Vec<_> = inputs.iter().map(|it| tape.leaf(it.clone())).collect();
    let outputs = tape.apply_many(Box::new(PlanarFlow), &vars.iter().collect::<Vec<_>>()).unwrap();
    let values: Vec<Vec<f64>> = outputs.iter().map(|it| it.value().to_vec().unwrap()).collect();
    let seeds = outputs.into_iter().zip(cotangents).map(|(output, cotangent)| {
        let (shape, precision) = (output.value().shape().clone(), output.value().precision());
        let seed = Tensor::from_slice(&cx.device, cotangent, shape, precision, Purpose::Activation).unwrap();
        (output, seed)
    });
    let seeds = seeds.collect();
    let mut grads = [Vec::new(), Vec::new()];
    tape.backward_from(seeds, &mut |id, grad| {
        grads[id.0] = grad.to_vec::<f64>()?;
        Ok(())
    })
    .unwrap();
    (values.try_into().unwrap(), grads)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_are_those_of_the_definition(
        lead in proptest::collection::vec(1usize..20, 1..3), d in 1usize..6, n in 1usize..40, seed in any::<u64>(),
    ) {
        let device = Device::cpu(2).unwrap();
        let shape = [&lead[..], &[d]].concat();
        for precision in Precision::ALL {
            let cx = Cx::inference(&device, &policy(precision));
            let [z, coefficients] = inputs(&device, (&shape, n), precision, seed);
            let (outputs, _) = PlanarFlow.forward(&cx, &[&z, &coefficients]).unwrap();
            prop_assert_eq!(&outputs[0].shape()[..], &shape[..]);
            prop_assert_eq!(outputs[1].precision(), precision.accumulate());
            let (want, sizes) = naive(&z.to_vec::<f64>().unwrap(), &coefficients.to_vec::<f64>().unwrap(), d);
            // Inside, f32's tanh is 3e-7 off, and its argument by the sum that it is.
            let inside = if precision == Precision::F64 { 1e-13 } else { 3e-6 };
            let tolerances = [precision, precision.accumulate()].map(|it| tol(it, n) + inside);
            for (idx, name) in ["v", "m"].into_iter().enumerate() {
                let got = outputs[idx].to_vec::<f64>().unwrap();
                prop_assert_eq!(got.len(), want[idx].len());
                let (error, allowed) = (distance(&got, &want[idx]), tolerances[idx] * sizes[idx]);
                prop_assert!(error <= allowed, "{} in {}: {:e} > {:e}", name, precision, error, allowed);
            }
        }
    }

    #[test]
    fn gradients_are_those_of_differences(
        lead in proptest::collection::vec(1usize..12, 1..3), d in 1usize..5, n in 1usize..9, seed in any::<u64>(),
    ) {
        let device = Device::cpu(2).unwrap();
        let shape = [&lead[..], &[d]].concat();
        let given = inputs(&device, (&shape, n), Precision::F64, seed);
        check_differences(&device, &given, seed);
    }
}

/// Every entry of every gradient against a difference along it, both outputs together.
fn check_differences(device: &Device, given: &[Tensor; 2], seed: u64) {
    let cx = Cx::new(device, &policy(Precision::F64));
    let mut rng = Rng::new(seed ^ 1);
    let (n, d) = (given[0].numel(), given[0].shape().last().copied().unwrap());
    let cotangents = [rng.normals(n), rng.normals(n / d)];
    let cotangents = [&cotangents[0][..], &cotangents[1][..]];
    let (_, grads) = run(&cx, given, cotangents);
    let (_, sizes) = naive(&given[0].to_vec::<f64>().unwrap(), &given[1].to_vec::<f64>().unwrap(), d);
    let terms = sizes[0] * norm(cotangents[0]) + sizes[1] * norm(cotangents[1]);
    for (idx, got) in grads.iter().enumerate() {
        let x = given[idx].to_vec::<f64>().unwrap();
        let shifted = |at: usize, by: f64| {
            let mut moved = x.clone();
            moved[at] += by;
            let mut inputs = given.clone();
            let shape = given[idx].shape().clone();
            inputs[idx] = Tensor::from_slice(device, &moved, shape, Precision::F64, Purpose::Activation).unwrap();
            let values = PlanarFlow.forward(&cx, &[&inputs[0], &inputs[1]]).unwrap().0;
            let dot = |(value, c): (&Tensor, &[f64])| -> f64 {
                value.to_vec::<f64>().unwrap().iter().zip(c).map(|(v, c)| v * c).sum()
            };
            values.iter().zip(cotangents).map(dot).sum::<f64>()
        };
        let h = 3e-4;
        let want: Vec<f64> = (0..x.len()).map(|at| slope(|by| shifted(at, by), h * x[at].abs().max(1.0))).collect();
        // No difference is finer than the rounding of the terms that are subtracted, however small it is.
        let noise = 16.0 * f64::EPSILON * terms * (x.len() as f64).sqrt() / h;
        let (error, size) = (distance(got, &want), norm(&want));
        assert!(error <= 1e-7 * size + noise, "input {idx}: off by {error:e} of {size:e}, noise {noise:e}");
    }
}

/// Every direction: `<J w, y> = <w, J^T y>` for the part in which the velocity is linear, in every format.
#[test]
fn the_adjoint_of_the_linear_part_is_its_transpose() {
    let (shape, n) = ([300, 3], 20);
    let device = Device::cpu(2).unwrap();
    for precision in Precision::ALL {
        let cx = Cx::new(&device, &policy(precision));
        let [z, coefficients] = inputs(&device, (&shape, n), precision, 9);
        let all = coefficients.to_vec::<f64>().unwrap();
        // Both outputs are linear in u; without it there is nothing.
        let y = [Rng::new(10).tensor(&device, &shape, precision), Rng::new(11).tensor(&device, &[300, 1], precision)];
        let y = y.map(|it| it.to_vec::<f64>().unwrap());
        let (values, grads) = run(&cx, &[z, coefficients], [&y[0], &y[1]]);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let left = dot(&values[0], &y[0]) + dot(&values[1], &y[1]);
        let of_u = |x: &[f64]| x.chunks(10).flat_map(|row| row[3..6].to_vec()).collect::<Vec<f64>>();
        let right = dot(&of_u(&all), &of_u(&grads[1]));
        let size = values.iter().zip(&y).map(|(v, y)| (dot(v, v) * dot(y, y)).sqrt()).sum::<f64>();
        let inside = if precision == Precision::F64 { 0.0 } else { 1e-6 };
        let allowed = 4.0 * (tol(precision, n) + inside) * size;
        assert!((left - right).abs() <= allowed, "{precision}: {left} against {right} of {size}");
    }
}

/// More rows than tiles and parts, in each format: gradients of both outputs together are the double ones but for
/// rounding of what goes in and comes out, and the same at any number of threads.
#[test]
fn gradients_of_every_format_are_the_double_ones() {
    let (shape, n) = ([1311, 2], 33);
    for precision in Precision::ALL {
        let device = Device::cpu(1).unwrap();
        let cx = Cx::new(&device, &policy(precision));
        let given = inputs(&device, (&shape, n), precision, 5);
        let mut rng = Rng::new(6);
        let cotangents = [rng.tensor(&device, &shape, precision), rng.tensor(&device, &[1311, 1], precision)];
        let cotangents = cotangents.map(|it| it.to_vec::<f64>().unwrap());
        let cotangents = [&cotangents[0][..], &cotangents[1][..]];
        let (values, got) = run(&cx, &given, cotangents);
        let double = Cx::new(&device, &policy(Precision::F64));
        let exact = given.clone().map(|it| it.cast(Precision::F64, Purpose::Activation).unwrap());
        let (_, want) = run(&double, &exact, cotangents);
        let inside = if precision == Precision::F64 { 1e-13 } else { 1e-5 };
        assert_close!(format!("{precision}: z"), got[0], want[0], tol(precision, n) + inside);
        assert_close!(format!("{precision}: coefficients"), got[1], want[1], tol(precision, 1311) + inside);
        let threads = Device::cpu(3).unwrap();
        let moved = given.map(|it| {
            let (shape, values) = (it.shape().clone(), it.to_vec::<f64>().unwrap());
            Tensor::from_slice(&threads, &values, shape, precision, Purpose::Activation).unwrap()
        });
        assert_eq!(run(&Cx::new(&threads, &policy(precision)), &moved, cotangents), (values, got), "{precision}");
    }
}

/// The second output is minus the trace of the first one's Jacobian, by differences of 1e-5 in double precision.
#[test]
fn the_second_output_is_minus_the_divergence_of_the_first() {
    for d in [1, 2, 3, 7] {
        let device = Device::cpu(1).unwrap();
        let [z, coefficients] = inputs(&device, (&[5, d], 11), Precision::F64, 7);
        let (z, coefficients) = (z.to_vec::<f64>().unwrap(), coefficients.to_vec::<f64>().unwrap());
        let ([_, m], _) = naive(&z, &coefficients, d);
        let cx = Cx::inference(&device, &policy(Precision::F64));
        let v = |z: &[f64]| {
            let tensor = |values: &[f64], shape: [usize; 2]| {
                Tensor::from_slice(&device, values, shape, Precision::F64, Purpose::Activation).unwrap()
            };
            let (z, coefficients) = (tensor(z, [5, d]), tensor(&coefficients, [11, 3 * d + 1]));
            PlanarFlow.forward(&cx, &[&z, &coefficients]).unwrap().0[0].to_vec::<f64>().unwrap()
        };
        let h = 1e-5;
        let mut trace = [0.0; 5];
        for c in 0..d {
            let shifted = |by: f64| {
                let z: Vec<f64> = z.iter().enumerate().map(|(i, z)| if i % d == c { z + by } else { *z }).collect();
                v(&z)
            };
            let (up, down) = (shifted(h), shifted(-h));
            (0..5).for_each(|row| trace[row] += (up[row * d + c] - down[row * d + c]) / (2.0 * h));
        }
        let minus: Vec<f64> = trace.iter().map(|it| -it).collect();
        assert_close!(format!("{d} axes"), m, minus, 1e-8);
    }
}

/// The planning device counts every byte of a run, in each format.
#[test]
fn plans_count_every_byte() {
    for precision in Precision::ALL {
        let cpu = Device::cpu(2).unwrap();
        // More flows than rows, so that sums and gradients of the coefficients are what counts most.
        for (shape, n) in [([700, 3], 5), ([3, 2], 400)] {
            let peaks = [cpu.clone(), cpu.twin()].map(|device| {
                device.reset_peak();
                let given = inputs(&device, (&shape, n), precision, 5);
                let ones = vec![1.0; shape[0] * shape[1]];
                drop(run_op(&Cx::new(&device, &policy(precision)), Box::new(PlanarFlow), &given, &ones));
                device.memory()
            });
            for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
                assert_eq!(run.peak, planned.peak, "{purpose} in {precision}, {n} flows");
            }
        }
    }
}

/// A gradient that is not there is zero, and half a flow is refused.
#[test]
fn one_gradient_may_be_missing_and_half_a_flow_is_refused() {
    let device = Device::cpu(1).unwrap();
    let cx = Cx::new(&device, &policy(Precision::F64));
    let given = inputs(&device, (&[4, 2], 3), Precision::F64, 8);
    let ones = [vec![1.0; 8], vec![1.0; 4]];
    let both = run(&cx, &given, [&ones[0], &ones[1]]).1;
    let of_v = run_op(&cx, Box::new(PlanarFlow), &given, &ones[0]).1;
    let of_m = run_op(&cx, Box::new(Divergence), &given, &ones[1]).1;
    for (idx, both) in both.iter().enumerate() {
        let part = |of: &[Option<Tensor>]| of[idx].as_ref().unwrap().to_vec::<f64>().unwrap();
        let sum: Vec<f64> = part(&of_v).iter().zip(part(&of_m)).map(|(a, b)| a + b).collect();
        assert_close!(format!("input {idx}"), *both, sum, 1e-14);
    }
    let bad = Rng::new(1).tensor(&device, &[8], Precision::F64);
    let said = PlanarFlow.forward(&cx, &[&given[0], &bad]).unwrap_err();
    let source = std::error::Error::source(&said).map_or(said.to_string(), ToString::to_string);
    assert!(source.contains("coefficients"), "{source}");
}
