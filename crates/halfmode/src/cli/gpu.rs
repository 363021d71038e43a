//! The GPUs of this machine, as `doctor` and `--device` see them.

use crate::cli::error::{CliError, Exit};
use crate::cli::text;
use halfmode::tensor::cuda::{Context, CudaError, Library, Roots, load, n_devices};
use halfmode::tensor::{Device, Error as TensorError};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The help of `--device`.
pub(crate) const DEVICE_HELP: &str = "Where to compute: auto, cpu or cuda[:i]; auto is the CPU";

/// Refuses a GPU that is not there.
pub(crate) fn check(index: u32) -> Result<(), CliError> {
    let n_devices = n_devices(&Roots::from_environment()).map_err(|err| unavailable(index, &err))?;
    let ordinal = index as usize;
    if ordinal < n_devices { Ok(()) } else { Err(unavailable(index, &CudaError::Ordinal { ordinal, n_devices })) }
}

/// GPU `index`, with its compiled kernels kept below `cache`.
pub(crate) fn device(index: u32, cache: PathBuf) -> Result<Device, CliError> {
    Device::cuda(index as usize, Some(cache)).map_err(|err| unavailable(index, &err))
}

fn unavailable(index: u32, err: &dyn std::error::Error) -> CliError {
    let err = CliError::new(Exit::Device, format!("device cuda:{index} is not available")).why(err.to_string());
    err.at("--device").help("halfmode doctor")
}

/// The exit code of an error of the GPU.
pub(crate) fn exit(err: &TensorError) -> Option<Exit> {
    let TensorError::Cuda(err) = err else { return None };
    Some(match err {
        CudaError::Library { .. }
        | CudaError::Headers { .. }
        | CudaError::OldDriver { .. }
        | CudaError::Ordinal { .. }
        | CudaError::OutOfMemory { .. } => Exit::Device,
        _ => Exit::Other,
    })
}

/// What `doctor` says, as an object and as lines.
pub(crate) fn report() -> (Value, Vec<String>) {
    let roots = Roots::from_environment();
    let (mut devices, mut lines) = (Vec::new(), Vec::new());
    let count = n_devices(&roots);
    for ordinal in 0..count.clone().unwrap_or(0) {
        let (device, line) = describe(ordinal, &roots);
        devices.push(device);
        lines.push(format!("GPU {ordinal:<6} {line}"));
    }
    match &count {
        Ok(0) => lines.push("GPU        none: the driver reports no device; everything runs on the CPU".to_owned()),
        Ok(_) => {}
        Err(err) => lines.push(format!("GPU        none, everything runs on the CPU: {err}")),
    }
    lines.push(String::new());
    let mut needs = Vec::new();
    let libraries = Library::ALL.map(|it| (it.file_name(), it.purpose(), load(it, &roots)));
    let headers = ("cuda_fp16.h", "compiling kernels", roots.include().map(|it| it.display().to_string()));
    for (name, purpose, found) in libraries.into_iter().chain([headers]) {
        lines.push(match &found {
            Ok(path) => format!("  {name:<26} yes  {path}"),
            Err(err) => format!("  {name:<26} no   {err}"),
        });
        let error = found.as_ref().err().map(ToString::to_string);
        needs.push(json!({ "name": name, "purpose": purpose, "path": found.ok(), "error": error }));
    }
    let error = count.err().map(|it| it.to_string());
    (json!({ "backend": "cuda", "error": error, "devices": devices, "libraries": needs }), lines)
}

fn describe(ordinal: usize, roots: &Roots) -> (Value, String) {
    let found = Context::new(ordinal, roots.clone(), None).and_then(|it| Ok((it.info().clone(), it.memory_info()?)));
    match found {
        Err(err) => (json!({ "ordinal": ordinal, "error": err.to_string() }), err.to_string()),
        Ok((info, memory)) => {
            let driver = format!("{}.{}", info.driver / 1000, info.driver % 1000 / 10);
            let line = format!(
                "{}, {}, {} multiprocessors, {} in all, {} free, driver for CUDA {driver}",
                info.name,
                info.arch(),
                info.n_multiprocessors,
                text::bytes(memory.total),
                text::bytes(memory.free),
            );
            let object = json!({
                "ordinal": ordinal,
                "name": info.name,
                "arch": info.arch(),
                "n_multiprocessors": info.n_multiprocessors,
                "l2_bytes": info.l2,
                "total_bytes": memory.total,
                "free_bytes": memory.free,
                "driver_cuda_version": driver,
                "error": Value::Null,
            });
            (object, line)
        }
    }
}
