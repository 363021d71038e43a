//! Which instructions kernels may use: chosen once, at run time.

use std::sync::LazyLock;

/// With this variable set to anything but 0, kernels take their portable paths.
pub(crate) const PORTABLE: &str = "HALFMODE_PORTABLE";

static IS_PORTABLE: LazyLock<bool> = LazyLock::new(|| std::env::var_os(PORTABLE).is_some_and(|value| value != "0"));

/// Whether kernels of this crate use AVX-512: the processor has it, and `HALFMODE_PORTABLE` is not set.
#[must_use]
pub fn uses_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f") && !*IS_PORTABLE;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The vector instructions that loops are compiled for.
pub(crate) fn vectors() -> pulp::Arch {
    if *IS_PORTABLE { pulp::Arch::Scalar } else { pulp::Arch::new() }
}
