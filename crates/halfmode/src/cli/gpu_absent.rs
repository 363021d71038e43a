//! What a build without the feature `cuda` says of GPUs.

use crate::cli::error::{CliError, Exit};
use crate::cli::memory::NoRoom;
use halfmode::tensor::{Device, Error as TensorError, Target};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The help of `--device`.
pub(crate) const DEVICE_HELP: &str = "Where to compute: auto, cpu or cuda[:i]. This build has no GPU backend";

/// Refuses every GPU.
pub(crate) fn check(index: u32) -> Result<(), CliError> {
    Err(unavailable(index))
}

/// There is none.
pub(crate) fn device(index: u32, _cache: PathBuf) -> Result<Device, CliError> {
    Err(unavailable(index))
}

fn unavailable(index: u32) -> CliError {
    let what = format!("device cuda:{index} is not available: this build of halfmode has no GPU backend");
    let err = CliError::new(Exit::Device, what).at("--device").why("only the CPU backend is compiled in");
    err.help("halfmode doctor")
}

/// There is none to plan for.
pub(crate) fn target(index: u32) -> Result<Target, CliError> {
    Err(unavailable(index))
}

/// There is none, and none that does not work.
#[allow(clippy::unnecessary_wraps, reason = "a build with a GPU backend says why a GPU does not work")]
pub(crate) fn find(_cache: PathBuf) -> Result<Option<Device>, String> {
    Ok(None)
}

/// No device is a GPU.
pub(crate) fn ordinal(_device: &Device) -> Option<usize> {
    None
}

/// No device is a GPU.
pub(crate) fn model(_device: &Device) -> Option<String> {
    None
}

/// There is none.
pub(crate) fn total_bytes(_ordinal: usize) -> Option<usize> {
    None
}

/// No device is a GPU.
pub(crate) fn room(_device: &Device) -> Option<usize> {
    None
}

/// Nothing runs behind the program's back.
#[allow(clippy::unnecessary_wraps, reason = "waiting for a GPU can fail")]
pub(crate) fn synchronize(_device: &Device) -> Result<(), TensorError> {
    Ok(())
}

/// Errors of a GPU do not come up.
pub(crate) fn exit(_err: &TensorError) -> Option<Exit> {
    None
}

/// Everything runs on the CPU.
pub(crate) fn wants_cpu(_err: &TensorError) -> bool {
    false
}

/// Errors of a GPU do not come up.
pub(crate) fn no_room(_err: &TensorError) -> Option<NoRoom> {
    None
}

/// What `doctor` says, as an object and as lines.
pub(crate) fn report() -> (Value, Vec<String>) {
    let line = "GPU        this build has no GPU backend (it lacks the feature cuda): everything runs on the CPU";
    (json!({ "backend": null, "devices": [] }), vec![line.to_owned()])
}
