//! Central differences on a uniform grid: the energy of a field's derivatives and its gradient.

use crate::accumulator::{Accumulator, LANES};
use crate::{Error, Result};
use std::ops::Range;

/// Entries of one row of a sparse matrix: column and value.
type Entries<R> = Vec<(usize, R)>;

/// The rows of a band matrix that differ from those in its middle: the first and the last few.
#[derive(Debug)]
struct Ends<R> {
    /// Rows from here to `high` are as in the middle.
    low: usize,
    high: usize,
    /// The rows before `low`, then those from `high` on.
    rows: Vec<Entries<R>>,
}

impl<R> Ends<R> {
    fn new(n: usize, margin: usize, row: impl Fn(usize) -> Entries<R>) -> Self {
        let low = margin.min(n);
        let high = n.saturating_sub(margin).max(low);
        Ends { low, high, rows: (0..low).chain(high..n).map(row).collect() }
    }

    /// The row's entries, or `None` in the middle.
    #[inline(always)]
    fn get(&self, idx: usize) -> Option<&Entries<R>> {
        match idx {
            idx if idx < self.low => Some(&self.rows[idx]),
            idx if idx < self.high => None,
            idx => Some(&self.rows[self.low + idx - self.high]),
        }
    }

    fn irregular(&self) -> impl Iterator<Item = (usize, &Entries<R>)> {
        let n_tail = self.rows.len() - self.low;
        (0..self.low).chain(self.high..self.high + n_tail).zip(&self.rows)
    }
}

/// The derivative `D` along one axis and `DᵀD`.
#[derive(Debug)]
struct Axis<R> {
    n: usize,
    periodic: bool,
    /// Rows of the field between neighbours along this axis; unused on the last axis.
    stride: usize,
    /// `1 / 2h`: in the middle, `(D e)_i = slope (e_{i+1} − e_{i−1})`.
    slope: R,
    /// `1 / 4h²`: in the middle, `(DᵀD e)_i = curvature (2 e_i − e_{i+2} − e_{i−2})`.
    curvature: R,
    first: Ends<R>,
    gram: Ends<R>,
}

impl<R: Accumulator> Axis<R> {
    fn new(n: usize, stride: usize, h: f64, periodic: bool) -> Self {
        let slope = 0.5 / h;
        let first = move |row: usize| derivative_row(row, n, h, periodic);
        let gram = move |column: usize| {
            // Only rows near an end reach a column near an end.
            let rows = (0..n.min(8)).chain(n.saturating_sub(8).max(8)..n).map(first);
            let mut entries = Vec::new();
            for row in rows {
                for &(_, at_column) in row.iter().filter(|entry| entry.0 == column) {
                    for &(other, value) in &row {
                        add_entry(&mut entries, other, at_column * value);
                    }
                }
            }
            entries
        };
        let rounded = |entries: Entries<f64>| entries.into_iter().map(|(idx, v)| (idx, R::from_f64(v))).collect();
        Axis {
            n,
            periodic,
            stride,
            slope: R::from_f64(slope),
            curvature: R::from_f64(slope * slope),
            first: Ends::new(n, 1, |row| rounded(first(row))),
            gram: Ends::new(n, 4, |row| rounded(gram(row))),
        }
    }
}

/// One row of the derivative: central, or the one-sided third-order formula at an end that is not
/// periodic.
pub(super) fn derivative_row(row: usize, n: usize, h: f64, periodic: bool) -> Entries<f64> {
    const ONE_SIDED: [f64; 4] = [-11.0, 18.0, -9.0, 2.0];
    if !periodic && (row == 0 || row + 1 == n) {
        let (sign, from_end) = if row == 0 { (1.0, false) } else { (-1.0, true) };
        let at = |idx: usize| if from_end { n - 1 - idx } else { idx };
        return ONE_SIDED.iter().enumerate().map(|(idx, c)| (at(idx), sign * c / (6.0 * h))).collect();
    }
    let mut entries = Vec::with_capacity(2);
    add_entry(&mut entries, (row + 1) % n, 0.5 / h);
    add_entry(&mut entries, (row + n - 1) % n, -0.5 / h);
    entries
}

fn add_entry(entries: &mut Entries<f64>, idx: usize, value: f64) {
    match entries.iter_mut().find(|entry| entry.0 == idx) {
        Some(entry) => entry.1 += value,
        None => entries.push((idx, value)),
    }
}

/// Fields on a uniform grid, seen as rows along the last axis, and their differences.
#[derive(Debug)]
pub(crate) struct GridDifferences<R> {
    leading: Vec<Axis<R>>,
    last: Axis<R>,
    /// Rows of one field.
    pub(crate) n_rows: usize,
    /// Points of one row.
    pub(crate) row_len: usize,
}

