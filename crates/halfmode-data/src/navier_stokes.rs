//! Navier-Stokes data: a random vorticity on the periodic square and what becomes of it.

use std::f64::consts::TAU;
use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::cache::Generator;
use crate::darcy::DarcyConfig;
use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
use crate::fourier::{Complex, Grid, Spectrum, zeros};
use crate::integrating_factor::{self, Periodic, kept};
use crate::periodic_field::PeriodicField;
use crate::samples;

/// The initial vorticity: covariance `7³ (-Δ + 49)^-2.5`, waves up to 16 on each axis, mean 0. The scale
/// is that of the standard deviation, `7^{3/2}`.
const FIELD: PeriodicField =
    PeriodicField { dim: 2, max: 16, scale: 18.520259177452136, tau: 7.0, alpha: 2.5, constant: false };
/// Points per axis of the first grid: it keeps 21 waves.
const FIRST_GRID: usize = 64;

/// What to generate: `w_t + u·∇w = ν Δw + f` with `∇·u = 0` and `w = ∇×u` on the periodic unit square, from a
/// random initial vorticity to the vorticity at a later time.
///
/// The force is `f = forcing (sin 2π(x + y) + cos 2π(x + y))`. The initial vorticity is a Gaussian random
/// field with covariance `7³ (-Δ + 49)^-2.5`, whose mean and waves above 16 are left out. Sample `i` depends
/// on `seed`, `first_index + i` and the values alone, so two resolutions with the same seed and indices
/// hold the same functions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NavierStokesConfig {
    /// Number of samples.
    pub n: usize,
    /// Points per axis, at `i / resolution`.
    pub resolution: usize,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Number of the first sample's random stream. Disjoint ranges give independent samples.
    #[serde(default)]
    pub first_index: u64,
    /// Viscosity ν, in lengths² per time; the square has side 1.
    #[serde(default = "default_viscosity")]
    pub viscosity: f64,
    /// Time of the output.
    #[serde(default = "default_time")]
    pub time: f64,
    /// Amplitude of the force; 0 lets the flow decay.
    #[serde(default = "default_forcing")]
    pub forcing: f64,
}

fn default_viscosity() -> f64 {
    NavierStokesConfig::VISCOSITY
}

fn default_time() -> f64 {
    NavierStokesConfig::TIME
}

fn default_forcing() -> f64 {
    NavierStokesConfig::FORCING
}

impl NavierStokesConfig {
    /// Largest number of points per axis.
    pub const MAX_RESOLUTION: usize = 1 << 11;
    /// The usual viscosity.
    pub const VISCOSITY: f64 = 1e-3;
    /// The usual time.
    pub const TIME: f64 = 5.0;
    /// The usual amplitude of the force.
    pub const FORCING: f64 = 0.1;

    /// `n` training samples with viscosity 1e-3 and a force of amplitude 0.1, at time 5.
    #[must_use]
    pub fn new(n: usize, resolution: usize, seed: u64) -> Self {
        let (viscosity, time, forcing) = (Self::VISCOSITY, Self::TIME, Self::FORCING);
        Self { n, resolution, seed, first_index: 0, viscosity, time, forcing }
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
        let sizes = samples::Sizes { n: self.n, resolution: self.resolution, dim: 2, first_index: self.first_index };
        sizes.validate(Self::NAME, Self::MAX_RESOLUTION)?;
        validate_flow(self.viscosity, self.forcing)?;
        samples::in_range(Self::NAME, "time", self.time, 1e-6, 1e2)
    }
}

fn validate_flow(viscosity: f64, forcing: f64) -> Result<()> {
    samples::in_range(NavierStokesConfig::NAME, "viscosity", viscosity, 1e-5, 1e3)?;
    samples::in_range(NavierStokesConfig::NAME, "forcing", forcing, 0.0, 1e3)
}

impl Generator for NavierStokesConfig {
    const NAME: &'static str = "navier-stokes";
    const VERSION: u32 = 1;

