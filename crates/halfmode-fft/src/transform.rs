//! Truncated transforms of whole fields, axis by axis.
//!
//! A field is `[batch, n_1, …, n_d, channels]`, a spectrum `[batch, (re, im), k_1, …, k_d,
//! channels]`. From the field the last axis goes first: `[.., n_d, c]` becomes `[.., (re, im), k_d,
//! c]`; then each earlier axis merges its points with the (re, im) axis behind it, as it is
//! stored, and comes out as modes before everything already transformed. No transposes.

use crate::axis::{Axis, Weights};
use crate::planner::{Algorithm, AxisKind};
use crate::scale::HalfSafeScale;
use crate::stage::{Direction, FftKernels, Stage};
use crate::{Error, Result};
use halfmode_precision::{Compute, DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};

/// What a transform is planned for; independent of batch and channels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TransformConfig {
    /// Points per axis, `n_1 … n_d`.
    pub grid: Vec<usize>,
    /// Kept modes per axis. The last axis of real data keeps frequencies `0..k`, every other axis
    /// `-k/2..k - k/2`.
    pub modes: Vec<usize>,
    /// Real or complex data.
    pub domain: Domain,
    /// The precision of sums: F32, or F64 for F64 data.
    pub accumulate: Precision,
    /// Forces one algorithm on every axis; `None` lets the planner choose per axis.
    pub algorithm: Option<Algorithm>,
}

/// A planned pair of directions between a grid and its kept modes.
///
/// Both directions are linear and each is the other's adjoint up to scale and half-spectrum
/// weights: analysis is [`Transform::to_modes`] with [`Weights::Plain`], synthesis
/// [`Transform::to_grid`] with [`Weights::Doubled`], and swapping the direction gives the adjoint.
/// Synthesis on another grid than that of the analysis evaluates the same trigonometric
/// polynomial there, so a resolution change is exact for band-limited fields.
#[derive(Clone, Debug)]
pub struct Transform {
    config: TransformConfig,
    device: Device,
    axes: Vec<Axis>,
    compute: Compute,
}

