//! Burgers' equation: a random velocity on the periodic interval and what becomes of it.

use std::f64::consts::TAU;
use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::cache::Generator;
use crate::darcy::DarcyConfig;
use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
use crate::fourier::{Complex, Grid, Spectrum};
use crate::integrating_factor::{self, Periodic, kept};
use crate::periodic_field::PeriodicField;
use crate::samples;

/// The initial velocity: covariance `625 (-Δ + 25)^-2`, waves up to 64.
const FIELD: PeriodicField = PeriodicField { dim: 1, max: 64, scale: 25.0, tau: 5.0, alpha: 2.0, constant: true };
/// Points of the first grid: it keeps 85 waves.
const FIRST_GRID: usize = 256;

/// What to generate: `u_t + u u_x = ν u_xx` on the periodic unit interval, from a random initial
/// velocity to the velocity at a later time.
///
/// The initial velocity is a Gaussian random field with covariance `625 (-Δ + 25)^-2`, whose waves
/// above 64 are left out. Sample `i` depends on `seed`, `first_index + i` and the values alone, so two
/// resolutions with the same seed and indices hold the same functions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BurgersConfig {
    /// Number of samples.
    pub n: usize,
    /// Points, at `i / resolution`.
    pub resolution: usize,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Number of the first sample's random stream. Disjoint ranges give independent samples.
    #[serde(default)]
    pub first_index: u64,
    /// Viscosity ν, in lengths² per time; the interval has length 1.
    #[serde(default = "default_viscosity")]
    pub viscosity: f64,
    /// Time of the output.
    #[serde(default = "default_time")]
    pub time: f64,
}

fn default_viscosity() -> f64 {
    BurgersConfig::VISCOSITY
}

fn default_time() -> f64 {
    BurgersConfig::TIME
}

impl BurgersConfig {
    /// Largest number of points.
    pub const MAX_RESOLUTION: usize = 1 << 16;
    /// The usual viscosity.
    pub const VISCOSITY: f64 = 0.1;
    /// The usual time.
    pub const TIME: f64 = 1.0;

    /// `n` training samples with viscosity 0.1, at time 1.
    #[must_use]
    pub fn new(n: usize, resolution: usize, seed: u64) -> Self {
        Self { n, resolution, seed, first_index: 0, viscosity: Self::VISCOSITY, time: Self::TIME }
    }

    /// The same with streams that no training set of less than 2³² samples uses.
    #[must_use]
    pub fn for_test(self) -> Self {
        Self { first_index: DarcyConfig::TEST_FIRST_INDEX, ..self }
    }

    /// Checks that every setting is in range.
    ///
    /// # Errors
    /// [`Error::Config`] with the name of the setting.
    pub fn validate(&self) -> Result<()> {
        let sizes = samples::Sizes { n: self.n, resolution: self.resolution, dim: 1, first_index: self.first_index };
        sizes.validate(Self::NAME, Self::MAX_RESOLUTION)?;
        samples::in_range(Self::NAME, "viscosity", self.viscosity, 1e-3, 1e3)?;
        samples::in_range(Self::NAME, "time", self.time, 1e-6, 1e2)
    }
}

impl Generator for BurgersConfig {
    const NAME: &'static str = "burgers";
    const VERSION: u32 = 1;

    fn generate(&self, threads: Option<NonZeroUsize>, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FieldPairs> {
        self.validate()?;
        let scratch = || Ok((BurgersSolver::new(self.viscosity)?, Grid::new(1, self.resolution)?));
        let one = |(solver, grid): &mut (BurgersSolver, Grid), sample: usize, x: &mut [f32], y: &mut [f32]| {
            let start = FIELD.sample(self.seed, self.first_index + sample as u64)?;
            samples::store(grid, &start, x);
            samples::store(grid, &solver.solve(&start, self.time)?, y);
            Ok(())
        };
        samples::on_threads(threads, || samples::make(self.n, &[self.resolution], progress, scratch, one))
    }
}

/// Solves `u_t + u u_x = ν u_xx` on the periodic unit interval.
///
/// A Fourier method free of aliases (two thirds of the waves of a grid are kept) with exact diffusion
/// and Runge-Kutta steps of order four, in f64. Grid and step are refined until neither changes the
/// result by more than 1e-7 of its largest wave.
#[derive(Clone, Debug)]
pub struct BurgersSolver {
    viscosity: f64,
}

impl BurgersSolver {
    /// A solver for one viscosity.
    ///
    /// # Errors
    /// [`Error::Config`] if the viscosity is not in 1e-3..=1e3.
    pub fn new(viscosity: f64) -> Result<Self> {
        samples::in_range(BurgersConfig::NAME, "viscosity", viscosity, 1e-3, 1e3)?;
        Ok(Self { viscosity })
    }

