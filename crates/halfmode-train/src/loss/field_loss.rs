//! The losses as one op: what they share, and the kernels that a backend owes them.

#[cfg(feature = "cuda")]
use super::cuda;
use super::fields::{self, Backward, FieldNorm, Fields};
use super::{H1Loss, LpLoss};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Target, Tensor};

/// One of the losses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FieldLoss<'a> {
    Lp(&'a LpLoss),
    H1(&'a H1Loss),
}

/// The kernels of the losses. The default bodies are the definition, in double precision; a device
/// overrides them. Both are called on the planning device too, where they count and compute nothing.
pub(crate) trait LossKernels {
    /// Norm and weight of each field, with sums in `precision`.
    fn loss_norms(
        &self,
        loss: FieldLoss<'_>,
        fields: &Fields,
        pair: [&Tensor; 2],
        precision: Precision,
    ) -> Result<Vec<FieldNorm>> {
        let _ = precision;
        loss.norms_by_definition(fields, pair)
    }

    /// Writes the gradient of the prediction, which is zero.
    fn loss_gradient(
        &self,
        loss: FieldLoss<'_>,
        fields: &Fields,
        back: &Backward,
        precision: Precision,
        grad: &mut Tensor,
    ) -> Result<()> {
        let _ = precision;
        loss.gradient_by_definition(fields, back, grad)
    }
}

impl LossKernels for Device {
    fn loss_norms(
        &self,
        loss: FieldLoss<'_>,
        fields: &Fields,
        pair: [&Tensor; 2],
        precision: Precision,
    ) -> Result<Vec<FieldNorm>> {
        match (self.target(), loss) {
            (Target::Cpu { .. }, FieldLoss::Lp(loss)) => loss.norms_on_cpu(self, fields, pair, precision),
            (Target::Cpu { .. }, FieldLoss::H1(loss)) => loss.norms_on_cpu(self, fields, pair, precision),
            // There norms do not come to the host.
            #[cfg(feature = "cuda")]
            (Target::Cuda, _) => Err(halfmode_tensor::Error::OnGpu.into()),
        }
    }

    fn loss_gradient(
        &self,
        loss: FieldLoss<'_>,
        fields: &Fields,
        back: &Backward,
        precision: Precision,
        grad: &mut Tensor,
    ) -> Result<()> {
        match (self.target(), loss) {
            (Target::Cpu { .. }, FieldLoss::Lp(loss)) => loss.gradient_on_cpu(self, fields, back, precision, grad),
            (Target::Cpu { .. }, FieldLoss::H1(loss)) => loss.gradient_on_cpu(self, fields, back, precision, grad),
            // There norms do not come to the host.
            #[cfg(feature = "cuda")]
            (Target::Cuda, _) => Err(halfmode_tensor::Error::OnGpu.into()),
        }
    }
}

impl FieldLoss<'_> {
    fn name(&self) -> &'static str {
        match self {
            FieldLoss::Lp(loss) => loss.name(),
            FieldLoss::H1(loss) => loss.name(),
        }
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        match self {
            FieldLoss::Lp(loss) => loss.check(),
            FieldLoss::H1(loss) => loss.check(fields),
        }
    }

    pub(crate) fn forward(self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let name = self.name();
        let [x, y] = match self {
            FieldLoss::Lp(loss) => loss.expect_inputs(inputs)?,
            FieldLoss::H1(loss) => loss.expect_inputs(inputs)?,
        };
        #[cfg(feature = "cuda")]
        if cx.device.target() == Target::Cuda {
            let run = || {
                let fields = Fields::of_pair(name, cx, x, y)?;
                self.check(&fields)?;
                cuda::forward(name, self, cx, &fields, [x, y])
            };
            return run().map_err(|err: Error| err.in_op(name));
        }
        let run = || {
            let fields = Fields::of_pair(name, cx, x, y)?;
            self.check(&fields)?;
            cx.device.loss_norms(self, &fields, [x, y], fields::accumulate(cx, x, y))
        };
        let norms = run().map_err(|err: Error| err.in_op(name))?;
        fields::finish(name, cx, [x, y], &norms)
    }

    pub(crate) fn backward(
        self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let Some(grad) = grads[0].take().filter(|_| needs[0]) else { return Ok(vec![None, None]) };
        #[cfg(feature = "cuda")]
        if cx.device.target() == Target::Cuda {
            let name = self.name();
            let grad_x = cuda::backward(name, self, cx, saved, &grad).map_err(|err| err.in_op(name))?;
            return Ok(vec![Some(grad_x), None]);
        }
        let back = Backward::start(saved, &grad)?;
        let x = &back.prediction;
        let mut grad_x = cx.device.alloc(x.shape().clone(), x.dtype(), Purpose::Activation)?;
        let mut run = || {
            let fields = Fields::of(self.name(), x)?;
            let precision = fields::accumulate(cx, x, &back.target);
            cx.device.loss_gradient(self, &fields, &back, precision, &mut grad_x)
        };
        run().map_err(|err: Error| err.in_op(self.name()))?;
        Ok(vec![Some(grad_x), None])
    }

    fn norms_by_definition(self, fields: &Fields, [x, y]: [&Tensor; 2]) -> Result<Vec<FieldNorm>> {
        let (x, y) = (x.to_vec::<f64>()?, y.to_vec::<f64>()?);
        let (relative, reduction, measure, root) = match self {
            FieldLoss::Lp(loss) => (loss.relative, loss.reduction, loss.measure, 1.0 / loss.p),
            FieldLoss::H1(loss) => (loss.relative, loss.reduction, loss.measure, 0.5),
        };
        let quadrature = if relative { 1.0 } else { fields.spacing(measure).product::<f64>().powf(root) };
        let norms = x.chunks(fields.n_points).zip(y.chunks(fields.n_points)).map(|(x, y)| {
            let e: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
            let target = relative.then(|| self.norm(fields, y));
            let weight = fields::weight(reduction, fields.n_fields, quadrature, target);
            FieldNorm { error: self.norm(fields, &e), weight }
        });
        Ok(norms.collect())
    }

    fn gradient_by_definition(self, fields: &Fields, back: &Backward, grad: &mut Tensor) -> Result<()> {
        let (x, y) = (back.prediction.to_vec::<f64>()?, back.target.to_vec::<f64>()?);
        let mut out = vec![0.0; x.len()];
        for (field, out) in out.chunks_mut(fields.n_points).enumerate() {
            let range = field * fields.n_points..(field + 1) * fields.n_points;
            let e: Vec<f64> = x[range.clone()].iter().zip(&y[range]).map(|(x, y)| x - y).collect();
            let FieldNorm { error, weight } = back.norms[field];
            if error.abs() <= 0.0 {
                continue;
            }
            match self {
                FieldLoss::Lp(loss) => {
                    let width = fields.domain.scalars();
                    for (out, e) in out.chunks_mut(width).zip(e.chunks(width)) {
                        let size = modulus(e);
                        let slope = (size / error).powf(loss.p - 1.0) / size;
                        out.iter_mut()
                            .zip(e)
                            .for_each(|(out, e)| *out = if size > 0.0 { weight * slope * e } else { *e });
                    }
                }
                FieldLoss::H1(loss) => {
                    out.iter_mut().zip(&e).for_each(|(out, e)| *out = weight / error * e);
                    loss.each_difference(fields, |row| {
                        let slope: f64 = row.iter().map(|&(point, c)| c * e[point]).sum();
                        row.iter().for_each(|&(point, c)| out[point] += weight / error * c * slope);
                    });
                }
            }
        }
        Ok(grad.copy_from_slice(&out)?)
    }

    /// The norm of one field.
    fn norm(&self, fields: &Fields, u: &[f64]) -> f64 {
        match self {
            FieldLoss::Lp(loss) => {
                let values = u.chunks(fields.domain.scalars());
                values.map(|u| modulus(u).powf(loss.p)).sum::<f64>().powf(1.0 / loss.p)
            }
            FieldLoss::H1(loss) => {
                let mut sum: f64 = u.iter().map(|u| u * u).sum();
                loss.each_difference(fields, |row| {
                    sum += row.iter().map(|&(point, c)| c * u[point]).sum::<f64>().powi(2);
                });
                sum.sqrt()
            }
        }
    }
}

