//! Gradients of small parameters, summed over many rows in an order that does not depend on the
//! number of threads: rows are cut into a fixed number of parts, each part sums into a buffer of
//! its own, and the buffers are added in order.

use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Tensor, View, ViewMut};
use std::ops::Range;

/// Parts that rows are cut into. Enough for some threads to share, few enough that the buffers
/// stay small.
pub(crate) const N_PARTS: usize = 8;

/// The rows of each part: contiguous, as equal as multiples of `grain` allow.
pub(crate) fn part_ranges(n_rows: usize, grain: usize) -> Vec<Range<usize>> {
    let n_grains = n_rows.div_ceil(grain.max(1));
    let per_part = n_grains.div_ceil(N_PARTS).max(1) * grain;
    (0..n_rows).step_by(per_part).map(|start| start..(start + per_part).min(n_rows)).collect()
}

/// Partial sums of several parameters' gradients, one row of buffers per part.
#[derive(Debug)]
pub(crate) struct Partial {
    sums: Tensor,
    lens: Vec<usize>,
}

impl Partial {
    /// Zeroed buffers for parameters of these lengths.
    pub(crate) fn new(device: &Device, n_parts: usize, accumulate: Precision, lens: &[usize]) -> Result<Self> {
        let total: usize = lens.iter().sum();
        let sums = device.alloc([n_parts, total], DType::real(accumulate), Purpose::Workspace)?;
        Ok(Partial { sums, lens: lens.to_vec() })
    }

    /// The buffers of each part.
    pub(crate) fn parts(&mut self) -> Result<Vec<ViewMut<'_>>> {
        let total = self.lens.iter().sum::<usize>().max(1);
        Ok(self.sums.view_mut()?.chunks(total))
    }

    /// Adds up the parts in order and hands out one gradient per parameter, in the accumulator's
    /// precision and the given shapes.
    pub(crate) fn finish<R: Real>(self, device: &Device, shapes: &[&[usize]]) -> Result<Vec<Tensor>> {
        let total: usize = self.lens.iter().sum();
        let mut sum = vec![R::ZERO; if device.launches() { total } else { 0 }];
        if device.launches() {
            let parts: View<'_> = self.sums.view()?;
            let mut row = vec![R::ZERO; total];
            for start in (0..parts.len()).step_by(total.max(1)) {
                parts.slice(start..start + total).widen(&mut row);
                sum.iter_mut().zip(&row).for_each(|(sum, value)| *sum += *value);
            }
        }
        let mut start = 0;
        let grads = self.lens.iter().zip(shapes).map(|(&len, &shape)| {
            let range = start..start + len;
            start += len;
            if device.launches() {
                Tensor::from_slice(device, &sum[range], shape, R::PRECISION, Purpose::Grad)
            } else {
                device.alloc(shape, DType::real(R::PRECISION), Purpose::Grad)
            }
        });
        Ok(grads.collect::<std::result::Result<_, _>>()?)
    }
}

/// The buffers of one part, split by parameter, as accumulators.
pub(crate) fn split_sums<'a, R: Real>(part: &'a mut ViewMut<'_>, lens: &[usize]) -> Vec<&'a mut [R]> {
    let mut rest: &mut [R] = R::direct_mut(part).unwrap_or_default();
    lens.iter()
        .map(|&len| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            head
        })
        .collect()
}
