//! Matrix products by cuBLASLt: any layout, mixed storage, algorithms chosen once per shape.

#![allow(unsafe_code, reason = "calls to cuBLASLt")]

use crate::libraries::{self, Library};
use crate::{Context, Error, Result, Span};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use halfmode_precision::Precision;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// Stored scalars, row-major: element (i, j) of matrix b is `span[b * stride + i * row + j]`, or with i and j
/// exchanged if the operand is the transpose of what is stored.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Where it is.
    pub span: Span<'a>,
    /// What a scalar is.
    pub precision: Precision,
    /// Scalars between stored rows.
    pub row: usize,
    /// Scalars between matrices of a batch; 0 for one that all share.
    pub stride: usize,
    /// Whether the product takes the transpose of what is stored.
    pub transposed: bool,
}

/// What products are formed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compute {
    /// f32 throughout: exact products of halves, true single precision for f32.
    F32,
    /// f32 operands rounded to 10 bits of significand, sums in f32.
    Tf32,
    /// f64 throughout.
    F64,
}

impl Compute {
    /// What products of stored scalars are formed in, where `policy` says what those of f32 may use.
    #[must_use]
    pub const fn of(operands: Precision, policy: halfmode_precision::Compute) -> Self {
        match (operands, policy) {
            (Precision::F64, _) => Compute::F64,
            (Precision::F32, halfmode_precision::Compute::Tf32) => Compute::Tf32,
            _ => Compute::F32,
        }
    }
}

/// The factors of a product in the accumulator's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalar {
    /// Factor of the product.
    pub scale: f64,
    /// Factor of what the result held; with 0 it is not read.
    pub keep: f64,
}

/// `c = keep * c + scale * a b` for a batch of matrices, `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Matmul<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Matrices.
    pub batch: usize,
    /// Left operand.
    pub a: Operand<'a>,
    /// Right operand.
    pub b: Operand<'a>,
    /// The result, as stored.
    pub c: Operand<'a>,
    /// The two factors.
    pub factors: Scalar,
    /// What products are formed in.
    pub compute: Compute,
}

/// A stored matrix without its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stored {
    rows: usize,
    cols: usize,
    row: usize,
    stride: usize,
    precision: Precision,
    transposed: bool,
    /// Bytes that divide its address, at most 256.
    align: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    a: Stored,
    b: Stored,
    c: Stored,
    batch: usize,
    compute: Compute,
    keeps: bool,
}

/// Descriptors and the algorithm of one shape.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the descriptors are this plan's own. Errors have nobody to go to.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in [self.a, self.b, self.c] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The library's handle, its workspace and the plans of this context.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: the handle may be used from any thread, and plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Bytes that algorithms may use beside their operands: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: no plan is left. Errors have nobody to go to.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn data_type(precision: Precision) -> sys::cudaDataType {
    match precision {
        Precision::F64 => sys::cudaDataType_t::CUDA_R_64F,
        Precision::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Precision::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Precision::F16 => sys::cudaDataType_t::CUDA_R_16F,
    }
}

impl Operand<'_> {
    /// The stored matrix of a logical `rows x cols` one.
    fn stored(&self, (rows, cols): (usize, usize)) -> Stored {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        let Operand { precision, row, stride, transposed, .. } = *self;
        let align = 1 << self.span.address().trailing_zeros().min(8);
        Stored { rows, cols, row, stride, precision, transposed, align }
    }
}

impl Stored {
    /// Scalars up to the last that is touched; `None` where the numbers overflow.
    fn extent(&self, batch: usize) -> Option<usize> {
        if self.rows == 0 || self.cols == 0 || batch == 0 {
            return Some(0);
        }
        let matrix = (self.rows - 1).checked_mul(self.row)?.checked_add(self.cols)?;
        (batch - 1).checked_mul(self.stride)?.checked_add(matrix)
    }
}

impl Key {
    fn describe(&self) -> String {
        let Key { a, b, c, batch, compute, .. } = self;
        let k = if a.transposed { a.rows } else { a.cols };
        let form = |it: &Stored| format!("{}{}", it.precision, if it.transposed { "ᵀ" } else { "" });
        format!("{batch} x [{}, {k}] [{k}, {}], {} {} -> {}, {compute:?}", c.rows, c.cols, form(a), form(b), form(c))
    }
}

