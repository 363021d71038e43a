//! Convolutions on the CPU as matrix products without copies of windows: in a row with channels last, the window of
//! a point begins one pixel after that of its neighbour, so the windows of a row are a matrix whose rows overlap.

use crate::Result;
use crate::partial::{Partial, split_sums};
use crate::pointwise::{accumulators, not_accumulators};
use halfmode_precision::DType;
use halfmode_tensor::{Device, Mat, MatMut, Purpose, Real, Shape, Tensor, View, with_real};
use rayon::prelude::*;
use std::ops::Range;

/// The sizes of a correlation `y[i, j, o] = sum w[d_1, d_2, c, o] x[i + d_1 - pad_1, j + d_2 - pad_2, c]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Correlation {
    pub(crate) batch: usize,
    pub(crate) x: [usize; 2],
    pub(crate) c_x: usize,
    pub(crate) y: [usize; 2],
    pub(crate) c_y: usize,
    pub(crate) kernel: [usize; 2],
    /// Zeros before and after; a negative number leaves out as many points.
    pub(crate) pad: [isize; 2],
}

/// Bands of output rows that a sample is cut into: enough for some threads to share a small batch.
const N_BANDS: usize = 4;

impl Correlation {
    pub(crate) fn output_shape(&self) -> Shape {
        [self.batch, self.y[0], self.y[1], self.c_y].into()
    }

    /// Scalars of a padded row.
    fn padded(&self) -> usize {
        (self.y[1] + self.kernel[1] - 1) * self.c_x
    }

    fn x_row(&self) -> usize {
        self.x[1] * self.c_x
    }

    fn y_row(&self) -> usize {
        self.y[1] * self.c_y
    }

    fn band(&self) -> usize {
        self.y[0].div_ceil(N_BANDS).max(1)
    }

    /// Padded row `i` of a sample: `load` changes what is read before it is used, given the sample.
    fn read<R: Real>(&self, x: View<'_>, b: usize, i: isize, load: &impl Fn(usize, &mut [R]), to: &mut [R]) {
        let Some(i) = usize::try_from(i).ok().filter(|&i| i < self.x[0]) else { return to.fill(R::ZERO) };
        let start = (b * self.x[0] + i) * self.x_row();
        // Points left out on either side, or zeros put there.
        let (skip, zeros) = ((-self.pad[1]).max(0) as usize, self.pad[1].max(0) as usize * self.c_x);
        let n = self.x_row() - 2 * skip * self.c_x;
        let row = x.slice(start + skip * self.c_x..start + skip * self.c_x + n);
        to[..zeros].fill(R::ZERO);
        row.widen(&mut to[zeros..zeros + n]);
        load(b, &mut to[zeros..zeros + n]);
        to[zeros + n..].fill(R::ZERO);
    }

    /// Writes `y`. `load` sees each row of `x` before, `store` each row of `y` after it is used, with the number of
    /// the sample. `w` holds accumulators, `[k_1, k_2, c_x, c_y]`.
    pub(crate) fn run<R: Real>(
        &self,
        device: &Device,
        x: &Tensor,
        w: &Tensor,
        y: &mut Tensor,
        load: impl Fn(usize, &mut [R]) + Sync,
        store: impl Fn(usize, &mut [R]) + Sync,
    ) -> Result<()> {
        let (band, padded) = (self.band(), self.padded());
        let n_rows = band + self.kernel[0] - 1;
        let scratch = device.scratch(n_rows * padded + self.y_row(), R::PRECISION.bytes());
        if !device.launches() || y.numel() == 0 {
            return Ok(());
        }
        let (x, w) = (x.view()?, accumulators::<R>("conv2d", "weight", w)?);
        let k = self.kernel[1] * self.c_x;
        let mut tasks = Vec::new();
        for (b, sample) in y.view_mut()?.chunks(self.y[0] * self.y_row()).into_iter().enumerate() {
            let bands = sample.chunks(band * self.y_row()).into_iter().enumerate();
            tasks.extend(bands.map(|(idx, rows)| (b, idx * band, rows)));
        }
        device.run(|| {
            tasks.into_par_iter().for_each(|(b, first, mut out)| {
                scratch.with::<R, _>(|scratch| {
                    let (rows, own) = scratch.split_at_mut(n_rows * padded);
                    let n_out = out.len() / self.y_row();
                    for (idx, row) in rows.chunks_exact_mut(padded).enumerate().take(n_out + self.kernel[0] - 1) {
                        self.read(x, b, (first + idx) as isize - self.pad[0], &load, row);
                    }
                    for i in 0..n_out {
                        out.slice_mut(i * self.y_row()..(i + 1) * self.y_row()).fill(own, |y| {
                            for (d1, w) in w.chunks_exact(k * self.c_y).enumerate() {
                                let windows = Mat { data: &rows[(i + d1) * padded..][..padded], row: self.c_x, col: 1 };
                                let keep = if d1 == 0 { R::ZERO } else { R::ONE };
                                let (w, to) = (Mat::rows(w, self.c_y), MatMut::rows(y, self.c_y));
                                R::gemm((self.y[1], self.c_y, k), windows, w, to, keep, R::ONE);
                            }
                            store(b, y);
                        });
                    }
                });
            });
        });
        Ok(())
    }

