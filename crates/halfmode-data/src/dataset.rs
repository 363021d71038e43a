//! Pairs of input and output fields on one grid.

use halfmode_precision::Domain;
use ndarray::{ArrayD, ArrayViewD, Axis, Dimension, IxDyn};

use crate::error::{Error, Result};

/// A data set: `n` input fields and the `n` output fields that belong to them.
///
/// # Shapes
/// - `x`: `[n, c_in, n_1, …, n_d]`, f32, row-major and contiguous
/// - `y`: `[n, c_out, n_1, …, n_d]`, f32, row-major and contiguous
///
/// Both of complex fields have a last axis of 2, real and imaginary part.
///
/// All values are finite, no axis is empty: the constructor checks it once.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldPairs {
    x: ArrayD<f32>,
    y: ArrayD<f32>,
    domain: Domain,
}

/// Some samples, copied together: contiguous, row-major, ready for a device.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Batch {
    /// Number of samples.
    pub n: usize,
    /// `[n, c_in, n_1, …, n_d]`.
    pub x: Vec<f32>,
    /// `[n, c_out, n_1, …, n_d]`.
    pub y: Vec<f32>,
}

impl FieldPairs {
    /// Joins real inputs and outputs, channels first.
    ///
    /// # Errors
    /// [`Error::Rank`] below 3 axes, [`Error::SampleCount`], [`Error::Grid`], [`Error::Empty`],
    /// [`Error::NonFinite`] with the first index of a NaN or infinity.
    pub fn new(x: ArrayD<f32>, y: ArrayD<f32>) -> Result<Self> {
        Self::of(Domain::Real, x, y)
    }

    /// Joins inputs and outputs, channels first; complex ones with a last axis of 2.
    ///
    /// # Errors
    /// Those of [`Self::new`]; [`Error::Domain`] for complex fields without that axis.
    pub fn of(domain: Domain, x: ArrayD<f32>, y: ArrayD<f32>) -> Result<Self> {
        for (name, array) in [("x", &x), ("y", &y)] {
            let extents = field_extents(name, array.shape(), domain, domain)?;
            if extents.len() < 3 {
                return Err(Error::Rank {
                    array: name.to_owned(),
                    expected: 3,
                    layout: "samples, channels, grid",
                    shape: array.shape().to_vec(),
                });
            }
            if array.is_empty() {
                return Err(Error::Empty { array: name.to_owned(), shape: array.shape().to_vec() });
            }
        }
        if x.shape()[0] != y.shape()[0] {
            return Err(Error::SampleCount { x: x.shape()[0], y: y.shape()[0] });
        }
        if x.shape()[2..] != y.shape()[2..] {
            return Err(Error::Grid { x: x.shape()[2..].to_vec(), y: y.shape()[2..].to_vec() });
        }
        let pairs = Self { x: contiguous(x), y: contiguous(y), domain };
        check_finite("x", &pairs.x)?;
        check_finite("y", &pairs.y)?;
        Ok(pairs)
    }

    /// Inputs, `[n, c_in, n_1, …, n_d]`.
    #[must_use]
    pub fn x(&self) -> &ArrayD<f32> {
        &self.x
    }

    /// Outputs, `[n, c_out, n_1, …, n_d]`.
    #[must_use]
    pub fn y(&self) -> &ArrayD<f32> {
        &self.y
    }

    /// Number of samples, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a data set without samples cannot be built")]
    pub fn len(&self) -> usize {
        self.x.shape()[0]
    }

    /// Channels of the input.
    #[must_use]
    pub fn c_in(&self) -> usize {
        self.x.shape()[1]
    }

    /// Channels of the output.
    #[must_use]
    pub fn c_out(&self) -> usize {
        self.y.shape()[1]
    }

    /// Points per axis, `[n_1, …, n_d]`.
    #[must_use]
    pub fn grid(&self) -> &[usize] {
        let shape = self.x.shape();
        &shape[2..shape.len() + 1 - self.domain.scalars()]
    }

    /// Whether the fields are real or complex.
    #[must_use]
    pub fn domain(&self) -> Domain {
        self.domain
    }

    /// Both arrays.
    #[must_use]
    pub fn into_parts(self) -> (ArrayD<f32>, ArrayD<f32>) {
        (self.x, self.y)
    }

    /// Copies the named samples, in the given order; repeats are allowed.
    ///
    /// # Errors
    /// [`Error::SampleIndex`] for a number that does not exist.
    pub fn batch(&self, samples: &[usize]) -> Result<Batch> {
        let mut batch = Batch::default();
        self.batch_into(samples, &mut batch)?;
        Ok(batch)
    }

    /// As [`Self::batch`], into buffers that keep their memory.
    ///
    /// # Errors
    /// [`Error::SampleIndex`] for a number that does not exist.
    pub fn batch_into(&self, samples: &[usize], batch: &mut Batch) -> Result<()> {
        let len = self.len();
        if let Some(&index) = samples.iter().find(|&&index| index >= len) {
            return Err(Error::SampleIndex { index, len });
        }
        batch.n = samples.len();
        gather(&self.x, samples, &mut batch.x);
        gather(&self.y, samples, &mut batch.y);
        Ok(())
    }

    /// A new data set of the named samples.
    ///
    /// # Errors
    /// [`Error::SampleIndex`]; [`Error::Empty`] if no sample is named.
    pub fn select(&self, samples: &[usize]) -> Result<Self> {
        let len = self.len();
        if let Some(&index) = samples.iter().find(|&&index| index >= len) {
            return Err(Error::SampleIndex { index, len });
        }
        Self::of(self.domain, self.x.select(Axis(0), samples), self.y.select(Axis(0), samples))
    }

