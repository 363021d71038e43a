//! One pairwise product on stored tensors.
//!
//! The product is cut into tasks ([`Blocking`]). A task widens a tile of each operand into the
//! accumulator, with the axes where the matrix product wants them, multiplies, and rounds its part
//! of the result once. A complex product is one real product of twice the size,
//! `[a_re | a_im] [[b_re, b_im], [-b_im, b_re]] = [c_re | c_im]`, so its sums, the differences of
//! products included, stay in the accumulator. The order of every sum depends on the shapes alone.

use crate::Conj;
use crate::blocking::{Blocking, Group};
use crate::tile::{self, Axis, Fill};
use halfmode_tensor::{Device, Mat, MatMut, Real, Scratch, View, ViewMut};
use rayon::prelude::*;

/// Below this many multiplies, plain loops beat a call of the matrix product.
const SMALL_PRODUCT: usize = 128;

/// Where the scalars of a labelled tensor are.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    pub(crate) labels: Vec<char>,
    /// Distance between neighbours along each label.
    pub(crate) strides: Vec<usize>,
    /// Distance from the real to the imaginary part.
    pub(crate) lane: usize,
}

impl Placement {
    /// Distance along a label; 0 for labels that the tensor does not have.
    pub(crate) fn stride(&self, label: char) -> usize {
        self.labels.iter().position(|&it| it == label).map_or(0, |axis| self.strides[axis])
    }
}

/// An operand of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) view: View<'a>,
    pub(crate) placement: &'a Placement,
    pub(crate) conj: Conj,
}

/// One label (or several that are neighbours everywhere) in the three tensors.
#[derive(Clone, Copy, Debug)]
struct Dim {
    size: usize,
    chunk: usize,
    /// Distances in a, b and c; 0 where the label is absent.
    strides: [usize; 3],
}

impl Dim {
    fn n_chunks(&self) -> usize {
        self.size.div_ceil(self.chunk.max(1))
    }
}

/// A consecutive part of a dim.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: usize,
    len: usize,
}

/// The dims of one group.
#[derive(Clone, Debug)]
struct Dims(Vec<Dim>);

impl Dims {
    fn new(group: &Group, placements: [&Placement; 3]) -> Self {
        let mut dims: Vec<Dim> = Vec::with_capacity(group.labels.len());
        for ((&label, &size), &chunk) in group.labels.iter().zip(&group.sizes).zip(&group.chunks) {
            let strides = placements.map(|it| it.stride(label));
            match dims.last_mut() {
                // Neighbours everywhere, and a tile takes the inner one whole.
                Some(outer) if chunk == size && (0..3).all(|i| outer.strides[i] == strides[i] * size) => {
                    *outer = Dim { size: outer.size * size, chunk: outer.chunk * size, strides };
                }
                _ => dims.push(Dim { size, chunk, strides }),
            }
        }
        Dims(dims)
    }

    fn n_chunks(&self) -> usize {
        self.0.iter().map(Dim::n_chunks).product()
    }

    /// The box with this number; the last dim varies fastest.
    fn part(&self, mut idx: usize) -> Vec<Part> {
        let mut parts = vec![Part { start: 0, len: 0 }; self.0.len()];
        for (part, dim) in parts.iter_mut().zip(&self.0).rev() {
            let n_chunks = dim.n_chunks().max(1);
            let start = idx % n_chunks * dim.chunk;
            idx /= n_chunks;
            *part = Part { start, len: dim.chunk.min(dim.size - start) };
        }
        parts
    }

    fn offset(&self, parts: &[Part], tensor: usize) -> usize {
        self.0.iter().zip(parts).map(|(dim, part)| part.start * dim.strides[tensor]).sum()
    }

    /// The axes of a box in a tensor and, row-major from `unit`, in a tile.
    fn axes<'a>(&'a self, parts: &'a [Part], tensor: usize, unit: usize) -> impl Iterator<Item = Axis> + 'a {
        let mut dst = unit;
        self.0.iter().zip(parts).rev().map(move |(dim, part)| {
            let axis = Axis { len: part.len, src: dim.strides[tensor], dst };
            dst *= part.len;
            axis
        })
    }

