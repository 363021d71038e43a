//! Periodic functions on the unit interval and the unit square, as Fourier coefficients.

use std::sync::Arc;

use rustfft::{Fft, FftPlanner};

use crate::error::{Error, Result};

pub(crate) type Complex = rustfft::num_complex::Complex<f64>;

/// A trigonometric polynomial `Σ c_k e^{2πi k·x}` with `|k_j| ≤ max` on each of `dim` axes (1 or 2).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spectrum {
    pub(crate) dim: usize,
    pub(crate) max: usize,
    /// `[2 max + 1; dim]`, row-major; wave number `k` has index `k + max`.
    pub(crate) c: Vec<Complex>,
}

impl Spectrum {
    /// All zero.
    pub(crate) fn zero(dim: usize, max: usize) -> Result<Self> {
        let side = 2 * max + 1;
        Ok(Self { dim, max, c: zeros(if dim == 1 { side } else { side * side }, "Fourier coefficients")? })
    }

    /// The same function with another bound on wave numbers; those above it are dropped.
    pub(crate) fn resized(&self, max: usize) -> Result<Self> {
        let mut other = Self::zero(self.dim, max)?;
        for (index, k) in waves(self.dim, self.max).enumerate() {
            if let Some(to) = other.index(k) {
                other.c[to] = self.c[index];
            }
        }
        Ok(other)
    }

    /// The place of a coefficient; for one axis only `k[1]` counts.
    pub(crate) fn index(&self, k: [i64; 2]) -> Option<usize> {
        let max = self.max as i64;
        let place = |k: i64| (-max..=max).contains(&k).then_some((k + max) as usize);
        let row = if self.dim == 1 { 0 } else { place(k[0])? };
        Some(row * (2 * self.max + 1) + place(k[1])?)
    }

    /// The largest absolute value of coefficients.
    pub(crate) fn amplitude(&self) -> f64 {
        self.c.iter().fold(0.0, |largest, c| if c.norm_sqr().is_finite() { c.norm().max(largest) } else { f64::NAN })
    }
}

/// The wave numbers of a [`Spectrum`], in its order; on one axis the first is 0.
pub(crate) fn waves(dim: usize, max: usize) -> impl Iterator<Item = [i64; 2]> {
    let max = max as i64;
    let first = if dim == 1 { 0 } else { max };
    (-first..=first).flat_map(move |k| (-max..=max).map(move |l| [k, l]))
}

/// Transforms between a [`Spectrum`] and values at the points `i / n` of each axis.
pub(crate) struct Grid {
    dim: usize,
    n: usize,
    forward: Arc<dyn Fft<f64>>,
    inverse: Arc<dyn Fft<f64>>,
    scratch: Vec<Complex>,
    spare: Vec<Complex>,
    /// `[n; dim]`, row-major.
    pub(crate) values: Vec<Complex>,
}

impl Grid {
    pub(crate) fn new(dim: usize, n: usize) -> Result<Self> {
        let mut planner = FftPlanner::new();
        let (forward, inverse) = (planner.plan_fft_forward(n), planner.plan_fft_inverse(n));
        let scratch = forward.get_inplace_scratch_len().max(inverse.get_inplace_scratch_len());
        let purpose = "a grid of the solver";
        Ok(Self {
            dim,
            n,
            forward,
            inverse,
            scratch: zeros(scratch, purpose)?,
            spare: zeros(if dim == 1 { 0 } else { n * n }, purpose)?,
            values: zeros(if dim == 1 { n } else { n * n }, purpose)?,
        })
    }

    /// Sets [`Self::values`] to `Σ c(k, index) e^{2πi k·x}` over the waves up to `max`. Waves beyond what
    /// the grid resolves are folded: the values are those of the function, at any number of points.
    pub(crate) fn synthesise(&mut self, max: usize, c: impl Fn([i64; 2], usize) -> Complex) {
        self.values.fill(Complex::default());
        let n = self.n as i64;
        for (index, k) in waves(self.dim, max).enumerate() {
            // Transposed: the first transform runs over the first axis.
            let place = k[1].rem_euclid(n) * if self.dim == 1 { 1 } else { n } + k[0].rem_euclid(n);
            self.values[place as usize] += c(k, index);
        }
        self.inverse.process_with_scratch(&mut self.values, &mut self.scratch);
        if self.dim == 2 {
            self.transpose();
            self.inverse.process_with_scratch(&mut self.values, &mut self.scratch);
        }
    }