impl<R: Accumulator> GridDifferences<R> {
    /// On a grid that is `measure` long along every axis. `periodic` is per axis; empty means that
    /// all are.
    pub(crate) fn new(op: &'static str, grid: &[usize], measure: f64, periodic: &[bool]) -> Result<Self> {
        if !periodic.is_empty() && periodic.len() != grid.len() {
            return Err(Error::Axes { op, expected: grid.len(), found: periodic.len() });
        }
        let is_periodic = |axis: usize| periodic.get(axis).copied().unwrap_or(true);
        if let Some(axis) = (0..grid.len()).find(|&axis| !is_periodic(axis) && grid[axis] < 4) {
            return Err(Error::ShortAxis { op, axis, n: grid[axis] });
        }
        let make = |axis: usize, stride: usize| {
            let n = grid[axis];
            Axis::new(n, stride, measure / n as f64, is_periodic(axis))
        };
        let last = grid.len() - 1;
        let leading = (0..last).map(|axis| make(axis, grid[axis + 1..last].iter().product()));
        let n_rows = grid[..last].iter().product();
        Ok(GridDifferences { leading: leading.collect(), last: make(last, 0), n_rows, row_len: grid[last] })
    }

    #[inline(always)]
    fn row<'a>(&self, field: &'a [R], idx: usize) -> &'a [R] {
        &field[idx * self.row_len..(idx + 1) * self.row_len]
    }

    /// Sum over the points of `rows` of `e² + Σ_a (D_a e)²`. `field` holds all rows.
    pub(crate) fn energy(&self, field: &[R], rows: Range<usize>) -> f64 {
        R::vectorised(
            #[inline(always)]
            || {
                let mut lanes = [R::ZERO; LANES];
                for idx in rows {
                    let e = self.row(field, idx);
                    add_squares(&mut lanes, e);
                    for axis in &self.leading {
                        let position = idx / axis.stride % axis.n;
                        let first = idx - position * axis.stride;
                        match axis.first.get(position).map(Vec::as_slice) {
                            None => {
                                let up = self.row(field, idx + axis.stride);
                                let down = self.row(field, idx - axis.stride);
                                add_squares_of_difference(&mut lanes, up, down, axis.slope);
                            }
                            // An end of a periodic axis: its entries are +slope and -slope.
                            Some(&[(up, slope), (down, _)]) if axis.periodic => {
                                let up = self.row(field, first + up * axis.stride);
                                let down = self.row(field, first + down * axis.stride);
                                add_squares_of_difference(&mut lanes, up, down, slope);
                            }
                            Some(entries) => {
                                for point in 0..self.row_len {
                                    let at = |row: usize| field[(first + row * axis.stride) * self.row_len + point];
                                    let slope = entries.iter().fold(R::ZERO, |sum, &(row, c)| sum + c * at(row));
                                    lanes[point % LANES] += slope * slope;
                                }
                            }
                        }
                    }
                    let axis = &self.last;
                    if axis.first.low < axis.first.high {
                        add_squares_of_difference(&mut lanes, &e[2..], &e[..e.len() - 2], axis.slope);
                    }
                    for (_, entries) in axis.first.irregular() {
                        let slope = dot(entries, e);
                        lanes[0] += slope * slope;
                    }
                }
                lanes.iter().map(|lane| lane.to_f64()).sum()
            },
        )
    }

    /// `out = factor · (e + Σ_a D_aᵀ D_a e)` on `rows`: `factor / 2` times the gradient of the energy.
    pub(crate) fn gradient(&self, field: &[R], rows: Range<usize>, factor: R, out: &mut [R]) {
        R::vectorised(
            #[inline(always)]
            || {
                for (idx, out) in rows.zip(out.chunks_exact_mut(self.row_len)) {
                    let e = self.row(field, idx);
                    out.copy_from_slice(e);
                    for axis in &self.leading {
                        let position = idx / axis.stride % axis.n;
                        let first = idx - position * axis.stride;
                        match axis.gram.get(position) {
                            None => {
                                let up = self.row(field, idx + 2 * axis.stride);
                                let down = self.row(field, idx - 2 * axis.stride);
                                add_bend(out, e, up, down, axis.curvature);
                            }
                            Some(entries) => {
                                for &(row, value) in entries {
                                    add_scaled(out, self.row(field, first + row * axis.stride), value);
                                }
                            }
                        }
                    }
                    let Ends { low, high, .. } = self.last.gram;
                    if low < high {
                        let (up, down) = (&e[low + 2..high + 2], &e[low - 2..high - 2]);
                        add_bend(&mut out[low..high], &e[low..high], up, down, self.last.curvature);
                    }
                    for (at, entries) in self.last.gram.irregular() {
                        out[at] += dot(entries, e);
                    }
                    out.iter_mut().for_each(|out| *out *= factor);
                }
            },
        );
    }
}

