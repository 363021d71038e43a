//! Truncated transforms of whole fields, axis by axis.
//!
//! A field is `[batch, n_1, …, n_d, channels]`, a spectrum `[batch, (re, im), k_1, …, k_d,
//! channels]`. From the field the last axis goes first: `[.., n_d, c]` becomes `[.., (re, im), k_d,
//! c]`; then each earlier axis merges its points with the (re, im) axis behind it, as it is
//! stored, and comes out as modes before everything already transformed. No transposes.

use crate::axis::{Axis, AxisReal, Weights};
use crate::planner::{Algorithm, AxisKind};
use crate::scale::HalfSafeScale;
use crate::{Error, Result};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Scratch, Shape, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

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
}

/// Scalars that a task's scratch may hold, so that it stays in the second-level cache.
const TILE_SCALARS: usize = 32 * 1024;
/// Tasks that one stage is cut into when it has few outer lines. Fixed, so that results do not
/// depend on the number of threads.
const MIN_TASKS: usize = 8;

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
        Ok(Transform { config, device: device.clone(), axes })
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
        let mut t = self.device.alloc(shape, DType::real(storage), first_purpose)?;
        let stage = Stage {
            axis: &self.axes[d - 1],
            outer: batch * self.config.grid[..d - 1].iter().product::<usize>(),
            inner: channels,
            weights,
            scale: scale[d - 1],
            accumulate: self.config.accumulate,
            interleaved: self.config.domain == Domain::Complex,
        };
        stage.run(&self.device, Direction::ToModes, x, &mut t)?;
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
            let mut out = self.device.alloc(extents, DType::real(storage), purpose)?;
            self.column_stage(axis, batch, channels, scale).run(&self.device, Direction::ToModes, &t, &mut out)?;
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
        let mut x = self.device.alloc(self.field_shape(batch, channels), dtype, purpose)?;
        let stage = Stage {
            axis: &self.axes[d - 1],
            outer: batch * self.config.grid[..d - 1].iter().product::<usize>(),
            inner: channels,
            weights,
            scale: scale[d - 1],
            accumulate: self.config.accumulate,
            interleaved: self.config.domain == Domain::Complex,
        };
        stage.run(&self.device, Direction::ToGrid, &z, &mut x)?;
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
            let mut out = self.device.alloc(extents, DType::real(storage), Purpose::Workspace)?;
            self.column_stage(axis, batch, channels, scale).run(&self.device, Direction::ToGrid, &z, &mut out)?;
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToModes,
    ToGrid,
}

/// One axis over a whole tensor: `[outer, rows, inner]` to `[outer, rows', inner]`.
struct Stage<'a> {
    axis: &'a Axis,
    outer: usize,
    inner: usize,
    weights: Weights,
    scale: f64,
    /// The precision that the axis was planned for, whatever the storage.
    accumulate: Precision,
    /// The grid side is interleaved complex: `[outer, n, inner, (re, im)]`.
    interleaved: bool,
}

