//! What the system says about memory.

use crate::cli::error::{CliError, Exit};
use crate::cli::text;
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

/// Refuses what takes more bytes than there are; `what` does not fit.
pub(crate) fn check(what: &str, needed: usize) -> Result<(), CliError> {
    let Some(available) = available().filter(|&available| needed > available) else { return Ok(()) };
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