/// `out += c (2 e − up − down)`
#[inline(always)]
fn add_bend<R: Accumulator>(out: &mut [R], e: &[R], up: &[R], down: &[R], c: R) {
    for (((out, e), up), down) in out.iter_mut().zip(e).zip(up).zip(down) {
        *out += c * ((*e - *up) + (*e - *down));
    }
}

#[inline(always)]
fn dot<R: Accumulator>(entries: &Entries<R>, e: &[R]) -> R {
    entries.iter().fold(R::ZERO, |sum, &(at, value)| sum + value * e[at])
}

/// `out += c e`
#[inline(always)]
fn add_scaled<R: Accumulator>(out: &mut [R], e: &[R], c: R) {
    for (out, e) in out.iter_mut().zip(e) {
        *out += c * *e;
    }
}

/// Adds `e²` of every point to the lanes.
#[inline(always)]
fn add_squares<R: Accumulator>(lanes: &mut [R; LANES], e: &[R]) {
    // A copy, so that the compiler keeps it in registers.
    let mut sums = *lanes;
    let mut pieces = e.chunks_exact(LANES);
    for piece in &mut pieces {
        for (sum, e) in sums.iter_mut().zip(piece) {
            *sum += *e * *e;
        }
    }
    for (sum, e) in sums.iter_mut().zip(pieces.remainder()) {
        *sum += *e * *e;
    }
    *lanes = sums;
}

/// Adds `(c (up − down))²` of every point to the lanes. Both rows have one length.
#[inline(always)]
fn add_squares_of_difference<R: Accumulator>(lanes: &mut [R; LANES], up: &[R], down: &[R], c: R) {
    let mut sums = *lanes;
    let (mut ups, mut downs) = (up.chunks_exact(LANES), down.chunks_exact(LANES));
    for (up, down) in (&mut ups).zip(&mut downs) {
        for ((sum, up), down) in sums.iter_mut().zip(up).zip(down) {
            let slope = c * (*up - *down);
            *sum += slope * slope;
        }
    }
    for ((sum, up), down) in sums.iter_mut().zip(ups.remainder()).zip(downs.remainder()) {
        let slope = c * (*up - *down);
        *sum += slope * slope;
    }
    *lanes = sums;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix of `D` by its definition, column by column.
    fn dense(n: usize, h: f64, periodic: bool) -> Vec<Vec<f64>> {
        let mut rows = vec![vec![0.0; n]; n];
        for (i, row) in rows.iter_mut().enumerate() {
            for (j, value) in derivative_row(i, n, h, periodic) {
                row[j] += value;
            }
        }
        rows
    }

    #[test]
    fn bands_are_the_dense_matrices() {
        for periodic in [true, false] {
            for n in (1..24).filter(|n| periodic || *n >= 4) {
                let h = 1.0 / n as f64;
                let d = dense(n, h, periodic);
                let axis = Axis::<f64>::new(n, 1, h, periodic);
                for i in 0..n {
                    let mut gram = vec![0.0; n];
                    for row in &d {
                        (0..n).for_each(|j| gram[j] += row[i] * row[j]);
                    }
                    let regular = |offsets: [(isize, f64); 3]| {
                        let at = |k: isize| (i as isize + k) as usize;
                        offsets.map(|(k, v)| (at(k), v)).to_vec()
                    };
                    let first = axis.first.get(i).cloned();
                    let first = first.unwrap_or_else(|| regular([(1, axis.slope), (-1, -axis.slope), (0, 0.0)]));
                    let c = axis.curvature;
                    let found = axis.gram.get(i).cloned().unwrap_or_else(|| regular([(0, 2.0 * c), (2, -c), (-2, -c)]));
                    let mut values = vec![[0.0; 2]; n];
                    first.into_iter().for_each(|(j, v)| values[j][0] += v);
                    found.into_iter().for_each(|(j, v)| values[j][1] += v);
                    for j in 0..n {
                        let size = 1.0 / (h * h);
                        assert!((values[j][0] - d[i][j]).abs() <= 1e-14 * size, "n {n} row {i} column {j}");
                        assert!((values[j][1] - gram[j]).abs() <= 1e-13 * size, "n {n} row {i} column {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn one_sided_differences_are_exact_for_cubics() {
        let (n, h) = (9, 0.25);
        for row in [0, n - 1] {
            let x = |i: usize| i as f64 * h;
            let got: f64 = derivative_row(row, n, h, false).iter().map(|&(j, v)| v * x(j).powi(3)).sum();
            assert!((got - 3.0 * x(row).powi(2)).abs() < 1e-12);
        }
    }
}
