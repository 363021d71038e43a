//! Normalisation to zero mean and unit variance.

use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, Axis, Dimension, IxDyn, Zip, indices};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::real::Real;

/// Means and unbiased standard deviations over chosen axes:
///
/// ```text
/// encode: z = (x - mean) / (std + eps)      decode: x = z (std + eps) + mean
/// ```
///
/// Statistics keep the axes they reduce, with length 1. So statistics per channel,
/// `[1, c, 1, …, 1]`, fit every grid; pointwise ones, `[1, c, n_1, …, n_d]`, fit one.
/// All arithmetic is f64, whatever the arrays hold.
///
/// ```
/// # use halfmode_data::UnitGaussian;
/// let x = ndarray::array![[[1.0f64, 3.0]], [[5.0, 7.0]]].into_dyn(); // [2 samples, 1 channel, 2]
/// let normaliser = UnitGaussian::fit_per_channel(&x.view())?;
/// let mut z = x.clone();
/// normaliser.encode(&mut z.view_mut())?;
/// assert!(z.sum().abs() < 1e-12);
/// # Ok::<(), halfmode_data::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "State", try_from = "State")]
pub struct UnitGaussian {
    mean: ArrayD<f64>,
    std: ArrayD<f64>,
    eps: f64,
    dims: Vec<usize>,
}

impl UnitGaussian {
    /// The usual guard against division by zero.
    pub const EPS: f64 = 1e-7;

    /// Fits over the given axes.
    ///
    /// # Errors
    /// [`Error::NormaliserDims`], [`Error::TooFewValues`], [`Error::NonFinite`].
    pub fn fit<T: Real>(x: &ArrayViewD<'_, T>, dims: &[usize]) -> Result<Self> {
        let mut fit = UnitGaussianFit::new(dims);
        fit.update(x)?;
        fit.finish()
    }

    /// One mean and deviation per channel: over all axes but axis 1.
    ///
    /// # Errors
    /// As [`Self::fit`].
    pub fn fit_per_channel<T: Real>(x: &ArrayViewD<'_, T>) -> Result<Self> {
        let dims: Vec<usize> = (0..x.ndim()).filter(|&axis| axis != 1).collect();
        Self::fit(x, &dims)
    }

    /// One complex mean and one real deviation per channel of complex data, as torch's `mean` and `std` give
    /// them: with `|x - mean|²` for the square.
    ///
    /// # Shapes
    /// - `x`: `[n, c, n_1, …, n_d, 2]`, real and imaginary part
    /// - statistics: `[1, c, 1, …, 1, 2]`, the deviation twice
    ///
    /// # Errors
    /// As [`Self::fit`].
    pub fn fit_complex_per_channel<T: Real>(x: &ArrayViewD<'_, T>) -> Result<Self> {
        let parts = x.ndim().saturating_sub(1);
        let dims: Vec<usize> = (0..parts).filter(|&axis| axis != 1).collect();
        let mut fit = Self::fit(x, &dims)?;
        for mut pair in fit.std.lanes_mut(Axis(parts)) {
            let deviation = pair.iter().fold(0.0, |sum: f64, part| sum.hypot(*part));
            pair.fill(deviation);
        }
        Ok(fit)
    }

    /// One mean and deviation per channel and point: over samples, axis 0.
    ///
    /// # Errors
    /// As [`Self::fit`].
    pub fn fit_pointwise<T: Real>(x: &ArrayViewD<'_, T>) -> Result<Self> {
        Self::fit(x, &[0])
    }

    /// From known statistics.
    ///
    /// # Errors
    /// [`Error::NormaliserState`] if the shapes differ, a reduced axis is not of length 1, or a
    /// number is not finite or negative where it cannot be.
    pub fn from_parts(mean: ArrayD<f64>, std: ArrayD<f64>, eps: f64, dims: Vec<usize>) -> Result<Self> {
        let refuse = |reason: String| Err(Error::NormaliserState { reason });
        if mean.shape() != std.shape() {
            return refuse(format!("mean has shape {:?}, std {:?}", mean.shape(), std.shape()));
        }
        check_dims(&dims, mean.ndim())?;
        if let Some(&axis) = dims.iter().find(|&&axis| mean.shape()[axis] != 1) {
            return refuse(format!("axis {axis} is reduced, but the statistics have shape {:?}", mean.shape()));
        }
        if !(eps.is_finite() && eps >= 0.0) {
            return refuse(format!("eps is {eps}"));
        }
        if !mean.iter().all(|v| v.is_finite()) {
            return refuse("a mean is not finite".to_owned());
        }
        if !std.iter().all(|&v| v.is_finite() && v >= 0.0) {
            return refuse("a standard deviation is negative or not finite".to_owned());
        }
        Ok(Self { mean, std, eps, dims })
    }