    /// Coefficients of the waves up to `max < n / 2` of [`Self::values`], which are overwritten.
    pub(crate) fn analyse(&mut self, max: usize, mut take: impl FnMut([i64; 2], usize, Complex)) {
        self.forward.process_with_scratch(&mut self.values, &mut self.scratch);
        if self.dim == 2 {
            self.transpose();
            self.forward.process_with_scratch(&mut self.values, &mut self.scratch);
        }
        let n = self.n as i64;
        let scale = 1.0 / self.values.len() as f64;
        for (index, k) in waves(self.dim, max).enumerate() {
            let place = k[1].rem_euclid(n) * if self.dim == 1 { 1 } else { n } + k[0].rem_euclid(n);
            take(k, index, self.values[place as usize] * scale);
        }
    }

    /// The values of a real function.
    pub(crate) fn sample(&mut self, function: &Spectrum) {
        self.synthesise(function.max, |_, index| function.c[index]);
    }

    /// The trigonometric interpolant of real values; the wave of an even grid that has no sign is dropped.
    pub(crate) fn interpolate(&mut self, values: &[f64]) -> Result<Spectrum> {
        let mut spectrum = Spectrum::zero(self.dim, (self.n - 1) / 2)?;
        for (to, &from) in self.values.iter_mut().zip(values) {
            *to = Complex::new(from, 0.0);
        }
        self.analyse(spectrum.max, |_, index, c| spectrum.c[index] = c);
        Ok(spectrum)
    }

    fn transpose(&mut self) {
        const TILE: usize = 16;
        let n = self.n;
        for (i0, j0) in (0..n).step_by(TILE).flat_map(|i| (0..n).step_by(TILE).map(move |j| (i, j))) {
            for i in i0..(i0 + TILE).min(n) {
                for j in j0..(j0 + TILE).min(n) {
                    self.spare[j * n + i] = self.values[i * n + j];
                }
            }
        }
        std::mem::swap(&mut self.values, &mut self.spare);
    }
}

/// Zeros, or the error that says how many bytes are missing.
pub(crate) fn zeros(len: usize, purpose: &'static str) -> Result<Vec<Complex>> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| Error::OutOfMemory { purpose, bytes: len.saturating_mul(size_of::<Complex>()) })?;
    values.resize(len, Complex::default());
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::TAU;

    /// A real function of two variables and its values by definition.
    fn function(dim: usize, max: usize) -> Spectrum {
        let mut spectrum = Spectrum::zero(dim, max).unwrap();
        for k in waves(dim, max) {
            let c = Complex::new((1.0 + k[0] as f64 * 0.3).sin(), (k[1] as f64 + 0.7 * k[0] as f64).sin());
            let (here, there) = (spectrum.index(k).unwrap(), spectrum.index([-k[0], -k[1]]).unwrap());
            spectrum.c[here] += c;
            spectrum.c[there] += c.conj();
        }
        spectrum
    }

    fn by_definition(spectrum: &Spectrum, x: f64, y: f64) -> f64 {
        let terms = waves(spectrum.dim, spectrum.max).zip(&spectrum.c);
        terms.map(|([k, l], c)| (c * Complex::cis(TAU * (k as f64 * x + l as f64 * y))).re).sum()
    }

    #[test]
    fn every_grid_samples_the_same_function() {
        for (dim, n) in [(1, 1), (1, 2), (1, 7), (1, 40), (2, 1), (2, 4), (2, 5), (2, 18)] {
            let spectrum = function(dim, 4);
            let mut grid = Grid::new(dim, n).unwrap();
            grid.sample(&spectrum);
            for (place, value) in grid.values.iter().enumerate() {
                let (i, j) = (place / n, place % n);
                let want = by_definition(&spectrum, i as f64 / n as f64, j as f64 / n as f64);
                // 81 terms of size up to 4.
                assert!((value.re - want).abs() < 1e-11 && value.im.abs() < 1e-11, "{dim} {n}: {value} {want}");
            }
        }
    }

    #[test]
    fn interpolation_undoes_sampling() {
        for (dim, n) in [(1, 9), (1, 12), (2, 9), (2, 11)] {
            let spectrum = function(dim, 4);
            let mut grid = Grid::new(dim, n).unwrap();
            grid.sample(&spectrum);
            let values: Vec<f64> = grid.values.iter().map(|value| value.re).collect();
            let back = grid.interpolate(&values).unwrap().resized(4).unwrap();
            for (got, want) in back.c.iter().zip(&spectrum.c) {
                assert!((got - want).norm() < 1e-13, "{dim} {n}");
            }
        }
    }
}