    /// The axes of the whole group, summed.
    fn summed(&self, tensor: usize) -> impl Iterator<Item = Axis> + '_ {
        self.0.iter().map(move |dim| Axis { len: dim.size, src: dim.strides[tensor], dst: 0 })
    }
}

fn volume(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.len).product()
}

/// An axis of the result, and who owns its parts.
#[derive(Clone, Copy, Debug)]
struct OutAxis {
    size: usize,
    chunk: usize,
    stride: usize,
    /// What one chunk further adds to the number of the task.
    task_step: usize,
    /// Group (batch, m, n; 3: real and imaginary parts) and dim in it.
    owner: (usize, usize),
}

struct Product<'a> {
    a: Source<'a>,
    b: Source<'a>,
    lanes: usize,
    batch: Dims,
    m: Dims,
    n: Dims,
    k: Dims,
    sum_a: Dims,
    sum_b: Dims,
    /// Distances between the matrices of a, b and c in their tiles.
    matrices: [usize; 3],
    tile_lens: [usize; 3],
    out: Vec<OutAxis>,
    /// Axes of the result before those that a run takes.
    n_outer: usize,
    scale: f64,
}

/// `c = scale * sum a b`, rounded once to the storage of `c`. Runs on the device's threads.
pub(crate) fn product<R: Real>(
    device: &Device,
    blocking: &Blocking,
    (a, b): (Source<'_>, Source<'_>),
    (c, c_placement): (ViewMut<'_>, &Placement),
    scale: f64,
    scratch: &Scratch,
) {
    if c.is_empty() {
        return;
    }
    let product = Product::new(blocking, a, b, c_placement, scale);
    device.run(|| {
        let tasks = product.runs(c);
        tasks.into_par_iter().enumerate().for_each(|(task, runs)| {
            scratch.with(|buffer: &mut [R]| product.task(task, runs, buffer));
        });
    });
}

impl<'a> Product<'a> {
    fn new(blocking: &Blocking, a: Source<'a>, b: Source<'a>, c: &Placement, scale: f64) -> Self {
        let dims = |group: &Group| Dims::new(group, [a.placement, b.placement, c]);
        let (batch, m, n) = (dims(&blocking.batch), dims(&blocking.m), dims(&blocking.n));
        let mut out = Vec::new();
        let mut task_step = 1;
        for (group, dims) in [&batch, &m, &n].into_iter().enumerate().rev() {
            for (idx, dim) in dims.0.iter().enumerate().rev() {
                let Dim { size, chunk, strides } = *dim;
                out.push(OutAxis { size, chunk, stride: strides[2], task_step, owner: (group, idx) });
                task_step *= dim.n_chunks();
            }
        }
        if blocking.lanes == 2 {
            out.push(OutAxis { size: 2, chunk: 2, stride: c.lane, task_step: 0, owner: (3, 0) });
        }
        out.sort_by_key(|axis| std::cmp::Reverse(axis.stride));
        let n_outer = out.iter().rposition(|axis| axis.chunk < axis.size).unwrap_or(0);
        Product {
            a,
            b,
            lanes: blocking.lanes,
            k: dims(&blocking.k),
            sum_a: dims(&blocking.sum_a),
            sum_b: dims(&blocking.sum_b),
            batch,
            m,
            n,
            matrices: blocking.matrix_strides(),
            tile_lens: blocking.tile_lens(),
            out,
            n_outer,
            scale,
        }
    }

    fn n_tasks(&self) -> usize {
        self.batch.n_chunks() * self.m.n_chunks() * self.n.n_chunks()
    }

    /// Deals the result out: the contiguous runs that each task writes, in storage order.
    fn runs<'c>(&self, c: ViewMut<'c>) -> Vec<Vec<ViewMut<'c>>> {
        match c {
            ViewMut::F64(c) => self.deal(c, ViewMut::F64),
            ViewMut::F32(c) => self.deal(c, ViewMut::F32),
            ViewMut::Bf16(c) => self.deal(c, ViewMut::Bf16),
            ViewMut::F16(c) => self.deal(c, ViewMut::F16),
        }
    }

    fn deal<'c, T>(&self, c: &'c mut [T], wrap: impl Fn(&'c mut [T]) -> ViewMut<'c>) -> Vec<Vec<ViewMut<'c>>> {
        let mut tasks: Vec<Vec<ViewMut<'c>>> = (0..self.n_tasks()).map(|_| Vec::new()).collect();
        let Some(cut) = self.out.get(self.n_outer) else {
            tasks[0].push(wrap(c));
            return tasks;
        };
        let outer = &self.out[..self.n_outer];
        let inner: usize = self.out[self.n_outer + 1..].iter().map(|axis| axis.size).product();
        let mut rest = c;
        let mut at = vec![0; outer.len()];
        loop {
            let task: usize = outer.iter().zip(&at).map(|(axis, at)| at / axis.chunk * axis.task_step).sum();
            for (idx, start) in (0..cut.size).step_by(cut.chunk).enumerate() {
                let len = cut.chunk.min(cut.size - start) * inner;
                let (run, tail) = rest.split_at_mut(len);
                tasks[task + idx * cut.task_step].push(wrap(run));
                rest = tail;
            }
            if !advance(&mut at, outer.iter().map(|axis| axis.size)) {
                return tasks;
            }
        }
    }

    fn task<R: Real>(&self, task: usize, runs: Vec<ViewMut<'_>>, scratch: &mut [R]) {
        let (n_m, n_n) = (self.m.n_chunks(), self.n.n_chunks());
        let batch = self.batch.part(task / (n_m * n_n));
        let m = self.m.part(task / n_n % n_m);
        let n = self.n.part(task % n_n);
        let [len_a, len_b, len_c] = self.tile_lens;
        let (tile_a, rest) = scratch.split_at_mut(len_a);
        let (tile_b, rest) = rest.split_at_mut(len_b);
        let (tile_c, run) = rest.split_at_mut(len_c);
        let n_k = self.k.n_chunks();
        if n_k == 0 {
            tile_c.fill(R::ZERO);
        }
        for block in 0..n_k {
            let k = self.k.part(block);
            self.gather_a(&batch, &m, &k, tile_a);
            self.gather_b(&batch, &k, &n, tile_b);
            let dims = (volume(&m), volume(&n) * self.lanes, volume(&k) * self.lanes);
            multiply(volume(&batch), dims, tile_a, tile_b, tile_c, self.matrices, block == 0);
        }
        self.store([&batch, &m, &n], runs, tile_c, run);
    }

    /// The tile `[batch, m, lane, k]` of the left operand.
    fn gather_a<R: Real>(&self, batch: &[Part], m: &[Part], k: &[Part], tile: &mut [R]) {
        let n_k = volume(k);
        let mut axes: Vec<Axis> = self.k.axes(k, 0, 1).collect();
        axes.extend(self.m.axes(m, 0, n_k * self.lanes));
        axes.extend(self.batch.axes(batch, 0, self.matrices[0]));
        if self.lanes == 2 {
            axes.push(Axis { len: 2, src: self.a.placement.lane, dst: n_k });
        }
        let base = self.batch.offset(batch, 0) + self.m.offset(m, 0) + self.k.offset(k, 0);
        fill(self.a.view, base, axes, &self.sum_a, 0, tile);
    }

    /// The tile `[batch, k, n]` of the right operand; complex: `[batch, lane, k, lane, n]`, the
    /// 2 x 2 block that multiplies by a complex number.
    fn gather_b<R: Real>(&self, batch: &[Part], k: &[Part], n: &[Part], tile: &mut [R]) {
        let (n_k, n_n) = (volume(k), volume(n));
        let row = n_n * self.lanes;
        let block = n_k * row * self.lanes;
        let mut axes: Vec<Axis> = self.n.axes(n, 1, 1).collect();
        axes.extend(self.k.axes(k, 1, row));
        axes.extend(self.batch.axes(batch, 1, self.matrices[1]));
        if self.lanes == 2 {
            axes.push(Axis { len: 2, src: self.b.placement.lane, dst: n_n });
        }
        let base = self.batch.offset(batch, 1) + self.k.offset(k, 1) + self.n.offset(n, 1);
        fill(self.b.view, base, axes, &self.sum_b, 1, tile);
        if self.lanes == 1 || block == 0 {
            return;
        }
        let sign = |conj: Conj| if conj == Conj::Yes { -R::ONE } else { R::ONE };
        let (sign_a, sign_b) = (sign(self.a.conj), sign(self.b.conj));
        for matrix in tile.chunks_mut(self.matrices[1]).take(volume(batch)) {
            let (upper, lower) = matrix[..block].split_at_mut(n_k * row);
            for (upper, lower) in upper.chunks_exact_mut(row).zip(lower.chunks_exact_mut(row)) {
                let (re, im) = upper.split_at_mut(n_n);
                let (cross, same) = lower.split_at_mut(n_n);
                for (((re, im), cross), same) in re.iter().zip(im).zip(cross).zip(same) {
                    *im *= sign_b;
                    *cross = -(sign_a * *im);
                    *same = sign_a * *re;
                }
            }
        }
    }

    /// Rounds the tile `[batch, m, lane, n]` into the runs of this task.
    fn store<R: Real>(&self, parts: [&[Part]; 3], runs: Vec<ViewMut<'_>>, tile: &[R], run: &mut [R]) {
        let n_n = volume(parts[2]);
        let row = n_n * self.lanes;
        let units = [self.matrices[2], row, 1];
        let mut strides: [Vec<usize>; 3] = Default::default();
        for ((strides, parts), unit) in strides.iter_mut().zip(parts).zip(units) {
            let inner = |idx: usize| parts[idx + 1..].iter().map(|part| part.len).product::<usize>();
            *strides = (0..parts.len()).map(|idx| unit * inner(idx)).collect();
        }
        let axes: Vec<(usize, usize)> = self
            .out
            .iter()
            .map(|axis| match axis.owner {
                (3, _) => (2, n_n),
                (group, idx) => (parts[group][idx].len, strides[group][idx]),
            })
            .collect();
        let (outer, inner) = axes.split_at(self.n_outer);
        let scale = R::from_f64(self.scale);
        let mut at = vec![0; outer.len()];
        for mut target in runs {
            let base: usize = outer.iter().zip(&at).map(|((_, stride), at)| stride * at).sum();
            let values = &mut run[..target.len()];
            tile::pick(tile, base, inner, values);
            if scale != R::ONE {
                values.iter_mut().for_each(|value| *value *= scale);
            }
            target.narrow(values);
            advance(&mut at, outer.iter().map(|(len, _)| *len));
        }
    }
}

