//! One axis of a transform over a whole tensor: the kernel that a backend owes this crate.

use crate::Result;
use crate::axis::{Axis, AxisReal, Weights};
use crate::planner::AxisKind;
use crate::table::{complex_matrix, real_matrix};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Rows, RowsMut, Scratch, Target, Tensor, View, ViewMut, with_real};
use rayon::prelude::*;

/// Scalars that a task's scratch may hold, so that it stays in the second-level cache.
const TILE_SCALARS: usize = 32 * 1024;
/// Tiles are whole vector registers wide, where there are that many columns.
const LANES: usize = 16;
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
            #[cfg(feature = "cuda")]
            Target::Cuda => crate::cuda::run(self, stage, direction, input, output),
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
    /// What products of f32 values may use.
    #[cfg(feature = "cuda")]
    pub(crate) compute: halfmode_precision::Compute,
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
        let gathered = if self.interleaved { self.axis.grid_rows() } else { 0 };
        let per_col = self.axis.scratch_len(16).div_ceil(16) + gathered;
        let cols = (TILE_SCALARS / per_col / LANES * LANES).max(2 * LANES).min(self.inner);
        // Columns are independent: a stage with few outer lines is cut into blocks of them.
        let n_blocks = if self.interleaved { 1 } else { MIN_TASKS.div_ceil(self.outer.max(1)) };
        let block = self.inner.div_ceil(n_blocks).next_multiple_of(LANES).min(cols);
        let accumulate = self.accumulate;
        let scratch: Scratch = device.scratch(self.axis.scratch_len(cols) + (gathered + 2) * cols, accumulate.bytes());
        if !device.launches() || output.numel() == 0 {
            return Ok(());
        }
        let source = input.view()?;
        let line_in = |outer: usize| source.slice(outer * rows_in * self.inner..(outer + 1) * rows_in * self.inner);
        let lines: Vec<ViewMut<'_>> = output.view_mut()?.chunks(rows_out * self.inner);
        device.run(|| {
            with_real!(accumulate, R => if n_blocks == 1 {
                lines.into_par_iter().enumerate().for_each(|(outer, line)| {
                    scratch.with::<R, _>(|scratch| self.line(direction, line_in(outer), line, cols, scratch));
                });
            } else {
                let tasks: Vec<_> = lines
                    .into_iter()
                    .enumerate()
                    .flat_map(|(outer, line)| {
                        let blocks = by_columns(line, self.inner, block).into_iter().enumerate();
                        blocks.map(move |(idx, rows)| (outer, idx * block, rows))
                    })
                    .collect();
                tasks.into_par_iter().for_each(|(outer, first, mut rows)| {
                    let cols = rows.first().map_or(0, ViewMut::len);
                    let input = line_in(outer);
                    let input = Rows { view: input.slice(first..input.len()), stride: self.inner };
                    scratch.with::<R, _>(|scratch| {
                        self.tile(direction, input, &mut RowsMut::Pieces(&mut rows), cols, scratch);
                    });
                });
            });
        });
        Ok(())
    }

    /// One outer line, tile of columns by tile of columns.
    fn line<R: AxisReal>(
        &self,
        direction: Direction,
        input: View<'_>,
        mut output: ViewMut<'_>,
        max_cols: usize,
        scratch: &mut [R],
    ) {
        for first in (0..self.inner).step_by(max_cols) {
            let cols = max_cols.min(self.inner - first);
            if self.interleaved {
                self.interleaved_tile(direction, input, &mut output, (first, cols), scratch);
                continue;
            }
            let input = Rows { view: input.slice(first..input.len()), stride: self.inner };
            let end = output.len();
            let mut output = RowsMut::Strided(output.slice_mut(first..end), self.inner);
            self.tile(direction, input, &mut output, cols, scratch);
        }
    }

    fn tile<R: AxisReal>(
        &self,
        direction: Direction,
        input: Rows<'_>,
        output: &mut RowsMut<'_, '_>,
        cols: usize,
        scratch: &mut [R],
    ) {
        let how = (self.weights, self.scale);
        match direction {
            Direction::ToModes => self.axis.to_modes(input, output, cols, how, scratch),
            Direction::ToGrid => self.axis.to_grid(input, output, cols, how, scratch),
        }
    }

    /// A tile of `cols` columns from `first` on whose grid side is interleaved.
    fn interleaved_tile<R: AxisReal>(
        &self,
        direction: Direction,
        input: View<'_>,
        output: &mut ViewMut<'_>,
        (first, cols): (usize, usize),
        scratch: &mut [R],
    ) {
        let (grid, scratch) = scratch.split_at_mut(self.axis.grid_rows() * cols);
        let (pairs, scratch) = scratch.split_at_mut(2 * cols);
        if direction == Direction::ToModes {
            self.gather_interleaved(input, grid, pairs, first);
            let input = Rows { view: R::view(grid), stride: cols };
            let end = output.len();
            let mut output = RowsMut::Strided(output.slice_mut(first..end), self.inner);
            self.tile(direction, input, &mut output, cols, scratch);
        } else {
            let input = Rows { view: input.slice(first..input.len()), stride: self.inner };
            self.tile(direction, input, &mut RowsMut::Strided(R::view_mut(grid), cols), cols, scratch);
            self.scatter_interleaved(grid, output, pairs, first);
        }
    }

    /// `[n, inner, (re, im)]` to tile rows (point, (re, im)).
    fn gather_interleaved<R: AxisReal>(&self, input: View<'_>, tile: &mut [R], pairs: &mut [R], first: usize) {
        let cols = pairs.len() / 2;
        for (point, rows) in tile.chunks_exact_mut(2 * cols).enumerate() {
            let start = 2 * (point * self.inner + first);
            input.slice(start..start + 2 * cols).widen(pairs);
            let (re, im) = rows.split_at_mut(cols);
            for (pair, (re, im)) in pairs.chunks_exact(2).zip(re.iter_mut().zip(im)) {
                (*re, *im) = (pair[0], pair[1]);
            }
        }
    }

    /// Tile rows (point, (re, im)) to `[n, inner, (re, im)]`.
    fn scatter_interleaved<R: AxisReal>(&self, tile: &[R], output: &mut ViewMut<'_>, pairs: &mut [R], first: usize) {
        let cols = pairs.len() / 2;
        for (point, rows) in tile.chunks_exact(2 * cols).enumerate() {
            let (re, im) = rows.split_at(cols);
            for (pair, (re, im)) in pairs.chunks_exact_mut(2).zip(re.iter().zip(im)) {
                (pair[0], pair[1]) = (*re, *im);
            }
            let start = 2 * (point * self.inner + first);
            output.slice_mut(start..start + 2 * cols).narrow(pairs);
        }
    }
}

/// The rows of `[rows, inner]` cut into blocks of columns: a list of rows for every block.
fn by_columns<'a>(line: ViewMut<'a>, inner: usize, block: usize) -> Vec<Vec<ViewMut<'a>>> {
    let n_rows = line.len() / inner;
    let mut blocks: Vec<Vec<ViewMut<'a>>> = (0..inner.div_ceil(block)).map(|_| Vec::with_capacity(n_rows)).collect();
    for row in line.chunks(inner) {
        for (piece, rows) in row.chunks(block).into_iter().zip(&mut blocks) {
            rows.push(piece);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Algorithm;
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
                        let stage = Stage {
                            axis: &axis,
                            outer,
                            inner,
                            weights,
                            scale: 0.25,
                            accumulate,
                            #[cfg(feature = "cuda")]
                            compute: halfmode_precision::Compute::F32,
                            interleaved,
                        };
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
