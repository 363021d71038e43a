//! Page-locked memory of the host, which the device copies from while both go on working.

#![allow(unsafe_code, reason = "calls to the CUDA driver")]

use crate::buffer::Buffer;
use crate::context::check;
use crate::{Context, Error, Result};
use cudarc::driver::{result, sys};
use std::ptr::NonNull;

/// Bytes of the host on their way to a buffer of the device.
///
/// A round is: fill [`bytes_mut`](Pinned::bytes_mut), [`send`](Pinned::send), [`arrive`](Pinned::arrive), launch what
/// reads the buffer, [`release`](Pinned::release). Nothing in it waits for the device but the next `bytes_mut`, and that
/// only for the copy.
#[derive(Debug)]
pub struct Pinned {
    context: Context,
    start: NonNull<u8>,
    len: usize,
    /// Recorded where the copy ends.
    copied: sys::CUevent,
    /// Recorded where the last reader of the buffer ends.
    released: sys::CUevent,
}

// SAFETY: the memory is nobody else's, and events are the driver's, which may be called from any thread.
unsafe impl Send for Pinned {}

impl Context {
    /// Page-locked memory of `n_bytes` zeros.
    ///
    /// # Errors
    /// [`Error::Driver`] if the host has too little memory.
    pub fn pinned(&self, n_bytes: usize) -> Result<Pinned> {
        self.bind()?;
        let len = n_bytes.max(1);
        // SAFETY: the memory is written right below, before anybody reads it.
        let start = check("cuMemHostAlloc", unsafe { result::malloc_host(len, 0) })?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| Error::Driver {
            call: "cuMemHostAlloc",
            name: "no address".to_owned(),
            text: "the driver returned none".to_owned(),
        })?;
        // SAFETY: `len` bytes were allocated there.
        unsafe { start.write_bytes(0, len) };
        let event = || check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING));
        let events = event().and_then(|copied| Ok((copied, event()?)));
        match events {
            Ok((copied, released)) => Ok(Pinned { context: self.clone(), start, len: n_bytes, copied, released }),
            Err(err) => {
                // SAFETY: it was just allocated, and nobody has it.
                let _ = unsafe { result::free_host(start.as_ptr().cast()) };
                Err(err)
            }
        }
    }
}

impl Pinned {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, to be filled. Waits until those sent before have been copied.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.context.bind()?;
        // SAFETY: the event is alive; one that was never recorded counts as done.
        check("cuEventSynchronize", unsafe { result::event::synchronize(self.copied) })?;
        // SAFETY: `len` bytes at `start` are initialised and borrowed through `self`; no copy reads them any more.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }

    /// Begins to copy the first `n_bytes` to the start of `to`, once what was launched before the last
    /// [`release`](Pinned::release) is done. `to` has to live until the copy has arrived.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Driver`].
    pub fn send(&mut self, to: &mut Buffer, n_bytes: usize) -> Result<()> {
        let address = to.check(0, n_bytes)?;
        if n_bytes > self.len {
            return Err(Error::Range { offset: 0, end: n_bytes, len: self.len });
        }
        self.context.bind()?;
        let (copies, flags) = (self.context.copies(), sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT);
        // SAFETY: events and stream are alive, both ranges lie inside their memory, and `bytes_mut` and `drop` wait
        // for the copy before the source changes.
        unsafe {
            check("cuStreamWaitEvent", result::stream::wait_event(copies, self.released, flags))?;
            let bytes = std::slice::from_raw_parts(self.start.as_ptr(), n_bytes);
            check("cuMemcpyHtoDAsync", result::memcpy_htod_async(address, bytes, copies))?;
            check("cuEventRecord", result::event::record(self.copied, copies))
        }
    }

    /// What is launched from now on waits for the copy.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn arrive(&self) -> Result<()> {
        self.context.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive.
        let outcome = unsafe { result::stream::wait_event(self.context.stream(), self.copied, flags) };
        check("cuStreamWaitEvent", outcome)
    }

    /// The next copy waits for what was launched up to now.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn release(&mut self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: event and stream are alive.
        check("cuEventRecord", unsafe { result::event::record(self.released, self.context.stream()) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: memory and events are its own, and the copy out of it is waited for. Errors have nobody to go to.
            unsafe {
                let _ = result::event::synchronize(self.copied);
                let _ = result::free_host(self.start.as_ptr().cast());
                let _ = result::event::destroy(self.copied);
                let _ = result::event::destroy(self.released);
            }
        }
    }
}
