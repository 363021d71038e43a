//! Types and constants of `cufft.h` and `library_types.h`.

#![allow(non_camel_case_types, reason = "the library's names")]

use std::ffi::{c_int, c_void};
use std::fmt;

/// A plan.
pub type cufftHandle = c_int;
/// A stream of the CUDA runtime or, which is the same, of the driver.
pub type cudaStream_t = *mut c_void;
/// A single number.
pub type cufftReal = f32;
/// A double number.
pub type cufftDoubleReal = f64;
/// Real and imaginary part.
pub type cufftComplex = [f32; 2];
/// Real and imaginary part.
pub type cufftDoubleComplex = [f64; 2];

/// The direction with `exp(-2πi kn/N)`.
pub const CUFFT_FORWARD: c_int = -1;
/// The direction with `exp(+2πi kn/N)`.
pub const CUFFT_INVERSE: c_int = 1;

/// The kind of a single or double transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum cufftType {
    /// Real to complex.
    CUFFT_R2C = 0x2a,
    /// Complex to real.
    CUFFT_C2R = 0x2c,
    /// Complex to complex.
    CUFFT_C2C = 0x29,
    /// Double to double complex.
    CUFFT_D2Z = 0x6a,
    /// Double complex to double.
    CUFFT_Z2D = 0x6c,
    /// Double complex to double complex.
    CUFFT_Z2Z = 0x69,
}

/// The number formats that transforms know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum cudaDataType {
    /// Single.
    CUDA_R_32F = 0,
    /// Double.
    CUDA_R_64F = 1,
    /// Half.
    CUDA_R_16F = 2,
    /// A pair of singles.
    CUDA_C_32F = 4,
    /// A pair of doubles.
    CUDA_C_64F = 5,
    /// A pair of halves.
    CUDA_C_16F = 6,
    /// Bfloat16.
    CUDA_R_16BF = 14,
    /// A pair of bfloat16.
    CUDA_C_16BF = 15,
}

/// What a call says. A number and not an enum: later versions of the library know more values.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct cufftResult(pub c_int);

/// Values and names of results.
macro_rules! results {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        impl cufftResult {
            $($(#[$doc])* pub const $name: cufftResult = cufftResult($value);)*

            /// The header's name of the value, if it is one of these.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(cufftResult::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

results! {
    /// Done.
    CUFFT_SUCCESS = 0x0,
    /// The handle is no plan.
    CUFFT_INVALID_PLAN = 0x1,
    /// Too little memory.
    CUFFT_ALLOC_FAILED = 0x2,
    /// The kind of transform is unknown.
    CUFFT_INVALID_TYPE = 0x3,
    /// A pointer or a parameter is wrong.
    CUFFT_INVALID_VALUE = 0x4,
    /// The driver or the library failed.
    CUFFT_INTERNAL_ERROR = 0x5,
    /// The transform could not be launched.
    CUFFT_EXEC_FAILED = 0x6,
    /// The library could not start.
    CUFFT_SETUP_FAILED = 0x7,
    /// A size is not supported.
    CUFFT_INVALID_SIZE = 0x8,
    /// The data is not aligned.
    CUFFT_UNALIGNED_DATA = 0x9,
    /// The plan is of another device.
    CUFFT_INVALID_DEVICE = 0xB,
    /// The plan has no work area.
    CUFFT_NO_WORKSPACE = 0xD,
    /// Not implemented for these parameters.
    CUFFT_NOT_IMPLEMENTED = 0xE,
    /// Not supported for these parameters.
    CUFFT_NOT_SUPPORTED = 0x10,
    /// A library that cuFFT loads was not found.
    CUFFT_MISSING_DEPENDENCY = 0x11,
    /// The run-time compiler failed.
    CUFFT_NVRTC_FAILURE = 0x12,
    /// The run-time linker failed.
    CUFFT_NVJITLINK_FAILURE = 0x13,
    /// The library of shared memory between devices failed.
    CUFFT_NVSHMEM_FAILURE = 0x14,
}

impl cufftResult {
    /// Whether the call did what it was asked for.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == cufftResult::CUFFT_SUCCESS
    }
}

impl fmt::Display for cufftResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "cufftResult {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_names() {
        assert_eq!(cufftResult(8).to_string(), "CUFFT_INVALID_SIZE");
        assert_eq!(cufftResult(0xC).to_string(), "cufftResult 12");
        assert!(cufftResult(0).is_success() && !cufftResult(1).is_success());
    }
}