/// `|u|` of a real number or a pair.
fn modulus(u: &[f64]) -> f64 {
    u.iter().fold(0.0, |sum: f64, part| sum.hypot(*part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reduction;
    use halfmode_precision::DType;
    use halfmode_tensor::Shape;

    /// Runs the default bodies.
    struct Definition;
    impl LossKernels for Definition {}

    fn field(device: &Device, shape: &Shape, dtype: DType, seed: f64) -> Tensor {
        let values: Vec<f64> = (0..shape.numel() * dtype.domain.scalars())
            .map(|i| ((i + 1) as f64 * 0.754_877_666 + seed).fract() - 0.5)
            .collect();
        Tensor::from_scalars(device, &values, shape.clone(), dtype, Purpose::Data).unwrap()
    }

    #[test]
    fn the_override_computes_what_the_default_bodies_say() {
        let device = Device::cpu(2).unwrap();
        let lp = |p, relative| LpLoss { p, relative, reduction: Reduction::Mean, measure: 2.0 };
        let h1 = |relative, periodic: &[bool]| H1Loss {
            relative,
            reduction: Reduction::Sum,
            periodic: periodic.to_vec(),
            measure: 0.7,
        };
        let lps = [lp(1.0, true), lp(2.0, false), lp(2.0, true), lp(3.5, true)];
        let h1s = [h1(true, &[true, true]), h1(false, &[false, true]), h1(true, &[true, false])];
        let losses = lps.iter().map(FieldLoss::Lp).chain(h1s.iter().map(FieldLoss::H1));
        let dtypes = [DType::real(Precision::F64), DType::complex(Precision::F64)];
        let cases = losses.flat_map(|loss| [[9, 7], [4, 5], [67, 83]].map(|grid| (loss, grid)));
        for ((loss, grid), dtype) in cases.flat_map(|case| dtypes.map(|dtype| (case, dtype))) {
            let shape = Shape::from([2, 1, grid[0], grid[1]]);
            let (prediction, target) = (field(&device, &shape, dtype, 0.1), field(&device, &shape, dtype, 0.4));
            let fields = Fields::of("loss", &prediction).unwrap();
            let run = |kernels: &dyn LossKernels| {
                let pair = [&prediction, &target];
                let norms = kernels.loss_norms(loss, &fields, pair, Precision::F64).unwrap();
                let mut values: Vec<f64> = norms.iter().flat_map(|norm| [norm.error, norm.weight]).collect();
                let back = Backward { prediction: prediction.clone(), target: target.clone(), norms };
                let mut grad = device.alloc(shape.clone(), dtype, Purpose::Activation).unwrap();
                kernels.loss_gradient(loss, &fields, &back, Precision::F64, &mut grad).unwrap();
                values.extend(grad.to_vec::<f64>().unwrap());
                values
            };
            let (got, want) = (run(&device), run(&Definition));
            // Sums of up to 11122 terms in another order; second differences cancel two digits.
            let close = |(got, want): (&f64, &f64)| (got - want).abs() <= 1e-11 * want.abs().max(1.0);
            assert!(got.len() == want.len() && got.iter().zip(&want).all(close), "{loss:?} on {grid:?} of {dtype}");
        }
    }
}
