//! Products of bfloat16 matrices with f32 sums on the tile registers of x86-64 processors (AMX).
//!
//! A tile is 16 rows of 16 words, a word two bfloat16 numbers that are neighbours in the sum. A *left* operand is read
//! where it lies, row by row, or in tiles; a *right* operand is in tiles `[n / 16][k / 32]`. Sizes are rounded up to
//! whole tiles: what is beyond a matrix is zero.

mod gemm;

pub use gemm::{available, product};

use half::bf16;

/// Rows of a tile, and its words per row.
pub const SIDE: usize = 16;
/// Numbers of a tile's row along the sum.
pub const DEPTH: usize = 2 * SIDE;
/// Words of a tile.
pub const TILE_WORDS: usize = SIDE * SIDE;

/// `n` rounded up to two tiles side by side.
#[must_use]
pub const fn whole(n: usize) -> usize {
    n.div_ceil(DEPTH) * DEPTH
}

/// Words of an operand in tiles, with `n` columns (or rows) and sums of `k` terms.
#[must_use]
pub const fn n_words(n: usize, k: usize) -> usize {
    whole(n) * whole(k) / 2
}

/// f32 scratch as words.
#[must_use]
pub fn words(scratch: &mut [f32]) -> &mut [u32] {
    bytemuck::cast_slice_mut(scratch)
}

/// f32 scratch as twice as many bfloat16 numbers.
#[must_use]
pub fn halves(scratch: &mut [f32]) -> &mut [bf16] {
    bytemuck::cast_slice_mut(scratch)
}

/// f32 storage as the words that were written there.
#[must_use]
pub fn as_words(values: &[f32]) -> &[u32] {
    bytemuck::cast_slice(values)
}

/// A row-major matrix: row `i` begins at `i * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The numbers.
    pub data: &'a [bf16],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub stride: usize,
}

impl Matrix<'_> {
    fn row(&self, i: usize, first: usize) -> &[bf16] {
        if i >= self.rows || first >= self.cols {
            return &[];
        }
        &self.data[i * self.stride + first..i * self.stride + self.cols]
    }

    /// Words `(p, j)` of rows `2 p`, `2 p + 1` from `i` on and column `j` from `first` on.
    fn pairs(&self, i: usize, first: usize, tile: &mut [u32]) {
        for (p, words) in tile.chunks_exact_mut(SIDE).enumerate() {
            let (low, high) = (self.row(i + 2 * p, first), self.row(i + 2 * p + 1, first));
            if low.len() >= SIDE && high.len() >= SIDE {
                for ((word, low), high) in words.iter_mut().zip(&low[..SIDE]).zip(&high[..SIDE]) {
                    *word = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
                }
            } else {
                let bits = |row: &[bf16], j: usize| row.get(j).map_or(0, |it| u32::from(it.to_bits()));
                for (j, word) in words.iter_mut().enumerate() {
                    *word = bits(low, j) | bits(high, j) << 16;
                }
            }
        }
    }

    /// Words `(j, w)` of row `j` from `i` on and columns `2 w`, `2 w + 1` from `first` on.
    fn words(&self, i: usize, first: usize, tile: &mut [u32]) {
        for (j, words) in tile.chunks_exact_mut(SIDE).enumerate() {
            let row = self.row(i + j, first);
            if row.len() >= DEPTH {
                for (word, pair) in words.iter_mut().zip(row.chunks_exact(2)) {
                    *word = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
                }
            } else {
                let bits = |at: usize| row.get(at).map_or(0, |it| u32::from(it.to_bits()));
                for (w, word) in words.iter_mut().enumerate() {
                    *word = bits(2 * w) | bits(2 * w + 1) << 16;
                }
            }
        }
    }

    /// The tiles of this matrix as a right operand, `k` its rows: those of columns `first..first + 16`.
    pub fn right(&self, first: usize, tiles: &mut [u32]) {
        for (kb, tile) in tiles.chunks_exact_mut(TILE_WORDS).enumerate() {
            self.pairs(kb * DEPTH, first, tile);
        }
    }

    /// The tiles of this matrix's transpose as a right operand, `k` its columns: those of rows `first..first + 16`.
    pub fn right_transposed(&self, first: usize, tiles: &mut [u32]) {
        let mut square = [0; TILE_WORDS];
        for (kb, tile) in tiles.chunks_exact_mut(TILE_WORDS).enumerate() {
            self.words(first, kb * DEPTH, &mut square);
            gemm::transpose(&square, tile);
        }
    }

    /// The tiles of this matrix's transpose as a left operand, `k` its rows: those of columns `first..first + 16`.
    pub fn left_transposed(&self, first: usize, tiles: &mut [u32]) {
        let mut square = [0; TILE_WORDS];
        for (kb, tile) in tiles.chunks_exact_mut(TILE_WORDS).enumerate() {
            self.pairs(kb * DEPTH, first, &mut square);
            gemm::transpose(&square, tile);
        }
    }
}

/// A left operand: rows of `k` numbers.
#[derive(Clone, Copy, Debug)]
pub enum Left<'a> {
    /// Row-major with this distance between rows; as many rows and columns as whole tiles have.
    Rows(&'a [bf16], usize),
    /// In tiles `[m / 16][k / 32]`.
    Tiles(&'a [u32]),
}
