//! Whole training steps of neural differential equations (forward, loss, backward, AdamW) in half against `full`.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use halfmode_autograd::{Cx, LeafId, Tape, Var};
use halfmode_benches::{Bench, noise};
use halfmode_nn::{Module, Params, Subtract};
use halfmode_ode::{ConvNode, MlpField, OdeOptions, OdePrecision, Storage, TimeInput, Times, VectorField, odeint_last};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_train::{AdamW, AdamWConfig, AdamWKind, CrossEntropy, Reduction};
use std::sync::Arc;

/// Parameters and their optimiser.
struct Weights {
    policy: Arc<PrecisionPolicy>,
    params: Params,
    optimizer: AdamW,
}

impl Weights {
    fn new(policy: &Arc<PrecisionPolicy>, params: Params) -> Self {
        let optimizer = AdamW::new(AdamWConfig::new(AdamWKind::Torch), &params, policy).unwrap();
        Weights { policy: Arc::clone(policy), params, optimizer }
    }

    /// One step: `loss` records the forward pass and returns what backward starts from.
    fn step(&mut self, device: &Device, loss: impl FnOnce(&mut Tape, &[Var]) -> (Var, Tensor)) {
        let mut tape = Tape::new(Cx::new(device, &self.policy));
        let leaves = self.params.leaves(&mut tape);
        let seed = loss(&mut tape, &leaves);
        drop(leaves);
        self.optimizer.begin_step();
        tape.backward_from(vec![seed], &mut |LeafId(idx), grad| {
            self.optimizer.update(idx, &mut self.params.list[idx], &grad, 1.0).unwrap();
            Ok(())
        })
        .unwrap();
    }
}

fn tensor(device: &Device, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(device, values, shape, Precision::F32, Purpose::Data).unwrap()
}

/// A classifier of images, three equations with convolutional fields.
fn conv(device: &Device, policy: &Arc<PrecisionPolicy>) -> impl FnMut() {
    let node = ConvNode::new([32, 32], 16);
    let mut weights = Weights::new(policy, node.params(device, policy, 0).unwrap());
    assert_eq!(weights.params.n_scalars(), 197_962);
    let x = tensor(device, &[2, 3, 32, 32], &noise(2 * 3 * 32 * 32));
    let device = device.clone();
    move || {
        // Inside the pool, so that no op waits for a worker to wake.
        device.run(|| {
            weights.step(&device, |tape, leaves| {
                let x = tape.constant(x.clone());
                let logits = node.forward(tape, leaves, &[&x]).unwrap();
                let loss = CrossEntropy { labels: [3, 7].into(), reduction: Reduction::Mean };
                let loss = tape.apply(loss, &[&logits]).unwrap();
                assert!(loss.value().all_finite());
                let one = tensor(&device, &[1], &[1.0]);
                (loss, one)
            });
        });
    }
}

/// A perceptron as a field, towards a target.
fn mlp(device: &Device, policy: &Arc<PrecisionPolicy>) -> impl FnMut() {
    const BATCH: usize = 512;
    const D: usize = 64;
    let field = MlpField { channels: D, hidden: vec![256; 3], time: TimeInput::Concatenated };
    let mut weights = Weights::new(policy, Params::new(device, field.param_specs(), policy, 0).unwrap());
    assert_eq!(weights.params.n_scalars(), 164_928);
    let [x, target] =
        [0, 1].map(|idx| tensor(device, &[BATCH, D], &noise(2 * BATCH * D)[idx * BATCH * D..][..BATCH * D]));
    let times: Vec<f64> = (0..=16).map(|step| f64::from(step) / 16.0).collect();
    let (device, policy) = (device.clone(), Arc::clone(policy));
    move || {
        device.run(|| {
            weights.step(&device, |tape, leaves| {
                let options = OdeOptions::new(OdePrecision::new((*policy).clone()));
                // In f32 all tapes are kept, as the faster peer does it; in half each step is computed again.
                let options = if policy.saved.is_half() { options } else { options.storage(Storage::Full) };
                let (y0, target) = (tape.constant(x.clone()), tape.constant(target.clone()));
                let field = Arc::new(field.clone());
                let y = odeint_last(tape, &field, &y0, Times::Fixed(&times), leaves, &options).unwrap();
                // The gradient of the mean of squares, by what the squares are of.
                let error = tape.apply(Subtract, &[&y, &target]).unwrap();
                let mut seed =
                    error.value().cast(Precision::F32, Purpose::Activation).unwrap().copy(Purpose::Activation).unwrap();
                assert!(seed.sum_squares().unwrap().is_finite());
                seed.scale_assign(2.0 / (BATCH * D) as f64).unwrap();
                (error, seed)
            });
        });
    }
}

fn main() {
    let mut bench = Bench::from_args("training step of a neural ODE; reference: the same step in `full`");
    let full = Arc::new(PrecisionPolicy::full());
    for format in [Precision::F16, Precision::Bf16] {
        let half = Arc::new(PrecisionPolicy::mixed(format));
        // One device for both, so that they share threads.
        let device = Device::cpu(2).unwrap();
        let name = |shape: &str| format!("step/cpu/{format}/{shape}");
        let (mut candidate, mut reference) = (conv(&device, &half), conv(&device, &full));
        bench.pair(&name("ode_conv_b2_w16_32_rk4x4"), &device, &mut candidate, &mut reference);
        let (mut candidate, mut reference) = (mlp(&device, &half), mlp(&device, &full));
        bench.pair(&name("ode_mlp_b512_d64_w256x3_rk4x16"), &device, &mut candidate, &mut reference);
    }
    bench.finish();
}