    fn generate(&self, threads: Option<NonZeroUsize>, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FieldPairs> {
        self.validate()?;
        let scratch = || Ok((NavierStokesSolver::new(self.viscosity, self.forcing)?, Grid::new(2, self.resolution)?));
        let one = |(solver, grid): &mut (NavierStokesSolver, Grid), sample: usize, x: &mut [f32], y: &mut [f32]| {
            let start = FIELD.sample(self.seed, self.first_index + sample as u64)?;
            samples::store(grid, &start, x);
            samples::store(grid, &solver.solve(&start, self.time)?, y);
            Ok(())
        };
        samples::on_threads(threads, || samples::make(self.n, &[self.resolution; 2], progress, scratch, one))
    }
}

/// Solves `w_t + u·∇w = ν Δw + f` on the periodic unit square.
///
/// A Fourier method free of aliases (two thirds of the waves of a grid are kept) with exact diffusion
/// and Runge-Kutta steps of order four, in f64. Grid and step are refined until neither changes the
/// result by more than 1e-7 of its largest wave.
#[derive(Clone, Debug)]
pub struct NavierStokesSolver {
    viscosity: f64,
    forcing: f64,
}

impl NavierStokesSolver {
    /// A solver for one viscosity and one amplitude of the force
    /// `f = forcing (sin 2π(x + y) + cos 2π(x + y))`.
    ///
    /// # Errors
    /// [`Error::Config`] if the viscosity is not in 1e-5..=1e3, or the amplitude not in 0..=1e3.
    pub fn new(viscosity: f64, forcing: f64) -> Result<Self> {
        validate_flow(viscosity, forcing)?;
        Ok(Self { viscosity, forcing })
    }

    /// The vorticity at `time` at the points `(i / n, j / n)`, from that at time 0 at the same points.
    ///
    /// The initial vorticity is the trigonometric interpolant of `start` without its mean: the vorticity
    /// of a periodic velocity has none.
    ///
    /// # Shapes
    /// - `start`: `[n, n]`, row-major; the first axis is x
    /// - returns the same shape
    ///
    /// # Errors
    /// [`Error::Length`] if `start` is not a square grid, [`Error::Unresolved`], [`Error::OutOfMemory`].
    pub fn evolve(&mut self, n: usize, start: &[f64], time: f64) -> Result<Vec<f64>> {
        samples::in_range(NavierStokesConfig::NAME, "time", time, 1e-6, 1e2)?;
        if n == 0 || n.checked_mul(n) != Some(start.len()) {
            return Err(Error::Length { operand: "start", expected: n.saturating_mul(n).max(1), found: start.len() });
        }
        let mut grid = Grid::new(2, n)?;
        let mut start = grid.interpolate(start)?;
        if let Some(mean) = start.index([0, 0]) {
            start.c[mean] = Complex::default();
        }
        grid.sample(&self.solve(&start, time)?);
        Ok(grid.values.iter().map(|value| value.re).collect())
    }

    fn solve(&mut self, start: &Spectrum, time: f64) -> Result<Spectrum> {
        // Room for the waves of the start below the tail that must be small.
        let n = FIRST_GRID.max((4 * start.max).next_power_of_two());
        integrating_factor::solve(&mut Flow::new(self.viscosity, self.forcing, n)?, start, time)
    }
}

/// The problem on one grid.
struct Flow {
    viscosity: f64,
    forcing: f64,
    n: usize,
    grid: Grid,
    /// Velocity at the points of the grid, as `u + iv`.
    flow: Vec<Complex>,
}

impl Flow {
    fn new(viscosity: f64, forcing: f64, n: usize) -> Result<Self> {
        Ok(Self { viscosity, forcing, n, grid: Grid::new(2, n)?, flow: zeros(n * n, "a grid of the solver")? })
    }

    /// Velocity as `u + iv` in the grid's values: `u = ψ_y`, `v = -ψ_x`, `-Δψ = w`.
    fn velocity(&mut self, w: &Spectrum) {
        self.grid.synthesise(w.max, |[k, l], index| {
            let square = (k * k + l * l).max(1) as f64;
            w.c[index] * Complex::new(k as f64, l as f64) / (TAU * square)
        });
    }
}

impl Periodic for Flow {
    const DIM: usize = 2;
    const NAME: &'static str = NavierStokesConfig::NAME;
    const MAX_GRID: usize = 1 << 10;

    fn with_grid(&self, n: usize) -> Result<Self> {
        Self::new(self.viscosity, self.forcing, n)
    }

    fn n(&self) -> usize {
        self.n
    }

    fn decay(&self, [k, l]: [i64; 2]) -> f64 {
        self.viscosity * TAU * TAU * (k * k + l * l) as f64
    }

