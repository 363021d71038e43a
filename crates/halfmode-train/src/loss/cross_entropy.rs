//! The cross entropy of logits and labels.

#[cfg(feature = "cuda")]
mod cuda;

use super::Reduction;
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Domain};
use halfmode_tensor::{Purpose, Shape, Tensor};
use std::sync::Arc;

const NAME: &str = "cross_entropy";

/// `-log softmax(x)[label]` per sample, then reduced.
///
/// # Shapes
/// - input: logits `[…, n_classes]`, real, as many rows as there are labels
/// - returns `[1]` in the policy's loss precision; exponentials and sums are f64
///
/// # Saved for backward
/// `logits`, shared.
///
/// # Errors
/// [`Error::Length`] for another number of rows, [`Error::Label`] for a label that is no class,
/// [`halfmode_tensor::Error::DType`] for complex logits, and on a GPU an error for more than 65 536 classes.
///
/// On a GPU labels are arguments of the launches: a recorded step replays those that it was recorded with, and takes no
/// others.
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// The class of each row, from 0.
    pub labels: Arc<[usize]>,
    /// What becomes of the samples' losses.
    pub reduction: Reduction,
}

/// The largest logit, and the logarithm of the sum of exponentials above it.
fn log_sum(row: &[f64]) -> f64 {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

impl CrossEntropy {
    fn share(&self) -> f64 {
        match self.reduction {
            Reduction::Sum => 1.0,
            Reduction::Mean => 1.0 / self.labels.len().max(1) as f64,
        }
    }

    fn check(&self, logits: &Tensor) -> Result<usize> {
        logits.expect_domain(NAME, "logits", Domain::Real)?;
        let n_classes = logits.shape().last().copied().unwrap_or(1).max(1);
        #[cfg(feature = "cuda")]
        if !logits.device().is_cpu() {
            cuda::check(n_classes)?;
        }
        let (expected, found) = (logits.numel() / n_classes, self.labels.len());
        if expected != found {
            return Err(Error::Length { op: NAME, operand: "labels", expected, found });
        }
        match self.labels.iter().enumerate().find(|(_, label)| **label >= n_classes) {
            Some((sample, &label)) => Err(Error::Label { op: NAME, sample, label, n_classes }),
            None => Ok(n_classes),
        }
    }

    fn run(&self, cx: &Cx, logits: &Tensor) -> Result<Tensor> {
        let n_classes = self.check(logits)?;
        let mut loss = cx.device.alloc(Shape::from([1]), DType::real(cx.policy.loss.storage), Purpose::Activation)?;
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            self.launch_loss(logits, n_classes, &mut loss)?;
            return Ok(loss);
        }
        if cx.device.launches() {
            let logits = logits.to_vec::<f64>()?;
            let rows = logits.chunks_exact(n_classes).zip(self.labels.iter());
            let sum: f64 = rows.map(|(row, &label)| log_sum(row) - row[label]).sum();
            loss.copy_from_slice(&[sum * self.share()])?;
        }
        Ok(loss)
    }

    fn gradient(&self, cx: &Cx, logits: &Tensor, g: &Tensor) -> Result<Tensor> {
        let n_classes = self.check(logits)?;
        // In the precision of sums: what narrows a gradient is the layer that takes it.
        let dtype = DType::real(cx.policy.loss.accumulate);
        let mut grad = cx.device.alloc(logits.shape().clone(), dtype, Purpose::Activation)?;
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            if let Some(cuda) = cx.device.as_cuda() {
                self.launch_gradient(cuda, [logits, g], n_classes, &mut grad)?;
            }
            return Ok(grad);
        }
        if cx.device.launches() {
            let seed = g.to_vec::<f64>()?.iter().sum::<f64>() * self.share();
            let mut values = logits.to_vec::<f64>()?;
            for (row, &label) in values.chunks_exact_mut(n_classes).zip(self.labels.iter()) {
                let all = log_sum(row);
                row.iter_mut().for_each(|x| *x = seed * (*x - all).exp());
                row[label] -= seed;
            }
            grad.copy_from_slice(&values)?;
        }
        Ok(grad)
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [logits] = self.expect_inputs(inputs)?;
        let loss = self.run(cx, logits).map_err(|err| err.in_op(NAME))?;
        Ok(([loss].into_iter().collect(), Saved::new(NAME).share(cx, "logits", logits)))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let logits = saved.take("logits")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.gradient(cx, &logits, &g).map_err(|err| err.in_op(NAME))?)])
    }
}
