//! The perceptron in bfloat16 on a processor with tile registers: the same passes as [`super::cpu`], which is their
//! reference, with products of bfloat16 numbers and sums in f32.

use super::cpu::{Backward, tanh_slope};
use super::{Layer, NAME};
use crate::Result;
use crate::pointwise::{accumulators, not_accumulators, rows_of};
use crate::rows::{add_bias, add_column_sums};
use half::bf16;
use halfmode_autograd::Cx;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::tiles::{self, Left, Matrix, SIDE, TILE_WORDS, as_words, n_words, whole};
use halfmode_tensor::{Device, Purpose, Real, Tensor, View, ViewMut};
use rayon::prelude::*;

/// Rows of a tile of rows.
const ROWS: usize = 128;
const F32: DType = DType::real(Precision::F32);
const BF16: DType = DType::real(Precision::Bf16);

/// Whether operands are bfloat16 and the processor multiplies those.
pub(super) fn suits(cx: &Cx, x: &Tensor, layers: &[Layer<'_>]) -> bool {
    let stored = [cx.policy.pointwise.storage, cx.policy.saved(NAME, "hidden"), x.precision()];
    let weights = layers.iter().map(|it| it.w.precision());
    cx.device.is_cpu() && stored.into_iter().chain(weights).all(|it| it == Precision::Bf16) && tiles::available()
}

fn halves<'a>(operand: &'static str, tensor: &'a Tensor) -> Result<&'a [bf16]> {
    match tensor.view()? {
        View::Bf16(values) => Ok(values),
        _ => Err(halfmode_tensor::Error::DType { op: NAME, operand, expected: "bf16", found: tensor.dtype() }.into()),
    }
}

/// Operands in tiles as [`in_tiles`] wrote them.
fn tiles_of(tensors: &[Tensor]) -> Result<Vec<&[u32]>> {
    tensors.iter().map(|it| accumulators::<f32>(NAME, "tiles", it).map(as_words)).collect()
}

/// f32 storage to be written.
fn written<'a>(view: ViewMut<'a>, operand: &'static str) -> Result<&'a mut [f32]> {
    let found = DType::real(view.as_view().precision());
    match view {
        ViewMut::F32(values) => Ok(values),
        _ => Err(not_accumulators::<f32>(NAME, operand, found)),
    }
}

fn matrix(data: &[bf16], (rows, cols): (usize, usize), stride: usize) -> Matrix<'_> {
    Matrix { data, rows, cols, stride }
}

/// Which way an operand lies.
#[derive(Clone, Copy)]
enum Way {
    Right,
    RightTransposed,
    LeftTransposed,
}

/// Operands in tiles: a tensor each, of `n` columns and sums of `k` terms, filled by all threads together.
fn in_tiles(device: &Device, operands: &[(Option<Matrix<'_>>, Way, (usize, usize))]) -> Result<Vec<Tensor>> {
    let mut out = Vec::with_capacity(operands.len());
    for (_, _, (n, k)) in operands {
        out.push(device.alloc_unwritten([n_words(*n, *k)], F32, Purpose::Workspace)?);
    }
    if !device.launches() {
        return Ok(out);
    }
    let mut tasks = Vec::new();
    for (tensor, (matrix, way, (_, k))) in out.iter_mut().zip(operands) {
        let Some(matrix) = matrix else { return Err(halfmode_tensor::Error::NoValues.into()) };
        let words = written(tensor.view_mut()?, "tiles")?;
        let block = (whole(*k) / tiles::DEPTH * TILE_WORDS).max(1);
        let blocks = tiles::words(words).chunks_mut(block).enumerate();
        tasks.extend(blocks.map(|(idx, tiles)| (matrix, *way, idx * SIDE, tiles)));
    }
    device.run(|| {
        tasks.into_par_iter().with_min_len(4).for_each(|(matrix, way, first, tiles)| {
            f32::vectorised(
                #[inline(always)]
                || match way {
                    Way::Right => matrix.right(first, tiles),
                    Way::RightTransposed => matrix.right_transposed(first, tiles),
                    Way::LeftTransposed => matrix.left_transposed(first, tiles),
                },
            );
        });
    });
    Ok(out)
}

fn weight<'a>(device: &Device, layer: &Layer<'a>) -> Result<Option<Matrix<'a>>> {
    let w = if device.launches() { Some(halves("weight", layer.w)?) } else { None };
    Ok(w.map(|w| matrix(w, (layer.c_out, layer.c_in), layer.stride)))
}

