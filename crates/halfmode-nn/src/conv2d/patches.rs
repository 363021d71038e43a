//! Tiles of points and the patches of a field that their windows share, as `patches.cuh` brings them to shared memory.

use super::cpu::Correlation;
use halfmode_tensor::cuda::Arg;

/// Bytes of a row of a patch: the channels of a point that a step takes.
pub(super) const ROW: usize = 64;
/// Steps whose weights are there or on their way.
pub(super) const DEPTH: usize = 4;
/// Shared memory that a block may ask for on every GPU with tensor cores for halves of both kinds.
const MAX_SHARED: usize = 96 << 10;
/// What lies beside a row of shared memory, so that rows begin in other banks.
pub(super) const BESIDE: usize = 8;

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

/// Channels of a tile, of so many.
pub(super) fn tile_columns(channels: usize) -> usize {
    if channels <= 64 { 64 } else { 128 }
}

/// Points of a tile with so many channels.
fn tile_rows(columns: usize) -> usize {
    64 * 256 / columns
}

impl Correlation {
    /// The tile for so many channels whose patches are the fewest, and then the smallest, of those that shared memory holds;
    /// `None` for windows too large, or where 32 bits do not count the weight.
    pub(super) fn tile(&self, columns: usize) -> Option<Tile> {
        let [k1, k2] = self.kernel;
        if k1.max(k2) >= 1 << 12 || self.n_places().saturating_mul(self.c_y) >= 1 << 30 {
            return None;
        }
        let rows = tile_rows(columns);
        let tiles = (0..=rows.ilog2()).map(|log_width| Tile { rows, log_width });
        let fit = tiles.filter(|&tile| self.shared(tile, columns, false) <= MAX_SHARED);
        // Eight points side by side are in different banks.
        fit.min_by_key(|&tile| (self.n_tiles(tile), self.patch_rows(tile), tile.log_width < 3))
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
    pub(super) fn shared(&self, tile: Tile, columns: usize, turned: bool) -> usize {
        let weights = ROW * (columns + if turned { 0 } else { BESIDE });
        let patches = if self.kernel[0] * self.kernel[1] < DEPTH - 1 { DEPTH } else { 2 };
        DEPTH * weights + patches * self.patch_rows(tile) * ROW
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    fn sizes(y: [usize; 2], kernel: [usize; 2], channels: usize) -> Correlation {
        let x = [0, 1].map(|axis| y[axis] + kernel[axis] - 1);
        Correlation { batch: 2, x, c_x: channels, y, c_y: channels, kernel, pad: [0, 0] }
    }

    #[test]
    fn tiles_are_as_few_as_they_can_be() {
        let extents = |y, kernel, columns| sizes(y, kernel, 64).tile(columns).unwrap().extents();
        for y in [[128, 128], [64, 64], [32, 32], [33, 33], [9, 14]] {
            assert_eq!(extents(y, [3, 3], 64), [16, 16], "{y:?}");
        }
        for y in [[128, 128], [64, 64], [32, 32]] {
            assert_eq!(extents(y, [3, 3], 128), [16, 8], "{y:?}");
        }
        assert_eq!(extents([64, 64], [1, 1], 64), [32, 8]);
        assert_eq!(extents([40, 3], [3, 3], 64), [64, 4]);
        assert_eq!(extents([1, 1024], [1, 3], 64), [1, 256]);
        assert_eq!(extents([1024, 1], [3, 1], 128), [128, 1]);
        assert_eq!(sizes([33, 17], [3, 3], 64).n_tiles(Tile { rows: 256, log_width: 4 }), 3 * 2);
    }

    #[test]
    fn every_point_is_in_one_tile_that_fits() {
        for (y, kernel) in [([1, 1], [1, 1]), ([24, 24], [9, 9]), ([7, 300], [3, 3]), ([129, 65], [5, 2])] {
            let sizes = sizes(y, kernel, 64);
            for columns in [64, 128] {
                let tile = sizes.tile(columns).unwrap();
                let [t1, t2] = tile.extents();
                assert_eq!(t1 * t2, tile.rows());
                assert!(
                    sizes.n_tiles(tile) * t1 * t2 >= y[0] * y[1] && sizes.shared(tile, columns, false) <= MAX_SHARED
                );
            }
        }
    }

    #[test]
    fn windows_too_large_have_none() {
        let served = |kernel| sizes([64, 64], kernel, 64).tile(64).is_some();
        assert!([[1, 1], [1, 2], [3, 3], [7, 7], [9, 9]].into_iter().all(served));
        assert!(![[12, 12], [30, 30], [1, 1 << 13]].into_iter().any(served));
        assert!(sizes([64, 64], [11, 11], 128).tile(128).is_some());
        assert!(sizes([8, 8], [3, 3], 1 << 14).tile(128).is_none(), "a weight that 32 bits do not count");
    }

    /// The sizes that `patches.cuh` reckons with: 4 steps of weights, and twice 18 x 18 points of 64 bytes.
    #[test]
    fn shared_memory_is_counted_as_the_kernel_counts_it() {
        let sizes = sizes([32, 32], [3, 3], 64);
        let tile = sizes.tile(64).unwrap();
        assert_eq!(sizes.shared(tile, 64, false), 4 * 32 * (64 + 8) * 2 + 2 * 18 * 18 * 64);
        assert_eq!(sizes.shared(tile, 64, true), 4 * 64 * 16 * 4 + 2 * 18 * 18 * 64);
    }
}