    /// `f - u·∇w`.
    fn nonlinear(&mut self, w: &Spectrum, out: &mut Spectrum) {
        // Two real functions in one complex transform: velocity as u + iv, gradient as w_x + i w_y.
        self.velocity(w);
        self.flow.copy_from_slice(&self.grid.values);
        self.grid.synthesise(w.max, |[k, l], index| w.c[index] * Complex::new(-l as f64, k as f64) * TAU);
        for (gradient, flow) in self.grid.values.iter_mut().zip(&self.flow) {
            *gradient = Complex::new(-(gradient.re * flow.re + gradient.im * flow.im), 0.0);
        }
        self.grid.analyse(kept(self.n), |_, index, advection| out.c[index] = advection);
        // sin + cos at wave (1, 1) is Re (1 - i) e^{2πi(x + y)}.
        let force = Complex::new(0.5, -0.5) * self.forcing;
        for (k, force) in [([1, 1], force), ([-1, -1], force.conj())] {
            if let Some(index) = out.index(k) {
                out.c[index] += force;
            }
        }
    }

    fn speed(&mut self, w: &Spectrum) -> f64 {
        self.velocity(w);
        self.grid.values.iter().fold(0.0, |speed, u| (u.re.abs() + u.im.abs()).max(speed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fourier::waves;
    use crate::integrating_factor::Stepper;

    fn start(max: usize) -> Spectrum {
        let mut start = FIELD.sample(3, 4).unwrap().resized(max).unwrap();
        start.c.iter_mut().for_each(|c| *c *= 5.0);
        start
    }

    fn stepped(n: usize, steps: usize, start: &Spectrum) -> Spectrum {
        let mut flow = Flow::new(2e-3, 0.1, n).unwrap();
        let mut w = start.resized(kept(n)).unwrap();
        let mut stepper = Stepper::new(&flow, 1.0 / steps as f64).unwrap();
        (0..steps).for_each(|_| stepper.step(&mut flow, &mut w));
        w
    }

    fn difference(a: &Spectrum, b: &Spectrum) -> f64 {
        let b = b.resized(a.max).unwrap();
        a.c.iter().zip(&b.c).map(|(a, b)| (a - b).norm()).fold(0.0, f64::max)
    }

    #[test]
    fn the_nonlinear_term_is_the_convolution_by_definition() {
        let mut flow = Flow::new(1e-3, 0.0, 16).unwrap();
        let w = start(kept(16));
        let mut out = w.clone();
        flow.nonlinear(&w, &mut out);
        for k in waves(2, w.max) {
            let mut want = Complex::default();
            for p in waves(2, w.max).filter(|&p| p != [0, 0]) {
                let q = [k[0] - p[0], k[1] - p[1]];
                if let Some(other) = w.index(q) {
                    // u_p = i 2π (p_y, -p_x) ψ_p, ψ_p = w_p / |2πp|², ∇w_q = i 2π q w_q.
                    let cross = (p[1] * q[0] - p[0] * q[1]) as f64 / (p[0] * p[0] + p[1] * p[1]) as f64;
                    want += w.c[w.index(p).unwrap()] * w.c[other] * cross;
                }
            }
            assert!((out.c[w.index(k).unwrap()] - want).norm() < 1e-12 * w.amplitude().powi(2) * 121.0, "{k:?}");
        }
    }

    #[test]
    fn steps_are_of_order_four() {
        let exact = stepped(32, 512, &start(8));
        let errors = [8, 16, 32].map(|steps| difference(&exact, &stepped(32, steps, &start(8))));
        for pair in errors.windows(2) {
            let order = (pair[0] / pair[1]).log2();
            assert!((3.7..4.5).contains(&order), "{errors:?}");
        }
    }

    #[test]
    fn grids_converge_faster_than_any_power() {
        let exact = stepped(128, 64, &start(3));
        let errors = [16, 32, 64].map(|n| difference(&stepped(n, 64, &start(3)), &exact));
        assert!(errors[0] > 20.0 * errors[1] && errors[1] > 200.0 * errors[2], "{errors:?}");
    }

    #[test]
    fn refinement_meets_its_tolerance() {
        let mut solver = NavierStokesSolver::new(2e-3, 0.1).unwrap();
        let start = FIELD.sample(1, 2).unwrap();
        let exact = stepped(128, 512, &start);
        let found = solver.solve(&start, 1.0).unwrap();
        assert!(difference(&exact, &found) < 1e-7 * exact.amplitude(), "{}", difference(&exact, &found));
    }
}
