//! What the system says about memory.

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

/// Bytes that can be had now, within the limit of the control group.
pub(crate) fn available() -> Option<usize> {
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    match (kib("/proc/meminfo", "MemAvailable"), limit) {
        (Some(free), Some(limit)) => Some(free.min(limit)),
        (free, limit) => free.or(limit),
    }
}

/// The most memory that the process held since [`reset_peak_rss`].
pub(crate) fn peak_rss() -> Option<usize> {
    kib("/proc/self/status", "VmHWM")
}

/// Starts a new peak at what the process holds now; false where the system does not know how.
pub(crate) fn reset_peak_rss() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}
