//! Finite volumes for `-div(a grad u) = f` with a sparse Cholesky factorisation.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::LltError;
use faer::sparse::linalg::SupernodalThreshold;
use faer::sparse::linalg::cholesky::{
    CholeskySymbolicParams, SymbolicCholesky, SymmetricOrdering, factorize_symbolic_cholesky,
};
use faer::sparse::{SparseColMatRef, SymbolicSparseColMatRef};
use faer::{Conj, MatMut, Par, Side};

use crate::dissection::nested_dissection;
use crate::error::{Error, Result};

/// Rectangles of at most this many cells are not cut further.
///
/// Measured on 2 cores for 1100 samples of 64x64 and 100 of 128x128, in seconds: nested dissection
/// with dense blocks (supernodes) 1.4 to 2.0 with leaves of 32, 1.8 to 2.1 with smaller ones; with
/// single entries 2.4 to 3.8. Approximate minimum degree 2.7 and 2.4. Natural order, which is a
/// banded factor, 3.5 and 13.
const LEAF_CELLS: usize = 32;

/// Solves `-div(a grad u) = f` on the unit square with `u = 0` on the boundary, for one grid.
///
/// Unknowns sit at the centres of `n × n` equal cells. The flux between two cells carries the
/// harmonic mean of their coefficients, a boundary face lies half a cell away and carries `2a`:
///
/// ```text
/// Σ_faces t (u_c - u_neighbour) = h² f_c,   t = 2 a_c a_d / (a_c + a_d) inside, 2 a_c at walls
/// ```
///
/// The error is of second order in `h = 1/n` where `a` is smooth, and where it jumps on cell
/// faces. The elimination order and the structure of the factor are found once per `n`; a solve
/// costs one numeric factorisation, O(n³).
///
/// ```
/// let solver = halfmode_data::DarcySolver::new(16)?;
/// let u = solver.solve(&[1.0; 256], &[1.0; 256])?;
/// assert!((u[8 * 16 + 8] - 0.0737).abs() < 1e-3); // the known maximum of -Δu = 1
/// # Ok::<(), halfmode_data::Error>(())
/// ```
#[derive(Debug)]
pub struct DarcySolver {
    n: usize,
    symbolic: SymbolicCholesky<u32>,
    /// Upper triangle of the permuted matrix, compressed columns.
    column_starts: Vec<u32>,
    row_indices: Vec<u32>,
    /// Cell → position in the elimination order.
    positions: Vec<u32>,
    /// Cell → slot of its diagonal entry.
    diagonal: Vec<u32>,
    /// Cell → slot of the coupling with the cell below (unused in the last row).
    below: Vec<u32>,
    /// Cell → slot of the coupling with the cell to the right (unused in the last column).
    right: Vec<u32>,
}

/// The memory that one thread needs to solve; reused from solve to solve.
pub struct DarcyWorkspace {
    values: Vec<f64>,
    factor: Vec<f64>,
    unknowns: Vec<f64>,
    stack: MemBuffer,
}

impl std::fmt::Debug for DarcyWorkspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DarcyWorkspace")
            .field("n_unknowns", &self.unknowns.len())
            .field("factor_values", &self.factor.len())
            .finish_non_exhaustive()
    }
}

impl DarcySolver {
    /// Largest number of cells per side. The factor then takes about 0.6 GB per thread.
    pub const MAX_RESOLUTION: usize = 1024;