    /// The velocity at `time` at the points `i / n`, from that at time 0 at the same points.
    ///
    /// The initial velocity is the trigonometric interpolant of `start`.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Unresolved`], [`Error::OutOfMemory`].
    ///
    /// ```
    /// let mut solver = halfmode_data::BurgersSolver::new(0.1)?;
    /// let start: Vec<f64> = (0..64).map(|i| (i as f64 / 64.0 * std::f64::consts::TAU).sin()).collect();
    /// let later = solver.evolve(&start, 1.0)?;
    /// assert!(later.iter().all(|u| u.abs() < 0.1));
    /// # Ok::<(), halfmode_data::Error>(())
    /// ```
    pub fn evolve(&mut self, start: &[f64], time: f64) -> Result<Vec<f64>> {
        samples::in_range(BurgersConfig::NAME, "time", time, 1e-6, 1e2)?;
        if start.is_empty() {
            return Err(Error::Empty { array: "start".to_owned(), shape: vec![0] });
        }
        let mut grid = Grid::new(1, start.len())?;
        let start = grid.interpolate(start)?;
        grid.sample(&self.solve(&start, time)?);
        Ok(grid.values.iter().map(|value| value.re).collect())
    }

    fn solve(&mut self, start: &Spectrum, time: f64) -> Result<Spectrum> {
        // Room for the waves of the start below the tail that must be small.
        let n = FIRST_GRID.max((4 * start.max).next_power_of_two());
        integrating_factor::solve(&mut Flow::new(self.viscosity, n)?, start, time)
    }
}

/// The problem on one grid.
struct Flow {
    viscosity: f64,
    n: usize,
    grid: Grid,
}

impl Flow {
    fn new(viscosity: f64, n: usize) -> Result<Self> {
        Ok(Self { viscosity, n, grid: Grid::new(1, n)? })
    }
}

impl Periodic for Flow {
    const DIM: usize = 1;
    const NAME: &'static str = BurgersConfig::NAME;
    const MAX_GRID: usize = 1 << 14;

    fn with_grid(&self, n: usize) -> Result<Self> {
        Self::new(self.viscosity, n)
    }

    fn n(&self) -> usize {
        self.n
    }

    fn decay(&self, k: [i64; 2]) -> f64 {
        self.viscosity * (TAU * k[1] as f64).powi(2)
    }

    /// `-(u²/2)_x`.
    fn nonlinear(&mut self, w: &Spectrum, out: &mut Spectrum) {
        self.grid.sample(w);
        for u in &mut self.grid.values {
            *u = Complex::new(0.5 * u.re * u.re, 0.0);
        }
        self.grid.analyse(kept(self.n), |k, index, flux| out.c[index] = flux * Complex::new(0.0, -TAU * k[1] as f64));
    }

    fn speed(&mut self, w: &Spectrum) -> f64 {
        self.grid.sample(w);
        self.grid.values.iter().fold(0.0, |speed, u| u.re.abs().max(speed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrating_factor::Stepper;

    fn start(max: usize) -> Spectrum {
        FIELD.sample(3, 4).unwrap().resized(max).unwrap()
    }

    fn stepped(n: usize, steps: usize, time: f64, start: &Spectrum) -> Spectrum {
        let mut flow = Flow::new(0.02, n).unwrap();
        let mut w = start.resized(kept(n)).unwrap();
        let mut stepper = Stepper::new(&flow, time / steps as f64).unwrap();
        (0..steps).for_each(|_| stepper.step(&mut flow, &mut w));
        w
    }

    fn difference(a: &Spectrum, b: &Spectrum) -> f64 {
        let b = b.resized(a.max).unwrap();
        a.c.iter().zip(&b.c).map(|(a, b)| (a - b).norm()).fold(0.0, f64::max)
    }

    #[test]
    fn the_nonlinear_term_is_the_convolution_by_definition() {
        let mut flow = Flow::new(0.1, 64).unwrap();
        let w = start(kept(64));
        let mut out = w.clone();
        flow.nonlinear(&w, &mut out);
        let max = w.max as i64;
        for k in -max..=max {
            let terms = (-max..=max)
                .filter(|l| (k - l).abs() <= max)
                .map(|l| w.c[w.index([0, l]).unwrap()] * w.c[w.index([0, k - l]).unwrap()]);
            let want = terms.sum::<Complex>() * Complex::new(0.0, -0.5 * TAU * k as f64);
            // 43 products of size 1, times 2π 21.
            assert!((out.c[w.index([0, k]).unwrap()] - want).norm() < 1e-12, "{k}");
        }
    }

    #[test]
    fn steps_are_of_order_four() {
        let exact = stepped(256, 4096, 0.2, &start(20));
        let errors = [64, 128, 256].map(|steps| difference(&exact, &stepped(256, steps, 0.2, &start(20))));
        for pair in errors.windows(2) {
            let order = (pair[0] / pair[1]).log2();
            assert!((3.7..4.5).contains(&order), "{errors:?}");
        }
    }

    #[test]
    fn grids_converge_faster_than_any_power() {
        let exact = stepped(256, 1024, 0.2, &start(4));
        let errors = [16, 32, 64].map(|n| difference(&stepped(n, 1024, 0.2, &start(4)), &exact));
        assert!(errors[0] > 50.0 * errors[1] && errors[1] > 1000.0 * errors[2], "{errors:?}");
    }

    #[test]
    fn refinement_meets_its_tolerance() {
        let mut solver = BurgersSolver::new(0.02).unwrap();
        let exact = stepped(2048, 8192, 0.2, &start(20));
        let found = solver.solve(&start(20), 0.2).unwrap();
        assert!(difference(&exact, &found) < 1e-7 * exact.amplitude(), "{}", difference(&exact, &found));
    }
}
