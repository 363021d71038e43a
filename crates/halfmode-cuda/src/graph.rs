//! A sequence of launches, recorded once and replayed as a whole.

#![allow(unsafe_code, reason = "calls to the CUDA driver")]

use crate::context::check;
use crate::{Context, Error, Result};
use cudarc::driver::{result, sys};

/// Recorded launches. They run again with the same addresses: memory that was allocated while recording belongs to
/// the graph until it is dropped; buffers from before are kept alive by whoever records.
#[derive(Debug)]
pub struct Graph {
    context: Context,
    pool: u64,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: the handles are the driver's, which may be called from any thread; a graph is not changed.
unsafe impl Send for Graph {}

impl Context {
    /// Records what `work` launches, instead of running it. Everything launched before is done first, and unused
    /// memory goes back to the driver, so that what `work` takes is not held twice.
    ///
    /// # Errors
    /// Those of `work`, [`Error::Recording`] if it writes to its own memory from the host, and [`Error::Driver`] if it did something that cannot be recorded, such as waiting
    /// for the device.
    pub fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        self.synchronize()?;
        self.trim()?;
        let nested = || Error::Launch { kernel: "capture".to_owned(), problem: "a capture is going on".to_owned() };
        let pool = self.begin_own_pool().ok_or_else(nested)?;
        let captured = self.capture_into(pool, work);
        self.end_own_pool();
        if captured.is_err() {
            self.release_own_pool(pool);
        }
        captured
    }

    fn capture_into<E: From<Error>>(
        &self,
        pool: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        // Relaxed, so that the pool may ask the driver for memory on the way.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive, and the capture is ended below whatever `work` does short of panicking.
        check("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream(), mode) })?;
        let outcome = work();
        // SAFETY: as above.
        let graph = check("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream()) });
        outcome?;
        let graph = graph?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: `graph` was just made.
        let executable = match check("cuGraphInstantiate", unsafe { result::graph::instantiate(graph, flags) }) {
            Ok(executable) => executable,
            Err(err) => {
                // SAFETY: `graph` is nobody else's.
                let _ = unsafe { result::graph::destroy(graph) };
                return Err(err.into());
            }
        };
        Ok(Graph { context: self.clone(), pool, graph, executable })
    }
}

impl Graph {
    /// Runs the recorded launches.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn launch(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: graph and stream are alive.
        check("cuGraphLaunch", unsafe { result::graph::launch(self.executable, self.context.stream()) })
    }

    /// How many launches, copies and fills it holds.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn n_nodes(&self) -> Result<usize> {
        let mut n_nodes = 0;
        // SAFETY: the graph is alive; without a list the call only counts.
        let outcome = unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &mut n_nodes) };
        check("cuGraphGetNodes", outcome.result())?;
        Ok(n_nodes)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: both are this graph's own. Errors have nobody to go to.
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
        self.context.release_own_pool(self.pool);
    }
}