impl Blas {
    pub(crate) fn new(context: &Context) -> Result<Self> {
        libraries::load(Library::CublasLt, context.roots())?;
        context.bind()?;
        let handle = result::create_handle().map_err(|err| Error::Blas {
            call: "cublasLtCreate",
            what: "this device".to_owned(),
            code: err.to_string(),
        })?;
        Ok(Blas { handle, workspace: context.take(WORKSPACE)?, plans: Mutex::default() })
    }

    fn plan(&self, key: &Key) -> Result<Plan> {
        let fail = |call| move |err: CublasError| Error::Blas { call, what: key.describe(), code: err.to_string() };
        use sys::cublasComputeType_t as C;
        let (compute, scale) = match key.compute {
            Compute::F32 => (C::CUBLAS_COMPUTE_32F, Precision::F32),
            Compute::Tf32 => (C::CUBLAS_COMPUTE_32F_FAST_TF32, Precision::F32),
            Compute::F64 => (C::CUBLAS_COMPUTE_64F, Precision::F64),
        };
        let product =
            result::create_matmul_desc(compute, data_type(scale)).map_err(fail("cublasLtMatmulDescCreate"))?;
        // The library counts columns first: it is given the transposed product, right operand first.
        let layout = |it: &Stored| {
            let layout = result::create_matrix_layout(
                data_type(it.precision),
                it.cols as u64,
                it.rows as u64,
                it.row.max(1) as i64,
            )?;
            use sys::cublasLtMatrixLayoutAttribute_t as L;
            let (count, stride) = (key.batch as i32, it.stride as i64);
            // SAFETY: the layout is alive, and the values have the types that the attributes are of.
            unsafe {
                set(|at, size| {
                    result::set_matrix_layout_attribute(layout, L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, at, size)
                })(&count)?;
                set(|at, size| {
                    let attribute = L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                    result::set_matrix_layout_attribute(layout, attribute, at, size)
                })(&stride)?;
            }
            Ok(layout)
        };
        let create = "cublasLtMatrixLayoutCreate";
        let a = layout(&key.b).map_err(fail(create))?;
        let b = layout(&key.a).map_err(fail(create))?;
        let c = layout(&key.c).map_err(fail(create))?;
        let algorithm = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        let mut plan = Plan { product, a, b, c, algorithm };
        use sys::cublasLtMatmulDescAttributes_t as D;
        for (attribute, transposed) in
            [(D::CUBLASLT_MATMUL_DESC_TRANSA, key.b.transposed), (D::CUBLASLT_MATMUL_DESC_TRANSB, key.a.transposed)]
        {
            let operation: i32 = transposed.into();
            // SAFETY: the descriptor is alive, and the value has the type that the attribute is of.
            unsafe { set(|at, size| result::set_matmul_desc_attribute(product, attribute, at, size))(&operation) }
                .map_err(fail("cublasLtMatmulDescSetAttribute"))?;
        }
        plan.algorithm = self.choose(key, &plan).map_err(fail("cublasLtMatmulAlgoGetHeuristic"))?;
        Ok(plan)
    }

    fn choose(&self, key: &Key, plan: &Plan) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let preference = result::create_matmul_pref()?;
        // SAFETY: all descriptors are alive, and the values have the types that the attributes are of.
        let found = unsafe {
            let number = |attribute, value: u32| {
                set(|at, size| result::set_matmul_pref_attribute(preference, attribute, at, size))(&value)
            };
            let workspace = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            set(|at, size| result::set_matmul_pref_attribute(preference, workspace, at, size))(&WORKSPACE)
                .and_then(|()| number(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b.align))
                .and_then(|()| number(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a.align))
                .and_then(|()| number(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.align))
                .and_then(|()| number(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c.align))
                .and_then(|()| {
                    let Plan { product, a, b, c, .. } = *plan;
                    result::get_matmul_algo_heuristic(self.handle, product, a, b, c, c, preference)
                })
        };
        // SAFETY: the preference is this function's own.
        let destroyed = unsafe { result::destroy_matmul_pref(preference) };
        let found = found?;
        destroyed?;
        Ok(found.algo)
    }
}

