//! The mean squared error of several tensors together.

use crate::Error;
use halfmode_autograd::{Cx, Op, Outputs, Result, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Tensor};
use smallvec::smallvec;

const NAME: &str = "squared_error";

/// The mean of `(x - y)²` over all numbers of several pairs of tensors.
///
/// # Shapes
/// - inputs `0 .. n`: the predictions, real, any shapes; inputs `n .. 2n`: the targets, which get no gradient
/// - returns `[1]` in f32, or f64 if a prediction is; the sum is formed in f64, in order
///
/// # Saved for backward
/// Predictions and targets, shared.
///
/// # Errors
/// [`Error::Shape`] for a target of another shape, and an odd number of inputs.
#[derive(Clone, Copy, Debug)]
pub struct SquaredError;

fn pairs<T>(of: &[T]) -> impl Iterator<Item = (&T, &T)> {
    let (x, y) = of.split_at(of.len() / 2);
    x.iter().zip(y)
}

impl Op for SquaredError {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        if inputs.is_empty() || inputs.len() % 2 == 1 {
            return Err(halfmode_autograd::Error::Arity { op: NAME, expected: 2, found: inputs.len() });
        }
        for (x, y) in pairs(inputs) {
            if x.shape() != y.shape() {
                let (expected, found) = (x.shape().clone(), y.shape().clone());
                return Err(Error::Shape { op: NAME, operand: "target", expected, found }.in_op(NAME));
            }
        }
        let precision = inputs[0].precision().accumulate();
        let mut saved = Saved::new(NAME);
        for (x, y) in pairs(inputs) {
            saved = saved.share(cx, "x", x).share(cx, "y", y);
        }
        let loss = if cx.device.launches() {
            let (mut sum, mut n) = (0.0, 0);
            for (x, y) in pairs(inputs) {
                let (x, y) = (x.to_vec::<f64>()?, y.to_vec::<f64>()?);
                sum += x.iter().zip(&y).map(|(x, y)| (x - y) * (x - y)).sum::<f64>();
                n += x.len();
            }
            Tensor::from_slice(&cx.device, &[sum / n.max(1) as f64], [1], precision, Purpose::Activation)?
        } else {
            cx.device.alloc([1], DType::real(precision), Purpose::Activation)?
        };
        Ok((smallvec![loss], saved))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (x, y) = (saved.take_all("x"), saved.take_all("y"));
        let mut out = vec![None; needs.len()];
        let Some(g) = grads[0].take() else { return Ok(out) };
        let n: usize = x.iter().map(Tensor::numel).sum();
        let launches = cx.device.launches();
        let each = if launches { 2.0 * g.to_vec::<f64>()?.iter().sum::<f64>() / n.max(1) as f64 } else { 0.0 };
        for ((slot, need), (x, y)) in out.iter_mut().zip(needs).zip(x.iter().zip(&y)) {
            let precision: Precision = x.precision().accumulate();
            *slot = match (*need, launches) {
                (false, _) => None,
                (true, false) => {
                    Some(cx.device.alloc(x.shape().clone(), DType::real(precision), Purpose::Activation)?)
                }
                (true, true) => {
                    let (values, y) = (x.to_vec::<f64>()?, y.to_vec::<f64>()?);
                    let grad: Vec<f64> = values.iter().zip(&y).map(|(x, y)| each * (x - y)).collect();
                    Some(Tensor::from_slice(&cx.device, &grad, x.shape().clone(), precision, Purpose::Activation)?)
                }
            };
        }
        Ok(out)
    }
}
