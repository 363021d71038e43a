//! Gaussian random fields on the periodic unit interval and square, as Fourier coefficients.

use std::f64::consts::{FRAC_1_SQRT_2, TAU};

use crate::error::Result;
use crate::fourier::{Complex, Spectrum, waves};
use crate::random::{Purpose, fill_standard_normal, stream};

/// A periodic Gaussian random field with covariance `scale² (-Δ + τ²)^-α`.
///
/// ```text
/// g(x) = s_0 z_0 + Σ_k √2 s_k (z_k cos(2πk·x) + z'_k sin(2πk·x)),  s_k = scale (|2πk|² + τ²)^(-α/2)
/// ```
///
/// The sum runs over one of each pair `±k`. The wave numbers do not depend on a grid, so every grid
/// samples the same function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeriodicField {
    /// Axes: 1 or 2.
    pub(crate) dim: usize,
    /// Largest wave number on an axis.
    pub(crate) max: usize,
    pub(crate) scale: f64,
    pub(crate) tau: f64,
    pub(crate) alpha: f64,
    /// Whether there is a constant `s_0 z_0`.
    pub(crate) constant: bool,
}

impl PeriodicField {
    /// One sample.
    pub(crate) fn sample(&self, seed: u64, sample: u64) -> Result<Spectrum> {
        let mut spectrum = Spectrum::zero(self.dim, self.max)?;
        let mut rng = stream(Purpose::PeriodicField, seed, sample);
        for k in waves(self.dim, self.max).filter(|&k| k >= [0, 0]) {
            let mut z = [0.0; 2];
            fill_standard_normal(&mut rng, &mut z);
            let square = TAU * TAU * (k[0] * k[0] + k[1] * k[1]) as f64;
            let std = self.scale * libm::pow(square + self.tau * self.tau, -0.5 * self.alpha);
            let c = match (k, self.constant) {
                ([0, 0], true) => Complex::new(std * z[0], 0.0),
                ([0, 0], false) => Complex::default(),
                _ => Complex::new(z[0], -z[1]) * (std * FRAC_1_SQRT_2),
            };
            for (k, c) in [(k, c), ([-k[0], -k[1]], c.conj())] {
                if let Some(index) = spectrum.index(k) {
                    spectrum.c[index] = c;
                }
            }
        }
        Ok(spectrum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fourier::Grid;

    #[test]
    fn the_variance_at_a_point_is_the_trace_of_the_covariance() {
        for (dim, n) in [(1, 40_000), (2, 20_000)] {
            let field = PeriodicField { dim, max: 3, scale: 25.0, tau: 5.0, alpha: 2.0, constant: dim == 1 };
            let mut grid = Grid::new(dim, 7).unwrap();
            let mut sum = 0.0;
            for sample in 0..n {
                grid.sample(&field.sample(1, sample).unwrap());
                assert!(grid.values.iter().all(|value| value.im.abs() < 1e-14));
                sum += grid.values[grid.values.len() / 3].re.powi(2);
            }
            let variance = |[k, l]: [i64; 2]| 625.0 / (TAU * TAU * (k * k + l * l) as f64 + 25.0).powi(2);
            let want: f64 = waves(dim, 3).filter(|&k| dim == 1 || k != [0, 0]).map(variance).sum();
            // Five standard errors of the variance of n normal numbers.
            assert!((sum / n as f64 / want - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "{dim}: {sum} {want}");
        }
    }
}