    /// Plans the factorisation for `n × n` cells.
    ///
    /// # Errors
    /// [`Error::Config`] if `n` is 0 or above [`Self::MAX_RESOLUTION`]; [`Error::OutOfMemory`].
    pub fn new(n: usize) -> Result<Self> {
        if !(1..=Self::MAX_RESOLUTION).contains(&n) {
            return Err(Error::Config {
                generator: "darcy",
                field: "resolution",
                value: n.to_string(),
                expected: format!("in 1..={}", Self::MAX_RESOLUTION),
            });
        }
        let order = nested_dissection(n, LEAF_CELLS);
        let n_cells = n * n;
        let mut positions = vec![0u32; n_cells];
        for (position, &cell) in order.iter().enumerate() {
            positions[cell] = position as u32;
        }
        let mut diagonal = vec![0u32; n_cells];
        let mut below = vec![0u32; n_cells];
        let mut right = vec![0u32; n_cells];
        let mut column_starts = Vec::with_capacity(n_cells + 1);
        let mut row_indices: Vec<u32> = Vec::with_capacity(3 * n_cells);
        column_starts.push(0);
        for (position, &cell) in order.iter().enumerate() {
            let (row, column) = (cell / n, cell % n);
            // The owner of a coupling is the upper or left cell of the two.
            let mut entries: Vec<(u32, usize, bool)> = Vec::with_capacity(4);
            let mut couple = |neighbour: usize, owner: usize, is_below: bool| {
                if (positions[neighbour] as usize) < position {
                    entries.push((positions[neighbour], owner, is_below));
                }
            };
            if row > 0 {
                couple(cell - n, cell - n, true);
            }
            if row + 1 < n {
                couple(cell + n, cell, true);
            }
            if column > 0 {
                couple(cell - 1, cell - 1, false);
            }
            if column + 1 < n {
                couple(cell + 1, cell, false);
            }
            entries.sort_unstable();
            for (neighbour, owner, is_below) in entries {
                let slot = row_indices.len() as u32;
                if is_below {
                    below[owner] = slot;
                } else {
                    right[owner] = slot;
                }
                row_indices.push(neighbour);
            }
            diagonal[cell] = row_indices.len() as u32;
            row_indices.push(position as u32);
            column_starts.push(row_indices.len() as u32);
        }
        let pattern = SymbolicSparseColMatRef::new_checked(n_cells, n_cells, &column_starts, None, &row_indices);
        let symbolic = factorize_symbolic_cholesky(
            pattern,
            Side::Upper,
            // The matrix is assembled in elimination order.
            SymmetricOrdering::Identity,
            CholeskySymbolicParams {
                supernodal_flop_ratio_threshold: SupernodalThreshold::FORCE_SUPERNODAL,
                ..Default::default()
            },
        )
        .map_err(|_| out_of_memory("the plan of a Cholesky factor", 0))?;
        Ok(Self { n, symbolic, column_starts, row_indices, positions, diagonal, below, right })
    }

    /// Cells per side.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Values stored in the Cholesky factor, f64 each.
    #[must_use]
    pub fn n_factor_values(&self) -> usize {
        self.symbolic.len_val()
    }