impl Stage<'_> {
    fn run(&self, device: &Device, direction: Direction, input: &Tensor, output: &mut Tensor) -> Result<()> {
        let (rows_in, rows_out) = match direction {
            Direction::ToModes => (self.axis.grid_rows(), self.axis.mode_rows()),
            Direction::ToGrid => (self.axis.mode_rows(), self.axis.grid_rows()),
        };
        // The matrix can make any rows, so a stage with few outer lines is cut into blocks of rows.
        let can_split = self.axis.algorithm() == Algorithm::Matrix && !self.interleaved;
        let n_blocks = if can_split { MIN_TASKS.div_ceil(self.outer.max(1)).min(rows_out.div_ceil(8)) } else { 1 };
        let block = rows_out.div_ceil(n_blocks);
        let cols = (TILE_SCALARS / (rows_in + block)).max(16).min(self.inner);
        let scratch_len = (rows_in + block) * cols + self.axis.scratch_len();
        let accumulate = self.accumulate;
        let scratch: Scratch = device.scratch(scratch_len, accumulate.bytes());
        if !device.launches() || output.numel() == 0 {
            return Ok(());
        }
        let source = input.view()?;
        let pieces: Vec<ViewMut<'_>> = output.view_mut()?.chunks(rows_out * self.inner);
        let tasks: Vec<(usize, usize, ViewMut<'_>)> = pieces
            .into_iter()
            .enumerate()
            .flat_map(|(outer, piece)| {
                piece
                    .chunks(block * self.inner)
                    .into_iter()
                    .enumerate()
                    .map(move |(idx, rows)| (outer, idx * block, rows))
            })
            .collect();
        device.run(|| {
            with_real!(accumulate, R => tasks.into_par_iter().for_each(|(outer, first_row, mut rows)| {
                scratch.with::<R, _>(|scratch| {
                    let input = source.slice(outer * rows_in * self.inner..(outer + 1) * rows_in * self.inner);
                    self.task::<R>(direction, input, first_row, &mut rows, cols, scratch);
                });
            }));
        });
        Ok(())
    }

    /// Rows `first_row..` of one outer line, column block by column block.
    fn task<R: AxisReal>(
        &self,
        direction: Direction,
        input: View<'_>,
        first_row: usize,
        output: &mut ViewMut<'_>,
        max_cols: usize,
        scratch: &mut [R],
    ) {
        let rows_in = input.len() / self.inner;
        let n_rows = output.len() / self.inner;
        let (tile_in, rest) = scratch.split_at_mut(rows_in * max_cols);
        let (tile_out, rest) = rest.split_at_mut(n_rows * max_cols);
        for first in (0..self.inner).step_by(max_cols) {
            let cols = max_cols.min(self.inner - first);
            let (tile_in, tile_out) = (&mut tile_in[..rows_in * cols], &mut tile_out[..n_rows * cols]);
            let interleaved = (self.interleaved, direction);
            if interleaved == (true, Direction::ToModes) {
                self.gather_interleaved(input, tile_in, first, cols);
            } else if cols == self.inner {
                input.widen(tile_in);
            } else {
                for (row, line) in tile_in.chunks_exact_mut(cols).enumerate() {
                    input.slice(row * self.inner + first..row * self.inner + first + cols).widen(line);
                }
            }
            let rows = first_row..first_row + n_rows;
            let how = (self.weights, self.scale);
            match direction {
                Direction::ToModes => self.axis.to_modes(tile_in, tile_out, rows, cols, how, rest),
                Direction::ToGrid => self.axis.to_grid(tile_in, tile_out, rows, cols, how, rest),
            }
            if interleaved == (true, Direction::ToGrid) {
                self.scatter_interleaved(tile_out, output, first, cols);
            } else if cols == self.inner {
                output.narrow(tile_out);
            } else {
                for (row, line) in tile_out.chunks_exact(cols).enumerate() {
                    output.slice_mut(row * self.inner + first..row * self.inner + first + cols).narrow(line);
                }
            }
        }
    }

    /// `[n, inner, (re, im)]` to tile rows (point, (re, im)).
    fn gather_interleaved<R: AxisReal>(&self, input: View<'_>, tile: &mut [R], first: usize, cols: usize) {
        let mut pairs = vec![R::ZERO; 2 * cols];
        for (point, rows) in tile.chunks_exact_mut(2 * cols).enumerate() {
            let start = 2 * (point * self.inner + first);
            input.slice(start..start + 2 * cols).widen(&mut pairs);
            let (re, im) = rows.split_at_mut(cols);
            for (pair, (re, im)) in pairs.chunks_exact(2).zip(re.iter_mut().zip(im)) {
                (*re, *im) = (pair[0], pair[1]);
            }
        }
    }

    /// Tile rows (point, (re, im)) to `[n, inner, (re, im)]`.
    fn scatter_interleaved<R: AxisReal>(&self, tile: &[R], output: &mut ViewMut<'_>, first: usize, cols: usize) {
        let mut pairs = vec![R::ZERO; 2 * cols];
        for (point, rows) in tile.chunks_exact(2 * cols).enumerate() {
            let (re, im) = rows.split_at(cols);
            for (pair, (re, im)) in pairs.chunks_exact_mut(2).zip(re.iter().zip(im)) {
                (pair[0], pair[1]) = (*re, *im);
            }
            let start = 2 * (point * self.inner + first);
            output.slice_mut(start..start + 2 * cols).narrow(&pairs);
        }
    }
}
