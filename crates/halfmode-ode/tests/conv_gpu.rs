//! The convolutional classifier on a GPU against the CPU. Without a GPU nothing runs; with `HALFMODE_REQUIRE_CUDA=1`
//! that is a failure.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, Params};
use halfmode_ode::{ConvNode, Storage};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, MemoryStats, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu, rel_l2};
use std::sync::Arc;

fn policy(precision: Precision) -> Arc<PrecisionPolicy> {
    Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionPolicy::full(),
        half => PrecisionPolicy::mixed(half),
    })
}

/// Logits and gradients of all parameters for a fixed cotangent, and what was allocated.
fn run(device: &Device, node: &ConvNode, precision: Precision) -> (Vec<Vec<f64>>, MemoryStats) {
    // The same values everywhere: drawn on the CPU.
    let cpu = Device::cpu(1).unwrap();
    let drawn = node.params(&cpu, &policy(Precision::F32), 3).unwrap();
    let mut params: Params = node.params(device, &policy(precision), 3).unwrap();
    if device.launches() {
        for (param, drawn) in params.list.iter_mut().zip(&drawn.list) {
            param.set_file_values(&drawn.file_values().unwrap()).unwrap();
        }
    }
    device.reset_peak();
    let [n1, n2] = node.image;
    let x = Rng::new(6).tensor(device, &[2, 3, n1, n2], Precision::F32);
    let mut tape = Tape::new(Cx::new(device, &policy(precision)));
    let leaves = params.leaves(&mut tape);
    let image = tape.constant(x);
    let logits = node.forward(&mut tape, &leaves, &[&image]).unwrap();
    drop(leaves);
    let values = |it: &Tensor| if device.launches() { it.to_vec::<f64>().unwrap() } else { Vec::new() };
    let mut results = vec![values(logits.value())];
    results.resize(params.list.len() + 1, Vec::new());
    let (shape, sums) = (logits.value().shape().clone(), precision.accumulate());
    let cotangent: Vec<f64> = (0..shape.numel()).map(|idx| 0.25 * (idx % 7) as f64 - 0.5).collect();
    let seed = Tensor::from_slice(device, &cotangent, shape, sums, Purpose::Activation).unwrap();
    tape.backward_from(vec![(logits, seed)], &mut |LeafId(idx), grad| {
        results[idx + 1] = values(&grad);
        Ok(())
    })
    .unwrap();
    (results, device.memory())
}

/// Relative errors of the logits and of all gradients together.
fn errors(got: &[Vec<f64>], want: &[Vec<f64>]) -> [f64; 2] {
    [rel_l2(&got[0], &want[0]), rel_l2(&got[1..].concat(), &want[1..].concat())]
}

#[test]
fn the_classifier_in_every_precision_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    for (image, channels) in [([12, 8], 4), ([20, 24], 16), ([9, 14], 8)] {
        let node = ConvNode { n_steps: 2, ..ConvNode::new(image, channels) };
        let want = run(&cpu, &node, Precision::F64).0;
        for precision in [Precision::F64, Precision::F32, Precision::Bf16, Precision::F16] {
            let on_cpu = errors(&run(&cpu, &node, precision).0, &want);
            let (results, memory) = run(&gpu, &node, precision);
            let on_gpu = errors(&results, &want);
            let [show_gpu, show_cpu] = [on_gpu, on_cpu].map(|it| it.map(|error| format!("{error:.2e}")).join(" "));
            let text = format!("{image:?} {channels} in {precision}: {show_gpu}, on the CPU {show_cpu}");
            println!("{text}");
            let allowed = match precision {
                Precision::F64 => [1e-10; 2],
                // Norms of channels that hardly vary make roundings a few thousand times larger; sums are formed in another
                // order here, so that the two errors are two draws.
                Precision::F32 => on_cpu.map(|it| 1e-5f64.max(4.0 * it)),
                _ => on_cpu.map(|it| 4.0 * it),
            };
            assert!(on_gpu.iter().zip(allowed).all(|(got, allowed)| *got <= allowed), "{text}");
            let again = run(&gpu, &node, precision).0;
            assert!(results == again, "{text}: another run, other bits");
            let planned = run(&gpu.twin(), &node, precision).1;
            // A dynamic scale asks for the largest value, which needs a word that a plan does not count.
            if precision != Precision::F16 {
                for ((purpose, run), (_, planned)) in memory.iter().zip(planned.iter()) {
                    assert_eq!(run.peak, planned.peak, "{purpose} in {precision}");
                }
            }
        }
        // States that are found again have the same bits.
        let budget = ConvNode { storage: Storage::Budget { bytes: 1 << 18 }, ..node.clone() };
        assert!(run(&gpu, &budget, Precision::Bf16).0 == run(&gpu, &node, Precision::Bf16).0, "{image:?}");
    }
}
