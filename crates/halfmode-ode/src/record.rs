//! What a solve did, for those who ask.

use std::sync::{Arc, Mutex, PoisonError};

/// What a solve did, forward and backward.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SolveRecord {
    /// Steps taken.
    pub n_steps: usize,
    /// Where steps began and ended, `n_steps + 1` times.
    pub grid: Vec<f64>,
    /// Steps tried and rejected by step control.
    pub n_rejected: usize,
    /// Velocities computed, recomputation included.
    pub n_velocities: usize,
    /// Vector-Jacobian products of whole steps, those that overflowed included.
    pub n_vjps: usize,
    /// Products that overflowed and were tried again.
    pub n_retries: usize,
    /// Most tries that one step took.
    pub most_tries: usize,
    /// The adjoint's scale in each step of the backward sweep, last step first; empty without scaling.
    pub scales: Vec<f64>,
}

/// Where a solve writes its [`SolveRecord`]; clones write to the same place.
#[derive(Clone, Debug, Default)]
pub struct Record(Arc<Mutex<SolveRecord>>);

impl Record {
    /// The record so far.
    #[must_use]
    pub fn get(&self) -> SolveRecord {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut SolveRecord)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
