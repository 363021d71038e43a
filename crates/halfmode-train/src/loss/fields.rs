//! What the losses share: fields one by one, their norms, and the reduction over them.

use crate::{Error, Result};
use halfmode_autograd::{Cx, Outputs, Saved};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor, ViewMut};
use serde::{Deserialize, Serialize};

/// How the errors of all samples and channels become one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Their sum.
    #[default]
    Sum,
    /// Their mean, over samples and channels.
    Mean,
}

/// What is added to the norm of a target before dividing by it, as neuraloperator does.
pub(crate) const EPS: f64 = 1e-8;

/// A batch seen as `batch · channels` fields of `n_points` scalars each.
///
/// A complex field is a real one whose grid has a last axis of 2, real and imaginary part: squares of moduli are
/// sums of two squares, and central differences on a periodic axis of two points are zero.
pub(crate) struct Fields {
    pub(crate) n_fields: usize,
    pub(crate) n_points: usize,
    pub(crate) grid: Vec<usize>,
    pub(crate) domain: Domain,
}

impl Fields {
    pub(crate) fn of(op: &'static str, x: &Tensor) -> Result<Self> {
        let mut fields = Fields::of_real(op, x.shape())?;
        fields.domain = x.dtype().domain;
        if fields.domain == Domain::Complex {
            fields.n_points *= 2;
            fields.grid.push(2);
        }
        Ok(fields)
    }

    pub(crate) fn of_real(op: &'static str, shape: &Shape) -> Result<Self> {
        let [batch, channels, grid @ ..] = &**shape else {
            return Err(Error::Fields { op, found: shape.clone() });
        };
        if grid.is_empty() || shape.contains(&0) {
            return Err(Error::Fields { op, found: shape.clone() });
        }
        let n_points = grid.iter().product();
        Ok(Fields { n_fields: batch * channels, n_points, grid: grid.to_vec(), domain: Domain::Real })
    }

    /// Axes of the grid, that of real and imaginary part left out.
    pub(crate) fn n_axes(&self) -> usize {
        self.grid.len() + 1 - self.domain.scalars()
    }

    /// The shape of all scalars.
    pub(crate) fn scalars(&self) -> [usize; 2] {
        [self.n_fields, self.n_points]
    }

    /// Points along the last axis, which are contiguous.
    pub(crate) fn row_len(&self) -> usize {
        self.grid[self.grid.len() - 1]
    }

    /// Checks that prediction and target are alike and on the op's device.
    pub(crate) fn of_pair(op: &'static str, cx: &Cx, x: &Tensor, y: &Tensor) -> Result<Self> {
        if x.shape() != y.shape() {
            let (expected, found) = (x.shape().clone(), y.shape().clone());
            return Err(Error::Shape { op, operand: "target", expected, found });
        }
        if x.dtype().domain != y.dtype().domain {
            let expected = if x.dtype().domain == Domain::Real { "real" } else { "complex" };
            let (operand, found) = ("target", y.dtype());
            return Err(halfmode_tensor::Error::DType { op, operand, expected, found }.into());
        }
        for tensor in [x, y] {
            if !tensor.device().same(&cx.device) {
                return Err(halfmode_tensor::Error::Devices { op }.into());
            }
        }
        Fields::of(op, x)
    }

    /// Cuts a tensor's scalars into fields and those into pieces of `len`; with each piece the
    /// field and the piece's first point.
    pub(crate) fn pieces<'a>(&self, view: ViewMut<'a>, len: usize) -> Vec<(usize, usize, ViewMut<'a>)> {
        let fields = view.chunks(self.n_points).into_iter().enumerate();
        let pieces = fields.flat_map(|(field, view)| {
            let pieces = view.chunks(len).into_iter().enumerate();
            pieces.map(move |(idx, piece)| (field, idx * len, piece))
        });
        pieces.collect()
    }

    /// The distance between points, `measure / n_i`, along each axis; 1 between real and imaginary part.
    pub(crate) fn spacing(&self, measure: f64) -> impl Iterator<Item = f64> {
        let n_axes = self.n_axes();
        self.grid.iter().enumerate().map(move |(axis, &n)| if axis < n_axes { measure / n as f64 } else { 1.0 })
    }
}

/// What losses and their gradients are computed in: the policy's, or f64 if an operand is f64.
pub(crate) fn accumulate(cx: &Cx, x: &Tensor, y: &Tensor) -> Precision {
    cx.policy.loss.accumulate.min(x.precision()).min(y.precision())
}

/// The two numbers of a field that backward needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FieldNorm {
    /// Norm of the difference.
    pub(crate) error: f64,
    /// What the loss multiplies it with.
    pub(crate) weight: f64,
}

/// The loss from the norms of all fields, in their order, and what backward needs. On the planning
/// device the norms mean nothing.
pub(crate) fn finish(
    op: &'static str,
    cx: &Cx,
    [x, y]: [&Tensor; 2],
    norms: &[FieldNorm],
) -> halfmode_autograd::Result<(Outputs, Saved)> {
    let mut saved = Saved::new(op);
    if cx.save {
        let shape = [x.shape()[0], x.shape()[1], 2];
        let mut kept = cx.device.alloc(shape, DType::real(accumulate(cx, x, y)), Purpose::Saved)?;
        if cx.device.launches() {
            let values: Vec<f64> = norms.iter().flat_map(|norm| [norm.error, norm.weight]).collect();
            kept.copy_from_slice(&values)?;
        }
        saved = saved.share(cx, "prediction", x).share(cx, "target", y).share(cx, "norms", &kept);
    }
    let mut loss = cx.device.alloc([1], DType::real(cx.policy.loss.storage), Purpose::Activation)?;
    loss.copy_from_slice(&[norms.iter().map(|norm| norm.error * norm.weight).sum::<f64>()])?;
    Ok(([loss].into_iter().collect(), saved))
}

/// What backward starts from. The norms' weights are multiplied with the loss's gradient.
pub(crate) struct Backward {
    pub(crate) prediction: Tensor,
    pub(crate) target: Tensor,
    /// Of each field; empty on the planning device.
    pub(crate) norms: Vec<FieldNorm>,
}

impl Backward {
    pub(crate) fn start(mut saved: Saved, grad: &Tensor) -> halfmode_autograd::Result<Self> {
        let (prediction, target) = (saved.take("prediction")?, saved.take("target")?);
        let norms = saved.take("norms")?;
        let mut kept = Vec::new();
        if grad.device().launches() {
            let seed: f64 = grad.to_vec::<f64>()?.iter().sum();
            let values = norms.to_vec::<f64>()?;
            kept.extend(values.chunks_exact(2).map(|pair| FieldNorm { error: pair[0], weight: seed * pair[1] }));
        }
        Ok(Backward { prediction, target, norms: kept })
    }
}

/// The weight of each field's error: the reduction's share, a factor of the quadrature, and the
/// target's norm for relative errors.
pub(crate) fn weight(reduction: Reduction, n_fields: usize, factor: f64, target_norm: Option<f64>) -> f64 {
    let share = match reduction {
        Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / n_fields as f64,
    };
    share * factor / target_norm.map_or(1.0, |norm| norm + EPS)
}

/// Refuses a measure that is not a length.
pub(crate) fn check_measure(measure: f64) -> Result<()> {
    if measure.is_finite() && measure > 0.0 {
        return Ok(());
    }
    Err(Error::Setting { setting: "measure", value: measure, expected: "a positive length" })
}