/// The numbers of a tile of rows between two layers: bfloat16 operands, and the sums of their product.
struct Buffers<'a> {
    from: &'a mut [bf16],
    to: &'a mut [bf16],
    sums: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    /// f32 scratch for layers of at most `widest` channels.
    fn len(widest: usize) -> usize {
        2 * ROWS * whole(widest)
    }

    fn new(scratch: &'a mut [f32]) -> Self {
        let (sums, halves) = scratch.split_at_mut(scratch.len() / 2);
        let (from, to) = tiles::halves(halves).split_at_mut(sums.len());
        Buffers { from, to, sums }
    }

    /// Takes `n` rows of `c` numbers as the operand.
    fn load(&mut self, rows: &[bf16], n: usize, c: usize) {
        for (to, row) in self.from.chunks_exact_mut(whole(c)).zip(rows.chunks_exact(c)).take(n) {
            to[..c].copy_from_slice(row);
            to[c..].fill(bf16::ZERO);
        }
    }

    /// Multiplies `n` rows of `k` numbers with an operand of `c` columns. Rows beyond `n` are whatever they were.
    fn multiply(&mut self, n: usize, (c, k): (usize, usize), right: &[u32]) -> &mut [f32] {
        let (m, wide) = (n.div_ceil(SIDE) * SIDE, whole(c));
        let rows = Left::Rows(&self.from[..m * whole(k)], whole(k));
        tiles::product((m, wide, whole(k)), rows, right, &mut self.sums[..m * wide], wide, false);
        &mut self.sums[..n * wide]
    }

    /// Makes the sums, `n` rows of `c`, the next operand.
    fn turn(&mut self, n: usize, c: usize) {
        let len = n * whole(c);
        ViewMut::Bf16(&mut self.to[..len]).narrow(&self.sums[..len]);
        std::mem::swap(&mut self.from, &mut self.to);
    }

    /// Copies the operand's `n` rows of `c` numbers out.
    fn store(&self, to: &mut ViewMut<'_>, c: usize) {
        let ViewMut::Bf16(to) = to else { return };
        let rows = self.from.chunks_exact(whole(c));
        to.chunks_exact_mut(c).zip(rows).for_each(|(to, from)| to.copy_from_slice(&from[..c]));
    }
}

fn widest(layers: &[Layer<'_>]) -> usize {
    layers.iter().map(|it| it.c_out.max(it.c_in)).max().unwrap_or(1)
}

/// A tile of each tensor, with that of the first.
fn tasks<'a>(
    first: &'a mut Tensor,
    c: usize,
    others: &'a mut [Tensor],
) -> Result<Vec<(ViewMut<'a>, Vec<ViewMut<'a>>)>> {
    let mut tasks: Vec<(ViewMut<'_>, Vec<ViewMut<'_>>)> =
        first.view_mut()?.chunks(ROWS * c).into_iter().map(|it| (it, Vec::new())).collect();
    for other in others {
        let c = rows_of(other).1;
        tasks.iter_mut().zip(other.view_mut()?.chunks(ROWS * c)).for_each(|(task, tile)| task.1.push(tile));
    }
    Ok(tasks)
}

