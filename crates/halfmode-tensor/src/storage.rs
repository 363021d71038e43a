//! Host buffers, and those that wait to be used again.

use half::{bf16, f16};
use halfmode_precision::Precision;
use std::collections::VecDeque;

/// The scalars of a tensor.
#[derive(Debug)]
pub(crate) enum Storage {
    F64(Vec<f64>),
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    /// In the memory of a GPU.
    #[cfg(feature = "cuda")]
    Cuda(halfmode_cuda::Buffer),
    /// Counted but not there: the planning device's storage.
    Planned,
}

/// Evaluates `$body` with `$values` bound to the vector of whichever arm; `$elsewhere` if the host has none.
macro_rules! each_storage {
    ($storage:expr, $values:ident => $body:expr, $elsewhere:expr) => {
        match $storage {
            Storage::F64($values) => $body,
            Storage::F32($values) => $body,
            Storage::Bf16($values) => $body,
            Storage::F16($values) => $body,
            _ => $elsewhere,
        }
    };
}

/// A zeroed vector, or `None` if the system refuses it. Fresh pages come zeroed from the system, one by one
/// when a kernel's threads first write them, not from one thread here.
fn zeroed<T: bytemuck::Zeroable>(len: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).ok()
}

#[cfg(feature = "cuda")]
pub(crate) use each_storage;

impl Storage {
    /// Zeros, or `None` if the system refuses the memory.
    pub(crate) fn zeros(precision: Precision, len: usize) -> Option<Self> {
        match precision {
            Precision::F64 => zeroed(len).map(Storage::F64),
            Precision::F32 => zeroed(len).map(Storage::F32),
            Precision::Bf16 => zeroed(len).map(Storage::Bf16),
            Precision::F16 => zeroed(len).map(Storage::F16),
        }
    }

    fn bytes(&self) -> usize {
        each_storage!(self, values => std::mem::size_of_val(values.as_slice()), 0)
    }

    fn holds(&self, precision: Precision, len: usize) -> bool {
        match (self, precision) {
            (Storage::F64(values), Precision::F64) => values.len() == len,
            (Storage::F32(values), Precision::F32) => values.len() == len,
            (Storage::Bf16(values), Precision::Bf16) => values.len() == len,
            (Storage::F16(values), Precision::F16) => values.len() == len,
            _ => false,
        }
    }

    pub(crate) fn fill_zero(&mut self) {
        each_storage!(self, values => values.fill(bytemuck::Zeroable::zeroed()), ());
    }

    /// The bytes of host memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn host_bytes(&mut self) -> &mut [u8] {
        each_storage!(self, values => bytemuck::cast_slice_mut(values), &mut [])
    }

    /// Makes a scalar that somebody reads before writing it visible in every result.
    pub(crate) fn poison(&mut self) {
        match self {
            Storage::F64(values) => values.fill(f64::NAN),
            Storage::F32(values) => values.fill(f32::NAN),
            Storage::Bf16(values) => values.fill(bf16::NAN),
            Storage::F16(values) => values.fill(f16::NAN),
            _ => {}
        }
    }
}

/// Freed buffers that wait for a tensor of their size. A training step asks for the same sizes again
/// and again; fresh memory would be zeroed by the system page by page every time.
///
/// Live buffers and waiting ones together never exceed the most bytes that were live at once, so
/// the ledger's peak bounds both.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// Oldest first.
    waiting: VecDeque<Storage>,
    bytes: usize,
}

/// Smaller buffers come from the allocator's own lists as fast.
const MIN_BYTES: usize = 64 * 1024;

impl Pool {
    /// The last freed buffer of this size, with whatever it held.
    pub(crate) fn take(&mut self, precision: Precision, len: usize) -> Option<Storage> {
        let idx = self.waiting.iter().rposition(|storage| storage.holds(precision, len))?;
        let storage = self.waiting.remove(idx)?;
        self.bytes -= storage.bytes();
        Some(storage)
    }

    /// Keeps a freed buffer if it fits into `room` bytes beside the younger ones.
    pub(crate) fn put(&mut self, storage: Storage, room: usize) {
        let bytes = storage.bytes();
        if (MIN_BYTES..=room).contains(&bytes) {
            self.shrink(room - bytes);
            self.bytes += bytes;
            self.waiting.push_back(storage);
        }
    }

    /// Frees the oldest buffers until the rest fits into `room` bytes.
    pub(crate) fn shrink(&mut self, room: usize) {
        while self.bytes > room {
            let Some(oldest) = self.waiting.pop_front() else { break };
            self.bytes -= oldest.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros(len: usize) -> Storage {
        Storage::zeros(Precision::F32, len).unwrap()
    }

    #[test]
    fn waiting_buffers_fit_the_room_and_the_youngest_goes_first() {
        let mut pool = Pool::default();
        let len = MIN_BYTES / 4;
        for (idx, room) in [(0, 3 * MIN_BYTES), (1, 3 * MIN_BYTES), (2, 3 * MIN_BYTES)] {
            let mut storage = zeros(len);
            let Storage::F32(values) = &mut storage else { unreachable!() };
            values[0] = idx as f32;
            pool.put(storage, room);
        }
        assert!(pool.take(Precision::F32, len - 1).is_none() && pool.take(Precision::F16, len).is_none());
        let Some(Storage::F32(values)) = pool.take(Precision::F32, len) else { panic!("no buffer waits") };
        assert_eq!((values[0].to_bits(), pool.bytes), (2f32.to_bits(), 2 * MIN_BYTES));
        pool.put(zeros(2 * len), 3 * MIN_BYTES);
        assert_eq!((pool.waiting.len(), pool.bytes), (2, 3 * MIN_BYTES), "the oldest makes room");
        pool.put(zeros(8 * len), 3 * MIN_BYTES);
        pool.put(zeros(len / 2), 3 * MIN_BYTES);
        assert_eq!(pool.waiting.len(), 2, "too large and too small ones are not kept");
        pool.shrink(0);
        assert_eq!((pool.waiting.len(), pool.bytes), (0, 0));
    }
}