/// Passes a value to a call that wants its address and size.
fn set<T, R>(call: impl FnOnce(*const c_void, usize) -> R) -> impl FnOnce(&T) -> R {
    move |value| call(std::ptr::from_ref(value).cast(), size_of::<T>())
}

impl Context {
    /// Launches a matrix product after everything launched so far.
    ///
    /// # Errors
    /// [`Error::Library`] without cuBLASLt, [`Error::Launch`] if an operand leaves its span, [`Error::Blas`] if the
    /// library has no algorithm for the types.
    pub fn matmul(&self, matmul: &Matmul<'_>) -> Result<()> {
        let Matmul { m, n, k, batch, a, b, c, factors, compute } = *matmul;
        let key = Key {
            a: a.stored((m, k)),
            b: b.stored((k, n)),
            c: c.stored((m, n)),
            batch,
            compute,
            keeps: factors.keep != 0.0,
        };
        let refuse = |problem: String| Err(Error::Launch { kernel: "matmul".to_owned(), problem });
        for (name, stored, operand) in [("a", key.a, a), ("b", key.b, b), ("c", key.c, c)] {
            let extent = stored.extent(batch).and_then(|it| it.checked_mul(stored.precision.bytes()));
            if extent.is_none_or(|it| it > operand.span.len()) {
                return refuse(format!("operand {name} leaves its {} bytes: {}", operand.span.len(), key.describe()));
            }
            if !operand.span.buffer.context().same(self) {
                return refuse(format!("operand {name} is of another device"));
            }
        }
        if c.transposed {
            return refuse("the result is written as stored".to_owned());
        }
        if m == 0 || n == 0 || batch == 0 {
            return Ok(());
        }
        let blas = self.blas()?;
        self.bind()?;
        let mut plans = blas.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let plan = blas.plan(entry.key())?;
                entry.insert(plan)
            }
        };
        let single = [factors.scale as f32, factors.keep as f32];
        let double = [factors.scale, factors.keep];
        let [scale, keep]: [*const c_void; 2] = match compute {
            Compute::F64 => double.each_ref().map(|it| std::ptr::from_ref(it).cast()),
            _ => single.each_ref().map(|it| std::ptr::from_ref(it).cast()),
        };
        let (at, bt, ct) = (a.span.address(), b.span.address(), c.span.address());
        // SAFETY: descriptors and handle are alive, every element lies in its span as checked above, the factors
        // outlive the call, and the workspace is used in the order of the one stream.
        let launch = || unsafe {
            result::matmul(
                blas.handle,
                plan.product,
                scale,
                keep,
                bt as *const c_void,
                plan.a,
                at as *const c_void,
                plan.b,
                ct as *const c_void,
                plan.c,
                ct as *mut c_void,
                plan.c,
                &plan.algorithm,
                blas.workspace as *mut c_void,
                WORKSPACE,
                self.stream().cast(),
            )
        };
        let fail =
            |err: CublasError| Error::Blas { call: "cublasLtMatmul", what: key.describe(), code: err.to_string() };
        self.timed(|| format!("matmul {}", key.describe()), || launch().map_err(fail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tf32_is_for_f32_alone() {
        use halfmode_precision::Compute::{F32, Tf32};
        for precision in Precision::ALL {
            let exact = if precision == Precision::F64 { Compute::F64 } else { Compute::F32 };
            assert_eq!(Compute::of(precision, F32), exact);
            assert_eq!(Compute::of(precision, Tf32), if precision == Precision::F32 { Compute::Tf32 } else { exact });
        }
    }

    #[test]
    fn the_extent_of_a_batch_ends_with_its_last_scalar() {
        let stored =
            Stored { rows: 3, cols: 4, row: 10, stride: 100, precision: Precision::F32, transposed: false, align: 256 };
        assert_eq!(stored.extent(1), Some(24));
        assert_eq!(stored.extent(3), Some(224));
        assert_eq!(Stored { stride: 0, ..stored }.extent(3), Some(24));
        assert_eq!(Stored { rows: 0, ..stored }.extent(3), Some(0));
        assert_eq!(Stored { row: usize::MAX, ..stored }.extent(3), None);
    }
}
