//! Memory of a device.

#![allow(unsafe_code, reason = "copies between host and device")]

use crate::context::check;
use crate::{Context, Error, Result};
use cudarc::driver::result;
use std::ops::Range;

/// Bytes of device memory; dropping it gives them back to the context.
///
/// Copies to the host wait for everything launched before; copies from the host are done when they return.
#[derive(Debug)]
pub struct Buffer {
    context: Context,
    address: u64,
    len: usize,
}

/// Some bytes of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl Context {
    /// Memory with arbitrary contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer { address: self.take(bytes)?, context: self.clone(), len: bytes })
    }
}

impl Buffer {
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

    /// Whose memory it is.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Where it is on the device.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn check(&self, offset: usize, n_bytes: usize) -> Result<u64> {
        let end = offset.saturating_add(n_bytes);
        if end > self.len {
            return Err(Error::Range { offset, end, len: self.len });
        }
        Ok(self.address + offset as u64)
    }

    /// All of it.
    #[must_use]
    pub fn span(&self) -> Span<'_> {
        Span { buffer: self, offset: 0, len: self.len }
    }

    /// Part of it.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn slice(&self, range: Range<usize>) -> Result<Span<'_>> {
        let len = range.end.saturating_sub(range.start);
        self.check(range.start, len)?;
        Ok(Span { buffer: self, offset: range.start, len })
    }

    /// Writes bytes at `offset`. While launches are recorded this happens at once and is no part of the graph, whose
    /// own memory it may therefore not write to.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Recording`], [`Error::Driver`].
    pub fn upload(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let address = self.check(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let stream = self.context.upload_stream(self.address).ok_or(Error::Recording { n_bytes: bytes.len() })?;
        self.context.bind()?;
        // SAFETY: the destination lies inside this buffer, and the wait keeps the source alive long enough.
        unsafe {
            check("cuMemcpyHtoDAsync", result::memcpy_htod_async(address, bytes, stream))?;
            check("cuStreamSynchronize", result::stream::synchronize(stream))
        }
    }

    /// Reads bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Driver`], also for what an earlier launch did.
    pub fn download(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let address = self.check(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: the source lies inside this buffer, and the wait keeps the destination alive long enough.
        check("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(bytes, address, self.context.stream()) })?;
        self.context.synchronize()
    }

    /// Copies `n_bytes` of another buffer; both may be captured in a graph.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Driver`].
    pub fn copy_from(&mut self, offset: usize, source: &Buffer, from: usize, n_bytes: usize) -> Result<()> {
        let (to, from) = (self.check(offset, n_bytes)?, source.check(from, n_bytes)?);
        if n_bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: both ranges lie inside their buffers, which are different ones.
        check("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.context.stream()) })
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn fill(&mut self, byte: u8) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: the range is this buffer.
        check("cuMemsetD8Async", unsafe {
            result::memset_d8_async(self.address, byte, self.len, self.context.stream())
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.context.give(self.address);
    }
}

impl Span<'_> {
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address + self.offset as u64
    }

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
}
