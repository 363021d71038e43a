//! Time on the device.

#![allow(unsafe_code, reason = "calls to the CUDA driver")]

use crate::context::check;
use crate::{Context, Result};
use cudarc::driver::{result, sys};

/// A stopwatch that the device itself starts and stops.
#[derive(Debug)]
pub struct Timer {
    context: Context,
    start: sys::CUevent,
    stop: sys::CUevent,
}

impl Timer {
    /// Starts after everything launched so far.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    pub fn start(context: &Context) -> Result<Self> {
        context.bind()?;
        let event = || check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let timer = Timer { context: context.clone(), start: event()?, stop: event()? };
        // SAFETY: event and stream are alive.
        check("cuEventRecord", unsafe { result::event::record(timer.start, context.stream()) })?;
        Ok(timer)
    }

    /// Stops after everything launched so far, without waiting for it.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    pub fn mark(&mut self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: event and stream are alive.
        check("cuEventRecord", unsafe { result::event::record(self.stop, self.context.stream()) })
    }

    /// Waits for the stop and returns microseconds.
    ///
    /// # Errors
    /// [`crate::Error::Driver`], also if it was never stopped.
    pub fn read(&self) -> Result<f64> {
        self.context.bind()?;
        // SAFETY: the events are alive; the driver refuses events that were not recorded.
        let ms = unsafe {
            check("cuEventSynchronize", result::event::synchronize(self.stop))?;
            check("cuEventElapsedTime", result::event::elapsed(self.start, self.stop))?
        };
        Ok(f64::from(ms) * 1e3)
    }

    /// Stops after everything launched so far, waits for it, and returns microseconds.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    pub fn stop(mut self) -> Result<f64> {
        self.mark()?;
        self.read()
    }
}

// SAFETY: events are the driver's, which may be called from any thread.
unsafe impl Send for Timer {}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: the events are this timer's own. Errors have nobody to go to.
            unsafe {
                let _ = result::event::destroy(self.start);
                let _ = result::event::destroy(self.stop);
            }
        }
    }
}
