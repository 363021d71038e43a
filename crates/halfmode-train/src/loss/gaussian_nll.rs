//! The negative log-likelihood of a normalising flow with a standard normal base.

use crate::Error;
use halfmode_autograd::{Cx, Op, Outputs, Result, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor};
use smallvec::smallvec;

const NAME: &str = "gaussian_nll";

/// The mean over points of `-log p = |z|²/2 + d/2 log 2π + l`: `z` is where a flow brings a point, and `l` what the
/// log-density gained on the way.
///
/// # Shapes
/// - input 0, `z`: `[n, d]`, real
/// - input 1, `l`: `[n, 1]`, real
/// - returns `[1]` in f32, or f64 if `z` is; the sum is formed in f64, in order
///
/// # Saved for backward
/// `z`, shared.
///
/// # Errors
/// [`Error::Shape`] for other shapes.
#[derive(Clone, Copy, Debug)]
pub struct GaussianNll;

fn precision(z: &Tensor) -> Precision {
    z.precision().accumulate()
}

impl Op for GaussianNll {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [z, l] = self.expect_inputs(inputs)?;
        let n = l.numel();
        if z.shape().len() != 2 || z.shape()[0] != n || n == 0 {
            let (expected, found) = (Shape::from([z.shape().first().copied().unwrap_or(0), 1]), l.shape().clone());
            return Err(Error::Shape { op: NAME, operand: "l", expected, found }.in_op(NAME));
        }
        let loss = if cx.device.launches() {
            let squares: f64 = z.to_vec::<f64>()?.iter().map(|z| 0.5 * z * z).sum();
            let gained: f64 = l.to_vec::<f64>()?.iter().sum();
            let value = (squares + gained) / n as f64 + 0.5 * z.shape()[1] as f64 * std::f64::consts::TAU.ln();
            Tensor::from_slice(&cx.device, &[value], [1], precision(z), Purpose::Activation)?
        } else {
            cx.device.alloc([1], DType::real(precision(z)), Purpose::Activation)?
        };
        Ok((smallvec![loss], Saved::new(NAME).share(cx, "z", z)))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let z = saved.take("z")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let (n, to) = (z.shape()[0], precision(&z));
        if !cx.device.launches() {
            let gz = cx.device.alloc(z.shape().clone(), DType::real(to), Purpose::Activation)?;
            return Ok(vec![Some(gz), Some(cx.device.alloc([n, 1], DType::real(to), Purpose::Activation)?)]);
        }
        let each = g.to_vec::<f64>()?.iter().sum::<f64>() / n as f64;
        let gz: Vec<f64> = z.to_vec::<f64>()?.into_iter().map(|z| each * z).collect();
        let gz = Tensor::from_slice(&cx.device, &gz, z.shape().clone(), to, Purpose::Activation)?;
        let gl = Tensor::from_slice(&cx.device, &vec![each; n], [n, 1], to, Purpose::Activation)?;
        Ok(vec![Some(gz), Some(gl)])
    }
}
