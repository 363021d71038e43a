//! The H1 error of fields: values and first derivatives.

use super::field_loss::FieldLoss;
use super::fields::{self, Backward, FieldNorm, Fields, Reduction};
use super::grid_differences::{GridDifferences, derivative_row};
use crate::Result;
use crate::accumulator::{Accumulator, TILE};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Scratch, Tensor, View, with_real};
use rayon::prelude::*;

const NAME: &str = "h1_loss";

/// The H1 error of a prediction `x` against a target `y`, per sample and channel, then reduced.
///
/// With `‖u‖² = Σ_points (|u|² + Σ_a |∂_a u|²)`:
/// - relative: `‖x − y‖ / (‖y‖ + 1e-8)`,
/// - absolute: `sqrt(Π_i measure/n_i) · ‖x − y‖`.
///
/// Derivatives are central differences with `h_i = measure/n_i`; at the ends of an axis that is not
/// periodic, one-sided differences of third order over four points.
///
/// # Shapes
/// - input 0, the prediction: `[batch, channels, n_1, …, n_d]`, real or complex, any precision
/// - input 1, the target: the same shape and domain, any precision; it gets no gradient
/// - returns `[1]` in the policy's loss precision; sums are f32 or f64 (f64 for f64 operands)
///
/// Where a difference vanishes on all points of a field, the gradient there is 0. Of complex fields it is
/// `∂L/∂Re x + i ∂L/∂Im x`.
///
/// # Saved for backward
/// `prediction`, `target` (shared); `norms` `[batch, channels, 2]` in the accumulator's precision.
/// Both passes hold one copy of the difference in that precision as workspace.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) if `measure` is not positive; [`Error::Shape`](crate::Error::Shape), [`Error::Fields`](crate::Error::Fields),
/// [`Error::Axes`](crate::Error::Axes) and [`Error::ShortAxis`](crate::Error::ShortAxis) for shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct H1Loss {
    /// Whether errors are divided by the target's norm.
    pub relative: bool,
    /// Over samples and channels.
    pub reduction: Reduction,
    /// Whether each grid axis is periodic; empty: all are.
    pub periodic: Vec<bool>,
    /// Length of the domain along every axis, in the user's unit.
    pub measure: f64,
}

impl Default for H1Loss {
    /// The relative error on a periodic domain, summed.
    fn default() -> Self {
        H1Loss { relative: true, reduction: Reduction::Sum, periodic: Vec::new(), measure: 1.0 }
    }
}

impl H1Loss {
    fn differences<R: Accumulator>(&self, fields: &Fields) -> Result<GridDifferences<R>> {
        let mut periodic = self.periodic.clone();
        if !periodic.is_empty() {
            periodic.resize(fields.grid.len(), true);
        }
        GridDifferences::new(NAME, &fields.grid, self.measure, &periodic)
    }

    /// The factor of the quadrature on a norm.
    fn quadrature(&self, fields: &Fields) -> f64 {
        if self.relative { 1.0 } else { fields.spacing(self.measure).product::<f64>().sqrt() }
    }

    pub(super) fn check(&self, fields: &Fields) -> Result<()> {
        fields::check_measure(self.measure)?;
        let (expected, found) = (fields.n_axes(), self.periodic.len());
        if found != 0 && found != expected {
            return Err(crate::Error::Axes { op: NAME, expected, found });
        }
        self.differences::<f64>(fields).map(drop)
    }

    /// Calls `each` with every row of the difference operators of all axes: points and their coefficients.
    pub(super) fn each_difference(&self, fields: &Fields, mut each: impl FnMut(&[(usize, f64)])) {
        let mut stride = fields.n_points;
        for (axis, (&n, h)) in fields.grid.iter().zip(fields.spacing(self.measure)).enumerate() {
            stride /= n;
            let periodic = self.periodic.get(axis).copied().unwrap_or(true);
            for point in 0..fields.n_points {
                let along = point / stride % n;
                let row = derivative_row(along, n, h, periodic).into_iter();
                each(&row.map(|(other, c)| (point + other * stride - along * stride, c)).collect::<Vec<_>>());
            }
        }
    }

    pub(super) fn norms_on_cpu(
        &self,
        device: &Device,
        fields: &Fields,
        [x, y]: [&Tensor; 2],
        precision: Precision,
    ) -> Result<Vec<FieldNorm>> {
        let mut work = device.alloc_unwritten(fields.scalars(), DType::real(precision), Purpose::Workspace)?;
        if !device.launches() {
            return Ok(Vec::new());
        }
        with_real!(precision, R => self.norms::<R>(fields, x, y, &mut work))
    }

