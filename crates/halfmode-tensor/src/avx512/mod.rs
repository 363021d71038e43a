//! Kernels that need AVX-512. Each has a portable twin that runs elsewhere, and a test that binds
//! the two.

pub(crate) mod gemm;
