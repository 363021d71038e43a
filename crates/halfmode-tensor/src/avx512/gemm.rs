//! Small matrix products in f32 with AVX-512, for operands that are in cache already.
//!
//! General libraries pack both operands and pay for it with every call; the products of a neural
//! operator are a few thousand multiplies long and their operands were just written. Here rows of
//! `b` are read where they are, elements of `a` are broadcast, and a block of up to 12 x 32 sums
//! stays in registers. Every sum runs over `k` in order, so no result depends on the blocking.

#![allow(
    unsafe_code,
    reason = "AVX-512 intrinsics on raw pointers; bounds are checked by the caller, once per product"
)]

use std::arch::x86_64::{
    __m512, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

/// Scalars of a vector register.
const LANES: usize = 16;
/// The most rows of a register block: with two vectors each, 24 of the 32 registers.
const MAX_ROWS: usize = 12;

/// Where the elements of the product are: `c[i][j]` at `c + i c_row + j`, `a[i][l]` at
/// `a + i a_row + l a_col`, `b[l][j]` at `b + l b_row + j`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) a_row: usize,
    pub(crate) a_col: usize,
    pub(crate) b: *const f32,
    pub(crate) b_row: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// `c = keep c + scale a b`; `c` is not read where this is 0.
    pub(crate) keep: f32,
    pub(crate) scale: f32,
}

impl Product {
    /// Runs the product.
    ///
    /// # Safety
    /// The processor has AVX-512F, `k` is not 0, every element named above lies inside its slice, and `c`
    /// overlaps neither operand.
    #[target_feature(enable = "avx512f")]
    // SAFETY: what callers must see to stands above; each block below says why it may.
    pub(crate) unsafe fn run(&self) {
        let n_blocks = self.m.div_ceil(MAX_ROWS);
        for col in (0..self.n).step_by(2 * LANES) {
            let cols = (self.n - col).min(2 * LANES);
            let mut row = 0;
            for block in 0..n_blocks {
                // Blocks as even as possible: a short one would leave the multipliers waiting.
                let rows = (self.m - row).div_ceil(n_blocks - block);
                // SAFETY: `row + rows <= m` and `col + cols <= n`.
                unsafe { self.block(row, rows, col, cols) };
                row += rows;
            }
        }
    }

    /// # Safety
    /// That of [`Product::run`]; the block lies inside the result, with at most 12 rows and 32 columns.
    #[target_feature(enable = "avx512f")]
    #[inline]
    // SAFETY: what callers must see to stands above; what a block is, is said again below.
    unsafe fn block(&self, row: usize, rows: usize, col: usize, cols: usize) {
        macro_rules! rows {
            ($($n:literal)*) => {
                match (rows, cols > LANES) {
                    $(
                        // SAFETY: as this function's.
                        ($n, true) => unsafe { self.registers::<$n, 2>(row, col, cols - LANES) },
                        // SAFETY: as this function's.
                        ($n, false) => unsafe { self.registers::<$n, 1>(row, col, cols) },
                    )*
                    _ => debug_assert!(false, "a block of {rows} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// A block of `M` rows and `V` vectors, the last of which has `tail` columns.
    ///
    /// # Safety
    /// That of [`Product::run`]; the block lies inside the result.
    #[target_feature(enable = "avx512f")]
    #[inline]
    // SAFETY: what callers must see to stands above; its block says why offsets are elements.
    unsafe fn registers<const M: usize, const V: usize>(&self, row: usize, col: usize, tail: usize) {
        let mut masks: [__mmask16; V] = [!0; V];
        masks[V - 1] = mask(tail);
        let mut sums: [[__m512; V]; M] = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: all offsets are those of elements of the operands; masked lanes are not touched.
        unsafe {
            let (mut a, mut b) = (self.a.add(row * self.a_row), self.b.add(col));
            for _ in 0..self.k {
                let mut line = [_mm512_setzero_ps(); V];
                for (v, (line, mask)) in line.iter_mut().zip(masks).enumerate() {
                    *line = _mm512_maskz_loadu_ps(mask, b.wrapping_add(v * LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let factor = _mm512_set1_ps(*a.add(i * self.a_row));
                    for (sum, line) in sums.iter_mut().zip(line) {
                        *sum = _mm512_fmadd_ps(factor, line, *sum);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            let (keep, scale) = (_mm512_set1_ps(self.keep), _mm512_set1_ps(self.scale));
            for (i, sums) in sums.into_iter().enumerate() {
                let c = self.c.add((row + i) * self.c_row + col);
                for (v, (sum, mask)) in sums.into_iter().zip(masks).enumerate() {
                    let c = c.wrapping_add(v * LANES);
                    let mut value = _mm512_mul_ps(scale, sum);
                    if self.keep != 0.0 {
                        value = _mm512_fmadd_ps(keep, _mm512_maskz_loadu_ps(mask, c), value);
                    }
                    _mm512_mask_storeu_ps(c, mask, value);
                }
            }
        }
    }
}

/// The lanes before `n`, for `n` of at most 16.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// Writes the transpose of `rows` x `cols` scalars: `dst[j * rows + i] = src[i * src_row + j]`.
///
/// # Safety
/// The processor has AVX-512F, `src` holds all the elements named, `dst` holds `rows * cols`.
#[target_feature(enable = "avx512f")]
// SAFETY: what callers must see to stands above; its block says why offsets are elements.
pub(crate) unsafe fn transpose(src: *const f32, src_row: usize, rows: usize, cols: usize, dst: *mut f32) {
    for row in (0..rows).step_by(LANES) {
        for col in (0..cols).step_by(LANES) {
            let (n_rows, n_cols) = ((rows - row).min(LANES), (cols - col).min(LANES));
            let mut lines = [_mm512_setzero_ps(); LANES];
            // SAFETY: `row + i < rows` and `col + n_cols <= cols` in both loops.
            unsafe {
                for (i, line) in lines.iter_mut().enumerate().take(n_rows) {
                    *line = _mm512_maskz_loadu_ps(mask(n_cols), src.add((row + i) * src_row + col));
                }
                for (j, line) in transposed(lines).into_iter().enumerate().take(n_cols) {
                    _mm512_mask_storeu_ps(dst.add((col + j) * rows + row), mask(n_rows), line);
                }
            }
        }
    }
}

/// The transpose of 16 x 16 scalars in registers: pairs, pairs of pairs, then quarters.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(r: [__m512; LANES]) -> [__m512; LANES] {
    let zero = _mm512_setzero_ps();
    let (mut pairs, mut fours, mut eights, mut out) = ([zero; LANES], [zero; LANES], [zero; LANES], [zero; LANES]);
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    // fours[4 q + e]: element e of every quarter, of rows 4 q to 4 q + 3.
    for q in 0..4 {
        for half in 0..2 {
            let (a, b) = (_mm512_castps_pd(pairs[4 * q + half]), _mm512_castps_pd(pairs[4 * q + 2 + half]));
            fours[4 * q + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * q + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // eights[8 p + e]: quarters 0 and 2 (e < 4) or 1 and 3 of rows 8 p to 8 p + 7.
    for p in 0..2 {
        for e in 0..4 {
            let (a, b) = (fours[8 * p + e], fours[8 * p + 4 + e]);
            eights[8 * p + e] = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            eights[8 * p + 4 + e] = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
        }
    }
    for e in 0..4 {
        let (a, b) = (eights[e], eights[8 + e]);
        out[e] = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        out[8 + e] = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
        let (a, b) = (eights[4 + e], eights[12 + e]);
        out[4 + e] = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        out[12 + e] = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
    }
    out
}
