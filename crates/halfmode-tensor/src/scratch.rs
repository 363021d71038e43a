//! Scratch of the worker threads, counted by the ledger.

use crate::{Device, Ledger, Purpose, Real};
use std::cell::RefCell;
use std::sync::Arc;

/// A reservation of per-thread scratch. The buffers themselves are kept by the threads and
/// reused; the ledger counts them while the reservation lives.
#[derive(Debug)]
pub struct Scratch {
    ledger: Arc<Ledger>,
    bytes: usize,
    len: usize,
}

thread_local! {
    static F32: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static F64: RefCell<Vec<f64>> = const { RefCell::new(Vec::new()) };
}

impl Scratch {
    pub(crate) fn new(device: &Device, len: usize, bytes_each: usize) -> Self {
        let bytes = len * bytes_each * device.n_threads();
        device.ledger().allocated(Purpose::Workspace, bytes);
        Scratch { ledger: Arc::clone(device.ledger()), bytes, len }
    }

    /// Bytes that this reservation counts, over all threads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lends the calling thread its scratch of `len` values. The contents are arbitrary.
    /// Must not be nested: an inner call would get a fresh buffer that nobody counts.
    pub fn with<R: Real, T>(&self, work: impl FnOnce(&mut [R]) -> T) -> T {
        let mut buffer = R::take_scratch();
        if buffer.len() < self.len {
            buffer.resize(self.len, R::ZERO);
        }
        let result = work(&mut buffer[..self.len]);
        R::return_scratch(buffer);
        result
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.ledger.freed(Purpose::Workspace, self.bytes);
    }
}

pub(crate) fn take_f32() -> Vec<f32> {
    F32.with(RefCell::take)
}

pub(crate) fn return_f32(buffer: Vec<f32>) {
    F32.with(|slot| slot.replace(buffer));
}

pub(crate) fn take_f64() -> Vec<f64> {
    F64.with(RefCell::take)
}

pub(crate) fn return_f64(buffer: Vec<f64>) {
    F64.with(|slot| slot.replace(buffer));
}
