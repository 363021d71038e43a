//! Relative errors of plain arrays, for evaluation: no tape, no device, double precision.

use super::fields::{self, EPS};
use super::grid_differences::GridDifferences;
use crate::{Error, Result};
use halfmode_tensor::{Real, Shape};

/// The relative L2 error of each sample, `‖prediction − truth‖ / (‖truth‖ + 1e-8)`, over all of its
/// channels and points, in double precision.
///
/// # Shapes
/// - `prediction`, `truth`: `n_samples` samples of one size, one after another; complex values as pairs
/// - returns `n_samples` errors
///
/// # Errors
/// [`Error::Length`] if the lengths differ or are no multiple of `n_samples`.
///
/// ```
/// let errors = halfmode_train::relative_l2(&[3.0f32, 5.0, 0.0, 1.0], &[3.0, 4.0, 0.0, 1.0], 2)?;
/// assert!((errors[0] - 0.2).abs() < 1e-8 && errors[1] == 0.0);
/// # Ok::<(), halfmode_train::Error>(())
/// ```
pub fn relative_l2<R: Real>(prediction: &[R], truth: &[R], n_samples: usize) -> Result<Vec<f64>> {
    const OP: &str = "relative_l2";
    check_length(OP, "prediction", truth.len(), prediction.len())?;
    if truth.is_empty() {
        return Ok(vec![0.0; n_samples]);
    }
    let whole = truth.len().checked_div(n_samples).unwrap_or(0) * n_samples;
    check_length(OP, "truth", whole, truth.len())?;
    let len = truth.len() / n_samples;
    let samples = prediction.chunks(len).zip(truth.chunks(len)).map(|(prediction, truth)| {
        let (mut error, mut size) = (0.0, 0.0);
        for (prediction, truth) in prediction.iter().zip(truth) {
            let (prediction, truth) = (prediction.to_f64(), truth.to_f64());
            error += (prediction - truth) * (prediction - truth);
            size += truth * truth;
        }
        error.sqrt() / (size.sqrt() + EPS)
    });
    Ok(samples.collect())
}

/// The relative H1 error of each sample: as [`relative_l2`] with `u² + Σ_a (∂_a u)²` under the root,
/// by the differences of [`H1Loss`](crate::H1Loss) on the unit box.
///
/// # Shapes
/// - `prediction`, `truth`: flat, row-major `shape` = `[n_samples, channels, n_1, …, n_d]`; of complex fields, with a
///   last axis of 2 that is periodic: it has no central difference
/// - `periodic`: one per grid axis; empty: all are periodic
/// - returns `n_samples` errors
///
/// # Errors
/// [`Error::Length`], [`Error::Fields`], [`Error::Axes`], [`Error::ShortAxis`].
pub fn relative_h1<R: Real>(prediction: &[R], truth: &[R], shape: &[usize], periodic: &[bool]) -> Result<Vec<f64>> {
    const OP: &str = "relative_h1";
    let shape = Shape::new(shape);
    let Some(expected) = shape.checked_numel() else { return Err(Error::Fields { op: OP, found: shape }) };
    check_length(OP, "prediction", expected, prediction.len())?;
    check_length(OP, "truth", expected, truth.len())?;
    let fields = fields::Fields::of_real(OP, &shape)?;
    let grid = GridDifferences::<f64>::new(OP, &fields.grid, 1.0, periodic)?;
    let mut values = vec![0.0; fields.n_points];
    let mut energies = Vec::with_capacity(fields.n_fields);
    for (prediction, truth) in prediction.chunks(fields.n_points).zip(truth.chunks(fields.n_points)) {
        let pairs = prediction.iter().zip(truth);
        values.iter_mut().zip(pairs).for_each(|(value, (p, t))| *value = p.to_f64() - t.to_f64());
        let error = grid.energy(&values, 0..grid.n_rows);
        values.iter_mut().zip(truth).for_each(|(value, truth)| *value = truth.to_f64());
        energies.push((error, grid.energy(&values, 0..grid.n_rows)));
    }
    let samples = energies.chunks(shape[1]).map(|channels| {
        let (error, size) = channels.iter().fold((0.0, 0.0), |sum, field| (sum.0 + field.0, sum.1 + field.1));
        error.sqrt() / (size.sqrt() + EPS)
    });
    Ok(samples.collect())
}

fn check_length(op: &'static str, operand: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Length { op, operand, expected, found }) }
}