    /// One sample's input `[c_in, n_1, …, n_d]` and output `[c_out, n_1, …, n_d]`.
    ///
    /// # Errors
    /// [`Error::SampleIndex`].
    pub fn sample(&self, index: usize) -> Result<(ArrayViewD<'_, f32>, ArrayViewD<'_, f32>)> {
        let len = self.len();
        if index >= len {
            return Err(Error::SampleIndex { index, len });
        }
        Ok((self.x.index_axis(Axis(0), index), self.y.index_axis(Axis(0), index)))
    }
}

/// The extents of an array that holds `stored` numbers and is read as `domain` fields: without the axis of real
/// and imaginary part.
pub(crate) fn field_extents<'a>(
    array: &str,
    shape: &'a [usize],
    stored: Domain,
    domain: Domain,
) -> Result<&'a [usize]> {
    match (stored, domain, shape) {
        (Domain::Real, Domain::Real, _) => Ok(shape),
        (_, Domain::Complex, [extents @ .., 2]) => Ok(extents),
        _ => Err(Error::Domain { array: array.to_owned(), shape: shape.to_vec(), domain }),
    }
}

fn contiguous(array: ArrayD<f32>) -> ArrayD<f32> {
    if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned() }
}

fn gather(array: &ArrayD<f32>, samples: &[usize], out: &mut Vec<f32>) {
    out.clear();
    out.reserve(samples.len() * array.len() / array.shape()[0]);
    for &sample in samples {
        // A sample of a contiguous array is contiguous, so this is a copy of one slice.
        out.extend(array.index_axis(Axis(0), sample).iter());
    }
}

fn check_finite(name: &str, array: &ArrayD<f32>) -> Result<()> {
    if array.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    match array.indexed_iter().find(|(_, v)| !v.is_finite()) {
        None => Ok(()),
        Some((index, &value)) => Err(non_finite(name, &index, value)),
    }
}

fn non_finite(name: &str, index: &IxDyn, value: f32) -> Error {
    Error::NonFinite { array: name.to_owned(), index: index.slice().to_vec(), value: f64::from(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(shape: &[usize]) -> ArrayD<f32> {
        let n: usize = shape.iter().product();
        ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(|v| v as f32).collect()).unwrap()
    }

    #[test]
    fn batches_are_contiguous_copies_in_order() {
        let pairs = FieldPairs::new(ramp(&[4, 2, 3]), ramp(&[4, 1, 3])).unwrap();
        assert_eq!((pairs.len(), pairs.c_in(), pairs.c_out()), (4, 2, 1));
        assert_eq!(pairs.grid(), [3]);
        let batch = pairs.batch(&[2, 0, 2]).unwrap();
        assert_eq!(batch.n, 3);
        assert_eq!(batch.x[..6], [12., 13., 14., 15., 16., 17.]);
        assert_eq!(batch.y, [6., 7., 8., 0., 1., 2., 6., 7., 8.]);
        let part = pairs.select(&[2, 0, 2]).unwrap();
        assert_eq!(part.x().iter().copied().collect::<Vec<_>>(), batch.x);
        assert!(matches!(pairs.batch(&[4]), Err(Error::SampleIndex { index: 4, len: 4 })));
        assert!(matches!(pairs.select(&[]), Err(Error::Empty { .. })));
        assert_eq!(pairs.sample(1).unwrap().1.shape(), [1, 3]);
    }

    #[test]
    fn fortran_order_becomes_row_major() {
        let x = ramp(&[3, 1, 4]).reversed_axes();
        let x = x.permuted_axes(vec![2, 1, 0]);
        let f =
            ArrayD::from_shape_vec(ndarray::ShapeBuilder::f(IxDyn(&[3, 1, 4])), (0..12).map(|v| v as f32).collect())
                .unwrap();
        let pairs = FieldPairs::new(x, f.clone()).unwrap();
        assert!(pairs.x().is_standard_layout() && pairs.y().is_standard_layout());
        assert_eq!(pairs.y(), &f);
    }

    #[test]
    fn mismatches_are_typed() {
        let new = |x: &[usize], y: &[usize]| FieldPairs::new(ramp(x), ramp(y));
        assert!(matches!(new(&[2, 1, 4], &[3, 1, 4]), Err(Error::SampleCount { x: 2, y: 3 })));
        assert!(matches!(new(&[2, 1, 4], &[2, 1, 5]), Err(Error::Grid { .. })));
        assert!(matches!(new(&[2, 4], &[2, 1, 4]), Err(Error::Rank { .. })));
        assert!(matches!(new(&[0, 1, 4], &[0, 1, 4]), Err(Error::Empty { .. })));
    }

    #[test]
    fn the_first_bad_value_is_located() {
        let mut y = ramp(&[2, 1, 3, 3]);
        y[[1, 0, 2, 1]] = f32::NAN;
        y[[1, 0, 2, 2]] = f32::INFINITY;
        let error = FieldPairs::new(ramp(&[2, 1, 3, 3]), y).unwrap_err();
        assert!(matches!(&error, Error::NonFinite { array, index, .. } if array == "y" && index == &[1, 0, 2, 1]));
        assert_eq!(error.to_string(), "`y` holds NaN at index [1, 0, 2, 1]; every value must be finite");
    }
}
