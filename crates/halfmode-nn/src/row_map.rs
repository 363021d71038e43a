//! Functions of rows, `[…, c]`, tile by tile: threads share the tiles, and sums do not depend on how.

use crate::Result;
use crate::partial::{Partial, part_ranges, split_sums};
use crate::pointwise::{on_the_host, rows_of};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Shape, Tensor, View};
use rayon::prelude::*;

/// Rows of a tile.
const TILE: usize = 128;

/// The operands of a call: their channels, and the scratch of a tile of all.
struct Operands<'a, const N: usize> {
    views: [View<'a>; N],
    channels: [usize; N],
}

impl<'a, const N: usize> Operands<'a, N> {
    fn new(tensors: [&'a Tensor; N]) -> Result<Self> {
        let views: Vec<View<'a>> = tensors.iter().map(|it| it.view()).collect::<std::result::Result<_, _>>()?;
        let channels = tensors.map(|it| rows_of(it).1);
        // As many views as tensors: the conversion cannot fail.
        Ok(Operands { views: std::array::from_fn(|idx| views[idx]), channels })
    }

    /// Rows `first..first + n` of every operand as accumulators.
    fn tile<'b, R: Real>(&self, first: usize, n: usize, mut scratch: &'b mut [R]) -> [&'b [R]; N]
    where
        'a: 'b,
    {
        std::array::from_fn(|idx| {
            let c = self.channels[idx];
            let (own, rest) = std::mem::take(&mut scratch).split_at_mut(n * c);
            scratch = rest;
            self.views[idx].slice(first * c..(first + n) * c).widened(own)
        })
    }
}

/// A tensor of `shape` whose rows `work` writes from the same rows of `inputs`.
pub(crate) fn map_rows<R: Real, const N: usize>(
    device: &Device,
    inputs: [&Tensor; N],
    (shape, dtype): (&Shape, DType),
    work: impl Fn([&[R]; N], &mut [R]) + Sync,
) -> Result<Tensor> {
    on_the_host(device)?;
    let mut out = device.alloc_unwritten(shape.clone(), dtype, Purpose::Activation)?;
    let c_out = rows_of(&out).1;
    let scratch_len = TILE * (inputs.iter().map(|it| rows_of(it).1).sum::<usize>() + c_out);
    let scratch = device.scratch(scratch_len, R::PRECISION.bytes());
    if device.launches() && out.numel() > 0 {
        let operands = Operands::new(inputs)?;
        let tasks = out.view_mut()?.chunks(TILE * c_out);
        device.run(|| {
            tasks.into_par_iter().enumerate().for_each(|(idx, mut rows)| {
                scratch.with::<R, _>(|scratch| {
                    let n = rows.len() / c_out;
                    let (out, scratch) = scratch.split_at_mut(TILE * c_out);
                    let inputs = operands.tile(idx * TILE, n, scratch);
                    rows.fill(out, |out| work(inputs, out));
                });
            });
        });
    }
    Ok(out)
}

/// Gradients of the given shapes, in the accumulator's precision, to which `work` adds from tiles of rows.
pub(crate) fn sum_rows<R: Real, const N: usize, const M: usize>(
    device: &Device,
    inputs: [&Tensor; N],
    shapes: [&Shape; M],
    work: impl Fn([&[R]; N], &mut [&mut [R]]) + Sync,
) -> Result<Vec<Tensor>> {
    on_the_host(device)?;
    let n_rows = inputs.first().map_or(0, |it| rows_of(it).0);
    let lens: Vec<usize> = shapes.iter().map(|shape| shape.numel()).collect();
    let parts = part_ranges(n_rows, TILE);
    let accumulate: Precision = R::PRECISION;
    let mut partial = Partial::new(device, parts.len(), accumulate, &lens)?;
    let scratch_len = TILE * inputs.iter().map(|it| rows_of(it).1).sum::<usize>();
    let scratch = device.scratch(scratch_len, accumulate.bytes());
    if device.launches() {
        let operands = Operands::new(inputs)?;
        let tasks: Vec<_> = parts.iter().cloned().zip(partial.parts()?).collect();
        device.run(|| {
            tasks.into_par_iter().for_each(|(range, mut sums)| {
                scratch.with::<R, _>(|scratch| {
                    let mut sums = split_sums::<R>(&mut sums, &lens);
                    for first in range.clone().step_by(TILE) {
                        let n = TILE.min(range.end - first);
                        work(operands.tile(first, n, scratch), &mut sums);
                    }
                });
            });
        });
    }
    let shapes: Vec<&[usize]> = shapes.iter().map(|shape| &shape[..]).collect();
    partial.finish::<R>(device, &shapes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows beyond one tile, at one and at three threads, against plain loops.
    #[test]
    fn tiles_are_the_rows_that_they_are_of() {
        for (n_rows, threads) in [(1, 1), (128, 3), (300, 1), (300, 3), (1500, 3)] {
            let device = Device::cpu(threads).unwrap();
            let values = |c: usize, seed: usize| -> Vec<f64> {
                (0..n_rows * c).map(|i| ((i * 37 + seed) % 101) as f64 / 8.0 - 6.0).collect()
            };
            let (a, b) = (values(3, 1), values(2, 5));
            let tensor = |values: &[f64], c: usize, precision| {
                Tensor::from_slice(&device, values, [n_rows, c], precision, Purpose::Activation).unwrap()
            };
            // One operand is read in place, the other is widened.
            let (x, y) = (tensor(&a, 3, Precision::F32), tensor(&b, 2, Precision::F16));
            let shape = Shape::from([n_rows, 2]);
            let out = map_rows::<f32, 2>(&device, [&x, &y], (&shape, DType::real(Precision::F32)), |[x, y], out| {
                for ((x, y), out) in x.chunks_exact(3).zip(y.chunks_exact(2)).zip(out.chunks_exact_mut(2)) {
                    (out[0], out[1]) = (x[0] + y[0], x[2] - y[1]);
                }
            });
            let sums = sum_rows::<f32, 2, 1>(&device, [&x, &y], [&Shape::from([2])], |[x, y], sums| {
                for (x, y) in x.chunks_exact(3).zip(y.chunks_exact(2)) {
                    sums[0][0] += x[1];
                    sums[0][1] += y[0];
                }
            });
            // Eighths below 16 and sums of at most 1500 of them are exact in f32.
            let rows = || a.chunks_exact(3).zip(b.chunks_exact(2));
            let want: Vec<f64> = rows().flat_map(|(x, y)| [x[0] + y[0], x[2] - y[1]]).collect();
            assert_eq!(out.unwrap().to_vec::<f64>().unwrap(), want, "{n_rows} rows, {threads} threads");
            let want = vec![rows().map(|(x, _)| x[1]).sum::<f64>(), rows().map(|(_, y)| y[0]).sum()];
            assert_eq!(sums.unwrap()[0].to_vec::<f64>().unwrap(), want, "{n_rows} rows, {threads} threads");
        }
    }
}
