//! What a build without the feature `cuda` says of GPUs.

use crate::cli::error::{CliError, Exit};
use halfmode::tensor::{Device, Error as TensorError};
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

/// Errors of a GPU do not come up.
pub(crate) fn exit(_err: &TensorError) -> Option<Exit> {
    None
}

/// What `doctor` says, as an object and as lines.
pub(crate) fn report() -> (Value, Vec<String>) {
    let line = "GPU        this build has no GPU backend (it lacks the feature cuda): everything runs on the CPU";
    (json!({ "backend": null, "devices": [] }), vec![line.to_owned()])
}