    /// Means; reduced axes have length 1.
    #[must_use]
    pub fn mean(&self) -> &ArrayD<f64> {
        &self.mean
    }

    /// Standard deviations, without `eps`; reduced axes have length 1.
    #[must_use]
    pub fn std(&self) -> &ArrayD<f64> {
        &self.std
    }

    /// What is added to every standard deviation.
    #[must_use]
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The axes that were reduced.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Replaces `x` by `(x - mean) / (std + eps)`.
    ///
    /// # Shapes
    /// - `x`: the statistics' shape, any length on reduced axes
    ///
    /// # Errors
    /// [`Error::NormaliserShape`].
    pub fn encode<T: Real>(&self, x: &mut ArrayViewMutD<'_, T>) -> Result<()> {
        let eps = self.eps;
        self.map(x, |x, mean, std| (x - mean) / (std + eps))
    }

    /// Replaces `z` by `z (std + eps) + mean`.
    ///
    /// # Shapes
    /// - `z`: the statistics' shape, any length on reduced axes
    ///
    /// # Errors
    /// [`Error::NormaliserShape`].
    pub fn decode<T: Real>(&self, z: &mut ArrayViewMutD<'_, T>) -> Result<()> {
        let eps = self.eps;
        self.map(z, |z, mean, std| z * (std + eps) + mean)
    }

    fn map<T: Real>(&self, x: &mut ArrayViewMutD<'_, T>, function: impl Fn(f64, f64, f64) -> f64) -> Result<()> {
        let fits = x.ndim() == self.mean.ndim()
            && (0..x.ndim()).all(|axis| self.dims.contains(&axis) || x.shape()[axis] == self.mean.shape()[axis]);
        if !fits {
            return Err(Error::NormaliserShape { statistics: self.mean.shape().to_vec(), found: x.shape().to_vec() });
        }
        Zip::from(x)
            .and_broadcast(&self.mean)
            .and_broadcast(&self.std)
            .for_each(|x, &mean, &std| *x = T::from_f64(function(x.to_f64(), mean, std)));
        Ok(())
    }
}

/// A fit that sees its data in parts, in any order and of any size.
///
/// Parts are merged by counts, means and sums of squared deviations (Chan's formula), so the
/// result is that of one fit over all data, up to rounding. neuraloperator's `partial_fit`
/// multiplies the deviation by n/(n-1) instead of its square root; this does not.
///
/// ```
/// # use halfmode_data::{UnitGaussian, UnitGaussianFit};
/// let x = ndarray::Array3::from_shape_fn((10, 2, 4), |(i, c, j)| (i * j + c) as f32).into_dyn();
/// let mut fit = UnitGaussianFit::new(&[0, 2]);
/// for part in x.axis_chunks_iter(ndarray::Axis(0), 3) {
///     fit.update(&part)?;
/// }
/// let whole = UnitGaussian::fit_per_channel(&x.view())?;
/// assert!((fit.finish()?.std() - whole.std()).iter().all(|d| d.abs() < 1e-12));
/// # Ok::<(), halfmode_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct UnitGaussianFit {
    dims: Vec<usize>,
    /// Values per statistic so far.
    count: u64,
    /// Means and sums of squared deviations; `None` before the first part.
    moments: Option<(ArrayD<f64>, ArrayD<f64>)>,
}

impl UnitGaussianFit {
    /// A fit over the given axes, without data yet.
    #[must_use]
    pub fn new(dims: &[usize]) -> Self {
        Self { dims: dims.to_vec(), count: 0, moments: None }
    }

    /// Adds a part of the data.
    ///
    /// # Errors
    /// [`Error::NormaliserDims`]; [`Error::NormaliserShape`] if an axis that is not reduced
    /// changes its length; [`Error::NonFinite`]. The fit is then unchanged.
    pub fn update<T: Real>(&mut self, x: &ArrayViewD<'_, T>) -> Result<()> {
        check_dims(&self.dims, x.ndim())?;
        let mut shape = x.shape().to_vec();
        let mut count = 1u64;
        for &axis in &self.dims {
            count *= shape[axis] as u64;
            shape[axis] = 1;
        }
        if count == 0 {
            return Ok(());
        }
        if let Some((mean, _)) = &self.moments
            && mean.shape() != shape.as_slice()
        {
            return Err(Error::NormaliserShape { statistics: mean.shape().to_vec(), found: x.shape().to_vec() });
        }
        let (mean, squares) = self.moments_of(x, &shape, count)?;
        self.merge_moments(count, mean, squares);
        Ok(())
    }

