//! Matrix products on strided views, single-threaded: callers parallelise over tiles.

#![allow(unsafe_code, reason = "the gemm crate and the AVX-512 kernel take raw pointers")]

#[cfg(target_arch = "x86_64")]
use crate::{avx512, features::uses_avx512};
#[cfg(target_arch = "x86_64")]
use std::cell::RefCell;

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// A transposed operand, kept so that no product allocates. At most 64 KiB.
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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

/// Whether an m x n matrix with these strides lies inside `len` scalars. An empty one does.
pub(crate) fn fits((m, n): (usize, usize), row: usize, col: usize, len: usize) -> bool {
    let last = |n: usize, stride: usize| n.checked_sub(1).map_or(Some(0), |n| n.checked_mul(stride));
    let end = last(m, row).zip(last(n, col)).and_then(|(i, j)| i.checked_add(j));
    m == 0 || n == 0 || end.is_some_and(|end| end < len)
}

/// `c = keep * c + scale * a b` with `a` m x k, `b` k x n, `c` m x n.
///
/// With `keep == 0` the old contents of `c` are not read, so they may be anything.
pub(crate) fn product<R: Copy + 'static + PartialEq>(
    dims: (usize, usize, usize),
    a: Mat<'_, R>,
    b: Mat<'_, R>,
    c: MatMut<'_, R>,
    keep: R,
    scale: R,
    zero: R,
) {
    check(dims, &a, &b, &c);
    let (m, n, k) = dims;
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: `check` bounds every element that the call touches; the result is borrowed mutably,
    // so it overlaps neither operand.
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

/// [`product`] in f32: by a kernel of this crate where the processor and the shapes suit it.
pub(crate) fn product_f32(
    dims: (usize, usize, usize),
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    c: MatMut<'_, f32>,
    keep: f32,
    scale: f32,
) {
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        check(dims, &a, &b, &c);
        if let Some(small) = Small::new(dims, &a, &b, &c) {
            small.run(c.data, keep, scale);
            return;
        }
    }
    product(dims, a, b, c, keep, scale, 0.0);
}

fn check<R>((m, n, k): (usize, usize, usize), a: &Mat<'_, R>, b: &Mat<'_, R>, c: &MatMut<'_, R>) {
    assert!(fits((m, k), a.row, a.col, a.data.len()), "left operand out of bounds");
    assert!(fits((k, n), b.row, b.col, b.data.len()), "right operand out of bounds");
    assert!(fits((m, n), c.row, c.col, c.data.len()), "result out of bounds");
}

/// A product for the AVX-512 kernel: rows of `c` are contiguous, those of `b` are or its columns.
#[cfg(target_arch = "x86_64")]
struct Small<'a> {
    dims: (usize, usize, usize),
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
    c_row: usize,
}

#[cfg(target_arch = "x86_64")]
impl<'a> Small<'a> {
    /// Scalars of `b` beyond which a library that packs panels is faster.
    const MAX_B: usize = 64 * 1024;
    /// Fewer columns leave most of a vector register empty.
    const MIN_COLS: usize = 8;
    /// Fewer rows are not worth transposing `b`.
    const MIN_ROWS: usize = 8;

    fn new((m, n, k): (usize, usize, usize), a: &Mat<'a, f32>, b: &Mat<'a, f32>, c: &MatMut<'_, f32>) -> Option<Self> {
        let flip = |it: &Mat<'a, f32>| Mat { data: it.data, row: it.col, col: it.row };
        let small = if c.col == 1 {
            Small { dims: (m, n, k), a: *a, b: *b, c_row: c.row }
        } else if c.row == 1 {
            // By columns: the transpose of the product is the product of the transposes.
            Small { dims: (n, m, k), a: flip(b), b: flip(a), c_row: c.col }
        } else {
            return None;
        };
        let (m, n, k) = small.dims;
        // Strides of 0 let a short slice be a matrix of any size.
        let (direct, len) = (small.b.col == 1, k.saturating_mul(n));
        let fits = n >= Self::MIN_COLS && len <= Self::MAX_B && m > 0 && k > 0;
        let packed = small.b.row == 1 && m >= Self::MIN_ROWS && len <= Self::MAX_B / 4;
        (fits && (direct || packed)).then_some(small)
    }

