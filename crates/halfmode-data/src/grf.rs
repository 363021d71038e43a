//! Gaussian random fields on the unit square, drawn in their cosine basis.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::random::{Purpose, fill_standard_normal, stream};

/// A zero-Neumann Gaussian random field on the unit square with covariance `(-Δ + τ²)^-α`.
///
/// ```text
/// g(x, y) = Σ_{k,l < modes} z_kl · (π²(k² + l²) + τ²)^(-α/2) · φ_k(x) φ_l(y),  z_kl ~ N(0, 1)
/// φ_0 = 1,  φ_k(x) = √2 cos(πkx),  z_00 = 0
/// ```
///
/// The mode set is fixed and does not depend on a grid. So two grids sample the same function.
#[derive(Clone, Debug, PartialEq)]
pub struct CosineField {
    modes: usize,
    std: Vec<f64>,
}

impl CosineField {
    /// A field with `modes × modes` cosine modes, `tau2` = τ² and exponent `alpha` = α.
    ///
    /// # Errors
    /// [`Error::Config`] if `modes` is not in 1..=1024, or `tau2` or `alpha` is negative or not
    /// finite.
    pub fn new(modes: usize, tau2: f64, alpha: f64) -> Result<Self> {
        let config = |field, value: String, expected: &str| Error::Config {
            generator: "random field",
            field,
            value,
            expected: expected.to_owned(),
        };
        if !(1..=1024).contains(&modes) {
            return Err(config("modes", modes.to_string(), "in 1..=1024"));
        }
        for (field, value) in [("tau2", tau2), ("alpha", alpha)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(config(field, value.to_string(), "finite and at least 0"));
            }
        }
        let mut std = Vec::with_capacity(modes * modes);
        for k in 0..modes {
            for l in 0..modes {
                let eigenvalue = PI * PI * ((k * k + l * l) as f64) + tau2;
                std.push(libm::pow(eigenvalue, -0.5 * alpha));
            }
        }
        std[0] = 0.0;
        Ok(Self { modes, std })
    }

    /// Cosine modes per axis.
    #[must_use]
    pub fn modes(&self) -> usize {
        self.modes
    }

    /// Coefficients of the orthonormal cosine basis of one sample.
    ///
    /// # Shapes
    /// - returns `[modes, modes]`, row-major, f64
    #[must_use]
    pub fn coefficients(&self, seed: u64, sample: u64) -> Vec<f64> {
        let mut z = vec![0.0; self.std.len()];
        self.fill_coefficients(seed, sample, &mut z);
        z
    }

    /// A sampler at the cell centres of an `n × n` grid.
    ///
    /// # Errors
    /// [`Error::Config`] if `n` is 0 or above 65536.
    pub fn sampler(&self, n: usize) -> Result<FieldSampler> {
        if !(1..=65_536).contains(&n) {
            return Err(Error::Config {
                generator: "random field",
                field: "n",
                value: n.to_string(),
                expected: "in 1..=65536".to_owned(),
            });
        }
        let modes = self.modes;
        let mut basis = vec![0.0; n * modes];
        let mut basis_t = vec![0.0; n * modes];
        for i in 0..n {
            for k in 0..modes {
                let value = cosine(k, i, n);
                basis[i * modes + k] = value;
                basis_t[k * n + i] = value;
            }
        }
        Ok(FieldSampler { field: self.clone(), n, basis, basis_t })
    }

    fn fill_coefficients(&self, seed: u64, sample: u64, z: &mut [f64]) {
        fill_standard_normal(&mut stream(Purpose::Field, seed, sample), z);
        for (z, std) in z.iter_mut().zip(&self.std) {
            *z *= std;
        }
    }
}

/// Evaluates samples of a [`CosineField`] at the cell centres `((i + ½)/n, (j + ½)/n)`.
///
/// A sample costs two small matrix products, `C ξ Cᵀ`, in plain f64 arithmetic with a fixed order
/// of sums. So the values are the same bits on every machine.
#[derive(Clone, Debug)]
pub struct FieldSampler {
    field: CosineField,
    n: usize,
    /// `[n, modes]`: φ_k at centre i.
    basis: Vec<f64>,
    /// `[modes, n]`: its transpose.
    basis_t: Vec<f64>,
}

impl FieldSampler {
    /// Cells per side.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// One sample of the field.
    ///
    /// # Shapes
    /// - returns `[n, n]`, row-major, f64; the first axis is x
    #[must_use]
    pub fn sample(&self, seed: u64, sample: u64) -> Vec<f64> {
        let mut scratch = Vec::new();
        let mut out = Vec::new();
        self.sample_into(seed, sample, &mut scratch, &mut out);
        out
    }

