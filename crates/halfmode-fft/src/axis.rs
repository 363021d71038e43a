//! One axis of a transform: a tile of lines to modes and back.
//!
//! A tile is a row-major matrix whose columns are independent lines. On the grid side a real axis
//! has n rows, a complex axis 2n rows (point x (re, im)); on the mode side both have 2k rows
//! ((re, im) x mode). The adjoint of one direction is the other, so one pair of tables serves both.

use crate::line::{Line, Scalar};
use crate::planner::{Algorithm, AxisKind, choose};
use crate::table::{cosines, half_weight, signed_frequency, sines};
use crate::waves::Waves;
use crate::{Error, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Rows, RowsMut, Tensor, even_rows, odd_rows};
use num_complex::Complex;

/// Whether the rows of a half spectrum carry the weight of the omitted half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Each stored mode counts once: analysis and its adjoint.
    Plain,
    /// A stored mode stands for its conjugate too: synthesis and its adjoint.
    Doubled,
}

#[derive(Clone, Debug)]
enum Table {
    /// Cosines and sines, and for a real axis the same with weighted rows.
    Folded {
        plain: [Tensor; 2],
        doubled: Option<[Tensor; 2]>,
    },
    Lines32(Line<f32>),
    Lines64(Line<f64>),
    /// Whole matrices, for a GPU.
    #[cfg(feature = "cuda")]
    Dense(crate::cuda::Dense),
}

/// One planned axis.
#[derive(Clone, Debug)]
pub struct Axis {
    kind: AxisKind,
    n: usize,
    k: usize,
    algorithm: Algorithm,
    table: Table,
}

/// The lines of an accumulator, if the axis was planned for it.
trait Lines: Scalar {
    fn lines(axis: &Axis) -> Option<&Line<Self>>;
}

impl Lines for f32 {
    fn lines(axis: &Axis) -> Option<&Line<f32>> {
        if let Table::Lines32(line) = &axis.table { Some(line) } else { None }
    }
}

impl Lines for f64 {
    fn lines(axis: &Axis) -> Option<&Line<f64>> {
        if let Table::Lines64(line) = &axis.table { Some(line) } else { None }
    }
}

/// The accumulators that axes are planned for.
#[allow(private_bounds, reason = "a sealed trait: the set of accumulators is closed")]
pub trait AxisReal: Lines {}
impl AxisReal for f32 {}
impl AxisReal for f64 {}

impl Axis {
    pub(crate) fn new(
        device: &Device,
        axis: usize,
        kind: AxisKind,
        (n, k): (usize, usize),
        accumulate: Precision,
        algorithm: Option<Algorithm>,
    ) -> Result<Self> {
        if n == 0 || k == 0 {
            return Err(Error::Empty { axis, n, k });
        }
        let limit = match kind {
            AxisKind::Real => n / 2 + 1,
            AxisKind::Complex => n,
        };
        if k > limit {
            return Err(Error::Modes { axis, n, k, limit });
        }
        #[cfg(feature = "cuda")]
        if device.target() == halfmode_tensor::Target::Cuda {
            let table = Table::Dense(crate::cuda::Dense::new(algorithm)?);
            return Ok(Axis { kind, n, k, algorithm: Algorithm::Matrix, table });
        }
        let algorithm = algorithm.unwrap_or_else(|| choose(kind, n, k));
        let table = match (algorithm, accumulate) {
            (Algorithm::Fft, Precision::F64) => Table::Lines64(Line::new(n)),
            (Algorithm::Fft, _) => Table::Lines32(Line::new(n)),
            (Algorithm::Matrix, _) => {
                let top = if kind == AxisKind::Real { k - 1 } else { k / 2 };
                let store = |shape: [usize; 2], values: &dyn Fn() -> Vec<f64>| -> Result<Tensor> {
                    if device.launches() {
                        Ok(Tensor::from_slice(device, &values(), shape, accumulate, Purpose::Table)?)
                    } else {
                        Ok(device.alloc(shape, DType::real(accumulate), Purpose::Table)?)
                    }
                };
                let waves = |weight: &dyn Fn(usize) -> f64| -> Result<[Tensor; 2]> {
                    let (even, odd) = (even_rows(n), odd_rows(n));
                    Ok([
                        store([top + 1, even], &|| cosines(n, top + 1, even, weight))?,
                        store([top, odd], &|| sines(n, top, odd, weight))?,
                    ])
                };
                let doubled = if kind == AxisKind::Real { Some(waves(&|f| half_weight(f, n))?) } else { None };
                Table::Folded { plain: waves(&|_| 1.0)?, doubled }
            }
        };
        Ok(Axis { kind, n, k, algorithm, table })
    }

