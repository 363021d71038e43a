//! What a training step takes if nothing but bytes counts: those that a plan moves, over the bandwidth of the card.
//!
//! Of `L` blocks with batch `B`, width `C`, a grid of `N^d` points and `K` modes per axis, `K_y = K/2 + 1` on the last:
//!
//! | symbol | scalars | of |
//! | --- | --- | --- |
//! | `P` | `B C N^d` | a field |
//! | `T` | `2 K_y P / N` | a field whose last axis is transformed |
//! | `S` | `2 B C M`, `M = K^(d-1) K_y` | a spectrum |
//! | `W` | `2 C^2 M` | the weights of a spectral convolution |
//!
//! With `e` bytes per stored scalar a block moves, gradients of weights in f32:
//!
//! | | forward | backward |
//! | --- | --- | --- |
//! | fused: a kernel per pass over rows, matrix products for the other axes | `e (2P + 4T + 4S + W)` | `e (4P + 4T + 6S + W) + 4W` |
//! | floor: every field once in and once out | `e (2P + W)` | `e (3P + W) + 4W` |
//!
//! AdamW moves 28 bytes per weight: weight, gradient and two moments in f32, read or read and written; a half copy is 2
//! more. Lifting, projection and the dense layers' weights are left out, so a whole step cannot reach its share of 1.

/// Bytes per second that a copy reaches on one H200, as measured.
pub const H200_BANDWIDTH: f64 = 4.3e12;

/// The sizes that decide.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Samples.
    pub batch: usize,
    /// Channels between blocks.
    pub width: usize,
    /// Points per axis.
    pub grid: &'a [usize],
    /// Modes per axis, as configured: those of the last are both signs.
    pub modes: &'a [usize],
    /// Blocks.
    pub n_layers: usize,
}

/// Bytes of one training step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// Blocks in the fused plan.
    pub fused: f64,
    /// Blocks if every field moved once in and once out.
    pub floor: f64,
    /// The optimiser.
    pub adam: f64,
}

impl Traffic {
    /// Microseconds of the fused plan and the optimiser at `bandwidth` bytes per second.
    #[must_use]
    pub fn fused_us(&self, bandwidth: f64) -> f64 {
        (self.fused + self.adam) / bandwidth * 1e6
    }

    /// Microseconds of the floor and the optimiser.
    #[must_use]
    pub fn floor_us(&self, bandwidth: f64) -> f64 {
        (self.floor + self.adam) / bandwidth * 1e6
    }
}

impl Step<'_> {
    /// What it moves with `stored` bytes per scalar of fields and spectra: 2 of halves, 4 of f32.
    #[must_use]
    pub fn traffic(&self, stored: usize) -> Traffic {
        let product = |extents: &[usize]| extents.iter().product::<usize>() as f64;
        let (batch, width, e) = (self.batch as f64, self.width as f64, stored as f64);
        let last = |extents: &[usize]| extents.last().copied().unwrap_or(1);
        let last_modes = (last(self.modes) / 2 + 1) as f64;
        let p = batch * width * product(self.grid);
        let t = 2.0 * last_modes * p / last(self.grid) as f64;
        let m = product(&self.modes[..self.modes.len().saturating_sub(1)]) * last_modes;
        let (s, w) = (2.0 * batch * width * m, 2.0 * width * width * m);
        let forward = [e * (2.0 * p + 4.0 * t + 4.0 * s + w), e * (2.0 * p + w)];
        let backward = [e * (4.0 * p + 4.0 * t + 6.0 * s + w) + 4.0 * w, e * (3.0 * p + w) + 4.0 * w];
        let layers = self.n_layers as f64;
        let [fused, floor] = [0, 1].map(|plan| layers * (forward[plan] + backward[plan]));
        let half_copy = if stored < 4 { 2.0 } else { 0.0 };
        Traffic { fused, floor, adam: layers * w * (28.0 + half_copy) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Microseconds at 4.3 TB/s that were worked out by hand: blocks in f32, in half, their floor in half; AdamW in
    /// f32 and with a half copy.
    type Row = (Step<'static>, [f64; 3], [f64; 2]);

    const fn step(batch: usize, width: usize, grid: &'static [usize], modes: &'static [usize]) -> Step<'static> {
        Step { batch, width, grid, modes, n_layers: 4 }
    }

    #[test]
    fn the_worked_numbers_come_out() {
        let rows: [Row; 5] = [
            (step(8, 64, &[128; 2], &[42; 2]), [393.0, 210.0, 134.0], [197.0, 211.0]),
            (step(8, 64, &[128; 2], &[64; 2]), [590.0, 327.0, 207.0], [451.0, 483.0]),
            (step(16, 64, &[256; 2], &[64; 2]), [2367.0, 1216.0, 753.0], [451.0, 483.0]),
            (step(4, 64, &[64; 3], &[16; 3]), [2315.0, 1192.0, 765.0], [492.0, 527.0]),
            (step(4, 64, &[64; 3], &[32; 3]), [4483.0, 2507.0, 1686.0], [3714.0, 3980.0]),
        ];
        for (step, blocks, adam) in rows {
            let (full, half) = (step.traffic(4), step.traffic(2));
            let us = |bytes: f64| bytes / H200_BANDWIDTH * 1e6;
            let got = [full.fused, half.fused, half.floor, full.adam, half.adam].map(us);
            for (got, want) in got.into_iter().zip(blocks.into_iter().chain(adam)) {
                assert!((got - want).abs() < 1.0, "{step:?}: {got} is not {want}");
            }
            assert!((half.fused_us(H200_BANDWIDTH) - got[1] - got[4]).abs() < 1e-6);
            assert!(half.floor_us(H200_BANDWIDTH) < half.fused_us(H200_BANDWIDTH));
        }
    }
}
