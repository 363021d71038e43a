//! One axis of a transform over a whole tensor: the kernel that a backend owes this crate.

use crate::Result;
use crate::axis::{Axis, AxisReal, Weights};
use crate::planner::{Algorithm, AxisKind};
use crate::table::{complex_matrix, real_matrix};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Scratch, Target, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

/// Scalars that a task's scratch may hold, so that it stays in the second-level cache.
const TILE_SCALARS: usize = 32 * 1024;
/// Tasks that one stage is cut into when it has few outer lines. Fixed, so that results do not
/// depend on the number of threads.
const MIN_TASKS: usize = 8;

/// The kernels of the transforms. The default body is the readable reference, in double precision
/// from the matrices; a device overrides it with tiles, threads and the planned algorithm.
pub(crate) trait FftKernels {
    /// Writes every row of `output` from `input`.
    fn axis_stage(&self, stage: &Stage<'_>, direction: Direction, input: &Tensor, output: &mut Tensor) -> Result<()> {
        stage.by_definition(direction, input, output)
    }
}

impl FftKernels for Device {
    fn axis_stage(&self, stage: &Stage<'_>, direction: Direction, input: &Tensor, output: &mut Tensor) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => stage.run(self, direction, input, output),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToModes,
    ToGrid,
}

/// One axis over a whole tensor: `[outer, rows, inner]` to `[outer, rows', inner]`.
pub(crate) struct Stage<'a> {
    pub(crate) axis: &'a Axis,
    pub(crate) outer: usize,
    pub(crate) inner: usize,
    pub(crate) weights: Weights,
    pub(crate) scale: f64,
    /// The precision that the axis was planned for, whatever the storage.
    pub(crate) accumulate: Precision,
    /// The grid side is interleaved complex: `[outer, n, inner, (re, im)]`.
    pub(crate) interleaved: bool,
}

impl Stage<'_> {
    /// The definition: one sum per output element.
    fn by_definition(&self, direction: Direction, input: &Tensor, output: &mut Tensor) -> Result<()> {
        let (n, k, rows) = (self.axis.n(), self.axis.k(), self.axis.grid_rows());
        let matrix = match self.axis.kind() {
            AxisKind::Real => real_matrix(n, k, self.weights == Weights::Doubled),
            AxisKind::Complex => complex_matrix(n, k),
        };
        let at_grid = |outer: usize, row: usize, col: usize| {
            if self.interleaved {
                ((outer * n + row / 2) * self.inner + col) * 2 + row % 2
            } else {
                (outer * rows + row) * self.inner + col
            }
        };
        let at_modes = |outer: usize, row: usize, col: usize| (outer * 2 * k + row) * self.inner + col;
        let x = input.to_vec::<f64>()?;
        let mut y = vec![0.0; output.numel() * output.dtype().domain.scalars()];
        for outer in 0..self.outer {
            for col in 0..self.inner {
                for mode in 0..2 * k {
                    for point in 0..rows {
                        let (grid, modes) = (at_grid(outer, point, col), at_modes(outer, mode, col));
                        let (to, from) = if direction == Direction::ToModes { (modes, grid) } else { (grid, modes) };
                        y[to] += self.scale * matrix[mode * rows + point] * x[from];
                    }
                }
            }
        }
        Ok(output.copy_from_slice(&y)?)
    }

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
            let tile_in: &[R] = if interleaved == (true, Direction::ToModes) {
                self.gather_interleaved(input, tile_in, first, cols);
                tile_in
            } else if cols == self.inner {
                input.widened(tile_in)
            } else {
                for (row, line) in tile_in.chunks_exact_mut(cols).enumerate() {
                    input.slice(row * self.inner + first..row * self.inner + first + cols).widen(line);
                }
                tile_in
            };
            let how = (self.weights, self.scale);
            let mut transform = |tile_out: &mut [R]| {
                let rows = first_row..first_row + n_rows;
                match direction {
                    Direction::ToModes => self.axis.to_modes(tile_in, tile_out, rows, cols, how, rest),
                    Direction::ToGrid => self.axis.to_grid(tile_in, tile_out, rows, cols, how, rest),
                }
            };
            if interleaved == (true, Direction::ToGrid) {
                transform(tile_out);
                self.scatter_interleaved(tile_out, output, first, cols);
            } else if cols == self.inner {
                output.fill(tile_out, transform);
            } else {
                transform(tile_out);
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

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_precision::{DType, Domain};
    use halfmode_tensor::Purpose;

    /// Runs the default bodies.
    struct Definition;
    impl FftKernels for Definition {}

    #[test]
    fn the_override_computes_what_the_default_body_says() {
        let device = Device::cpu(2).unwrap();
        let sizes = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 8, 5, 3), (3, 9, 9, 2), (9, 4, 2, 40)];
        for (outer, n, k, inner) in sizes {
            for (kind, interleaved) in [(AxisKind::Real, false), (AxisKind::Complex, false), (AxisKind::Complex, true)]
            {
                let k = if kind == AxisKind::Real { k.min(n / 2 + 1) } else { k };
                for algorithm in [Algorithm::Matrix, Algorithm::Fft] {
                    for precision in [Precision::F64, Precision::F16] {
                        let accumulate = precision.accumulate();
                        let axis = Axis::new(&device, 0, kind, (n, k), accumulate, Some(algorithm)).unwrap();
                        let weights = Weights::Doubled;
                        let stage = Stage { axis: &axis, outer, inner, weights, scale: 0.25, accumulate, interleaved };
                        let grid_scalars = outer * axis.grid_rows() * inner;
                        for direction in [Direction::ToModes, Direction::ToGrid] {
                            let (from, to) = match direction {
                                Direction::ToModes => (grid_scalars, outer * 2 * k * inner),
                                Direction::ToGrid => (outer * 2 * k * inner, grid_scalars),
                            };
                            let values: Vec<f64> = (0..from).map(|i| ((i * 37 % 101) as f64) / 50.0 - 1.0).collect();
                            let purpose = Purpose::Activation;
                            let x = halfmode_tensor::Tensor::from_slice(&device, &values, [from], precision, purpose)
                                .unwrap();
                            let make =
                                || device.alloc([to], DType { domain: Domain::Real, precision }, purpose).unwrap();
                            let (mut got, mut want) = (make(), make());
                            device.axis_stage(&stage, direction, &x, &mut got).unwrap();
                            Definition.axis_stage(&stage, direction, &x, &mut want).unwrap();
                            let (got, want) = (got.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap());
                            // Both round once to storage; sums of at most 18 terms below 2.
                            let tolerance =
                                if precision == Precision::F64 { 1e-13 } else { 4.0 * 2f64.powi(-11) * 2.0 };
                            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                            assert!(worst <= tolerance, "{kind:?} {algorithm:?} n {n} k {k} {precision}: {worst}");
                        }
                    }
                }
            }
        }
    }
}
