//! Which bytes of the device are free: best fit in segments, with neighbours joined.
//!
//! Work on a device runs in the order of one stream, so a buffer that is dropped may be handed out again at
//! once: whoever gets it launches later. The same sequence of requests from the same state gets the same
//! addresses, which is what a captured graph needs.

use std::collections::BTreeMap;

/// Buffers begin at multiples of this.
pub(crate) const ALIGN: usize = 512;
/// Segments are multiples of this.
const SEGMENT: usize = 2 << 20;

/// Addresses only; whoever owns the pool talks to the driver.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// Start and size of what was taken from the driver.
    segments: BTreeMap<u64, usize>,
    /// Start and size of free blocks; no two touch inside one segment.
    free: BTreeMap<u64, usize>,
    /// Start and size of blocks in use.
    used: BTreeMap<u64, usize>,
}

impl Pool {
    /// Bytes that a request takes.
    pub(crate) fn rounded(bytes: usize) -> Option<usize> {
        bytes.max(1).checked_next_multiple_of(ALIGN)
    }

    /// Bytes to ask the driver for, for a request that does not fit.
    pub(crate) fn segment_for(bytes: usize) -> Option<usize> {
        Self::rounded(bytes)?.checked_next_multiple_of(SEGMENT)
    }

    /// Bytes taken from the driver.
    pub(crate) fn held(&self) -> usize {
        self.segments.values().sum()
    }

    /// The smallest free block that is large enough, the first of them; cut to size.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<u64> {
        let bytes = Self::rounded(bytes)?;
        let (&start, &size) = self.free.iter().filter(|(_, size)| **size >= bytes).min_by_key(|(_, size)| **size)?;
        self.free.remove(&start);
        if size > bytes {
            self.free.insert(start + bytes as u64, size - bytes);
        }
        self.used.insert(start, bytes);
        Some(start)
    }

    /// Adds memory from the driver.
    pub(crate) fn add_segment(&mut self, start: u64, bytes: usize) {
        self.segments.insert(start, bytes);
        self.free.insert(start, bytes);
    }

    /// Whether a block in use begins there.
    pub(crate) fn holds(&self, start: u64) -> bool {
        self.used.contains_key(&start)
    }

    /// Takes over everything that another pool has.
    pub(crate) fn absorb(&mut self, other: Pool) {
        self.segments.extend(other.segments);
        self.free.extend(other.free);
        self.used.extend(other.used);
    }

    /// Gives a block back and joins it to free neighbours of its segment.
    pub(crate) fn give(&mut self, start: u64) {
        let Some(mut size) = self.used.remove(&start) else { return };
        let mut start = start;
        let Some((&segment, &segment_size)) = self.segments.range(..=start).next_back() else { return };
        if let Some((&next, &next_size)) = self.free.range(start..).next()
            && next == start + size as u64
            && next < segment + segment_size as u64
        {
            self.free.remove(&next);
            size += next_size;
        }
        if let Some((&previous, &previous_size)) = self.free.range(..start).next_back()
            && previous + previous_size as u64 == start
            && previous >= segment
        {
            self.free.remove(&previous);
            start = previous;
            size += previous_size;
        }
        self.free.insert(start, size);
    }

    /// Takes out the segments that are wholly free, to be given back to the driver.
    pub(crate) fn drain_free_segments(&mut self) -> Vec<u64> {
        let whole: Vec<u64> = self
            .segments
            .iter()
            .filter(|(start, size)| self.free.get(start) == Some(size))
            .map(|(start, _)| *start)
            .collect();
        for start in &whole {
            self.segments.remove(start);
            self.free.remove(start);
        }
        whole
    }

    /// Takes out all segments.
    pub(crate) fn drain(&mut self) -> Vec<u64> {
        (self.free, self.used) = Default::default();
        std::mem::take(&mut self.segments).into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(segments: &[(u64, usize)]) -> Pool {
        let mut pool = Pool::default();
        segments.iter().for_each(|(start, bytes)| pool.add_segment(*start, *bytes));
        pool
    }

    #[test]
    fn the_same_requests_get_the_same_addresses() {
        let mut pool = pool(&[(1 << 20, SEGMENT)]);
        let mut round = || {
            let a = pool.take(1000).unwrap();
            let b = pool.take(5000).unwrap();
            pool.give(a);
            let c = pool.take(600).unwrap();
            pool.give(b);
            pool.give(c);
            (a, b, c)
        };
        let first = round();
        assert_eq!(first, round());
        assert_eq!(first, (1 << 20, (1 << 20) + 1024, 1 << 20));
    }

    #[test]
    fn neighbours_join_but_not_across_segments() {
        let start = 4096u64;
        let mut pool = pool(&[(start, 2048), (start + 2048, 2048)]);
        let blocks: Vec<u64> = (0..8).map(|_| pool.take(512).unwrap()).collect();
        assert!(pool.take(1).is_none());
        for at in [1, 0, 2, 3, 7, 5, 6, 4] {
            pool.give(blocks[at]);
        }
        assert_eq!(pool.free, BTreeMap::from([(start, 2048), (start + 2048, 2048)]));
        assert!(pool.take(2049).is_none(), "one block in two segments");
        let kept = pool.take(100).unwrap();
        assert_eq!(pool.drain_free_segments(), vec![start + 2048]);
        pool.give(kept);
        assert_eq!(pool.drain_free_segments(), vec![start]);
        assert_eq!((pool.held(), pool.take(1)), (0, None));
    }

    #[test]
    fn the_smallest_block_that_fits_is_cut() {
        let mut pool = pool(&[(0x10000, 4096), (0x20000, 1024)]);
        assert_eq!(pool.take(700), Some(0x20000));
        assert_eq!(pool.take(1500), Some(0x10000));
        assert_eq!(pool.free, BTreeMap::from([(0x10000 + 1536, 2560)]));
        pool.give(0x999);
        assert_eq!(pool.used.len(), 2, "an unknown address changes nothing");
    }

    #[test]
    fn a_pool_that_is_absorbed_goes_on_as_it_was() {
        let (mut main, mut other) = (pool(&[(0x10000, 4096)]), pool(&[(0x20000, 4096)]));
        let (kept, dropped) = (other.take(600).unwrap(), other.take(512).unwrap());
        assert!(other.holds(kept) && !main.holds(kept));
        main.absorb(other);
        main.give(dropped);
        main.give(kept);
        assert_eq!(main.free, BTreeMap::from([(0x10000, 4096), (0x20000, 4096)]));
        assert_eq!(main.held(), 8192);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        assert_eq!(Pool::rounded(usize::MAX), None);
        assert_eq!(Pool::segment_for(usize::MAX - ALIGN), None);
        assert_eq!((Pool::rounded(0), Pool::segment_for(1)), (Some(ALIGN), Some(SEGMENT)));
    }
}
