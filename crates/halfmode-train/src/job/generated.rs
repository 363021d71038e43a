//! Data that are generated: their part of the configuration, and what makes them.

use crate::job::{DarcyPtData, DataConfig, FileData, JobError};
use halfmode_data::{BurgersConfig, DarcyConfig, DarcySolver, NavierStokesConfig, Problem};
use serde::{Deserialize, Serialize};

/// Generated Darcy flow: `-div(a grad u) = 1` on the unit square.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DarcyData {
    /// Training samples.
    pub n_train: usize,
    /// Test samples, the same functions at every resolution.
    pub n_test: usize,
    /// Points per axis in training.
    pub resolution: usize,
    /// Points per axis in testing.
    pub test_resolutions: Vec<usize>,
    /// Seed of the samples.
    pub seed: u64,
}

impl Default for DarcyData {
    fn default() -> Self {
        DarcyData { n_train: 1000, n_test: 100, resolution: 64, test_resolutions: vec![64, 128], seed: 0 }
    }
}

/// Generated solutions of `u_t + u u_x = ν u_xx` on the periodic interval: from the velocity at time 0 to
/// that at `time`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BurgersData {
    /// Training samples.
    pub n_train: usize,
    /// Test samples, the same functions at every resolution.
    pub n_test: usize,
    /// Points in training.
    pub resolution: usize,
    /// Points in testing.
    pub test_resolutions: Vec<usize>,
    /// Seed of the samples.
    pub seed: u64,
    /// Viscosity ν, in lengths² per time.
    pub viscosity: f64,
    /// Time of the output.
    pub time: f64,
}

impl Default for BurgersData {
    fn default() -> Self {
        let BurgersConfig { viscosity, time, .. } = BurgersConfig::new(1, 1, 0);
        let test_resolutions = vec![256, 1024];
        BurgersData { n_train: 1000, n_test: 100, resolution: 256, test_resolutions, seed: 0, viscosity, time }
    }
}

/// Generated flows `w_t + u·∇w = ν Δw + f` on the periodic square: from the vorticity at time 0 to that at
/// `time`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NavierStokesData {
    /// Training samples.
    pub n_train: usize,
    /// Test samples, the same functions at every resolution.
    pub n_test: usize,
    /// Points per axis in training.
    pub resolution: usize,
    /// Points per axis in testing.
    pub test_resolutions: Vec<usize>,
    /// Seed of the samples.
    pub seed: u64,
    /// Viscosity ν, in lengths² per time.
    pub viscosity: f64,
    /// Time of the output.
    pub time: f64,
    /// Amplitude of the force `f`.
    pub forcing: f64,
}

impl Default for NavierStokesData {
    fn default() -> Self {
        let NavierStokesConfig { viscosity, time, forcing, .. } = NavierStokesConfig::new(1, 1, 0);
        let test_resolutions = vec![64, 128];
        let (n_train, n_test, resolution) = (1000, 100, 64);
        NavierStokesData { n_train, n_test, resolution, test_resolutions, seed: 0, viscosity, time, forcing }
    }
}

/// Where samples come from.
#[derive(Clone, Copy, Debug)]
pub enum DataSource<'a> {
    /// A generator.
    Generated(GeneratedData<'a>),
    /// neuraloperator's Darcy files.
    DarcyPt(&'a DarcyPtData),
    /// Arrays in `.npz` files.
    File(&'a FileData),
}

/// What jobs on generated data have in common.
#[derive(Clone, Copy, Debug)]
pub struct GeneratedData<'a> {
    /// Training samples.
    pub n_train: usize,
    /// Test samples.
    pub n_test: usize,
    /// Points per axis in training.
    pub resolution: usize,
    /// Points per axis in testing.
    pub test_resolutions: &'a [usize],
    /// Seed of the samples.
    pub seed: u64,
    data: &'a DataConfig,
}

impl GeneratedData<'_> {
    /// What makes the training samples.
    #[must_use]
    pub fn train(&self) -> Problem {
        self.problem(self.n_train, self.resolution)
    }

    /// What makes the test samples of a resolution.
    #[must_use]
    pub fn test(&self, resolution: usize) -> Problem {
        self.problem(self.n_test, resolution).for_test()
    }

    /// Checks the settings of the problem itself; how much fits is a matter of memory.
    pub(crate) fn validate(&self) -> Result<(), JobError> {
        match self.problem(1, 2).validate() {
            Err(halfmode_data::Error::Config { field, value, expected, .. }) => Err(JobError::Config {
                key: format!("data.{field}"),
                why: format!("is {value}, but must be {expected}"),
            }),
            other => Ok(other?),
        }
    }

    fn problem(&self, n: usize, resolution: usize) -> Problem {
        let seed = self.seed;
        match self.data {
            DataConfig::Burgers(BurgersData { viscosity, time, .. }) => Problem::Burgers(BurgersConfig {
                viscosity: *viscosity,
                time: *time,
                ..BurgersConfig::new(n, resolution, seed)
            }),
            DataConfig::NavierStokes(NavierStokesData { viscosity, time, forcing, .. }) => {
                Problem::NavierStokes(NavierStokesConfig {
                    viscosity: *viscosity,
                    time: *time,
                    forcing: *forcing,
                    ..NavierStokesConfig::new(n, resolution, seed)
                })
            }
            _ => Problem::Darcy(DarcyConfig::new(n, resolution, seed)),
        }
    }
}

impl DataConfig {
    /// Where the samples come from, whatever generates them.
    #[must_use]
    pub fn source(&self) -> DataSource<'_> {
        let (n_train, n_test, resolution, test_resolutions, seed) = match self {
            DataConfig::Darcy(it) => (it.n_train, it.n_test, it.resolution, &it.test_resolutions, it.seed),
            DataConfig::Burgers(it) => (it.n_train, it.n_test, it.resolution, &it.test_resolutions, it.seed),
            DataConfig::NavierStokes(it) => (it.n_train, it.n_test, it.resolution, &it.test_resolutions, it.seed),
            DataConfig::File(it) => return DataSource::File(it),
            DataConfig::DarcyPt(it) => return DataSource::DarcyPt(it),
        };
        DataSource::Generated(GeneratedData { n_train, n_test, resolution, test_resolutions, seed, data: self })
    }

    /// How the samples are made, unless they are read from files.
    #[must_use]
    pub fn generated(&self) -> Option<GeneratedData<'_>> {
        match self.source() {
            DataSource::Generated(generated) => Some(generated),
            DataSource::DarcyPt(_) | DataSource::File(_) => None,
        }
    }

    /// Numbers of samples, all resolutions (that of training first) and the largest that is possible, of data
    /// on square grids.
    pub(crate) fn sizes(&self) -> Option<([usize; 2], Vec<usize>, usize)> {
        let all = |first: usize, others: &[usize]| std::iter::once(first).chain(others.iter().copied()).collect();
        if let DataConfig::DarcyPt(it) = self {
            let resolutions = all(it.resolution, &it.test_resolutions);
            return Some(([it.n_train, it.n_test], resolutions, DarcySolver::MAX_RESOLUTION));
        }
        let it = self.generated()?;
        let max_resolution = it.train().max_resolution();
        Some(([it.n_train, it.n_test], all(it.resolution, it.test_resolutions), max_resolution))
    }

    /// The number of axes of data on square grids, and how to say it.
    pub(crate) fn axes(&self) -> (usize, &'static str) {
        match self {
            DataConfig::Burgers(_) => (1, "Burgers data have one axis"),
            DataConfig::NavierStokes(_) => (2, "Navier-Stokes data have two axes"),
            _ => (2, "Darcy data have two axes"),
        }
    }
}
