//! The library's functions, found by their names when the library is loaded.

#![allow(unsafe_code, reason = "foreign functions")]
#![allow(non_snake_case, reason = "the library's names")]

use crate::types::{
    cudaDataType, cudaStream_t, cufftComplex, cufftDoubleComplex, cufftDoubleReal, cufftHandle, cufftReal, cufftResult,
    cufftType,
};
use std::ffi::{c_int, c_longlong, c_void};
use std::path::{Path, PathBuf};

/// Why the library cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library is not there, or the loader refuses it.
    #[error("{} cannot be loaded: {why}", path.display())]
    Library {
        /// Name or path.
        path: PathBuf,
        /// What the loader says.
        why: String,
    },
    /// The library lacks a function: it is too old, or another library.
    #[error("{} has no function {symbol}: {why}", path.display())]
    Symbol {
        /// Name or path.
        path: PathBuf,
        /// The function.
        symbol: &'static str,
        /// What the loader says.
        why: String,
    },
}

/// The structure of function pointers and how it is filled.
macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The loaded library. Its functions are those of the header with the same names.
        #[derive(Debug)]
        pub struct Cufft {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument: $type),*) -> cufftResult,)*
            /// Unloaded when the functions are gone.
            _library: libloading::Library,
        }

        impl Cufft {
            /// Loads the library by its path, or by its name where the system's loader finds it.
            ///
            /// # Safety
            /// What `path` names is NVIDIA's cuFFT, version 12 or newer: loading runs its initialisers, and its
            /// functions are called with the parameters of that version's header.
            ///
            /// # Errors
            /// [`Error::Library`], [`Error::Symbol`] for the first function that is missing.
            pub unsafe fn load(path: &Path) -> Result<Self, Error> {
                // SAFETY: the caller says what the file is.
                let library = unsafe { libloading::Library::new(path) }
                    .map_err(|err| Error::Library { path: path.to_owned(), why: err.to_string() })?;
                $(
                    let symbol = stringify!($name);
                    // SAFETY: the type is that of the header's declaration.
                    let $name = *unsafe { library.get(symbol) }.map_err(|err| Error::Symbol {
                        path: path.to_owned(),
                        symbol,
                        why: err.to_string(),
                    })?;
                )*
                Ok(Cufft { $($name,)* _library: library })
            }
        }
    };
}

functions! {
    /// Makes a handle.
    cufftCreate(handle: *mut cufftHandle);
    /// Frees a plan.
    cufftDestroy(plan: cufftHandle);
    /// The stream on which a plan runs.
    cufftSetStream(plan: cufftHandle, stream: cudaStream_t);
    /// Whether making a plan allocates its work area; set before it is made.
    cufftSetAutoAllocation(plan: cufftHandle, autoAllocate: c_int);
    /// The memory of the device that a plan may use while it runs.
    cufftSetWorkArea(plan: cufftHandle, workArea: *mut c_void);
    /// Bytes of a plan's work area.
    cufftGetSize(handle: cufftHandle, workSize: *mut usize);
    /// The library's version: 12500 is 12.5.0.
    cufftGetVersion(version: *mut c_int);
    /// Makes a handle and a plan of batched transforms with 32-bit sizes.
    cufftPlanMany(
        plan: *mut cufftHandle,
        rank: c_int,
        n: *mut c_int,
        inembed: *mut c_int,
        istride: c_int,
        idist: c_int,
        onembed: *mut c_int,
        ostride: c_int,
        odist: c_int,
        kind: cufftType,
        batch: c_int,
    );
    /// Makes a plan of batched transforms with 64-bit sizes.
    cufftMakePlanMany64(
        plan: cufftHandle,
        rank: c_int,
        n: *mut c_longlong,
        inembed: *mut c_longlong,
        istride: c_longlong,
        idist: c_longlong,
        onembed: *mut c_longlong,
        ostride: c_longlong,
        odist: c_longlong,
        kind: cufftType,
        batch: c_longlong,
        workSize: *mut usize,
    );
    /// Runs a transform of singles.
    cufftExecR2C(plan: cufftHandle, idata: *mut cufftReal, odata: *mut cufftComplex);
    /// Runs a transform of singles.
    cufftExecC2R(plan: cufftHandle, idata: *mut cufftComplex, odata: *mut cufftReal);
    /// Runs a transform of singles.
    cufftExecC2C(plan: cufftHandle, idata: *mut cufftComplex, odata: *mut cufftComplex, direction: c_int);
    /// Runs a transform of doubles.
    cufftExecD2Z(plan: cufftHandle, idata: *mut cufftDoubleReal, odata: *mut cufftDoubleComplex);
    /// Runs a transform of doubles.
    cufftExecZ2D(plan: cufftHandle, idata: *mut cufftDoubleComplex, odata: *mut cufftDoubleReal);
    /// Runs a transform of doubles.
    cufftExecZ2Z(plan: cufftHandle, idata: *mut cufftDoubleComplex, odata: *mut cufftDoubleComplex, direction: c_int);
    /// Makes a plan of batched transforms in any of the formats.
    cufftXtMakePlanMany(
        plan: cufftHandle,
        rank: c_int,
        n: *mut c_longlong,
        inembed: *mut c_longlong,
        istride: c_longlong,
        idist: c_longlong,
        inputtype: cudaDataType,
        onembed: *mut c_longlong,
        ostride: c_longlong,
        odist: c_longlong,
        outputtype: cudaDataType,
        batch: c_longlong,
        workSize: *mut usize,
        executiontype: cudaDataType,
    );
    /// Bytes of work area that such a plan would need.
    cufftXtGetSizeMany(
        plan: cufftHandle,
        rank: c_int,
        n: *mut c_longlong,
        inembed: *mut c_longlong,
        istride: c_longlong,
        idist: c_longlong,
        inputtype: cudaDataType,
        onembed: *mut c_longlong,
        ostride: c_longlong,
        odist: c_longlong,
        outputtype: cudaDataType,
        batch: c_longlong,
        workSize: *mut usize,
        executiontype: cudaDataType,
    );
    /// Runs a plan in any of the formats; kinds with one direction ignore it.
    cufftXtExec(plan: cufftHandle, input: *mut c_void, output: *mut c_void, direction: c_int);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named() {
        let path = Path::new("libcufft-that-nobody-has.so");
        // SAFETY: there is no such file.
        let err = unsafe { Cufft::load(path) }.unwrap_err();
        assert!(matches!(&err, Error::Library { path: it, .. } if it == path));
        assert!(err.to_string().starts_with("libcufft-that-nobody-has.so cannot be loaded: "), "{err}");
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn a_missing_function_is_named() {
        // SAFETY: the C library is loaded already, and none of its functions is called.
        let err = unsafe { Cufft::load(Path::new("libc.so.6")) }.unwrap_err();
        assert!(matches!(err, Error::Symbol { symbol: "cufftCreate", .. }), "{err}");
    }
}
