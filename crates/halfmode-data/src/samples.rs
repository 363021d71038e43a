//! Samples made in parallel, each by itself.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;

use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
use crate::fourier::{Grid, Spectrum};

/// Runs `work` on so many threads of its own; `None` uses the pool that is already there.
pub(crate) fn on_threads<T: Send>(threads: Option<NonZeroUsize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match threads {
        None => work(),
        Some(threads) => rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build()
            .map_err(|error| Error::Threads { threads: threads.get(), reason: error.to_string() })?
            .install(work),
    }
}

/// `n` samples of one channel on `grid`, in parallel. `one` fills input and output of one sample, with
/// what `scratch` gives to each thread; `progress(done, n)` is called after each.
///
/// # Shapes
/// - returns `x` and `y`: `[n, 1, grid…]`
pub(crate) fn make<S: Send>(
    n: usize,
    grid: &[usize],
    progress: &(dyn Fn(usize, usize) + Sync),
    scratch: impl Fn() -> Result<S> + Sync,
    one: impl Fn(&mut S, usize, &mut [f32], &mut [f32]) -> Result<()> + Sync,
) -> Result<FieldPairs> {
    let n_points: usize = grid.iter().product();
    let mut x = zeros(n * n_points)?;
    let mut y = zeros(n * n_points)?;
    let done = AtomicUsize::new(0);
    x.par_chunks_exact_mut(n_points).zip(y.par_chunks_exact_mut(n_points)).enumerate().try_for_each_init(
        || None,
        |kept, (sample, (x, y))| {
            let scratch = match kept {
                Some(scratch) => scratch,
                None => kept.insert(scratch()?),
            };
            one(scratch, sample, x, y)?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, n);
            Ok(())
        },
    )?;
    let shape = [&[n, 1], grid].concat();
    FieldPairs::new(array(&shape, x)?, array(&shape, y)?)
}

fn zeros(len: usize) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| Error::OutOfMemory { purpose: "the samples", bytes: len.saturating_mul(size_of::<f32>()) })?;
    values.resize(len, 0.0);
    Ok(values)
}

fn array(shape: &[usize], values: Vec<f32>) -> Result<ArrayD<f32>> {
    let found = values.len();
    ArrayD::from_shape_vec(IxDyn(shape), values).map_err(|_| Error::Length {
        operand: "samples",
        expected: shape.iter().product(),
        found,
    })
}

/// Most numbers in one array of a data set (16 GiB of f32).
pub(crate) const MAX_VALUES: usize = 1 << 32;

/// How much to generate.
pub(crate) struct Sizes {
    pub(crate) n: usize,
    pub(crate) resolution: usize,
    /// Axes of the grid.
    pub(crate) dim: u32,
    pub(crate) first_index: u64,
}

impl Sizes {
    /// Checks that the arrays have a size that someone may want, and the samples a random stream each.
    pub(crate) fn validate(&self, generator: &'static str, max_resolution: usize) -> Result<()> {
        let refuse = |field, value: String, expected: String| Err(Error::Config { generator, field, value, expected });
        if !(1..=max_resolution).contains(&self.resolution) {
            return refuse("resolution", self.resolution.to_string(), format!("in 1..={max_resolution}"));
        }
        let max_n = MAX_VALUES / self.resolution.pow(self.dim);
        if !(1..=max_n).contains(&self.n) {
            return refuse("n", self.n.to_string(), format!("in 1..={max_n} at this resolution"));
        }
        if self.first_index.checked_add(self.n as u64).is_none() {
            return refuse("first_index", self.first_index.to_string(), "at most 2^64 - 1 - n".to_owned());
        }
        Ok(())
    }
}

/// Refuses a value that is not in `low..=high`.
pub(crate) fn in_range(generator: &'static str, field: &'static str, value: f64, low: f64, high: f64) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::Config { generator, field, value: value.to_string(), expected: format!("in {low:e}..={high:e}") })
}

/// Samples `function` at the points of `grid`, rounded to f32.
pub(crate) fn store(grid: &mut Grid, function: &Spectrum, to: &mut [f32]) {
    grid.sample(function);
    for (to, from) in to.iter_mut().zip(&grid.values) {
        *to = from.re as f32;
    }
}
