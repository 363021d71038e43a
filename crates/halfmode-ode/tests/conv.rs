//! The convolutional field and the classifier of images.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{LAST, Problem, double, linspace};
use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, ParamSpec, Params};
use halfmode_ode::{ConvField, ConvNode, Method, Storage, VectorField, classes};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, Rng, assert_close, devices};
use std::sync::Arc;

fn policy(precision: Precision) -> Arc<PrecisionPolicy> {
    Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionPolicy::full(),
        half => PrecisionPolicy::mixed(half),
    })
}

/// Logits, and gradients of all parameters in the file's order by name, for this cotangent.
type Ran = (Vec<f64>, Vec<(String, Vec<f64>)>);

fn run(device: &Device, node: &ConvNode, params: &Params, x: &Tensor, cotangent: &dyn Fn(&[f64]) -> Vec<f64>) -> Ran {
    let precision = params.list[0].value.precision();
    let mut tape = Tape::new(Cx::new(device, &policy(precision)));
    let leaves = params.leaves(&mut tape);
    let image = tape.constant(x.clone());
    let logits = node.forward(&mut tape, &leaves, &[&image]).unwrap();
    drop(leaves);
    let values = logits.value().to_vec::<f64>().unwrap();
    let seed = Tensor::from_slice(
        device,
        &cotangent(&values),
        logits.value().shape().clone(),
        Precision::F64,
        Purpose::Activation,
    );
    let mut grads = vec![(String::new(), Vec::new()); params.list.len()];
    tape.backward_from(vec![(logits, seed.unwrap())], &mut |LeafId(idx), grad| {
        let spec: &ParamSpec = &params.list[idx].spec;
        grads[idx] = (spec.name.clone(), spec.to_file(&grad.to_vec::<f64>()?));
        Ok(())
    })
    .unwrap();
    (values, grads)
}

/// The gradient of the mean cross entropy.
fn softmax_less_one(logits: &[f64], labels: &[usize]) -> Vec<f64> {
    let n = logits.len() / labels.len();
    let rows = logits.chunks(n).zip(labels).flat_map(|(row, &label)| {
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        let one = move |idx: usize| if idx == label { 1.0 } else { 0.0 };
        row.iter().enumerate().map(move |(idx, x)| x.exp() / sum - one(idx)).collect::<Vec<_>>()
    });
    rows.map(|it| it / labels.len() as f64).collect()
}

fn recorded() -> (Golden, ConvNode, Vec<usize>) {
    let golden = Golden::load("ode_conv_node");
    let config = golden.fact("config").clone();
    let of = |key: &str| usize::try_from(config[key].as_u64().unwrap()).unwrap();
    let list = |key: &str| -> Vec<usize> {
        config[key].as_array().unwrap().iter().map(|it| usize::try_from(it.as_u64().unwrap()).unwrap()).collect()
    };
    let image = list("image").try_into().unwrap();
    let node = ConvNode {
        n_classes: of("n_classes"),
        n_steps: of("n_steps"),
        method: Method::Rk4ThreeEighths,
        ..ConvNode::new(image, of("channels"))
    };
    (golden, node, list("labels"))
}

/// Logits and gradients of PyTorch through torchdiffeq, in double precision; and in single precision within four times
/// PyTorch's own error.
#[test]
fn the_classifier_is_the_recorded_one() {
    let (golden, node, labels) = recorded();
    let single = ["out", "grad_max"].map(|what| golden.f32_tolerance(what));
    // The same condition, with 29 bits more.
    let double = single.map(|it| it * 2f64.powi(-29));
    for (precision, [of_logits, of_gradients]) in [(Precision::F64, double), (Precision::F32, single)] {
        for device in devices() {
            let mut params = node.params(&device, &policy(precision), 0).unwrap();
            assert_eq!(params.list.len(), golden.names("param/").count());
            for param in &mut params.list {
                let (shape, values) = golden.get(&format!("param/{}", param.spec.name));
                assert_eq!(shape, param.spec.file_shape, "{}", param.spec.name);
                param.set_file_values(values).unwrap();
            }
            let (shape, x) = golden.get("in/x");
            let x = Tensor::from_slice(&device, x, shape, precision, Purpose::Data).unwrap();
            let (logits, grads) = run(&device, &node, &params, &x, &|logits| softmax_less_one(logits, &labels));
            assert_close!(format!("logits in {precision}"), logits, *golden.get("f64/out").1, of_logits);
            golden.assert_gradients("ode_conv_node", "f64/grad/", &grads, of_gradients);
        }
    }
}