    /// Adds what another fit over the same axes has seen.
    ///
    /// # Errors
    /// [`Error::NormaliserDims`] if the axes differ, [`Error::NormaliserShape`] if the shapes do.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        let Some((mean, squares)) = other.moments else {
            return Ok(());
        };
        if self.dims != other.dims {
            return Err(Error::NormaliserDims { dims: other.dims, rank: mean.ndim() });
        }
        if let Some((own, _)) = &self.moments
            && own.shape() != mean.shape()
        {
            return Err(Error::NormaliserShape { statistics: own.shape().to_vec(), found: mean.shape().to_vec() });
        }
        self.merge_moments(other.count, mean, squares);
        Ok(())
    }

    /// The normaliser of all data so far.
    ///
    /// # Errors
    /// [`Error::TooFewValues`] below two values per statistic.
    pub fn finish(self) -> Result<UnitGaussian> {
        match self.moments {
            Some((mean, squares)) if self.count >= 2 => {
                let divisor = (self.count - 1) as f64;
                UnitGaussian::from_parts(
                    mean,
                    squares.mapv_into(|v| (v / divisor).sqrt()),
                    UnitGaussian::EPS,
                    self.dims,
                )
            }
            _ => Err(Error::TooFewValues { found: self.count }),
        }
    }

    /// Mean, then squared deviations from it, of every group of values.
    fn moments_of<T: Real>(
        &self,
        x: &ArrayViewD<'_, T>,
        shape: &[usize],
        count: u64,
    ) -> Result<(ArrayD<f64>, ArrayD<f64>)> {
        let mut mean = ArrayD::zeros(IxDyn(shape));
        let mut squares = ArrayD::zeros(IxDyn(shape));
        for index in indices(IxDyn(shape)) {
            let mut group = x.view();
            for (axis, &i) in index.slice().iter().enumerate() {
                if !self.dims.contains(&axis) {
                    group.collapse_axis(Axis(axis), i);
                }
            }
            let sum: f64 = group.iter().map(|v| v.to_f64()).sum();
            let group_mean = sum / count as f64;
            if !group_mean.is_finite() {
                return Err(locate_non_finite(x, group_mean));
            }
            mean[index.slice()] = group_mean;
            squares[index.slice()] = group.iter().map(|v| (v.to_f64() - group_mean).powi(2)).sum::<f64>();
        }
        Ok((mean, squares))
    }

    fn merge_moments(&mut self, count: u64, mean: ArrayD<f64>, squares: ArrayD<f64>) {
        let Some((own_mean, own_squares)) = &mut self.moments else {
            self.count = count;
            self.moments = Some((mean, squares));
            return;
        };
        let total = (self.count + count) as f64;
        let share = count as f64 / total;
        let cross = self.count as f64 * share;
        Zip::from(own_mean).and(own_squares).and(&mean).and(&squares).for_each(
            |own_mean, own_squares, &mean, &squares| {
                let delta = mean - *own_mean;
                *own_mean += share * delta;
                *own_squares += squares + cross * delta * delta;
            },
        );
        self.count += count;
    }
}

fn locate_non_finite<T: Real>(x: &ArrayViewD<'_, T>, mean: f64) -> Error {
    let found = x.indexed_iter().find(|(_, v)| !v.to_f64().is_finite());
    let (index, value) = match found {
        Some((index, value)) => (index.slice().to_vec(), value.to_f64()),
        // All values are finite, but their sum is not.
        None => (vec![], mean),
    };
    Error::NonFinite { array: "data to normalise".to_owned(), index, value }
}

fn check_dims(dims: &[usize], rank: usize) -> Result<()> {
    let repeated = dims.iter().enumerate().any(|(i, d)| dims[..i].contains(d));
    if repeated || dims.iter().any(|&axis| axis >= rank) {
        return Err(Error::NormaliserDims { dims: dims.to_vec(), rank });
    }
    Ok(())
}

/// The stored form: shape, then row-major values.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    shape: Vec<usize>,
    mean: Vec<f64>,
    std: Vec<f64>,
    eps: f64,
    dims: Vec<usize>,
}

impl From<UnitGaussian> for State {
    fn from(normaliser: UnitGaussian) -> Self {
        Self {
            shape: normaliser.mean.shape().to_vec(),
            mean: normaliser.mean.iter().copied().collect(),
            std: normaliser.std.iter().copied().collect(),
            eps: normaliser.eps,
            dims: normaliser.dims,
        }
    }
}

impl TryFrom<State> for UnitGaussian {
    type Error = Error;

    fn try_from(state: State) -> Result<Self> {
        let array = |values: Vec<f64>| {
            ArrayD::from_shape_vec(IxDyn(&state.shape), values)
                .map_err(|error| Error::NormaliserState { reason: format!("shape {:?}: {error}", state.shape) })
        };
        Self::from_parts(array(state.mean)?, array(state.std)?, state.eps, state.dims)
    }
}