    /// The gradient of `sum over pairs <K field, image>` by the weight of `K`, in accumulators. Each of `parts`, ranges
    /// of samples, sums on its own; the parts are added in order.
    pub(crate) fn weight_gradient<R: Real>(
        &self,
        device: &Device,
        shape: &Shape,
        parts: &[Range<usize>],
        pairs: &[Pair<'_, R>],
    ) -> Result<Tensor> {
        let [k1, k2] = self.kernel;
        let len = k2 * self.c_x * self.c_y;
        let mut partial = Partial::new(device, parts.len(), R::PRECISION, &[k1 * len])?;
        let (padded, points) = (self.padded(), self.y[1] + k2 - 1);
        let scratch = device.scratch(self.y[0] * (padded + points * self.c_y), R::PRECISION.bytes());
        if device.launches() {
            let pairs = pairs.iter().map(Pair::views).collect::<Result<Vec<_>>>()?;
            let mut buffers = partial.parts()?;
            let mut tasks = Vec::new();
            for (range, buffer) in parts.iter().zip(&mut buffers) {
                let sums = split_sums::<R>(buffer, &[k1 * len]);
                let rows = sums.into_iter().flat_map(|sums| sums.chunks_mut(len.max(1))).enumerate();
                tasks.extend(rows.map(|(d1, sums)| (range.clone(), d1, sums)));
            }
            device.run(|| {
                tasks.into_par_iter().for_each(|(range, d1, sums)| {
                    scratch.with::<R, _>(|scratch| {
                        for b in range {
                            pairs.iter().for_each(|pair| self.add_sample(pair, b, d1, sums, scratch));
                        }
                    });
                });
            });
        }
        partial
            .finish::<R>(device, &[&shape[..]])
            .and_then(|mut grads| grads.pop().ok_or(crate::Error::Tensor(halfmode_tensor::Error::NoValues)))
    }

    /// What one sample adds to row `d1` of the weight's gradient.
    fn add_sample<R: Real>(&self, pair: &Views<'_, R>, b: usize, d1: usize, sums: &mut [R], scratch: &mut [R]) {
        // Rows of the field that are there.
        let shift = d1 as isize - self.pad[0];
        let first = (-shift).clamp(0, self.y[0] as isize) as usize;
        let last = (self.x[0] as isize - shift).clamp(first as isize, self.y[0] as isize) as usize;
        let (n, padded, points) = (last - first, self.padded(), self.y[1] + self.kernel[1] - 1);
        if n == 0 {
            return;
        }
        let (field, image) = scratch.split_at_mut(self.y[0] * padded);
        for (idx, i) in (first..last).enumerate() {
            self.read(pair.field, b, i as isize + shift, &pair.load_field, &mut field[idx * padded..][..padded]);
            let (row, to) = (self.y_row(), &mut image[idx * points * self.c_y..][..points * self.c_y]);
            let start = (b * self.y[0] + i) * row;
            pair.image.slice(start..start + row).widen(&mut to[..row]);
            (pair.load_image)(b, &mut to[..row]);
            to[row..].fill(R::ZERO);
        }
        let n_points = (n - 1) * points + self.y[1];
        let dims = (self.kernel[1] * self.c_x, self.c_y, n_points);
        let windows = Mat { data: &field[..n * padded], row: 1, col: self.c_x };
        R::gemm(dims, windows, Mat::rows(image, self.c_y), MatMut::rows(sums, self.c_y), R::ONE, R::ONE);
    }
}

/// What changes a row of a sample after it is read.
pub(crate) type Load<'a, R> = &'a (dyn Fn(usize, &mut [R]) + Sync);

/// A field and the gradient by its image.
pub(crate) struct Pair<'a, R> {
    pub(crate) field: &'a Tensor,
    pub(crate) image: &'a Tensor,
    pub(crate) load_field: Load<'a, R>,
    pub(crate) load_image: Load<'a, R>,
}

impl<'a, R: Real> Pair<'a, R> {
    pub(crate) fn new(field: &'a Tensor, image: &'a Tensor) -> Self {
        Pair { field, image, load_field: &|_, _| {}, load_image: &|_, _| {} }
    }

    fn views(&self) -> Result<Views<'_, R>> {
        let (field, image) = (self.field.view()?, self.image.view()?);
        Ok(Views { field, image, load_field: self.load_field, load_image: self.load_image })
    }
}

struct Views<'a, R> {
    field: View<'a>,
    image: View<'a>,
    load_field: Load<'a, R>,
    load_image: Load<'a, R>,
}

/// The weight of the transpose: `[k_1, k_2, c_out, c_in]`, both axes of the kernel turned round.
pub(crate) fn adjoint_weights(w: &Tensor) -> Result<Tensor> {
    let [k1, k2, c_in, c_out] = w.shape()[..] else { return Ok(w.clone()) };
    let device = w.device();
    let mut turned = device.alloc_unwritten([k1, k2, c_out, c_in], DType::real(w.precision()), Purpose::Workspace)?;
    if device.launches() {
        let mut to = turned.view_mut()?;
        with_real!(w.precision(), R => {
            let from = accumulators::<R>("conv2d", "weight", w)?;
            let to = R::direct_mut(&mut to).ok_or_else(|| not_accumulators::<R>("conv2d", "weight", w.dtype()))?;
            turn(from, to, c_in, c_out);
        });
    }
    Ok(turned)
}

/// Side of the squares in which a matrix is transposed.
const SQUARE: usize = 16;

fn turn<R: Real>(from: &[R], to: &mut [R], c_in: usize, c_out: usize) {
    let len = c_in * c_out;
    for (from, to) in from.chunks_exact(len.max(1)).rev().zip(to.chunks_exact_mut(len.max(1))) {
        for (i0, o0) in (0..c_in).step_by(SQUARE).flat_map(|i| (0..c_out).step_by(SQUARE).map(move |o| (i, o))) {
            for o in o0..(o0 + SQUARE).min(c_out) {
                for i in i0..(i0 + SQUARE).min(c_in) {
                    to[o * c_in + i] = from[i * c_out + o];
                }
            }
        }
    }
}
