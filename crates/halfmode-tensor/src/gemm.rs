//! Matrix products on strided views, single-threaded: callers parallelise over tiles.

#![allow(unsafe_code, reason = "the gemm crate takes raw pointers")]

/// A strided matrix inside a slice: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, R> {
    /// The scalars.
    pub data: &'a [R],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub col: usize,
}

/// A strided matrix that is written.
#[derive(Debug)]
pub struct MatMut<'a, R> {
    /// The scalars.
    pub data: &'a mut [R],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub col: usize,
}

impl<'a, R> Mat<'a, R> {
    /// A row-major matrix with `cols` columns.
    #[must_use]
    pub fn rows(data: &'a [R], cols: usize) -> Self {
        Mat { data, row: cols, col: 1 }
    }

    /// The transpose of a row-major matrix with `cols` columns.
    #[must_use]
    pub fn transposed(data: &'a [R], cols: usize) -> Self {
        Mat { data, row: 1, col: cols }
    }
}

impl<'a, R> MatMut<'a, R> {
    /// A row-major matrix with `cols` columns.
    #[must_use]
    pub fn rows(data: &'a mut [R], cols: usize) -> Self {
        MatMut { data, row: cols, col: 1 }
    }
}

/// The largest offset of an m x n matrix, plus one; 0 when it is empty.
fn extent(m: usize, n: usize, row: usize, col: usize) -> usize {
    if m == 0 || n == 0 { 0 } else { (m - 1) * row + (n - 1) * col + 1 }
}

/// `c = keep * c + scale * a b` with `a` m x k, `b` k x n, `c` m x n.
///
/// With `keep == 0` the old contents of `c` are not read, so they may be anything.
pub(crate) fn product<R: Copy + 'static + PartialEq>(
    (m, n, k): (usize, usize, usize),
    a: Mat<'_, R>,
    b: Mat<'_, R>,
    c: MatMut<'_, R>,
    keep: R,
    scale: R,
    zero: R,
) {
    assert!(extent(m, k, a.row, a.col) <= a.data.len(), "left operand out of bounds");
    assert!(extent(k, n, b.row, b.col) <= b.data.len(), "right operand out of bounds");
    assert!(extent(m, n, c.row, c.col) <= c.data.len(), "result out of bounds");
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: the three assertions bound every element that the call touches; the result is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr(),
            c.col as isize,
            c.row as isize,
            keep != zero,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