pub(super) fn forward(
    device: &Device,
    layers: &[Layer<'_>],
    x: &Tensor,
    t: f64,
    hidden: &mut [Tensor],
    y: &mut Tensor,
) -> Result<()> {
    let mut operands = Vec::with_capacity(layers.len());
    for layer in layers {
        operands.push((weight(device, layer)?, Way::RightTransposed, (layer.c_out, layer.c_in)));
    }
    let weights = in_tiles(device, &operands)?;
    let scratch = device.scratch(Buffers::len(widest(layers)), 4);
    if !device.launches() || y.numel() == 0 {
        return Ok(());
    }
    let mut shifts = Vec::with_capacity(layers.len());
    for (idx, layer) in layers.iter().enumerate() {
        let mut b = layer.b.to_vec::<f32>()?;
        if idx == 0 && layer.stride > layer.c_in {
            let rows = halves("weight", layer.w)?.chunks_exact(layer.stride);
            b.iter_mut().zip(rows).for_each(|(b, row)| *b += t as f32 * row[layer.c_in].to_f32());
        }
        // tanh(0) = 0: what is beyond a layer stays zero.
        b.resize(whole(layer.c_out), 0.0);
        shifts.push(b);
    }
    let weights = tiles_of(&weights)?;
    let ((_, c), c_last) = (rows_of(x), layers.last().map_or(1, |it| it.c_out));
    let x = halves("x", x)?;
    let tasks = tasks(y, c_last, hidden)?;
    device.run(|| {
        tasks.into_par_iter().enumerate().for_each(|(tile, (mut y, kept))| {
            scratch.with::<f32, _>(|scratch| {
                let mut buffers = Buffers::new(scratch);
                let n = y.len() / c_last;
                buffers.load(&x[tile * ROWS * c..][..n * c], n, c);
                let mut kept = kept.into_iter();
                for (idx, (layer, (w, b))) in layers.iter().zip(weights.iter().zip(&shifts)).enumerate() {
                    let sums = buffers.multiply(n, (layer.c_out, layer.c_in), w);
                    add_bias(sums, b);
                    if idx + 1 < layers.len() {
                        <f32 as Real>::tanh(sums);
                    }
                    buffers.turn(n, layer.c_out);
                    if let Some(mut kept) = kept.next() {
                        buffers.store(&mut kept, layer.c_out);
                    }
                }
                buffers.store(&mut y, c_last);
            });
        });
    });
    Ok(())
}

impl Backward<'_> {
    /// As [`Backward::rows`]; what it returns is bfloat16.
    pub(super) fn rows_tiled(&self, device: &Device, g: &Tensor, gx: &mut Tensor) -> Result<Vec<Tensor>> {
        let (n_rows, c) = rows_of(self.x);
        let g = g.cast(Precision::Bf16, Purpose::Workspace)?;
        let mut inner = Vec::with_capacity(self.layers.len());
        let mut operands = Vec::with_capacity(self.layers.len());
        for layer in self.layers {
            inner.push(device.alloc_unwritten([n_rows, layer.c_out], BF16, Purpose::Workspace)?);
            operands.push((weight(device, layer)?, Way::Right, (layer.c_in, layer.c_out)));
        }
        let weights = in_tiles(device, &operands)?;
        let widest = widest(self.layers);
        let scratch = device.scratch(Buffers::len(widest) + widest, 4);
        if !device.launches() || n_rows == 0 {
            return Ok(inner);
        }
        let weights = tiles_of(&weights)?;
        let hidden = self.hidden.iter().map(Tensor::view).collect::<std::result::Result<Vec<_>, _>>()?;
        let (g, c_last) = (halves("gradient", &g)?, self.layers.last().map_or(1, |it| it.c_out));
        let tasks = tasks(gx, c, &mut inner)?;
        device.run(|| {
            tasks.into_par_iter().enumerate().for_each(|(tile, (mut gx, mut inner))| {
                scratch.with::<f32, _>(|scratch| {
                    let (wide, scratch) = scratch.split_at_mut(widest);
                    let mut buffers = Buffers::new(scratch);
                    let (n, first) = (gx.len() / c, tile * ROWS);
                    buffers.load(&g[first * c_last..][..n * c_last], n, c_last);
                    for (idx, (layer, w)) in self.layers.iter().zip(&weights).enumerate().rev() {
                        if let Some(inner) = inner.get_mut(idx) {
                            buffers.store(inner, layer.c_out);
                        }
                        let sums = buffers.multiply(n, (layer.c_in, layer.c_out), w);
                        if let Some(hidden) = idx.checked_sub(1).and_then(|below| hidden.get(below)) {
                            for (i, sums) in sums.chunks_exact_mut(whole(layer.c_in)).enumerate() {
                                let start = (first + i) * layer.c_in;
                                let h = hidden.slice(start..start + layer.c_in).widened(&mut *wide);
                                tanh_slope(&mut sums[..layer.c_in], h);
                            }
                        }
                        buffers.turn(n, layer.c_in);
                    }
                    buffers.store(&mut gx, c);
                });
            });
        });
        Ok(inner)
    }

    /// As [`Backward::weights`], from what [`Backward::rows_tiled`] returned.
    pub(super) fn weights_tiled(&self, device: &Device, inner: &[Tensor]) -> Result<Vec<Tensor>> {
        let n_rows = rows_of(self.x).0;
        let (mut grads, mut operands) = (Vec::new(), Vec::new());
        // Of no rows all sums are zero.
        let (launches, sums) = (device.launches(), device.launches() && n_rows > 0);
        for (idx, (layer, g)) in self.layers.iter().zip(inner).enumerate() {
            let shape = layer.w.shape().clone();
            grads.push((
                if sums {
                    device.alloc_unwritten(shape, F32, Purpose::Grad)
                } else {
                    device.alloc(shape, F32, Purpose::Grad)
                }?,
                device.alloc(layer.b.shape().clone(), F32, Purpose::Grad)?,
            ));
            let x = if idx == 0 { self.x } else { &self.hidden[idx - 1] };
            for (tensor, way, c) in [(g, Way::LeftTransposed, layer.c_out), (x, Way::Right, layer.c_in)] {
                let lies = if launches { Some(matrix(halves("hidden", tensor)?, (n_rows, c), c)) } else { None };
                operands.push((lies, way, (c, n_rows)));
            }
        }
        let packed = in_tiles(device, &operands)?;
        let widest = self.layers.iter().map(|it| whole(it.c_in)).max().unwrap_or(1);
        let widest_out = self.layers.iter().map(|it| it.c_out).max().unwrap_or(1);
        let scratch = device.scratch((tiles::DEPTH * widest).max(ROWS * widest_out), 4);
        if sums {
            let packed = tiles_of(&packed)?;
            let (mut tasks, mut biases) = (Vec::new(), Vec::new());
            for ((layer, pair), ((grad_w, grad_b), g)) in
                self.layers.iter().zip(packed.chunks_exact(2)).zip(grads.iter_mut().zip(inner))
            {
                let w = written(grad_w.view_mut()?, "gradient")?;
                let b = written(grad_b.view_mut()?, "gradient")?;
                let blocks =
                    w.chunks_mut(tiles::DEPTH * layer.stride).zip(pair[0].chunks(n_words(tiles::DEPTH, n_rows)));
                tasks.extend(blocks.map(|(rows, left)| (layer, left, pair[1], rows)));
                biases.push((b, g.view()?));
            }
            device.run(|| {
                tasks.into_par_iter().for_each(|(layer, left, right, rows)| {
                    scratch.with::<f32, _>(|sums| {
                        let wide = whole(layer.c_in);
                        let dims = (tiles::DEPTH, wide, whole(n_rows));
                        tiles::product(dims, Left::Tiles(left), right, &mut sums[..tiles::DEPTH * wide], wide, false);
                        for (row, sums) in rows.chunks_exact_mut(layer.stride).zip(sums.chunks_exact(wide)) {
                            row[..layer.c_in].copy_from_slice(&sums[..layer.c_in]);
                        }
                    });
                });
                biases.into_par_iter().for_each(|(b, g)| {
                    scratch.with::<f32, _>(|wide| {
                        for start in (0..g.len()).step_by(ROWS * b.len()) {
                            add_column_sums(
                                g.slice(start..(start + ROWS * b.len()).min(g.len())).widened(&mut *wide),
                                b,
                            );
                        }
                    });
                });
            });
        }
        let mut out = Vec::with_capacity(2 * grads.len());
        for (layer, (mut grad_w, grad_b)) in self.layers.iter().zip(grads) {
            if launches && layer.stride > layer.c_in {
                let b = accumulators::<f32>(NAME, "gradient", &grad_b)?;
                let w = written(grad_w.view_mut()?, "gradient")?;
                w.chunks_exact_mut(layer.stride).zip(b).for_each(|(row, b)| row[layer.c_in] = self.t as f32 * *b);
            }
            out.extend([grad_w, grad_b]);
        }
        Ok(out)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::super::{TanhMlp, TimeColumn, cpu};
    use super::*;

    /// Whether there are tile registers; says so where a test cannot run. With `HALFMODE_REQUIRE_AMX=1` that is a failure.
    fn has_tiles() -> bool {
        if !tiles::available() {
            let required = std::env::var_os("HALFMODE_REQUIRE_AMX").is_some_and(|it| it == "1");
            assert!(!required, "HALFMODE_REQUIRE_AMX is set, but this processor has no tile registers");
            eprintln!("skipped: this processor has no tile registers");
        }
        tiles::available()
    }

    fn tensor(device: &Device, shape: &[usize], seed: f64, scale: f64) -> Tensor {
        let n = shape.iter().product::<usize>();
        let at = |i: usize| scale * (2.0 * ((i + 1) as f64 * 0.754_877_666 + seed).fract() - 1.0);
        Tensor::from_slice(device, &(0..n).map(at).collect::<Vec<_>>(), shape, Precision::Bf16, Purpose::Param).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30)
    }

    /// On the same operands both paths form the same sums; that of tiles rounds what goes from one layer to the next,
    /// and what comes back. Each such rounding is at most 2^-8 of a value; those of four layers there and back, and of
    /// the result, add as squares. Weights uniform in ±2 / sqrt(c_in) pass errors on 2 / sqrt(3) times as large, four
    /// layers less than twice.
    #[test]
    fn tiles_compute_what_the_widening_path_computes() {
        if !has_tiles() {
            return;
        }
        let device = Device::cpu(2).unwrap();
        for (n_rows, widths) in [
            (0, vec![3, 7, 2]),
            (1, vec![1, 1]),
            (5, vec![3, 7, 2]),
            (131, vec![64, 256, 33, 64]),
            (300, vec![17, 70, 40, 31, 5]),
        ] {
            let x = tensor(&device, &[n_rows, widths[0]], 0.1, 1.0);
            let weights: Vec<Tensor> = (0..widths.len() - 1)
                .flat_map(|idx| {
                    let c_in = widths[idx] + usize::from(idx == 0);
                    let scale = 2.0 / (c_in as f64).sqrt();
                    [
                        tensor(&device, &[widths[idx + 1], c_in], 0.3 + idx as f64, scale),
                        tensor(&device, &[widths[idx + 1]], 0.7, 0.3),
                    ]
                })
                .collect();
            let refs: Vec<&Tensor> = weights.iter().collect();
            let layers = TanhMlp(TimeColumn::Last).layers(&x, &refs).unwrap();
            let c_last = widths[widths.len() - 1];
            let make = |c: usize| device.alloc([n_rows, c], BF16, Purpose::Workspace).unwrap();
            let hidden = || widths[1..widths.len() - 1].iter().map(|&c| make(c)).collect::<Vec<_>>();
            let (mut got, mut want, mut h, mut h_want) = (make(c_last), make(c_last), hidden(), hidden());
            forward(&device, &layers, &x, 0.375, &mut h, &mut got).unwrap();
            cpu::forward::<f32>(&device, &layers, &x, 0.375, &mut h_want, &mut want).unwrap();
            let bound = 2.0 * 9f64.sqrt() * 2f64.powi(-8);
            assert!(distance(&got, &want) <= bound, "{n_rows} {widths:?}: {}", distance(&got, &want));
            let g = tensor(&device, &[n_rows, c_last], 0.9, 1.0);
            let back = Backward { layers: &layers, x: &x, hidden: &h_want, t: 0.375 };
            let (mut gx, mut gx_want) = (make(widths[0]), make(widths[0]));
            let inner = back.rows_tiled(&device, &g, &mut gx).unwrap();
            let inner_want = back.rows::<f32>(&device, &g, &mut gx_want).unwrap();
            assert!(distance(&gx, &gx_want) <= bound, "{n_rows} {widths:?}: {}", distance(&gx, &gx_want));
            let grads = back.weights_tiled(&device, &inner).unwrap();
            let want = back.weights::<f32>(&device, &inner_want).unwrap();
            assert_eq!(grads.len(), want.len());
            for (idx, (got, want)) in grads.iter().zip(&want).enumerate() {
                assert_eq!(got.shape(), want.shape());
                assert!(distance(got, want) <= bound, "{n_rows} {widths:?} {idx}: {}", distance(got, want));
            }
        }
    }
}
