#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod functions;
mod types;

pub use functions::{Cufft, Error};
pub use types::{
    CUFFT_FORWARD, CUFFT_INVERSE, cudaDataType, cudaStream_t, cufftComplex, cufftDoubleComplex, cufftDoubleReal,
    cufftHandle, cufftReal, cufftResult, cufftType,
};
