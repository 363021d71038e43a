//! Values of the host on their way to a GPU, two batches ahead at most.

use crate::storage::Storage;
use crate::{Device, Error, Purpose, Result, Tensor};
use halfmode_cuda::Pinned;
use halfmode_precision::{DType, Precision};

/// Double buffers: the host fills page-locked memory and the device copies it while it computes on what came before.
#[derive(Debug)]
pub struct Feed {
    slots: [Slot; 2],
    /// The slot that was sent first.
    first: usize,
    n_sent: usize,
}

/// The copy ends before its target is freed: fields are dropped in this order.
#[derive(Debug)]
struct Slot {
    /// Missing on the planning device.
    pinned: Option<Pinned>,
    landing: Tensor,
}

impl Feed {
    /// For up to `len` values of single precision at a time.
    ///
    /// # Errors
    /// Those of allocation; [`Error::Cuda`] if the host has too little memory that can be locked.
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        let slot = || -> Result<Slot> {
            let landing = device.alloc_unwritten([len], DType::real(Precision::F32), Purpose::Data)?;
            let pinned = device.as_cuda().map(|cuda| cuda.context().pinned(landing.bytes())).transpose()?;
            let mut slot = Slot { pinned, landing };
            // What used this memory before may still be running.
            slot.pinned.as_mut().map_or(Ok(()), Pinned::release)?;
            Ok(slot)
        };
        Ok(Feed { slots: [slot()?, slot()?], first: 0, n_sent: 0 })
    }

    /// Sends `len` values, which `fill` writes: a copy beside whatever the device is doing.
    ///
    /// # Errors
    /// [`Error::Feed`] if both slots are on their way or too small, [`Error::Cuda`].
    pub fn send(&mut self, len: usize, fill: impl FnOnce(&mut [f32])) -> Result<()> {
        if self.n_sent == 2 {
            return Err(Error::Feed { problem: "two batches are on their way already" });
        }
        let slot = &mut self.slots[(self.first + self.n_sent) % 2];
        if len > slot.landing.numel() {
            return Err(Error::Feed { problem: "a batch has more values than the feed was made for" });
        }
        if let (Some(pinned), Storage::Cuda(landing)) = (&mut slot.pinned, slot.landing.storage_mut()?) {
            let n_bytes = len * size_of::<f32>();
            fill(bytemuck::cast_slice_mut(&mut pinned.bytes_mut()?[..n_bytes]));
            pinned.send(landing, n_bytes)?;
        }
        self.n_sent += 1;
        Ok(())
    }

    /// Copies what was sent first to `targets`, one after another; what is launched from now on reads it there.
    ///
    /// # Errors
    /// [`Error::Feed`] if nothing is on its way or not that much, [`Error::Shared`] if others hold a target,
    /// [`Error::Cuda`].
    pub fn receive(&mut self, targets: &mut [&mut Tensor]) -> Result<()> {
        if self.n_sent == 0 {
            return Err(Error::Feed { problem: "nothing is on its way" });
        }
        let Slot { pinned, landing } = &mut self.slots[self.first];
        if let (Some(pinned), Storage::Cuda(source)) = (pinned, landing.storage()) {
            pinned.arrive()?;
            let mut from = 0;
            for target in targets {
                let (n_bytes, precision) = (target.bytes(), target.precision());
                if precision != Precision::F32 || from + n_bytes > source.len() {
                    return Err(Error::Feed { problem: "the targets are not what was sent" });
                }
                let Storage::Cuda(target) = target.storage_mut()? else { return Err(Error::NotOnGpu) };
                target.copy_from(0, source, from, n_bytes)?;
                from += n_bytes;
            }
            pinned.release()?;
        }
        self.drop_first();
        Ok(())
    }

    /// Forgets what is on its way.
    pub fn clear(&mut self) {
        while self.n_sent > 0 {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        self.first = (self.first + 1) % 2;
        self.n_sent -= 1;
    }
}