    pub(super) fn gradient_on_cpu(
        &self,
        device: &Device,
        fields: &Fields,
        back: &Backward,
        precision: Precision,
        grad: &mut Tensor,
    ) -> Result<()> {
        let mut work = device.alloc_unwritten(fields.scalars(), DType::real(precision), Purpose::Workspace)?;
        // Rows are narrowed from a buffer where they are not stored in the accumulator's precision.
        let buffer_len = if grad.precision() == precision { 0 } else { rows_of_block(fields) * fields.row_len() };
        let scratch = device.scratch(buffer_len, precision.bytes());
        if !device.launches() {
            return Ok(());
        }
        with_real!(precision, R => self.gradient::<R>(fields, back, &mut work, &scratch, grad))
    }

    fn norms<R: Accumulator>(
        &self,
        fields: &Fields,
        x: &Tensor,
        y: &Tensor,
        work: &mut Tensor,
    ) -> Result<Vec<FieldNorm>> {
        let grid = self.differences::<R>(fields)?;
        let energies = |values: &[R]| energies(x.device(), &grid, fields, values);
        let mut targets = None;
        if self.relative {
            targets = Some(match R::stored(y.view()?) {
                Some(y) => energies(y),
                None => {
                    difference::<R>(y.view()?, None, work)?;
                    energies(R::stored(work.view()?).unwrap_or_default())
                }
            });
        }
        difference::<R>(x.view()?, Some(y.view()?), work)?;
        let errors = energies(R::stored(work.view()?).unwrap_or_default());
        let factor = self.quadrature(fields);
        let norms = errors.iter().enumerate().map(|(field, error)| {
            let target = targets.as_ref().map(|targets| targets[field].sqrt());
            let weight = fields::weight(self.reduction, fields.n_fields, factor, target);
            FieldNorm { error: error.sqrt(), weight }
        });
        Ok(norms.collect())
    }

    fn gradient<R: Accumulator>(
        &self,
        fields: &Fields,
        back: &Backward,
        work: &mut Tensor,
        scratch: &Scratch,
        grad: &mut Tensor,
    ) -> Result<()> {
        let grid = self.differences::<R>(fields)?;
        let device = grad.device().clone();
        difference::<R>(back.prediction.view()?, Some(back.target.view()?), work)?;
        let work = R::stored(work.view()?).unwrap_or_default();
        let block = rows_of_block(fields);
        let pieces = fields.pieces(grad.view_mut()?, block * grid.row_len);
        device.run(|| {
            pieces.into_par_iter().for_each(|(field, start, mut piece)| {
                let FieldNorm { error, weight } = back.norms[field];
                if error.abs() <= 0.0 {
                    return;
                }
                let values = &work[field * fields.n_points..(field + 1) * fields.n_points];
                let rows = start / grid.row_len..(start + piece.len()) / grid.row_len;
                let factor = R::from_f64(weight / error);
                let fill = |out: &mut [R]| grid.gradient(values, rows, factor, out);
                match R::stored_mut(&mut piece) {
                    Some(out) => fill(out),
                    None => scratch.with(|buffer| R::fill(&mut piece, buffer, fill)),
                }
            });
        });
        Ok(())
    }
}

/// Rows that one task works on: about a tile of points.
fn rows_of_block(fields: &Fields) -> usize {
    let row_len = fields.row_len();
    (TILE / row_len).clamp(1, fields.n_points / row_len)
}

/// `work = x − y`, or `x` alone.
fn difference<R: Accumulator>(x: View<'_>, y: Option<View<'_>>, work: &mut Tensor) -> Result<()> {
    let device = work.device().clone();
    let pieces = work.view_mut()?.chunks(TILE);
    device.run(|| {
        pieces.into_par_iter().enumerate().for_each(|(idx, mut piece)| {
            let range = idx * TILE..idx * TILE + piece.len();
            let Some(out) = R::stored_mut(&mut piece) else { return };
            x.slice(range.clone()).widen(out);
            if let Some(y) = y {
                let mut wide = [R::ZERO; TILE];
                let y = R::widened(y.slice(range), &mut wide);
                R::vectorised(
                    #[inline(always)]
                    || out.iter_mut().zip(y).for_each(|(out, y)| *out = *out - *y),
                );
            }
        });
    });
    Ok(())
}

/// The energy of each field, its blocks added in their order.
fn energies<R: Accumulator>(device: &Device, grid: &GridDifferences<R>, fields: &Fields, values: &[R]) -> Vec<f64> {
    let block = rows_of_block(fields);
    let n_blocks = grid.n_rows.div_ceil(block);
    let sums = device.run(|| {
        let blocks = (0..fields.n_fields * n_blocks).into_par_iter().map(|task| {
            let (field, idx) = (task / n_blocks, task % n_blocks);
            let values = &values[field * fields.n_points..(field + 1) * fields.n_points];
            grid.energy(values, idx * block..((idx + 1) * block).min(grid.n_rows))
        });
        blocks.collect::<Vec<f64>>()
    });
    sums.unwrap_or_default().chunks(n_blocks).map(|blocks| blocks.iter().sum()).collect()
}

impl Op for H1Loss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        FieldLoss::H1(self).forward(cx, inputs)
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        FieldLoss::H1(self).backward(cx, saved, grads, needs)
    }
}
