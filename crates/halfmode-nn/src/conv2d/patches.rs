//! Tiles of points and the patches of a field that their windows share, as `patches.cuh` brings them to shared memory.

use super::cpu::Correlation;
use halfmode_precision::Precision;
use halfmode_tensor::cuda::Arg;

/// Bytes of a row of a patch, whose tiles' kernels take so many channels at a time, and steps that are on their way.
pub(super) const ROW: usize = 64;
pub(super) const DEPTH: usize = 4;
/// Shared memory that a block may ask for on every GPU with tensor cores for halves of both kinds.
const MAX_SHARED: usize = 96 << 10;
/// What lies beside a row of shared memory, so that rows begin in other banks.
pub(super) const BESIDE: usize = 8;
/// Logarithms of the widths of tiles.
const WIDTHS: std::ops::RangeInclusive<u32> = 3..=5;

/// A tile of points of a sample: so many, `2^log_width` of them side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    rows: usize,
    log_width: u32,
}

impl Tile {
    /// Points along both axes.
    pub(crate) fn extents(self) -> [usize; 2] {
        [self.rows >> self.log_width, 1 << self.log_width]
    }

    /// Points in all.
    pub(super) fn rows(self) -> usize {
        self.rows
    }

    /// What kernels are told of it and of how many a sample has.
    pub(super) fn numbers(self, n_tiles: usize) -> [Arg<'static>; 2] {
        [Arg::I32(self.log_width as i32), Arg::I32(n_tiles as i32)]
    }
}

/// Points of a tile with so many channels.
pub(super) fn tile_rows(columns: usize) -> usize {
    64 * 256 / columns
}

impl Correlation {
    /// The tile of so many points whose patches are the fewest, and then the smallest.
    pub(super) fn tile(&self, rows: usize) -> Tile {
        let cost = |log_width: u32| {
            let tile = Tile { rows, log_width };
            (self.n_tiles(tile), self.patch_rows(tile))
        };
        let log_width = WIDTHS.min_by_key(|&it| cost(it)).unwrap_or(*WIDTHS.start());
        Tile { rows, log_width }
    }

    /// Tiles of one sample.
    pub(super) fn n_tiles(&self, tile: Tile) -> usize {
        let [t1, t2] = tile.extents();
        self.y[0].div_ceil(t1) * self.y[1].div_ceil(t2)
    }

    /// Points that the windows of a tile see; an even number.
    fn patch_rows(&self, tile: Tile) -> usize {
        let [t1, t2] = tile.extents();
        ((t1 + self.kernel[0] - 1) * (t2 + self.kernel[1] - 1)).next_multiple_of(2)
    }

    /// Shared memory for the patches of a tile and the weights of so many channels; see `patches.cuh`.
    pub(super) fn shared(&self, tile: Tile, columns: usize, precision: Precision, turned: bool) -> usize {
        let chunk = ROW / precision.bytes();
        let weights = if turned { columns * chunk } else { chunk * (columns + BESIDE) };
        let patches = if self.kernel[0] * self.kernel[1] < DEPTH - 1 { DEPTH } else { 2 };
        DEPTH * precision.bytes() * weights + patches * self.patch_rows(tile) * ROW
    }

    /// Whether shared memory holds patches for windows of this size, and 32 bits count the weight.
    pub(super) fn has_small_windows(&self) -> bool {
        let [k1, k2] = self.kernel;
        let few = k1.max(k2) < 1 << 12 && self.n_places().saturating_mul(self.c_y) < 1 << 30;
        few && [Precision::F16, Precision::F32].iter().all(|&precision| {
            [64, 128]
                .iter()
                .all(|&columns| self.shared(self.tile(tile_rows(columns)), columns, precision, false) <= MAX_SHARED)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(y: [usize; 2], kernel: [usize; 2], channels: usize) -> Correlation {
        let x = [0, 1].map(|axis| y[axis] + kernel[axis] - 1);
        Correlation { batch: 2, x, c_x: channels, y, c_y: channels, kernel, pad: [0, 0] }
    }

    #[test]
    fn tiles_are_as_few_as_they_can_be() {
        let extents = |y, kernel| sizes(y, kernel, 64).tile(256).extents();
        assert_eq!(extents([128, 128], [3, 3]), [16, 16]);
        assert_eq!(extents([40, 3], [3, 3]), [32, 8], "one tile below another");
        assert_eq!(extents([8, 32], [3, 3]), [8, 32], "one tile");
        assert_eq!(sizes([33, 17], [3, 3], 64).n_tiles(Tile { rows: 256, log_width: 4 }), 3 * 2);
    }

    #[test]
    fn windows_up_to_nine_by_nine_have_patches() {
        let served = |kernel| sizes([64, 64], kernel, 64).has_small_windows();
        assert!([[1, 1], [1, 2], [3, 3], [7, 7], [9, 9]].into_iter().all(served));
        assert!(![[3, 40], [12, 12], [1, 1 << 13]].into_iter().any(served));
        assert!(!sizes([8, 8], [3, 3], 1 << 14).has_small_windows(), "a weight that 32 bits do not count");
    }

    /// The sizes that `patches.cuh` reckons with: 4 steps of weights, and twice 18 x 18 points of 64 bytes.
    #[test]
    fn shared_memory_is_counted_as_the_kernel_counts_it() {
        let sizes = sizes([32, 32], [3, 3], 64);
        let tile = sizes.tile(256);
        assert_eq!(sizes.shared(tile, 64, Precision::F16, false), 4 * 32 * (64 + 8) * 2 + 2 * 18 * 18 * 64);
        assert_eq!(sizes.shared(tile, 64, Precision::F32, true), 4 * 64 * 16 * 4 + 2 * 18 * 18 * 64);
    }
}
