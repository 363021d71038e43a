//! The half-safe scale: how the factor 1/N is split between the two directions.
//!
//! With the whole 1/N on the way to the modes, spectra of white noise sink into the subnormals of
//! binary16; with 1/sqrt(N) on each side, the mean of a large field overflows. Per axis, the sum
//! over N points carries the power of two nearest N^(-3/4), the sum over modes the rest. A mean
//! then grows as N^(1/4) of all points and noise shrinks as N^(-1/4): both stay inside binary16
//! for any grid that fits memory. The split follows the direction in which data flows, so the
//! backward pass uses it too.

/// Per-axis factors of a pair of transforms whose product is 1/N.
#[derive(Clone, Debug, PartialEq)]
pub struct HalfSafeScale {
    /// Factors of the direction that sums over points, per axis; powers of two.
    pub to_modes: Vec<f64>,
    /// Factors of the direction that sums over modes, per axis.
    pub to_grid: Vec<f64>,
}

impl HalfSafeScale {
    /// The split of `1 / normalise[i]` on an axis whose sums run over `summed[i]` points. In a
    /// forward pass both are the input grid; in a backward pass the sum runs over the output grid
    /// while the factor still belongs to the input grid.
    #[must_use]
    pub fn new(normalise: &[usize], summed: &[usize]) -> Self {
        let to_modes: Vec<f64> = summed.iter().map(|&n| (-0.75 * (n as f64).log2()).round().exp2()).collect();
        let to_grid = normalise.iter().zip(&to_modes).map(|(&n, a)| 1.0 / (n as f64 * a)).collect();
        HalfSafeScale { to_modes, to_grid }
    }

    /// The product of all factors of the direction that sums over points.
    #[must_use]
    pub fn to_modes_product(&self) -> f64 {
        self.to_modes.iter().product()
    }

    /// The product of all factors of the direction that sums over modes.
    #[must_use]
    pub fn to_grid_product(&self) -> f64 {
        self.to_grid.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_directions_make_one_over_n_and_the_first_is_a_power_of_two() {
        for n in [1usize, 2, 17, 64, 421, 1024] {
            let scale = HalfSafeScale::new(&[n], &[n]);
            assert!((scale.to_modes[0] * scale.to_grid[0] * n as f64 - 1.0).abs() < 1e-15);
            assert!(scale.to_modes[0].log2().fract() == 0.0);
        }
        let scale = HalfSafeScale::new(&[1024, 1024], &[1024, 1024]);
        let mean_100 = 100.0 * 1024.0 * 1024.0 * scale.to_modes_product();
        assert!((mean_100 - 1600.0).abs() < 1e-9, "{mean_100}");
    }
}
