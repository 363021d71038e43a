//! The devices that conformance tests run on.

use halfmode_tensor::Device;

/// The CPU with one thread and with three.
#[must_use]
pub fn devices() -> Vec<Device> {
    [1, 3].into_iter().map(|threads| Device::cpu(threads).unwrap()).collect()
}

/// The first GPU, or `None` where there is none: tests then pass without having run. With
/// `HALFMODE_REQUIRE_CUDA=1` they fail instead.
///
/// # Panics
/// If a GPU is required and there is none, or the build has no GPU backend.
#[must_use]
pub fn gpu() -> Option<Device> {
    let required = std::env::var_os("HALFMODE_REQUIRE_CUDA").is_some_and(|it| it == "1");
    #[cfg(feature = "cuda")]
    {
        let cache = std::env::temp_dir().join("halfmode-test-kernels");
        match Device::cuda(0, Some(cache)) {
            Ok(device) => Some(device),
            Err(err) => {
                assert!(!required, "HALFMODE_REQUIRE_CUDA is set, but: {err}");
                None
            }
        }
    }
    #[cfg(not(feature = "cuda"))]
    {
        assert!(!required, "HALFMODE_REQUIRE_CUDA is set, but this build has no GPU backend");
        None
    }
}
