//! The devices that conformance tests run on.

use halfmode_tensor::Device;

/// The CPU with one thread and with three; a GPU joins here once there is a backend for one.
#[must_use]
pub fn devices() -> Vec<Device> {
    [1, 3].into_iter().map(|threads| Device::cpu(threads).unwrap()).collect()
}