    /// Memory for solves on one thread.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn workspace(&self) -> Result<DarcyWorkspace> {
        let need =
            self.symbolic
                .factorize_numeric_llt_scratch::<f64>(Par::Seq, Default::default())
                .or(self.symbolic.solve_in_place_scratch::<f64>(1, Par::Seq));
        let stack = MemBuffer::try_new(need).map_err(|_| out_of_memory("the scratch of a solve", need.size_bytes()))?;
        Ok(DarcyWorkspace {
            values: zeros(self.row_indices.len(), "the matrix of a solve")?,
            factor: zeros(self.symbolic.len_val(), "the Cholesky factor of a solve")?,
            unknowns: zeros(self.n * self.n, "the unknowns of a solve")?,
            stack,
        })
    }

    /// Solves for one coefficient and one right-hand side.
    ///
    /// # Shapes
    /// - `a`: `[n, n]`, coefficient per cell, positive
    /// - `f`: `[n, n]`, right-hand side at the centres
    /// - returns `u`: `[n, n]` at the centres
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Coefficient`], [`Error::NonFinite`] (in `f`),
    /// [`Error::NotPositiveDefinite`], [`Error::OutOfMemory`].
    pub fn solve(&self, a: &[f64], f: &[f64]) -> Result<Vec<f64>> {
        let mut u = zeros(self.n * self.n, "the solution")?;
        self.solve_into(&mut self.workspace()?, a, f, &mut u)?;
        Ok(u)
    }

    /// As [`Self::solve`], into `u`, without allocation.
    ///
    /// # Errors
    /// As [`Self::solve`]; [`Error::Length`] also if the workspace belongs to another grid.
    pub fn solve_into(&self, workspace: &mut DarcyWorkspace, a: &[f64], f: &[f64], u: &mut [f64]) -> Result<()> {
        let n = self.n;
        let n_cells = n * n;
        self.check_coefficient(a)?;
        check_length("right-hand side", n_cells, f.len())?;
        check_length("solution", n_cells, u.len())?;
        check_length("workspace", n_cells, workspace.unknowns.len())?;
        if let Some(cell) = f.iter().position(|v| !v.is_finite()) {
            return Err(Error::NonFinite {
                array: "right-hand side".to_owned(),
                index: vec![cell / n, cell % n],
                value: f[cell],
            });
        }
        self.assemble(a, &mut workspace.values);
        let area = 1.0 / n_cells as f64;
        for (&position, &f) in self.positions.iter().zip(f) {
            workspace.unknowns[position as usize] = area * f;
        }
        let pattern =
            SymbolicSparseColMatRef::new_checked(n_cells, n_cells, &self.column_starts, None, &self.row_indices);
        let stack = MemStack::new(&mut workspace.stack);
        let factor = self
            .symbolic
            .factorize_numeric_llt(
                &mut workspace.factor,
                SparseColMatRef::new(pattern, &workspace.values),
                Side::Upper,
                Default::default(),
                Par::Seq,
                stack,
                Default::default(),
            )
            .map_err(|error| not_definite(n, error))?;
        factor.solve_in_place_with_conj(
            Conj::No,
            MatMut::from_column_major_slice_mut(&mut workspace.unknowns, n_cells, 1),
            Par::Seq,
            stack,
        );
        for (u, &position) in u.iter_mut().zip(&self.positions) {
            *u = workspace.unknowns[position as usize];
        }
        Ok(())
    }

    /// The discrete operator: `-div(a grad u)` at the centres, in the units of `f`.
    ///
    /// # Shapes
    /// - `a`, `u`: `[n, n]`
    /// - returns `[n, n]`
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Coefficient`].
    pub fn apply(&self, a: &[f64], u: &[f64]) -> Result<Vec<f64>> {
        let n = self.n;
        self.check_coefficient(a)?;
        check_length("field", n * n, u.len())?;
        let mut out = zeros(n * n, "the image of a field")?;
        for_each_face(n, a, |face, t| match face {
            Face::Inner { cell, other, .. } => {
                let flux = t * (u[cell] - u[other]);
                out[cell] += flux;
                out[other] -= flux;
            }
            Face::Wall { cell } => out[cell] += t * u[cell],
        });
        let inverse_area = (n * n) as f64;
        out.iter_mut().for_each(|v| *v *= inverse_area);
        Ok(out)
    }

    fn assemble(&self, a: &[f64], values: &mut [f64]) {
        values.fill(0.0);
        for_each_face(self.n, a, |face, t| match face {
            Face::Inner { cell, other, is_below } => {
                let slot = if is_below { &self.below } else { &self.right }[cell];
                values[slot as usize] = -t;
                values[self.diagonal[cell] as usize] += t;
                values[self.diagonal[other] as usize] += t;
            }
            Face::Wall { cell } => values[self.diagonal[cell] as usize] += t,
        });
    }

    fn check_coefficient(&self, a: &[f64]) -> Result<()> {
        check_length("coefficient", self.n * self.n, a.len())?;
        match a.iter().position(|&v| !(v.is_finite() && v > 0.0)) {
            None => Ok(()),
            Some(cell) => Err(Error::Coefficient { row: cell / self.n, column: cell % self.n, value: a[cell] }),
        }
    }
}

enum Face {
    /// Between a cell and the one below it or to its right.
    Inner { cell: usize, other: usize, is_below: bool },
    /// Between a cell and the boundary.
    Wall { cell: usize },
}

/// Calls `visit(face, transmissibility)` for every face of the grid.
fn for_each_face(n: usize, a: &[f64], mut visit: impl FnMut(Face, f64)) {
    let harmonic = |c: usize, d: usize| 2.0 * a[c] * (a[d] / (a[c] + a[d]));
    for row in 0..n {
        for column in 0..n {
            let cell = row * n + column;
            if row + 1 < n {
                let other = cell + n;
                visit(Face::Inner { cell, other, is_below: true }, harmonic(cell, other));
            }
            if column + 1 < n {
                let other = cell + 1;
                visit(Face::Inner { cell, other, is_below: false }, harmonic(cell, other));
            }
            let walls = [row == 0, row + 1 == n, column == 0, column + 1 == n];
            for _ in walls.iter().filter(|&&at_wall| at_wall) {
                visit(Face::Wall { cell }, 2.0 * a[cell]);
            }
        }
    }
}

fn check_length(operand: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Length { operand, expected, found }) }
}

fn out_of_memory(purpose: &'static str, bytes: usize) -> Error {
    Error::OutOfMemory { purpose, bytes }
}

fn zeros(len: usize, purpose: &'static str) -> Result<Vec<f64>> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| out_of_memory(purpose, len.saturating_mul(size_of::<f64>())))?;
    values.resize(len, 0.0);
    Ok(values)
}

fn not_definite(n: usize, error: LltError) -> Error {
    let LltError::NonPositivePivot { index } = error;
    Error::NotPositiveDefinite { n, pivot: index }
}
