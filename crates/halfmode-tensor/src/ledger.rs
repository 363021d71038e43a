//! The memory ledger: who holds how many bytes, and what the most was.

use std::fmt;
use std::sync::{Mutex, PoisonError};

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Weights that forward and backward read.
    Param,
    /// High-precision copies of weights that are stored in half.
    Master,
    /// Moments and other state of an optimiser.
    OptimState,
    /// Gradients of parameters.
    Grad,
    /// Kept by an op for its backward pass.
    Saved,
    /// Values that travel between ops.
    Activation,
    /// Scratch inside an op.
    Workspace,
    /// Constant tables: DFT and Legendre matrices.
    Table,
    /// Samples and batches.
    Data,
    /// Running statistics.
    State,
}

impl Purpose {
    /// All purposes, in the order of reports.
    pub const ALL: [Purpose; 10] = [
        Purpose::Param,
        Purpose::Master,
        Purpose::OptimState,
        Purpose::Grad,
        Purpose::Saved,
        Purpose::Activation,
        Purpose::Workspace,
        Purpose::Table,
        Purpose::Data,
        Purpose::State,
    ];

    /// The name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Purpose::Param => "param",
            Purpose::Master => "master",
            Purpose::OptimState => "optim_state",
            Purpose::Grad => "grad",
            Purpose::Saved => "saved",
            Purpose::Activation => "activation",
            Purpose::Workspace => "workspace",
            Purpose::Table => "table",
            Purpose::Data => "data",
            Purpose::State => "state",
        }
    }

    /// Whether the bytes count as activations: saved values, values in flight and scratch.
    #[must_use]
    pub const fn is_activation(self) -> bool {
        matches!(self, Purpose::Saved | Purpose::Activation | Purpose::Workspace)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Bytes live now and the most that were live at once since the last reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes live now.
    pub live: usize,
    /// The most bytes that were live at once.
    pub peak: usize,
}

impl Usage {
    fn add(&mut self, bytes: usize) {
        self.live += bytes;
        self.peak = self.peak.max(self.live);
    }
}

/// A snapshot of a ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// All purposes together; its peak is the peak of the sum, not the sum of peaks.
    pub total: Usage,
    /// Saved, activation and workspace bytes together.
    pub activations: Usage,
    by_purpose: [Usage; Purpose::ALL.len()],
}

impl MemoryStats {
    /// Bytes of one purpose.
    #[must_use]
    pub fn of(&self, purpose: Purpose) -> Usage {
        self.by_purpose[purpose as usize]
    }

    /// What each purpose held at the moment when the total was at its peak is not kept; this is
    /// each purpose's own peak.
    pub fn iter(&self) -> impl Iterator<Item = (Purpose, Usage)> + '_ {
        Purpose::ALL.into_iter().map(|purpose| (purpose, self.of(purpose)))
    }
}

impl fmt::Display for MemoryStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<12} {:>14} {:>14}", "purpose", "live bytes", "peak bytes")?;
        for (purpose, usage) in self.iter().filter(|(_, usage)| usage.peak > 0) {
            writeln!(f, "{purpose:<12} {:>14} {:>14}", usage.live, usage.peak)?;
        }
        writeln!(f, "{:<12} {:>14} {:>14}", "activations", self.activations.live, self.activations.peak)?;
        write!(f, "{:<12} {:>14} {:>14}", "total", self.total.live, self.total.peak)
    }
}

/// Counts the bytes of one device by purpose. Every buffer reports its birth and its death.
#[derive(Debug, Default)]
pub struct Ledger {
    stats: Mutex<MemoryStats>,
}

impl Ledger {
    pub(crate) fn allocated(&self, purpose: Purpose, bytes: usize) {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.total.add(bytes);
        if purpose.is_activation() {
            stats.activations.add(bytes);
        }
        stats.by_purpose[purpose as usize].add(bytes);
    }

    pub(crate) fn freed(&self, purpose: Purpose, bytes: usize) {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.total.live -= bytes;
        if purpose.is_activation() {
            stats.activations.live -= bytes;
        }
        stats.by_purpose[purpose as usize].live -= bytes;
    }

    /// The state of the ledger now.
    #[must_use]
    pub fn stats(&self) -> MemoryStats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts new peaks at what is live now.
    pub fn reset_peak(&self) {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let MemoryStats { total, activations, by_purpose } = &mut *stats;
        for usage in by_purpose.iter_mut().chain([total, activations]) {
            usage.peak = usage.live;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_of_the_sum_is_not_the_sum_of_peaks() {
        let ledger = Ledger::default();
        ledger.allocated(Purpose::Saved, 100);
        ledger.freed(Purpose::Saved, 100);
        ledger.allocated(Purpose::Param, 70);
        let stats = ledger.stats();
        assert_eq!(stats.total, Usage { live: 70, peak: 100 });
        assert_eq!(stats.activations, Usage { live: 0, peak: 100 });
        assert_eq!(stats.of(Purpose::Param), Usage { live: 70, peak: 70 });
        ledger.reset_peak();
        assert_eq!(ledger.stats().total, Usage { live: 70, peak: 70 });
    }
}
