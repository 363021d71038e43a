//! Kernels and the one function that launches them.

#![allow(unsafe_code, reason = "calls to the CUDA driver")]

use crate::buffer::{Buffer, Span};
use crate::context::check;
use crate::{Context, Error, Result, Source, compile};
use cudarc::driver::{result, sys};
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// A kernel of a file that was compiled with certain definitions.
pub(crate) type KernelKey = (&'static str, Vec<String>, String);

/// A loaded kernel. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Kernel(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    name: String,
    module: Arc<Module>,
    function: sys::CUfunction,
    /// Bytes of each parameter.
    parameters: Vec<usize>,
    /// Threads that a block may have.
    max_threads: usize,
}

#[derive(Debug)]
struct Module(sys::CUmodule);

// SAFETY: the handles are the driver's, which may be called from any thread; a loaded kernel is not changed.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: no kernel of the module is left. The context that it was loaded in is this thread's while it
        // is taken down; errors have nobody to go to.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// Blocks, threads of a block and bytes of shared memory that a launch adds to the kernel's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x, y, z.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl Grid {
    /// Blocks in one row.
    #[must_use]
    pub fn row(blocks: usize, threads: usize) -> Self {
        Grid { blocks: [blocks, 1, 1], threads, shared: 0 }
    }

    /// Enough blocks for one thread per item, but no more than `most`: kernels stride over the rest.
    #[must_use]
    pub fn over(n_items: usize, threads: usize, most: usize) -> Self {
        Grid::row(n_items.div_ceil(threads).clamp(1, most.max(1)), threads)
    }
}

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// The address of some bytes, to be read.
    In(Span<'a>),
    /// The address of some bytes, to be written.
    Out(Span<'a>),
    /// No address.
    Null,
    /// `int`
    I32(i32),
    /// `long long`
    I64(i64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
}

impl<'a> From<&'a Buffer> for Arg<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Arg::In(buffer.span())
    }
}

impl<'a> From<&'a mut Buffer> for Arg<'a> {
    fn from(buffer: &'a mut Buffer) -> Self {
        Arg::Out(buffer.span())
    }
}

impl Arg<'_> {
    /// The bits that the kernel gets, and how many bytes of them.
    fn bits(self) -> (u64, usize) {
        match self {
            Arg::In(span) | Arg::Out(span) => (span.address(), 8),
            Arg::Null => (0, 8),
            Arg::I32(value) => (u64::from(value.cast_unsigned()), 4),
            Arg::I64(value) => (value.cast_unsigned(), 8),
            Arg::F32(value) => (u64::from(value.to_bits()), 4),
            Arg::F64(value) => (value.to_bits(), 8),
        }
    }
}