impl Transform {
    /// Plans the axes and builds their tables on `device`.
    ///
    /// # Errors
    /// [`Error::Axes`] for other than 1 to 3 axes, [`Error::Empty`] for an axis without points or
    /// modes, [`Error::Modes`] if an axis does not resolve the modes asked for.
    pub fn new(device: &Device, config: TransformConfig) -> Result<Self> {
        let (n_grid, n_modes) = (config.grid.len(), config.modes.len());
        if n_grid != n_modes || !(1..=3).contains(&n_grid) {
            let (grid, modes) = (Shape::new(&config.grid), Shape::new(&config.modes));
            return Err(Error::Axes { grid, n_grid, modes, n_modes });
        }
        let axes = (0..n_grid)
            .map(|axis| {
                let last_real = axis + 1 == n_grid && config.domain == Domain::Real;
                let kind = if last_real { AxisKind::Real } else { AxisKind::Complex };
                let size = (config.grid[axis], config.modes[axis]);
                Axis::new(device, axis, kind, size, config.accumulate, config.algorithm)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Transform { config, device: device.clone(), axes, compute: Compute::F32 })
    }

    /// The same with products of f32 values that may use `compute`. On a CPU they are exact whatever it says.
    #[must_use]
    pub fn with_compute(self, compute: Compute) -> Self {
        Transform { compute, ..self }
    }

    /// What products of f32 values may use.
    #[must_use]
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// What was planned.
    #[must_use]
    pub fn config(&self) -> &TransformConfig {
        &self.config
    }

    /// The planned axes, outermost first.
    #[must_use]
    pub fn axes(&self) -> &[Axis] {
        &self.axes
    }

    /// Number of kept modes.
    #[must_use]
    pub fn n_modes(&self) -> usize {
        self.config.modes.iter().product()
    }

    /// The half-safe scale of a forward pass that starts on this grid.
    #[must_use]
    pub fn scale(&self) -> HalfSafeScale {
        HalfSafeScale::new(&self.config.grid, &self.config.grid)
    }

    /// `[batch, n_1, …, n_d, channels]`
    #[must_use]
    pub fn field_shape(&self, batch: usize, channels: usize) -> Shape {
        let mut extents = vec![batch];
        extents.extend(&self.config.grid);
        extents.push(channels);
        extents.into()
    }

    /// `[batch, 2, k_1, …, k_d, channels]`
    #[must_use]
    pub fn spectrum_shape(&self, batch: usize, channels: usize) -> Shape {
        let mut extents = vec![batch, 2];
        extents.extend(&self.config.modes);
        extents.push(channels);
        extents.into()
    }

    /// Shape after the last axis only: `[batch, n_1, …, n_{d-1}, 2, k_d, channels]`.
    #[must_use]
    pub fn half_transformed_shape(&self, batch: usize, channels: usize) -> Shape {
        let d = self.axes.len();
        let mut extents = vec![batch];
        extents.extend(&self.config.grid[..d - 1]);
        extents.extend([2, self.config.modes[d - 1], channels]);
        extents.into()
    }

    /// Sums over points: the kept modes of a field, `x_hat_k = prod(scale) sum_j x_j e^(-2 pi i k j / n)`.
    ///
    /// # Shapes
    /// - `x`: `[batch, n_1, …, n_d, channels]`, of the planned domain
    /// - returns `[batch, (re, im), k_1, …, k_d, channels]`, real, stored in `storage`
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Domain`] if `x` is not what was planned.
    pub fn to_modes(
        &self,
        x: &Tensor,
        weights: Weights,
        scale: &[f64],
        storage: Precision,
        purpose: Purpose,
    ) -> Result<Tensor> {
        let (batch, channels) = self.check_field(x)?;
        let d = self.axes.len();
        let first_purpose = if d == 1 { purpose } else { Purpose::Workspace };
        let shape = self.half_transformed_shape(batch, channels);
        let mut t = self.device.alloc_unwritten(shape, DType::real(storage), first_purpose)?;
        let stage = Stage {
            axis: &self.axes[d - 1],
            outer: batch * self.config.grid[..d - 1].iter().product::<usize>(),
            inner: channels,
            weights,
            scale: scale[d - 1],
            accumulate: self.config.accumulate,
            #[cfg(feature = "cuda")]
            compute: self.compute,
            interleaved: self.config.domain == Domain::Complex,
        };
        self.device.axis_stage(&stage, Direction::ToModes, x, &mut t)?;
        self.columns_to_modes(t, scale, storage, purpose)
    }

    /// The axes before the last, of a field whose last axis is transformed already
    /// ([`Transform::half_transformed_shape`]).
    ///
    /// # Errors
    /// Those of allocation.
    pub fn columns_to_modes(&self, t: Tensor, scale: &[f64], storage: Precision, purpose: Purpose) -> Result<Tensor> {
        let d = self.axes.len();
        let (batch, channels) = (t.shape()[0], t.shape()[d + 2]);
        let mut t = t;
        for axis in (0..d - 1).rev() {
            let mut extents = vec![batch];
            extents.extend(&self.config.grid[..axis]);
            extents.push(2);
            extents.extend(&self.config.modes[axis..]);
            extents.push(channels);
            let purpose = if axis == 0 { purpose } else { Purpose::Workspace };
            let mut out = self.device.alloc_unwritten(extents, DType::real(storage), purpose)?;
            let stage = self.column_stage(axis, batch, channels, scale);
            self.device.axis_stage(&stage, Direction::ToModes, &t, &mut out)?;
            t = out;
        }
        Ok(t.reshape(self.spectrum_shape(batch, channels))?)
    }

    /// Sums over modes: `x_j = prod(scale) sum_k w_k Re(x_hat_k e^(2 pi i k j / n))` for real data, the
    /// plain complex sum for complex data.
    ///
    /// # Shapes
    /// - `x_hat`: `[batch, (re, im), k_1, …, k_d, channels]`, real
    /// - returns `[batch, n_1, …, n_d, channels]`, of the planned domain, stored in `storage`
    ///
    /// # Errors
    /// [`Error::Shape`] if `x_hat` is not what was planned.
    pub fn to_grid(
        &self,
        x_hat: &Tensor,
        weights: Weights,
        scale: &[f64],
        storage: Precision,
        purpose: Purpose,
    ) -> Result<Tensor> {
        let d = self.axes.len();
        let (batch, channels) = self.check_spectrum(x_hat)?;
        let z = self.columns_to_grid(x_hat, scale, storage)?;
        let dtype = DType { domain: self.config.domain, precision: storage };
        let mut x = self.device.alloc_unwritten(self.field_shape(batch, channels), dtype, purpose)?;
        let stage = Stage {
            axis: &self.axes[d - 1],
            outer: batch * self.config.grid[..d - 1].iter().product::<usize>(),
            inner: channels,
            weights,
            scale: scale[d - 1],
            accumulate: self.config.accumulate,
            #[cfg(feature = "cuda")]
            compute: self.compute,
            interleaved: self.config.domain == Domain::Complex,
        };
        self.device.axis_stage(&stage, Direction::ToGrid, &z, &mut x)?;
        Ok(x)
    }

    /// The axes before the last: leaves `[batch, n_1, …, n_{d-1}, (re, im), k_d, channels]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x_hat` is not what was planned.
    pub fn columns_to_grid(&self, x_hat: &Tensor, scale: &[f64], storage: Precision) -> Result<Tensor> {
        let d = self.axes.len();
        let (batch, channels) = self.check_spectrum(x_hat)?;
        let mut z = x_hat.clone();
        for axis in 0..d - 1 {
            let mut extents = vec![batch];
            extents.extend(&self.config.grid[..=axis]);
            extents.push(2);
            extents.extend(&self.config.modes[axis + 1..]);
            extents.push(channels);
            let mut out = self.device.alloc_unwritten(extents, DType::real(storage), Purpose::Workspace)?;
            let stage = self.column_stage(axis, batch, channels, scale);
            self.device.axis_stage(&stage, Direction::ToGrid, &z, &mut out)?;
            z = out;
        }
        Ok(z.reshape(self.half_transformed_shape(batch, channels))?)
    }

    fn column_stage(&self, axis: usize, batch: usize, channels: usize, scale: &[f64]) -> Stage<'_> {
        Stage {
            axis: &self.axes[axis],
            outer: batch * self.config.grid[..axis].iter().product::<usize>(),
            inner: channels * self.config.modes[axis + 1..].iter().product::<usize>(),
            weights: Weights::Plain,
            scale: scale[axis],
            accumulate: self.config.accumulate,
            #[cfg(feature = "cuda")]
            compute: self.compute,
            interleaved: false,
        }
    }

    /// (batch, channels) of a field of the planned grid.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Domain`] if it is not one.
    pub fn check_field(&self, x: &Tensor) -> Result<(usize, usize)> {
        if x.dtype().domain != self.config.domain {
            let expected = if self.config.domain == Domain::Real { "real" } else { "complex" };
            return Err(Error::Domain { operand: "field", expected });
        }
        let ends = (x.shape().first().copied().unwrap_or(0), x.shape().last().copied().unwrap_or(0));
        let expected = self.field_shape(ends.0, ends.1);
        if *x.shape() != expected {
            return Err(Error::Shape { operand: "field", expected, found: x.shape().clone() });
        }
        Ok(ends)
    }

    fn check_spectrum(&self, x_hat: &Tensor) -> Result<(usize, usize)> {
        if x_hat.dtype().domain != Domain::Real {
            return Err(Error::Domain { operand: "spectrum", expected: "split complex" });
        }
        let ends = (x_hat.shape().first().copied().unwrap_or(0), x_hat.shape().last().copied().unwrap_or(0));
        let expected = self.spectrum_shape(ends.0, ends.1);
        if *x_hat.shape() != expected {
            return Err(Error::Shape { operand: "spectrum", expected, found: x_hat.shape().clone() });
        }
        Ok(ends)
    }
}