/// Fills a tile from a box, summing over the labels that only this operand has.
fn fill<R: Real>(src: View<'_>, base: usize, mut axes: Vec<Axis>, summed: &Dims, tensor: usize, tile: &mut [R]) {
    if summed.0.is_empty() {
        tile::gather(src, base, &axes, tile, Fill::Replace);
    } else {
        axes.extend(summed.summed(tensor));
        tile.fill(R::ZERO);
        tile::gather(src, base, &axes, tile, Fill::Add);
    }
}

/// `n_batch` products of (m, k) and (k, n), which lie `strides` apart.
fn multiply<R: Real>(
    n_batch: usize,
    (m, n, k): (usize, usize, usize),
    a: &[R],
    b: &[R],
    c: &mut [R],
    strides: [usize; 3],
    first: bool,
) {
    for idx in 0..n_batch {
        let [a_at, b_at, c_at] = strides.map(|stride| idx * stride);
        let a = &a[a_at..a_at + m * k];
        let b = &b[b_at..b_at + k * n];
        let c = &mut c[c_at..c_at + m * n];
        if m * n * k > SMALL_PRODUCT {
            let keep = if first { R::ZERO } else { R::ONE };
            R::gemm((m, n, k), Mat::rows(a, k), Mat::rows(b, n), MatMut::rows(c, n), keep, R::ONE);
            continue;
        }
        if first {
            c.fill(R::ZERO);
        }
        for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
            for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
                c.iter_mut().zip(b).for_each(|(c, b)| *c += a * *b);
            }
        }
    }
}

/// The next index in row-major order; false after the last.
fn advance(at: &mut [usize], sizes: impl DoubleEndedIterator<Item = usize> + ExactSizeIterator) -> bool {
    for (at, size) in at.iter_mut().rev().zip(sizes.rev()) {
        *at += 1;
        if *at < size {
            return true;
        }
        *at = 0;
    }
    false
}
