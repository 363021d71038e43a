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
    /// Bytes that were sent.
    sent: usize,
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
            let mut slot = Slot { pinned, landing, sent: 0 };
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
        let n_bytes = len * size_of::<f32>();
        slot.sent = n_bytes;
        if let (Some(pinned), Storage::Cuda(landing)) = (&mut slot.pinned, slot.landing.storage_mut()?) {
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
        let Slot { pinned, landing, sent } = &mut self.slots[self.first];
        let wanted: usize = targets.iter().map(|target| target.bytes()).sum();
        if wanted != *sent || targets.iter().any(|target| target.precision() != Precision::F32) {
            return Err(Error::Feed { problem: "the targets are not what was sent" });
        }
        if let (Some(pinned), Storage::Cuda(source)) = (pinned, landing.storage()) {
            pinned.arrive()?;
            let mut from = 0;
            for target in targets {
                let n_bytes = target.bytes();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Target;

    #[test]
    fn batches_arrive_in_order_and_in_their_sizes() {
        let device = Device::meta(Target::Cuda);
        let mut feed = Feed::new(&device, 6).unwrap();
        assert_eq!(device.memory().total.live, 2 * 6 * 4);
        let tensor = |len: usize| device.alloc([len], DType::real(Precision::F32), Purpose::Data).unwrap();
        let (mut x, mut y, mut z) = (tensor(4), tensor(2), tensor(3));
        let is_refused = |outcome: Result<()>, why: &str| match outcome {
            Err(Error::Feed { problem }) => problem.contains(why),
            _ => false,
        };
        assert!(is_refused(feed.receive(&mut [&mut x]), "nothing is on its way"));
        assert!(is_refused(feed.send(7, |_| ()), "more values"));
        feed.send(6, |_| ()).unwrap();
        feed.send(3, |_| ()).unwrap();
        assert!(is_refused(feed.send(1, |_| ()), "two batches"));
        assert!(is_refused(feed.receive(&mut [&mut z]), "not what was sent"));
        feed.receive(&mut [&mut x, &mut y]).unwrap();
        feed.receive(&mut [&mut z]).unwrap();
        feed.send(1, |_| ()).unwrap();
        feed.clear();
        assert!(is_refused(feed.receive(&mut [&mut z]), "nothing is on its way"));
    }
}
