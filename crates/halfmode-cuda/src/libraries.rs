//! The libraries of the CUDA toolkit, found and loaded at run time.
//!
//! They come with the toolkit, with pip wheels (`nvidia-cuda-nvrtc`, `nvidia-cublas`, …) or with conda,
//! each in folders of its own that no loader knows. A library that is loaded once by its absolute path is
//! found by its name afterwards, which is what the bindings look for.

#![allow(unsafe_code, reason = "loading a library runs its initialisers")]

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A library that is loaded at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Library {
    /// The driver.
    Driver,
    /// Device code that the run-time compiler links in.
    NvrtcBuiltins,
    /// The run-time compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Fast Fourier transforms.
    Cufft,
}

impl Library {
    /// All of them, in the order in which they are needed.
    pub const ALL: [Library; 5] =
        [Library::Driver, Library::NvrtcBuiltins, Library::Nvrtc, Library::CublasLt, Library::Cufft];

    /// The name that the loader is asked for.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::NvrtcBuiltins => "libnvrtc-builtins.so.13.0",
            Library::Nvrtc => "libnvrtc.so.13",
            Library::CublasLt => "libcublasLt.so.13",
            Library::Cufft => "libcufft.so.12",
        }
    }

    /// What it is for.
    #[must_use]
    pub const fn purpose(self) -> &'static str {
        match self {
            Library::Driver => "every use of the GPU; it comes with the NVIDIA driver",
            Library::NvrtcBuiltins => "compiling kernels; it comes with libnvrtc",
            Library::Nvrtc => {
                "compiling kernels; it comes with the CUDA 13 toolkit or `pip install 'nvidia-cuda-nvrtc==13.*'`"
            }
            Library::CublasLt => {
                "matrix products; it comes with the CUDA 13 toolkit or `pip install 'nvidia-cublas==13.*'`"
            }
            Library::Cufft => {
                "the second transform algorithm; it comes with the CUDA 13 toolkit or `pip install 'nvidia-cufft==12.*'`"
            }
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.file_name())
    }
}

/// Folders in which a toolkit, wheels or conda keep `lib` and `include` folders, best first.
#[derive(Clone, Debug, Default)]
pub struct Roots(Vec<PathBuf>);

impl Roots {
    /// The folders that the environment names, and those where installers put things.
    #[must_use]
    pub fn from_environment() -> Self {
        let mut roots = Vec::new();
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            roots.extend(std::env::var_os(name).map(PathBuf::from));
        }
        for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
            let Some(prefix) = std::env::var_os(name).map(PathBuf::from) else { continue };
            for python in folders(&prefix.join("lib")) {
                roots.extend(folders(&python.join("site-packages/nvidia")));
            }
            roots.push(prefix.join("targets/x86_64-linux"));
            roots.push(prefix);
        }
        roots.push("/usr/local/cuda".into());
        let mut toolkits: Vec<PathBuf> = folders(Path::new("/usr/local"));
        toolkits.retain(|it| it.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda-13")));
        roots.extend(toolkits);
        roots.push("/usr/lib/x86_64-linux-gnu".into());
        Roots(roots)
    }

    /// Folders given by hand.
    #[must_use]
    pub fn new(folders: Vec<PathBuf>) -> Self {
        Roots(folders)
    }

    /// Where libraries may be.
    fn libraries(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.0.iter().flat_map(|root| [root.join("lib64"), root.join("lib"), root.clone()])
    }

    /// The folder with `cuda_fp16.h`.
    ///
    /// # Errors
    /// [`Error::Headers`] if there is none.
    pub fn include(&self) -> Result<PathBuf> {
        let candidates =
            || self.0.iter().flat_map(|root| [root.join("include"), root.join("targets/x86_64-linux/include")]);
        candidates()
            .find(|it| it.join("cuda_fp16.h").is_file())
            .ok_or_else(|| Error::Headers { tried: candidates().map(|it| it.display().to_string()).collect() })
    }
}

/// Folders inside a folder, by name; none if it cannot be read.
fn folders(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(path)
        .map(|entries| entries.flatten().map(|it| it.path()).filter(|it| it.is_dir()).collect())
        .unwrap_or_default();
    found.sort();
    found
}

/// Libraries that this process has loaded, and under which name or path. They stay loaded.
static LOADED: Mutex<BTreeMap<Library, String>> = Mutex::new(BTreeMap::new());

/// Loads a library unless it is loaded; returns the name or path that worked.
///
/// # Errors
/// [`Error::Library`] with everything that was tried.
pub fn load(library: Library, roots: &Roots) -> Result<String> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = loaded.get(&library) {
        return Ok(path.clone());
    }
    let name = library.file_name();
    let mut tried = Vec::new();
    let paths = roots.libraries().map(|folder| folder.join(name)).filter(|path| path.is_file());
    for path in std::iter::once(PathBuf::from(name)).chain(paths) {
        // SAFETY: NVIDIA's libraries may be loaded at any time, by any thread.
        match unsafe { libloading::Library::new(&path) } {
            Ok(handle) => {
                // Bindings hold symbols of it for the rest of the process.
                std::mem::forget(handle);
                let path = path.display().to_string();
                loaded.insert(library, path.clone());
                return Ok(path);
            }
            Err(_) => tried.push(path.display().to_string()),
        }
    }
    if let Some(last) = tried.last_mut() {
        last.push_str(" (not there, or not loadable)");
    }
    Err(Error::Library { library, tried })
}

/// Loads what compiling kernels needs.
pub(crate) fn load_compiler(roots: &Roots) -> Result<()> {
    // The compiler looks for its builtins by name alone; where they were loaded by their path it finds them.
    // A toolkit of another minor version has builtins of another name, which it finds by itself or reports.
    let builtins = load(Library::NvrtcBuiltins, roots);
    load(Library::Nvrtc, roots).or_else(|err| builtins.and(Err(err)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_itself_its_use_and_where_it_was_sought() {
        let folder = std::env::temp_dir().join(format!("halfmode-no-cuda-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("lib")).unwrap();
        std::fs::write(folder.join("lib/libcufft.so.12"), b"not a library").unwrap();
        let err = load(Library::Cufft, &Roots::new(vec![folder.clone()]));
        std::fs::remove_dir_all(&folder).unwrap();
        // A machine that has the library finds it by name.
        if let Err(err) = err {
            let text = err.to_string();
            assert!(text.starts_with("libcufft.so.12 was not found; it is needed for the second transform"), "{text}");
            assert!(text.contains("lib/libcufft.so.12"), "{text}");
        }
    }

    #[test]
    fn headers_are_found_beside_the_libraries() {
        let folder = std::env::temp_dir().join(format!("halfmode-headers-{}", std::process::id()));
        let roots = Roots::new(vec![folder.clone()]);
        assert!(matches!(roots.include(), Err(Error::Headers { tried }) if tried.len() == 2));
        std::fs::create_dir_all(folder.join("include")).unwrap();
        std::fs::write(folder.join("include/cuda_fp16.h"), b"").unwrap();
        assert_eq!(roots.include().unwrap(), folder.join("include"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
