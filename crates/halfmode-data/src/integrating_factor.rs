//! Time stepping of `dw_k/dt = -d_k w_k + N_k(w)` in Fourier space, to a stated accuracy.
//!
//! Diffusion is exact (an integrating factor), the rest is the classical Runge-Kutta method of order
//! four. The grid doubles until the solution needs no more waves, the number of steps until the
//! solution no longer changes.

use crate::error::{Error, Result};
use crate::fourier::{Complex, Spectrum, waves, zeros};

/// Change of a coefficient by halving the step, relative to the largest one, that is accepted.
/// Values are stored in f32, which rounds at 6e-8.
const STEP_TOLERANCE: f64 = 1e-7;
/// The largest coefficient of the upper fifth of waves that is accepted underway and at the end,
/// relative to the largest one of all.
const TAIL_UNDERWAY: f64 = 1e-3;
const TAIL_AT_THE_END: f64 = 1e-8;
/// The first try: step times the fastest rate of advection.
const COURANT: f64 = 2.0;
/// Runge-Kutta steps that no problem of this crate should need.
const MAX_STEPS: usize = 1 << 20;

/// A problem on a grid whose products of two functions are free of aliases.
pub(crate) trait Periodic: Sized {
    /// Axes.
    const DIM: usize;
    /// Name in messages.
    const NAME: &'static str;
    /// Points per axis of the finest grid.
    const MAX_GRID: usize;

    /// The same problem on `n` points per axis.
    fn with_grid(&self, n: usize) -> Result<Self>;
    /// Points per axis.
    fn n(&self) -> usize;
    /// Rate at which a wave decays.
    fn decay(&self, k: [i64; 2]) -> f64;
    /// `N(w)`.
    fn nonlinear(&mut self, w: &Spectrum, out: &mut Spectrum);
    /// The largest speed in `w`, per unit length.
    fn speed(&mut self, w: &Spectrum) -> f64;
}

/// The largest wave number that `n` points keep: two thirds of what they resolve.
pub(crate) fn kept(n: usize) -> usize {
    (n.max(4) - 1) / 3
}

/// `w` at `time`, on the grid and with the steps that the accuracy needs. `problem` keeps the grid.
pub(crate) fn solve<P: Periodic>(problem: &mut P, start: &Spectrum, time: f64) -> Result<Spectrum> {
    let unresolved = |n: usize, steps: usize| Error::Unresolved { problem: P::NAME, n, steps };
    'grids: loop {
        let (n, max) = (problem.n(), kept(problem.n()));
        let w = start.resized(max)?;
        let rate = std::f64::consts::TAU * max as f64 * problem.speed(&w);
        let mut steps = ((time * rate / COURANT).ceil().min(MAX_STEPS as f64) as usize).max(4);
        let mut coarse: Option<Spectrum> = None;
        while steps <= MAX_STEPS {
            let mut stepper = Stepper::new(problem, time / steps as f64)?;
            let mut fine = w.clone();
            let mut tail = 0.0f64;
            for _ in 0..steps {
                stepper.step(problem, &mut fine);
                let now = tail_of(&fine);
                tail = if now.is_nan() { now } else { tail.max(now) };
                if now.is_nan() || now > TAIL_UNDERWAY {
                    break;
                }
            }
            if tail > TAIL_UNDERWAY || tail_of(&fine) > TAIL_AT_THE_END {
                if 2 * n > P::MAX_GRID {
                    return Err(unresolved(n, steps));
                }
                *problem = problem.with_grid(2 * n)?;
                continue 'grids;
            }
            if coarse.is_some_and(|coarse| distance(&coarse, &fine) <= STEP_TOLERANCE * fine.amplitude()) {
                return Ok(fine);
            }
            coarse = (!tail.is_nan()).then_some(fine);
            steps *= 2;
        }
        return Err(unresolved(n, steps));
    }
}

fn distance(a: &Spectrum, b: &Spectrum) -> f64 {
    a.c.iter().zip(&b.c).map(|(a, b)| (a - b).norm()).fold(0.0, f64::max)
}

/// The largest coefficient of the upper fifth of waves, relative to the largest of all; NaN where one
/// is not finite.
fn tail_of(w: &Spectrum) -> f64 {
    let bound = (4 * w.max / 5) as i64;
    let (mut tail, mut all) = (0.0f64, f64::MIN_POSITIVE);
    for (k, c) in waves(w.dim, w.max).zip(&w.c) {
        let square = c.norm_sqr();
        if !square.is_finite() {
            return f64::NAN;
        }
        if k[0].abs().max(k[1].abs()) > bound {
            tail = tail.max(square);
        }
        all = all.max(square);
    }
    (tail / all).sqrt()
}

/// Steps of one length.
pub(crate) struct Stepper {
    step: f64,
    /// `e^{-d step / 2}`.
    half: Vec<f64>,
    stage: Spectrum,
    slope: Spectrum,
    sum: Vec<Complex>,
}

impl Stepper {
    pub(crate) fn new<P: Periodic>(problem: &P, step: f64) -> Result<Self> {
        let (dim, max) = (P::DIM, kept(problem.n()));
        let stage = Spectrum::zero(dim, max)?;
        let half = waves(dim, max).map(|k| libm::exp(-0.5 * step * problem.decay(k))).collect();
        let sum = zeros(stage.c.len(), "a time step")?;
        Ok(Self { step, half, slope: stage.clone(), stage, sum })
    }

    /// One step of the Runge-Kutta method for `e^{dt} w`.
    pub(crate) fn step<P: Periodic>(&mut self, problem: &mut P, w: &mut Spectrum) {
        let Self { step, half, stage, slope, sum } = self;
        let step = *step;
        problem.nonlinear(w, slope);
        for (i, &e) in half.iter().enumerate() {
            stage.c[i] = (w.c[i] + slope.c[i] * (0.5 * step)) * e;
            sum[i] = (w.c[i] + slope.c[i] * (step / 6.0)) * (e * e);
        }
        problem.nonlinear(stage, slope);
        for (i, &e) in half.iter().enumerate() {
            stage.c[i] = w.c[i] * e + slope.c[i] * (0.5 * step);
            sum[i] += slope.c[i] * (e * step / 3.0);
        }
        problem.nonlinear(stage, slope);
        for (i, &e) in half.iter().enumerate() {
            stage.c[i] = (w.c[i] * e + slope.c[i] * step) * e;
            sum[i] += slope.c[i] * (e * step / 3.0);
        }
        problem.nonlinear(stage, slope);
        for ((w, sum), slope) in w.c.iter_mut().zip(sum).zip(&slope.c) {
            *w = *sum + slope * (step / 6.0);
        }
    }
}