/// The published configuration has the published number of weights, and all steps start alike.
#[test]
fn the_classifier_has_the_peers_weights() {
    let node = ConvNode::new([32, 32], 16);
    assert_eq!(node.n_parameters(), 197_962);
    let device = Device::cpu(1).unwrap();
    let params = node.params(&device, &PrecisionPolicy::mixed(Precision::Bf16), 7).unwrap();
    let values = |name: &str| params.get(name).unwrap().file_values().unwrap();
    assert_eq!(values("f2.w.0"), values("f2.w.3"));
    let n = values("f3.w.1").len() as f64;
    let std = (values("f3.w.1").iter().map(|w| w * w).sum::<f64>() / n).sqrt();
    // 36 864 draws: the standard error of the deviation is 0.0004.
    assert!((std - 0.1).abs() < 2e-3, "{std}");
}

/// Central differences of a solve, by the state and by the weights of every interval.
#[test]
fn gradients_of_a_solve_match_differences() {
    let device = Device::cpu(2).unwrap();
    let field = ConvField { channels: 2, n_intervals: 2 };
    let mut rng = Rng::new(5);
    // Biases of either sign, far from the kinks of the rectifiers.
    let params: Vec<(Vec<usize>, Vec<f64>)> = field
        .param_specs()
        .iter()
        .map(|spec| {
            let n = spec.n_scalars();
            let values = if n == 2 { vec![9.0, -9.0] } else { rng.normals(n) };
            (spec.stored_shape().to_vec(), values)
        })
        .collect();
    let y0 = (vec![1, 4, 4, 2], rng.normals(32));
    let problem = Problem { field: Arc::new(field), params, y0, times: linspace(0.0, 1.0, 4) };
    let got = problem.solve(&device, &double(), LAST, &common::square).unwrap();
    let loss =
        |problem: &Problem<ConvField>| problem.forward(&device, &double()).iter().map(|y| y * y).sum::<f64>() / 2.0;
    let check = |name: &str, shift: &dyn Fn(&mut Problem<ConvField>, f64), want: f64| {
        let at = |h: f64| {
            let mut moved = problem.clone();
            shift(&mut moved, h);
            loss(&moved)
        };
        let h = 1e-5;
        let slope = (at(h) - at(-h)) / (2.0 * h);
        assert!((slope - want).abs() <= 1e-6 * (1.0 + want.abs()), "{name}: {slope} against {want}");
    };
    for idx in [0, 13, 31] {
        check("y0", &|it, h| it.y0.1[idx] += h, got.grad_y0[idx]);
    }
    for (param, grad) in got.grad_params.iter().enumerate() {
        for idx in [0, grad.len() / 2, grad.len() - 1] {
            check(&format!("parameter {param}"), &|it, h| it.params[param].1[idx] += h, grad[idx]);
        }
    }
}

/// Neither threads nor kept states change a bit, in any precision, and the planning device counts the same bytes.
#[test]
fn threads_and_storage_change_no_bit() {
    let node = ConvNode { n_steps: 3, ..ConvNode::new([12, 8], 4) };
    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
        let mut results = Vec::new();
        for device in devices() {
            let params = node.params(&device, &policy(precision), 3).unwrap();
            let x = Rng::new(6).tensor(&device, &[2, 3, 12, 8], Precision::F32);
            for storage in [Storage::Trajectory, Storage::Budget { bytes: 1 << 14 }] {
                let node = ConvNode { storage, ..node.clone() };
                results.push(run(&device, &node, &params, &x, &|logits| vec![1.0; logits.len()]));
            }
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision}");
        let cpu = Device::cpu(2).unwrap();
        let peaks = [cpu.clone(), cpu.twin()].map(|device| {
            let params = node.params(&device, &policy(precision), 3).unwrap();
            let x = Rng::new(6).tensor(&device, &[2, 3, 12, 8], Precision::F32);
            let mut tape = Tape::new(Cx::new(&device, &policy(precision)));
            let leaves = params.leaves(&mut tape);
            let image = tape.constant(x);
            let logits = node.forward(&mut tape, &leaves, &[&image]).unwrap();
            drop(leaves);
            let shape = logits.value().shape().clone();
            let seed = Tensor::from_slice(&device, &[1.0; 20], shape, Precision::F32, Purpose::Activation).unwrap();
            tape.backward_from(vec![(logits, seed)], &mut |_, _| Ok(())).unwrap();
            device.memory()
        });
        for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
            assert_eq!(run.peak, planned.peak, "{purpose} in {precision}");
        }
    }
}

#[test]
fn the_class_is_that_of_the_first_largest_logit() {
    let device = Device::cpu(1).unwrap();
    let logits = [0.0, 2.0, 2.0, -1.0, -2.0, -3.0, 0.0, f64::NAN, 2.0];
    let logits = Tensor::from_slice(&device, &logits, [3, 3], Precision::F32, Purpose::Data).unwrap();
    assert_eq!(classes(&logits).unwrap(), [Some(1), Some(0), None]);
}
