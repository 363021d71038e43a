//! Darcy flow data: a two-valued random coefficient and the pressure it causes.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::cache::Generator;
use crate::darcy_solver::DarcySolver;
use crate::dataset::FieldPairs;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::grf::CosineField;
use crate::samples;

/// Cosine modes per axis of the field behind the coefficient, on every grid.
pub const FIELD_MODES: usize = 64;
/// τ² in the covariance `(-Δ + τ²)^-2` of that field.
pub const FIELD_TAU2: f64 = 9.0;
/// The exponent α of that covariance.
pub const FIELD_ALPHA: f64 = 2.0;

/// What to generate: `-div(a grad u) = 1` on the unit square, `u = 0` on the boundary.
///
/// `a` is [`high`](Self::high) where a Gaussian random field is at least 0 and
/// [`low`](Self::low) elsewhere. Sample `i` depends on `seed`, `first_index + i` and the values
/// alone, so two resolutions with the same seed and indices hold the same functions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DarcyConfig {
    /// Number of samples.
    pub n: usize,
    /// Cells per side.
    pub resolution: usize,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Number of the first sample's random stream. Disjoint ranges give independent samples.
    #[serde(default)]
    pub first_index: u64,
    /// Coefficient where the field is at least 0.
    #[serde(default = "default_high")]
    pub high: f64,
    /// Coefficient where the field is negative.
    #[serde(default = "default_low")]
    pub low: f64,
}

fn default_high() -> f64 {
    12.0
}

fn default_low() -> f64 {
    3.0
}

impl DarcyConfig {
    /// The first stream of test samples by convention; training samples count from 0.
    pub const TEST_FIRST_INDEX: u64 = 1 << 32;

    /// Most numbers in one array of a data set (16 GiB of f32).
    pub const MAX_VALUES: usize = samples::MAX_VALUES;

    /// `n` training samples with the usual coefficients 12 and 3.
    #[must_use]
    pub fn new(n: usize, resolution: usize, seed: u64) -> Self {
        Self { n, resolution, seed, first_index: 0, high: default_high(), low: default_low() }
    }

    /// The same with streams that no training set of less than 2³² samples uses.
    #[must_use]
    pub fn for_test(self) -> Self {
        Self { first_index: Self::TEST_FIRST_INDEX, ..self }
    }

    /// Checks that every setting is in range.
    ///
    /// # Errors
    /// [`Error::Config`] with the name of the setting.
    pub fn validate(&self) -> Result<()> {
        let sizes = samples::Sizes { n: self.n, resolution: self.resolution, dim: 2, first_index: self.first_index };
        sizes.validate(Self::NAME, DarcySolver::MAX_RESOLUTION)?;
        for (field, value) in [("high", self.high), ("low", self.low)] {
            // Far beyond any physics, and far inside the range of f32 and of the solver.
            samples::in_range(Self::NAME, field, value, 1e-12, 1e12)?;
        }
        Ok(())
    }
}

impl Generator for DarcyConfig {
    const NAME: &'static str = "darcy";
    const VERSION: u32 = 1;

    fn generate(&self, threads: Option<NonZeroUsize>, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FieldPairs> {
        generate(self, threads, progress)
    }
}

/// Generates Darcy samples, in parallel over samples.
///
/// `threads` is the number of worker threads; `None` uses the pool that is already there.
/// `progress(done, total)` is called after every sample, from any thread, with growing counts
/// that may arrive slightly out of order. The result is the same bits for every thread count.
///
/// # Shapes
/// - `x`: `[n, 1, resolution, resolution]`, the coefficient
/// - `y`: the same shape, the pressure at cell centres; solved in f64, stored in f32
///
/// # Errors
/// [`Error::Config`] if a setting is out of range, [`Error::Threads`], [`Error::OutOfMemory`],
/// [`Error::NotPositiveDefinite`].
pub fn generate(
    config: &DarcyConfig,
    threads: Option<NonZeroUsize>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<FieldPairs> {
    config.validate()?;
    samples::on_threads(threads, || generate_here(config, progress))
}

fn generate_here(config: &DarcyConfig, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FieldPairs> {
    let resolution = config.resolution;
    let n_cells = resolution * resolution;
    let sampler = CosineField::new(FIELD_MODES, FIELD_TAU2, FIELD_ALPHA)?.sampler(resolution)?;
    let solver = DarcySolver::new(resolution)?;
    let rhs = vec![1.0; n_cells];
    let one = |scratch: &mut Scratch, sample: usize, x: &mut [f32], y: &mut [f32]| {
        let Scratch { workspace, products, field, solution } = scratch;
        let stream = config.first_index + sample as u64;
        sampler.sample_into(config.seed, stream, products, field);
        for value in field.iter_mut() {
            *value = if *value >= 0.0 { config.high } else { config.low };
        }
        solver.solve_into(workspace, field, &rhs, solution)?;
        for (to, &from) in x.iter_mut().zip(field.iter()) {
            *to = from as f32;
        }
        for (to, &from) in y.iter_mut().zip(solution.iter()) {
            *to = from as f32;
        }
        Ok(())
    };
    samples::make(config.n, &[resolution; 2], progress, || Scratch::new(&solver), one)
}

/// What one thread reuses from sample to sample.
struct Scratch {
    workspace: crate::DarcyWorkspace,
    products: Vec<f64>,
    field: Vec<f64>,
    solution: Vec<f64>,
}

impl Scratch {
    fn new(solver: &DarcySolver) -> Result<Self> {
        let workspace = solver.workspace()?;
        Ok(Self { workspace, products: Vec::new(), field: Vec::new(), solution: vec![0.0; solver.n() * solver.n()] })
    }
}
