//! What the system says about memory.

use crate::cli::error::{CliError, Exit};
use crate::cli::{gpu, text};
use halfmode::tensor::{Device, Target};
use std::fs;

fn kib(file: &str, key: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Bytes of memory of the machine.
pub(crate) fn total() -> Option<usize> {
    kib("/proc/meminfo", "MemTotal")
}

/// Bytes that can be had now, within the limits of the control group and of the process.
pub(crate) fn available() -> Option<usize> {
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    [kib("/proc/meminfo", "MemAvailable"), group, addresses()].into_iter().flatten().min()
}

/// Addresses that the process may still take (`ulimit -v`), in bytes.
fn addresses() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: usize = limit.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(kib("/proc/self/status", "VmSize")?))
}

/// Bytes that can be had now on a device.
pub(crate) fn room(device: &Device) -> Option<usize> {
    if device.is_cpu() { available() } else { gpu::room(device) }
}

/// Bytes that a process takes for tensors of `planned` bytes. On a GPU the pool rounds up and libraries have
/// workspaces: of steps that take more than a gigabyte, up to 22 % of what was planned (`docs/benchmarks.md`).
pub(crate) fn taken(planned: usize, target: Target) -> usize {
    if matches!(target, Target::Cpu { .. }) { planned } else { planned.saturating_add(planned / 4) }
}

/// Refuses what takes more bytes than the machine has; `what` does not fit.
pub(crate) fn check(what: &str, needed: usize) -> Result<(), CliError> {
    refuse_above(available(), what, needed)
}

/// As [`check`] for tensors on a device.
pub(crate) fn check_on(device: &Device, what: &str, planned: usize) -> Result<(), CliError> {
    refuse_above(room(device), what, taken(planned, device.target()))
}

fn refuse_above(available: Option<usize>, what: &str, needed: usize) -> Result<(), CliError> {
    let Some(available) = available.filter(|&available| needed > available) else { return Ok(()) };
    let why = format!("it takes {}, of which {} are available", text::bytes(needed), text::bytes(available));
    Err(CliError::new(Exit::Device, format!("{what} does not fit memory")).why(why))
}

/// The most memory that the process held since [`reset_peak_rss`].
pub(crate) fn peak_rss() -> Option<usize> {
    kib("/proc/self/status", "VmHWM")
}

/// Starts a new peak at what the process holds now; false where the system does not know how.
pub(crate) fn reset_peak_rss() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// A GPU that had no room for what was asked of it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom {
    /// What was asked for.
    pub(crate) bytes: usize,
    /// What the driver has free.
    pub(crate) free: usize,
    /// What the GPU has in all.
    pub(crate) total: usize,
    /// What this process holds.
    pub(crate) held: usize,
}

impl NoRoom {
    /// The facts in a sentence.
    pub(crate) fn why(&self) -> String {
        let [bytes, free, total, held] = [self.bytes, self.free, self.total, self.held].map(text::bytes);
        format!("{bytes} were asked for; of {total} in all {free} are free, and this run holds {held}")
    }

    /// The error, without help.
    pub(crate) fn error(&self) -> CliError {
        CliError::new(Exit::Device, "the GPU is out of memory").why(self.why())
    }

    /// What a run that is alone on the GPU could have.
    pub(crate) fn room(&self) -> usize {
        self.free.saturating_add(self.held)
    }
}
