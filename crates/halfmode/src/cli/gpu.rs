//! The GPUs of this machine, as `doctor` and `--device` see them.

use crate::cli::error::{CliError, Exit};
use crate::cli::memory::NoRoom;
use crate::cli::text;
use halfmode::precision::Precision;
use halfmode::tensor::cuda::{Context, CudaError, Library, Roots, load, n_devices};
use halfmode::tensor::{Device, Error as TensorError, Purpose, Target, Tensor};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The help of `--device`.
pub(crate) const DEVICE_HELP: &str =
    "Where to compute: auto, cpu or cuda[:i]; auto is the first GPU if it works, else the CPU";

/// Refuses a GPU that is not there.
pub(crate) fn check(index: u32) -> Result<(), CliError> {
    let n_devices = n_devices(&Roots::from_environment()).map_err(|err| unavailable(index, &err))?;
    let ordinal = index as usize;
    if ordinal < n_devices { Ok(()) } else { Err(unavailable(index, &CudaError::Ordinal { ordinal, n_devices })) }
}

/// GPU `index`, with its compiled kernels kept below `cache`.
pub(crate) fn device(index: u32, cache: PathBuf) -> Result<Device, CliError> {
    open(index as usize, cache).map_err(|err| unavailable(index, &err))
}

/// The first GPU, if there is one; `Err` says why it does not work.
pub(crate) fn find(cache: PathBuf) -> Result<Option<Device>, String> {
    match n_devices(&Roots::from_environment()) {
        Ok(0) | Err(CudaError::Library { library: Library::Driver, .. }) => Ok(None),
        Err(CudaError::Driver { name, .. }) if name == "CUDA_ERROR_NO_DEVICE" => Ok(None),
        Err(err) => Err(err.to_string()),
        Ok(_) => open(0, cache).map(Some).map_err(|err| err.to_string()),
    }
}

/// What to plan for: it needs no GPU.
#[allow(clippy::unnecessary_wraps, reason = "a build without a GPU backend has none to plan for")]
pub(crate) fn target(_index: u32) -> Result<Target, CliError> {
    Ok(Target::Cuda)
}

/// A GPU that was tried: every library that a job needs is loaded, memory taken, a kernel compiled and run.
fn open(ordinal: usize, cache: PathBuf) -> Result<Device, TensorError> {
    let roots = Roots::from_environment();
    let device = Device::cuda(ordinal, Some(cache))?;
    // The compiler finds builtins of another minor version by itself, or says so.
    let _ = load(Library::NvrtcBuiltins, &roots);
    for library in [Library::Nvrtc, Library::CublasLt] {
        load(library, &roots)?;
    }
    let ones = Tensor::from_slice(&device, &[1f32; 64], [64], Precision::F32, Purpose::Workspace)?;
    ones.cast(Precision::F16, Purpose::Workspace)?.to_vec::<f32>()?;
    drop(ones);
    device.reset_peak();
    Ok(device)
}

fn unavailable(index: u32, err: &dyn std::error::Error) -> CliError {
    let err = CliError::new(Exit::Device, format!("device cuda:{index} is not available")).why(err.to_string());
    err.at("--device").help("halfmode doctor")
}

/// Which GPU a device is, if it is one.
pub(crate) fn ordinal(device: &Device) -> Option<usize> {
    Some(device.as_cuda()?.context().info().ordinal)
}

/// Its maker's name, and the driver.
pub(crate) fn model(device: &Device) -> Option<String> {
    let info = device.as_cuda()?.context().info();
    Some(format!("{}, driver for CUDA {}", info.name, version(info.driver)))
}

/// All bytes of a GPU, if it is there.
pub(crate) fn total_bytes(ordinal: usize) -> Option<usize> {
    Some(Context::new(ordinal, Roots::from_environment(), None).ok()?.memory_info().ok()?.total)
}

/// Bytes of a GPU that this process can have: those that are free, and those that it holds.
pub(crate) fn room(device: &Device) -> Option<usize> {
    let memory = device.as_cuda()?.context().memory_info().ok()?;
    Some(memory.free + memory.held)
}

/// Waits until everything launched is done.
pub(crate) fn synchronize(device: &Device) -> Result<(), TensorError> {
    device.as_cuda().map_or(Ok(()), |it| Ok(it.context().synchronize()?))
}

/// The exit code of an error of the GPU.
pub(crate) fn exit(err: &TensorError) -> Option<Exit> {
    let err = match err {
        TensorError::OnGpu => return Some(Exit::Device),
        TensorError::Cuda(err) => err,
        _ => return None,
    };
    Some(match err {
        CudaError::Library { .. }
        | CudaError::Headers { .. }
        | CudaError::OldDriver { .. }
        | CudaError::Ordinal { .. }
        | CudaError::OutOfMemory { .. } => Exit::Device,
        _ => Exit::Other,
    })
}

/// Whether the CPU can do what the GPU has no kernel for.
pub(crate) fn wants_cpu(err: &TensorError) -> bool {
    *err == TensorError::OnGpu
}

/// What a full GPU says.
pub(crate) fn no_room(err: &TensorError) -> Option<NoRoom> {
    let TensorError::Cuda(CudaError::OutOfMemory { bytes, free, total, held }) = *err else { return None };
    Some(NoRoom { bytes, free, total, held })
}

/// `13.0` of 13000.
fn version(driver: i32) -> String {
    format!("{}.{}", driver / 1000, driver % 1000 / 10)
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
            let driver = version(info.driver);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::error::job_exit;
    use halfmode::nn::Error as NnError;
    use halfmode::train::job::JobError;

    fn deep(err: TensorError) -> JobError {
        NnError::from(halfmode::fft::Error::from(err)).in_op("fno_block").into()
    }

    #[test]
    fn a_full_gpu_says_what_was_asked_free_and_held() {
        let full = CudaError::OutOfMemory { bytes: 3 << 30, free: 1 << 20, total: 8 << 30, held: 6 << 30 };
        let err = deep(full.into());
        assert_eq!(job_exit(&err), Exit::Device);
        let text = CliError::from(err).render(false);
        for part in ["out of memory", "3.00 GiB were asked for", "1.00 MiB are free", "this run holds 6.00 GiB"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn what_has_no_kernel_is_sent_to_the_cpu() {
        let err = deep(TensorError::OnGpu);
        assert_eq!(job_exit(&err), Exit::Device);
        let text = CliError::from(err).render(false);
        assert!(
            text.contains("no GPU kernel") && text.contains("help: halfmode") && text.contains("--device cpu"),
            "{text}"
        );
    }
}