impl Context {
    /// Kernel `entry` of a file compiled with `defines` (`NAME=VALUE`) for this device; compiled at first use.
    ///
    /// # Errors
    /// Those of [`compile`], and [`Error::Driver`] if the device refuses the code.
    pub fn kernel(&self, source: Source, defines: &[String], entry: &str) -> Result<Kernel> {
        let key = (source.name, defines.to_vec(), entry.to_owned());
        if let Some(kernel) = self.kernels().get(&key) {
            return Ok(kernel.clone());
        }
        let module = self.module(source, defines)?;
        let name = CString::new(entry).unwrap_or_default();
        // SAFETY: the module is alive.
        let function = check("cuModuleGetFunction", unsafe { result::module::get_function(module.0, name) })?;
        let mut parameters = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function is alive; past the last parameter the call fails.
            let outcome = unsafe { sys::cuFuncGetParamInfo(function, parameters.len(), &mut offset, &mut size) };
            if outcome != sys::CUresult::CUDA_SUCCESS {
                break;
            }
            parameters.push(size);
        }
        use sys::CUfunction_attribute_enum as A;
        // SAFETY: the function is alive.
        let max_threads = check("cuFuncGetAttribute", unsafe {
            result::function::get_function_attribute(function, A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
        })?;
        let own = self.info().shared_memory as i32 - {
            // SAFETY: the function is alive.
            check("cuFuncGetAttribute", unsafe {
                result::function::get_function_attribute(function, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
            })?
        };
        // SAFETY: the function is alive.
        check("cuFuncSetAttribute", unsafe {
            result::function::set_function_attribute(
                function,
                A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                own.max(0),
            )
        })?;
        let name = format!("{}::{entry}", source.name);
        let max_threads = usize::try_from(max_threads).unwrap_or(0);
        let kernel = Kernel(Arc::new(Loaded { name, module, function, parameters, max_threads }));
        self.kernels().insert(key, kernel.clone());
        Ok(kernel)
    }

    /// The module of a file: shared by its kernels.
    fn module(&self, source: Source, defines: &[String]) -> Result<Arc<Module>> {
        let loaded = self
            .kernels()
            .iter()
            .find(|((name, with, _), _)| *name == source.name && *with == defines)
            .map(|(_, kernel)| Arc::clone(&kernel.0.module));
        if let Some(module) = loaded {
            return Ok(module);
        }
        let cache = self.cache().map(|folder| folder.join("kernels"));
        let arch = self.info().arch();
        let code = compile((source.name, source.text), &arch, defines, self.roots(), cache.as_deref())?;
        self.bind()?;
        // SAFETY: the image is whole: the compiler made it, or its checksum was verified.
        let module = check("cuModuleLoadData", unsafe { result::module::load_data(code.cubin.as_ptr().cast()) })?;
        Ok(Arc::new(Module(module)))
    }

    /// Launches a kernel after everything launched so far. The only place that does.
    ///
    /// A kernel works in the device's memory alone: whatever it does wrong there is reported by the next call
    /// that waits, and touches no memory of the host.
    ///
    /// # Errors
    /// [`Error::Launch`] if number or sizes of the arguments are not the kernel's, if the grid is empty or too
    /// large, or if a buffer is of another device; [`Error::Driver`].
    pub fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        let Kernel(loaded) = kernel;
        let refuse = |problem: String| Err(Error::Launch { kernel: loaded.name.clone(), problem });
        let sizes: Vec<usize> = args.iter().map(|it| it.bits().1).collect();
        if sizes != loaded.parameters {
            return refuse(format!("arguments of {sizes:?} bytes for parameters of {:?}", loaded.parameters));
        }
        for arg in args {
            if let Arg::In(span) | Arg::Out(span) = arg
                && !span.buffer.context().same(self)
            {
                return refuse("a buffer of another device".to_owned());
            }
        }
        let [x, y, z] = grid.blocks;
        let fits = (1..=i32::MAX as usize).contains(&x) && (1..=65535).contains(&y) && (1..=65535).contains(&z);
        if !fits || grid.threads == 0 || grid.threads > loaded.max_threads {
            return refuse(format!(
                "{:?} blocks of {} threads; it takes at most {}",
                grid.blocks, grid.threads, loaded.max_threads
            ));
        }
        self.bind()?;
        let mut bits: Vec<u64> = args.iter().map(|it| it.bits().0).collect();
        let mut pointers: Vec<*mut c_void> = bits.iter_mut().map(|it| std::ptr::from_mut(it).cast()).collect();
        let (blocks, threads) = ((x as u32, y as u32, z as u32), (grid.threads as u32, 1, 1));
        let launch = || {
            let shared = grid.shared as u32;
            // SAFETY: number and sizes of the arguments are the kernel's, as checked above; the driver copies them
            // before it returns. Values are little endian, so the low bytes of each word are the argument.
            check("cuLaunchKernel", unsafe {
                result::launch_kernel(loaded.function, blocks, threads, shared, self.stream(), &mut pointers)
            })
        };
        self.timed(|| loaded.name.clone(), launch)
    }
}
