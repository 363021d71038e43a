//! The problems whose data can be generated, as one type.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;

use serde::Serialize;

use crate::burgers::BurgersConfig;
use crate::cache::{CacheOutcome, Generator, load_or_generate};
use crate::darcy::DarcyConfig;
use crate::darcy_solver::DarcySolver;
use crate::dataset::FieldPairs;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::navier_stokes::NavierStokesConfig;

/// One of the generators with its settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Problem {
    /// Darcy flow.
    Darcy(DarcyConfig),
    /// Burgers' equation.
    Burgers(BurgersConfig),
    /// Navier-Stokes equations.
    NavierStokes(NavierStokesConfig),
}

impl Problem {
    /// The generator's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Darcy(_) => DarcyConfig::NAME,
            Self::Burgers(_) => BurgersConfig::NAME,
            Self::NavierStokes(_) => NavierStokesConfig::NAME,
        }
    }

    /// Number of samples.
    #[must_use]
    pub fn n(&self) -> usize {
        match self {
            Self::Darcy(config) => config.n,
            Self::Burgers(config) => config.n,
            Self::NavierStokes(config) => config.n,
        }
    }

    /// Points per axis.
    #[must_use]
    pub fn grid(&self) -> Vec<usize> {
        match self {
            Self::Darcy(config) => vec![config.resolution; 2],
            Self::Burgers(config) => vec![config.resolution],
            Self::NavierStokes(config) => vec![config.resolution; 2],
        }
    }

    /// The largest number of points per axis.
    #[must_use]
    pub fn max_resolution(&self) -> usize {
        match self {
            Self::Darcy(_) => DarcySolver::MAX_RESOLUTION,
            Self::Burgers(_) => BurgersConfig::MAX_RESOLUTION,
            Self::NavierStokes(_) => NavierStokesConfig::MAX_RESOLUTION,
        }
    }

    /// The same with streams that no training set of less than 2³² samples uses.
    #[must_use]
    pub fn for_test(self) -> Self {
        match self {
            Self::Darcy(config) => Self::Darcy(config.for_test()),
            Self::Burgers(config) => Self::Burgers(config.for_test()),
            Self::NavierStokes(config) => Self::NavierStokes(config.for_test()),
        }
    }

    /// Checks that every setting is in range.
    ///
    /// # Errors
    /// [`Error::Config`] with the name of the setting.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Darcy(config) => config.validate(),
            Self::Burgers(config) => config.validate(),
            Self::NavierStokes(config) => config.validate(),
        }
    }

    /// Makes the samples. Arguments as in [`generate`](crate::generate).
    ///
    /// # Errors
    /// What the generator says.
    pub fn generate(
        &self,
        threads: Option<NonZeroUsize>,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<FieldPairs> {
        match self {
            Self::Darcy(config) => config.generate(threads, progress),
            Self::Burgers(config) => config.generate(threads, progress),
            Self::NavierStokes(config) => config.generate(threads, progress),
        }
    }

    /// Loads the samples from `folder`, or makes and stores them: see [`load_or_generate`].
    ///
    /// # Errors
    /// What the generator says.
    pub fn load_or_generate(
        &self,
        folder: &Path,
        threads: Option<NonZeroUsize>,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(FieldPairs, CacheOutcome)> {
        match self {
            Self::Darcy(config) => load_or_generate(config, folder, threads, progress),
            Self::Burgers(config) => load_or_generate(config, folder, threads, progress),
            Self::NavierStokes(config) => load_or_generate(config, folder, threads, progress),
        }
    }
}

/// Name and grid, as in `darcy 64x64`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid: Vec<String> = self.grid().iter().map(usize::to_string).collect();
        write!(f, "{} {}", self.name(), grid.join("x"))
    }
}
