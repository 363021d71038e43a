//! The two tests that every op passes.

use crate::{Rng, tol};
use halfmode_autograd::{Cx, Op, Tape};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use std::sync::Arc;

/// Forward and backward of one op through a tape: the output, and the gradients of
/// `sum(output * cotangent)` for all inputs.
#[must_use]
pub fn run_op(cx: &Cx, op: Box<dyn Op>, inputs: &[Tensor], cotangent: &[f64]) -> (Tensor, Vec<Option<Tensor>>) {
    let mut tape = Tape::new(cx.clone());
    let vars: Vec<_> = inputs.iter().map(|it| tape.leaf(it.clone())).collect();
    let out = tape.apply_many(op, &vars.iter().collect::<Vec<_>>()).unwrap().remove(0);
    let value = out.value().clone();
    let seed = Tensor::from_slice(&cx.device, cotangent, value.shape().clone(), value.precision(), Purpose::Activation);
    let mut grads = vec![None; inputs.len()];
    let keep = &mut |id: halfmode_autograd::LeafId, grad| {
        grads[id.0] = Some(grad);
        Ok(())
    };
    tape.backward_from(vec![(out, seed.unwrap())], keep).unwrap();
    (value, grads)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The derivatives of what `f` returns, at zero: central differences of steps `h` and `h / 2`, combined so that their
/// errors of order `h^2` cancel and `h^4` is left.
pub fn slopes(f: impl Fn(f64) -> Vec<f64>, h: f64) -> Vec<f64> {
    let differences = |h: f64| -> Vec<f64> {
        let (up, down) = (f(h), f(-h));
        up.iter().zip(down).map(|(up, down)| (up - down) / (2.0 * h)).collect()
    };
    differences(h / 2.0).iter().zip(differences(h)).map(|(fine, coarse)| (4.0 * fine - coarse) / 3.0).collect()
}

/// As [`slopes`], of one number.
pub fn slope(f: impl Fn(f64) -> f64, h: f64) -> f64 {
    slopes(|by| vec![f(by)], h)[0]
}

/// Compares each input's gradient with differences along random directions, in f64.
///
/// # Panics
/// If one is off by more than 1e-6 of the size of its terms and the rounding of the difference.
pub fn gradcheck(device: &Device, op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor], seed: u64) {
    let cx = Cx::new(device, &Arc::new(PrecisionPolicy::double()));
    let mut rng = Rng::new(seed);
    let forward = |inputs: &[Tensor]| {
        let refs: Vec<&Tensor> = inputs.iter().collect();
        op().forward(&cx, &refs).unwrap().0[0].to_vec::<f64>().unwrap()
    };
    let y = forward(inputs);
    let cotangent = rng.normals(y.len());
    let terms: f64 = y.iter().zip(&cotangent).map(|(y, c)| (y * c).abs()).sum();
    let (_, grads) = run_op(&cx, op(), inputs, &cotangent);
    for (idx, input) in inputs.iter().enumerate() {
        let Some(grad) = &grads[idx] else { panic!("{}: no gradient for input {idx}", op().name()) };
        assert_eq!(grad.shape(), input.shape(), "{}: gradient of input {idx}", op().name());
        let grad = grad.to_vec::<f64>().unwrap();
        let x = input.to_vec::<f64>().unwrap();
        for round in 0..3 {
            // The last direction is one coordinate: random directions hide a single wrong entry.
            let direction = if round < 2 {
                rng.normals(x.len())
            } else {
                let mut unit = vec![0.0; x.len()];
                unit[rng.bits() as usize % x.len()] = 1.0;
                unit
            };
            // A step that is small beside the values it moves: along one coordinate, beside that one.
            let h = if round < 2 {
                1e-5 / dot(&direction, &direction).sqrt() * (1.0 + dot(&x, &x).sqrt())
            } else {
                5e-5 * (1.0 + dot(&x, &direction).abs())
            };
            let shifted = |by: f64| {
                let moved: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
                let mut inputs = inputs.to_vec();
                inputs[idx] =
                    Tensor::from_slice(device, &moved, input.shape().clone(), Precision::F64, Purpose::Activation)
                        .unwrap();
                dot(&forward(&inputs), &cotangent)
            };
            let want = slope(shifted, h);
            let got = dot(&grad, &direction);
            let size = grad.iter().zip(&direction).map(|(g, d)| (g * d).abs()).sum::<f64>().max(want.abs());
            // Truncation h^4 of functions as curved as a norm of few values, and cancellation eps |f| / h, each with
            // room.
            let tolerance = 1e-6 * size + 1e-14 * terms / h + 1e-12;
            assert!(
                (got - want).abs() <= tolerance,
                "{}: input {idx}, round {round}: {got} against {want}",
                op().name()
            );
        }
    }
}

/// `<A x, y> = <x, A^T y>` for an op that is linear in input `idx`, under `policy`.
///
/// # Panics
/// If the two differ by more than the rounding of both sides allows: `tol` relative to
/// `|A x| |y|`, the size against which the rounding errors of either side are measured.
pub fn adjoint(cx: &Cx, op: &dyn Fn() -> Box<dyn Op>, inputs: &[Tensor], idx: usize, n_terms: usize, seed: u64) {
    let refs: Vec<&Tensor> = inputs.iter().collect();
    let out = op().forward(cx, &refs).unwrap().0.remove(0);
    let mut rng = Rng::new(seed);
    let y = rng.tensor(&cx.device, out.shape(), out.precision()).to_vec::<f64>().unwrap();
    let (out, grads) = run_op(cx, op(), inputs, &y);
    let out = out.to_vec::<f64>().unwrap();
    let grad = grads[idx].as_ref().unwrap().to_vec::<f64>().unwrap();
    let x = inputs[idx].to_vec::<f64>().unwrap();
    let (left, right) = (dot(&out, &y), dot(&x, &grad));
    let size = (dot(&out, &out) * dot(&y, &y)).sqrt().max((dot(&x, &x) * dot(&grad, &grad)).sqrt());
    let precision = inputs[idx].precision().max(out_precision(cx));
    let tolerance = 4.0 * tol(precision, n_terms) * size + 1e-300;
    assert!(
        (left - right).abs() <= tolerance,
        "{}: input {idx} in {precision}: {left} against {right} (size {size})",
        op().name()
    );
}

/// The coarsest precision that an op under this context stores anything in.
fn out_precision(cx: &Cx) -> Precision {
    let policy = &cx.policy;
    let all = [policy.pointwise.storage, policy.transform.storage, policy.contraction.storage, policy.saved_spectrum];
    // bfloat16 is coarser than binary16, though it comes first in the order of the enum.
    if all.contains(&Precision::Bf16) { Precision::Bf16 } else { all.into_iter().max().unwrap_or(Precision::F64) }
}