    /// What its lines hold.
    #[must_use]
    pub fn kind(&self) -> AxisKind {
        self.kind
    }

    /// Points.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Kept modes.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows of a tile on the grid side.
    #[must_use]
    pub fn grid_rows(&self) -> usize {
        self.kind.grid_rows(self.n)
    }

    /// Rows of a tile on the mode side.
    #[must_use]
    pub fn mode_rows(&self) -> usize {
        2 * self.k
    }

    /// How the axis is transformed.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Scalars of scratch that a tile of `cols` columns needs besides its operands.
    #[must_use]
    pub fn scratch_len(&self, cols: usize) -> usize {
        let rows = self.grid_rows() + self.mode_rows();
        match &self.table {
            Table::Folded { .. } => {
                let parts = even_rows(self.n) + odd_rows(self.n);
                let modes = match self.kind {
                    AxisKind::Real => 2 * self.k,
                    AxisKind::Complex => 2 * (2 * self.top() + 1),
                };
                cols * (parts + modes)
            }
            Table::Lines32(line) => cols * rows + line.scratch_len(),
            Table::Lines64(line) => cols * rows + line.scratch_len(),
            #[cfg(feature = "cuda")]
            Table::Dense(_) => 0,
        }
    }

    /// The matrices of an axis that was planned for a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn dense(&self) -> Option<&crate::cuda::Dense> {
        if let Table::Dense(dense) = &self.table { Some(dense) } else { None }
    }

    /// The highest frequency that is kept.
    fn top(&self) -> usize {
        match self.kind {
            AxisKind::Real => self.k - 1,
            AxisKind::Complex => self.k / 2,
        }
    }

    fn waves<R: AxisReal>(&self, weights: Weights) -> Option<Waves<'_, R>> {
        let Table::Folded { plain, doubled } = &self.table else { return None };
        let [cosines, sines] = match weights {
            Weights::Plain => plain,
            Weights::Doubled => doubled.as_ref().unwrap_or(plain),
        };
        Some(Waves {
            cosines: R::direct(cosines.view().ok()?)?,
            sines: R::direct(sines.view().ok()?)?,
            even: even_rows(self.n),
            odd: odd_rows(self.n),
            top: self.top(),
        })
    }

    /// Sums over points: `modes = scale * M field`, for a tile of `cols` columns.
    ///
    /// `field` has [`Axis::grid_rows`] rows, `modes` [`Axis::mode_rows`]; `scratch` holds
    /// [`Axis::scratch_len`] scalars.
    pub fn to_modes<R: AxisReal>(
        &self,
        field: Rows<'_>,
        modes: &mut RowsMut<'_, '_>,
        cols: usize,
        (weights, scale): (Weights, f64),
        scratch: &mut [R],
    ) {
        if let Some(waves) = self.waves::<R>(weights) {
            let scale = <R as Real>::from_f64(scale);
            match self.kind {
                AxisKind::Real => waves.real_to_modes(self.n, field, modes, cols, scale, scratch),
                AxisKind::Complex => waves.complex_to_modes((self.n, self.k), field, modes, cols, scale, scratch),
            }
        } else if let Some(line) = R::lines(self) {
            let (tile_in, scratch) = scratch.split_at_mut(self.grid_rows() * cols);
            let (tile_out, scratch) = scratch.split_at_mut(self.mode_rows() * cols);
            field.widen(self.grid_rows(), cols, tile_in);
            for col in 0..cols {
                self.line_to_modes(line, tile_in, tile_out, (cols, col), (weights, scale), scratch);
            }
            modes.narrow(tile_out, cols);
        }
    }

    /// Sums over modes: `field = scale * M^T modes`, for a tile of `cols` columns; the adjoint of
    /// [`Axis::to_modes`].
    pub fn to_grid<R: AxisReal>(
        &self,
        modes: Rows<'_>,
        field: &mut RowsMut<'_, '_>,
        cols: usize,
        (weights, scale): (Weights, f64),
        scratch: &mut [R],
    ) {
        if let Some(waves) = self.waves::<R>(weights) {
            let scale = <R as Real>::from_f64(scale);
            match self.kind {
                AxisKind::Real => waves.real_to_grid(self.n, modes, field, cols, scale, scratch),
                AxisKind::Complex => waves.complex_to_grid((self.n, self.k), modes, field, cols, scale, scratch),
            }
        } else if let Some(line) = R::lines(self) {
            let (tile_in, scratch) = scratch.split_at_mut(self.mode_rows() * cols);
            let (tile_out, scratch) = scratch.split_at_mut(self.grid_rows() * cols);
            modes.widen(self.mode_rows(), cols, tile_in);
            for col in 0..cols {
                self.line_to_grid(line, tile_in, tile_out, (cols, col), (weights, scale), scratch);
            }
            field.narrow(tile_out, cols);
        }
    }

    /// The factor of stored mode `idx`: the scale, and the half-spectrum weight where it applies.
    fn factor<R: Scalar>(&self, idx: usize, weights: Weights, scale: f64) -> R {
        let weight = match (self.kind, weights) {
            (AxisKind::Real, Weights::Doubled) => half_weight(idx, self.n),
            _ => 1.0,
        };
        <R as Real>::from_f64(weight * scale)
    }

    /// Where stored mode `idx` stands in a full spectrum.
    fn bin(&self, idx: usize) -> usize {
        match self.kind {
            AxisKind::Real => idx,
            AxisKind::Complex => signed_frequency(idx, self.k).rem_euclid(self.n as i64) as usize,
        }
    }

    fn line_to_modes<R: Scalar>(
        &self,
        line: &Line<R>,
        field: &[R],
        modes: &mut [R],
        (cols, col): (usize, usize),
        (weights, scale): (Weights, f64),
        scratch: &mut [R],
    ) {
        let scratch: &mut [Complex<R>] = as_complex(scratch);
        let (spectrum, rest) = match self.kind {
            AxisKind::Complex => {
                let (spectrum, rest) = scratch.split_at_mut(self.n);
                for (j, value) in spectrum.iter_mut().enumerate() {
                    *value = Complex::new(field[2 * j * cols + col], field[(2 * j + 1) * cols + col]);
                }
                line.complex(true, spectrum, rest);
                (spectrum, rest)
            }
            AxisKind::Real => {
                let (points, rest) = scratch.split_at_mut(self.n.div_ceil(2));
                let points = &mut bytemuck::cast_slice_mut::<Complex<R>, R>(points)[..self.n];
                for (j, value) in points.iter_mut().enumerate() {
                    *value = field[j * cols + col];
                }
                let (spectrum, rest) = rest.split_at_mut(self.n / 2 + 1);
                line.to_half(points, spectrum, rest);
                (spectrum, rest)
            }
        };
        let _ = rest;
        for idx in 0..self.k {
            let value = spectrum[self.bin(idx)].scale(self.factor(idx, weights, scale));
            modes[idx * cols + col] = value.re;
            modes[(self.k + idx) * cols + col] = value.im;
        }
    }

    fn line_to_grid<R: Scalar>(
        &self,
        line: &Line<R>,
        modes: &[R],
        field: &mut [R],
        (cols, col): (usize, usize),
        (weights, scale): (Weights, f64),
        scratch: &mut [R],
    ) {
        let scratch: &mut [Complex<R>] = as_complex(scratch);
        let n_bins = match self.kind {
            AxisKind::Real => self.n / 2 + 1,
            AxisKind::Complex => self.n,
        };
        let (spectrum, rest) = scratch.split_at_mut(n_bins);
        spectrum.fill(Complex::new(R::ZERO, R::ZERO));
        for idx in 0..self.k {
            // The real transform doubles interior modes by itself.
            let own = match self.kind {
                AxisKind::Real => 1.0 / half_weight(idx, self.n),
                AxisKind::Complex => 1.0,
            };
            let value = Complex::new(modes[idx * cols + col], modes[(self.k + idx) * cols + col]);
            spectrum[self.bin(idx)] = value.scale(self.factor(idx, weights, scale * own));
        }
        match self.kind {
            AxisKind::Complex => {
                line.complex(false, spectrum, rest);
                for (j, value) in spectrum.iter().enumerate() {
                    field[2 * j * cols + col] = value.re;
                    field[(2 * j + 1) * cols + col] = value.im;
                }
            }
            AxisKind::Real => {
                let (points, rest) = rest.split_at_mut(self.n.div_ceil(2));
                let points = &mut bytemuck::cast_slice_mut::<Complex<R>, R>(points)[..self.n];
                line.to_points(spectrum, points, rest);
                for (j, value) in points.iter().enumerate() {
                    field[j * cols + col] = *value;
                }
            }
        }
    }
}

/// Scratch scalars as complex numbers; an odd one at the end is left out.
fn as_complex<R: Scalar>(scratch: &mut [R]) -> &mut [Complex<R>] {
    let even = scratch.len() / 2 * 2;
    bytemuck::cast_slice_mut(&mut scratch[..even])
}

impl AxisKind {
    pub(crate) fn grid_rows(self, n: usize) -> usize {
        match self {
            AxisKind::Real => n,
            AxisKind::Complex => 2 * n,
        }
    }
}
