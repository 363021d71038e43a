//! Kernels from their sources, by the run-time compiler; needs no GPU.

#![allow(unsafe_code, reason = "calls to the run-time compiler")]

use crate::libraries::{self, Roots};
use crate::{Error, Result};
use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};

/// A file of kernels, embedded with `include_str!`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Its name, for messages.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// What kernel files may include besides CUDA's own headers.
const HEADERS: [(&str, &str); 4] = [
    ("halfmode.cuh", include_str!("../kernels/halfmode.cuh")),
    ("tableau.cuh", include_str!("../kernels/tableau.cuh")),
    ("patches.cuh", include_str!("../kernels/patches.cuh")),
    ("tensor_cores.cuh", include_str!("../kernels/tensor_cores.cuh")),
];

/// Machine code of a kernel file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The device's binary format.
    pub cubin: Vec<u8>,
    /// What the compiler said: registers, spills and shared memory of each kernel. Empty if the code was
    /// read from the cache.
    pub log: String,
}

fn check(call: &'static str, outcome: sys::nvrtcResult) -> Result<()> {
    outcome.result().map_err(|err| Error::Nvrtc { call, code: format!("{:?}", err.0) })
}

/// Compiles for `arch` (such as `sm_90a`) with `defines` (`NAME=VALUE`).
///
/// With a `cache` folder the code is kept there under the SHA-256 of everything that it depends on: source,
/// headers, options, architecture and compiler version. A file that does not verify is compiled again. A
/// folder that cannot be written costs time, not the result.
///
/// # Errors
/// [`Error::Library`] or [`Error::Headers`] if the compiler is not there, [`Error::Compile`] with its log.
pub fn compile(
    (name, text): (&str, &str),
    arch: &str,
    defines: &[String],
    roots: &Roots,
    cache: Option<&Path>,
) -> Result<Compiled> {
    libraries::load_compiler(roots)?;
    let include = roots.include()?;
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        "--ptxas-options=-v".to_owned(),
        format!("--include-path={}", include.display()),
    ];
    // The newer layout of the toolkit keeps C++ headers one folder below.
    options.push(format!("--include-path={}", include.join("cccl").display()));
    options.extend(defines.iter().map(|it| format!("-D{it}")));
    let cached = cache.map(|folder| cache_file(folder, (name, text), &options[..1], defines, roots)).transpose()?;
    if let Some(cubin) = cached.as_deref().and_then(read_cached) {
        return Ok(Compiled { cubin, log: String::new() });
    }
    let compiled = run_compiler(name, text, arch, &options)?;
    if let Some(path) = &cached {
        // A full or read-only disk is no reason to stop.
        let _ = write_cached(path, &compiled.cubin);
    }
    Ok(compiled)
}

/// Major and minor version of the run-time compiler.
///
/// # Errors
/// [`Error::Library`] if it is not there.
pub fn compiler_version(roots: &Roots) -> Result<(i32, i32)> {
    libraries::load_compiler(roots)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the compiler is loaded, and the arguments are numbers that it writes.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

fn cache_file(
    folder: &Path,
    (name, text): (&str, &str),
    arch: &[String],
    defines: &[String],
    roots: &Roots,
) -> Result<PathBuf> {
    let (major, minor) = compiler_version(roots)?;
    let mut hash = Sha256::new();
    let version = format!("{major}.{minor}");
    let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
    let parts = [name, text, version.as_str()].into_iter().chain(headers);
    for part in parts.chain(arch.iter().chain(defines).map(String::as_str)) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    Ok(folder.join(format!("{name}-{}.cubin", hex(&hash.finalize()[..16]))))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The code behind its checksum, if it is whole.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (checksum, cubin) = bytes.split_at_checked(32)?;
    (Sha256::digest(cubin)[..] == *checksum).then(|| cubin.to_vec())
}

fn write_cached(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, [&Sha256::digest(cubin)[..], cubin].concat())?;
    std::fs::rename(&temporary, path)
}

/// A compilation in progress.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is this value's own.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn c_string(text: &str) -> CString {
    // A source with a zero byte ends there, as for every C compiler.
    CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

fn run_compiler(name: &str, text: &str, arch: &str, options: &[String]) -> Result<Compiled> {
    let (source, file) = (c_string(text), c_string(&format!("{name}.cu")));
    let headers = HEADERS.map(|(name, text)| (c_string(name), c_string(text)));
    let header_names = headers.each_ref().map(|(name, _)| name.as_ptr());
    let header_texts = headers.each_ref().map(|(_, text)| text.as_ptr());
    let options: Vec<CString> = options.iter().map(|it| c_string(it)).collect();
    let option_pointers: Vec<*const c_char> = options.iter().map(|it| it.as_ptr()).collect();
    let mut raw = std::ptr::null_mut();
    // SAFETY: all strings end in zero and outlive the program.
    check("nvrtcCreateProgram", unsafe {
        sys::nvrtcCreateProgram(
            &mut raw,
            source.as_ptr(),
            file.as_ptr(),
            HEADERS.len() as i32,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        )
    })?;
    let program = Program(raw);
    // SAFETY: the program is alive, and so are the options.
    let outcome = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, option_pointers.as_ptr()) };
    // SAFETY: the calls fill a buffer of the size that they name.
    let log = bytes_of(
        |size| unsafe { sys::nvrtcGetProgramLogSize(program.0, size) },
        |to| unsafe { sys::nvrtcGetProgramLog(program.0, to) },
    )?;
    let log = CStr::from_bytes_until_nul(&log).map(|it| it.to_string_lossy().trim().to_owned()).unwrap_or_default();
    if outcome != sys::nvrtcResult::NVRTC_SUCCESS {
        let log = if log.is_empty() { format!("{outcome:?}") } else { log };
        return Err(Error::Compile { file: name.to_owned(), arch: arch.to_owned(), log });
    }
    // SAFETY: as above.
    let cubin = bytes_of(
        |size| unsafe { sys::nvrtcGetCUBINSize(program.0, size) },
        |to| unsafe { sys::nvrtcGetCUBIN(program.0, to) },
    )?;
    Ok(Compiled { cubin, log })
}

/// A buffer that the compiler fills, of the size that it asks for.
fn bytes_of(
    size: impl FnOnce(&mut usize) -> sys::nvrtcResult,
    fill: impl FnOnce(*mut c_char) -> sys::nvrtcResult,
) -> Result<Vec<u8>> {
    let mut n_bytes = 0;
    check("nvrtcGet…Size", size(&mut n_bytes))?;
    let mut bytes = vec![0u8; n_bytes];
    check("nvrtcGet…", fill(bytes.as_mut_ptr().cast()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_file_is_not_used() {
        let folder = std::env::temp_dir().join(format!("halfmode-cubin-{}", std::process::id()));
        let path = folder.join("kernels/k.cubin");
        write_cached(&path, b"machine code").unwrap();
        assert_eq!(read_cached(&path).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_cached(&path), None);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!((read_cached(&path), read_cached(&folder)), (None, None));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