    /// As [`Self::sample`], into `out`; `scratch` keeps its memory for the next call.
    pub fn sample_into(&self, seed: u64, sample: u64, scratch: &mut Vec<f64>, out: &mut Vec<f64>) {
        let (n, modes) = (self.n, self.field.modes);
        scratch.clear();
        scratch.resize(modes * modes + n * modes, 0.0);
        out.clear();
        out.resize(n * n, 0.0);
        let (xi, half) = scratch.split_at_mut(modes * modes);
        self.field.fill_coefficients(seed, sample, xi);
        multiply_add(&self.basis, xi, half, modes);
        multiply_add(half, &self.basis_t, out, modes);
    }
}

/// `c += a b` for row-major `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
fn multiply_add(a: &[f64], b: &[f64], c: &mut [f64], k: usize) {
    let n = b.len() / k;
    for (a_row, c_row) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (&factor, b_row) in a_row.iter().zip(b.chunks_exact(n)) {
            for (c, &b) in c_row.iter_mut().zip(b_row) {
                *c += factor * b;
            }
        }
    }
}

/// φ_k at cell centre `i` of `n`. The angle is reduced exactly, in integers.
fn cosine(k: usize, i: usize, n: usize) -> f64 {
    if k == 0 {
        return 1.0;
    }
    // cos(π k (2i+1) / (2n)) has period 4n in the integer k (2i+1).
    let phase = (k * (2 * i + 1)) % (4 * n);
    std::f64::consts::SQRT_2 * libm::cos(PI * phase as f64 / (2 * n) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The field by its definition, at any point.
    fn by_definition(field: &CosineField, coefficients: &[f64], x: f64, y: f64) -> f64 {
        let phi = |k: usize, x: f64| {
            if k == 0 { 1.0 } else { 2f64.sqrt() * (PI * k as f64 * x).cos() }
        };
        let mut sum = 0.0;
        for k in 0..field.modes() {
            for l in 0..field.modes() {
                sum += coefficients[k * field.modes() + l] * phi(k, x) * phi(l, y);
            }
        }
        sum
    }

    #[test]
    fn every_grid_samples_the_same_function() {
        let field = CosineField::new(64, 9.0, 2.0).unwrap();
        let coefficients = field.coefficients(11, 3);
        for n in [1, 7, 64, 128] {
            let values = field.sampler(n).unwrap().sample(11, 3);
            for (i, j) in [(0, 0), (n / 2, n / 3), (n - 1, 0), (n - 1, n - 1)] {
                let x = (i as f64 + 0.5) / n as f64;
                let y = (j as f64 + 0.5) / n as f64;
                let want = by_definition(&field, &coefficients, x, y);
                let got = values[i * n + j];
                // 4096 terms of size at most 2/18, each wrong by some units of 1e-16.
                assert!((got - want).abs() < 1e-12, "n {n} [{i}, {j}]: {got} {want}");
            }
        }
    }

    #[test]
    fn centres_shared_by_two_grids_have_the_same_values() {
        // A centre of n cells is a centre of 3n cells.
        let field = CosineField::new(64, 9.0, 2.0).unwrap();
        let coarse = field.sampler(43).unwrap().sample(0, 0);
        let fine = field.sampler(129).unwrap().sample(0, 0);
        for i in 0..43 {
            for j in 0..43 {
                let difference = coarse[i * 43 + j] - fine[(3 * i + 1) * 129 + 3 * j + 1];
                assert!(difference.abs() < 1e-13, "{difference}");
            }
        }
    }

    #[test]
    fn the_variance_is_the_sum_of_the_spectrum() {
        let field = CosineField::new(16, 9.0, 2.0).unwrap();
        let sampler = field.sampler(16).unwrap();
        let want: f64 = field.std.iter().map(|s| s * s).sum();
        let n_samples = 2000;
        let mut got = 0.0;
        for sample in 0..n_samples {
            let g = sampler.sample(5, sample);
            got += g.iter().map(|v| v * v).sum::<f64>() / g.len() as f64;
        }
        got /= n_samples as f64;
        // The largest two of the variances dominate, so the relative spread of one sample is near
        // 1, and five standard errors are near 5 / sqrt(2000) = 0.11.
        assert!((got / want - 1.0).abs() < 0.11, "{got} {want}");
    }

    #[test]
    fn the_mean_over_the_square_is_zero() {
        // The midpoint rule integrates the cosines exactly when there are more cells than modes.
        let field = CosineField::new(8, 9.0, 2.0).unwrap();
        let g = field.sampler(32).unwrap().sample(1, 2);
        assert!(g.iter().sum::<f64>().abs() < 1e-12);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        assert!(CosineField::new(0, 9.0, 2.0).is_err());
        assert!(CosineField::new(8, f64::NAN, 2.0).is_err());
        assert!(CosineField::new(8, 9.0, -1.0).is_err());
        assert!(CosineField::new(8, 9.0, 2.0).unwrap().sampler(0).is_err());
    }
}