    /// `c` is the slice that [`check`] was given.
    fn run(self, c: &mut [f32], keep: f32, scale: f32) {
        let (m, n, k) = self.dims;
        let mut run = |b: *const f32, b_row: usize| {
            let (a, a_row, a_col) = (self.a.data.as_ptr(), self.a.row, self.a.col);
            let (c, c_row) = (c.as_mut_ptr(), self.c_row);
            let product = avx512::gemm::Product { m, n, k, a, a_row, a_col, b, b_row, c, c_row, keep, scale };
            // SAFETY: `product_f32` found AVX-512F and checked every element, `new` that there are products; `c` is
            // borrowed mutably.
            unsafe { product.run() };
        };
        if self.b.col == 1 {
            return run(self.b.data.as_ptr(), self.b.row);
        }
        let mut packed = PANEL.with(RefCell::take);
        packed.resize(packed.len().max(k * n), 0.0);
        // SAFETY: as above; `packed` holds `k * n` scalars.
        unsafe { avx512::gemm::transpose(self.b.data.as_ptr(), self.b.col, n, k, packed.as_mut_ptr()) };
        run(packed.as_ptr(), n);
        PANEL.with(|panel| panel.replace(packed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: f64) -> Vec<f32> {
        (0..len).map(|i| (((i + 1) as f64 * 0.754_877_666 + seed).fract() - 0.5) as f32).collect()
    }

    /// Sizes around the registers of the kernel, in every orientation, against sums in f64.
    #[test]
    fn every_shape_and_orientation_is_the_sum_of_products() {
        let sizes = [1, 2, 7, 8, 11, 12, 13, 16, 17, 24, 25, 31, 32, 33, 48, 65];
        for (m, n) in sizes.iter().flat_map(|m| sizes.map(|n| (*m, n))) {
            for k in [0, 1, 5, 16, 37] {
                let (a, b, old) = (values(m * k, 0.1), values(k * n, 0.2), values(m * n, 0.3));
                for orientation in 0..8 {
                    let stride = |rows: usize, cols: usize, flip: bool| if flip { (1, rows) } else { (cols, 1) };
                    let [(a_row, a_col), (b_row, b_col), (c_row, c_col)] = [
                        stride(m, k, orientation & 1 > 0),
                        stride(k, n, orientation & 2 > 0),
                        stride(m, n, orientation & 4 > 0),
                    ];
                    for (keep, scale) in [(0.0, 1.0), (1.0, -0.5), (0.25, 2.0)] {
                        let mut c = if keep == 0.0 { vec![f32::NAN; m * n] } else { old.clone() };
                        let (a_mat, b_mat) =
                            (Mat { data: &a, row: a_row, col: a_col }, Mat { data: &b, row: b_row, col: b_col });
                        let c_mat = MatMut { data: &mut c, row: c_row, col: c_col };
                        product_f32((m, n, k), a_mat, b_mat, c_mat, keep, scale);
                        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                            let term = |l| f64::from(a[i * a_row + l * a_col]) * f64::from(b[l * b_row + j * b_col]);
                            let sum: f64 = (0..k).map(term).sum();
                            let at = i * c_row + j * c_col;
                            let want = f64::from(scale) * sum + f64::from(keep) * f64::from(old[at]);
                            let error = (f64::from(c[at]) - want).abs();
                            // At most 40 roundings of sums below 10.
                            assert!(error <= 40.0 * 10.0 * 2f64.powi(-24), "{m} {n} {k} {orientation} {keep}: {error}");
                        }
                    }
                }
            }
        }
    }

    /// What the kernel makes and what the library makes, which runs where there is no AVX-512.
    #[test]
    fn the_kernel_agrees_with_the_library() {
        for (m, n, k) in [(128, 32, 32), (18, 32, 64), (64, 48, 18), (16, 64, 32), (421, 16, 66)] {
            let (a, b) = (values(m * k, 0.1), values(k * n, 0.2));
            let (mut got, mut want) = (vec![0.0; m * n], vec![0.0; m * n]);
            let (dims, a, b) = ((m, n, k), Mat::rows(&a, k), Mat::rows(&b, n));
            product_f32(dims, a, b, MatMut::rows(&mut got, n), 0.0, 1.0);
            product(dims, a, b, MatMut::rows(&mut want, n), 0.0, 1.0, 0.0);
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= k as f32 * f32::EPSILON, "{m} {n} {k}: {got} {want}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "right operand out of bounds")]
    fn operands_out_of_bounds_are_seen() {
        let (a, b, mut c) = (vec![0.0; 64], vec![0.0; 63], vec![0.0; 64]);
        product_f32((8, 8, 8), Mat::rows(&a, 8), Mat::rows(&b, 8), MatMut::rows(&mut c, 8), 0.0, 1.0);
    }

    /// Strides whose offsets wrap round to small ones.
    #[test]
    #[should_panic(expected = "left operand out of bounds")]
    fn offsets_beyond_the_address_space_are_seen() {
        let (a, b, mut c) = (vec![0.0; 8], vec![0.0; 72], vec![0.0; 72]);
        // 8 rows of 2^61 scalars: the last begins 7 * 2^61 in, the ninth at 0 again.
        let a = Mat { data: &a, row: 1 << 61, col: 0 };
        product_f32((9, 8, 9), a, Mat::rows(&b, 8), MatMut::rows(&mut c, 8), 0.0, 1.0);
    }

    #[test]
    fn sizes_are_bounded_without_wrapping() {
        assert!(fits((0, 5), usize::MAX, usize::MAX, 0) && fits((1, 1), usize::MAX, usize::MAX, 1));
        assert!(fits((3, 4), 4, 1, 12) && !fits((3, 4), 4, 1, 11) && fits((1 << 40, 1 << 40), 0, 0, 1));
        // (m - 1) row is 2^64, and the sum of both offsets is.
        assert!(!fits((3, 1), 1 << 63, 1, 1) && !fits((2, 2), 1 << 63, 1 << 63, 1) && !fits((2, 1), usize::MAX, 0, 1));
    }
}
