//! A mean of planar flows and its divergence as one op.

use crate::partial::{Partial, part_ranges, split_sums};
use crate::pointwise::{Grads, check_axes, check_len, check_real, on_the_host, rows_of, storage, weight_dtype};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Purpose, Real, Shape, Tensor, View, with_real};
use rayon::prelude::*;
use smallvec::smallvec;

/// The velocity of a mean of `k` planar flows, and its divergence with the sign that a log-density wants:
///
/// ```text
/// v(z) = mean_k tanh(<a_k, z> + s_k) g_k,    m(z) = -div v = -mean_k (1 - tanh²) <a_k, g_k>
/// ```
///
/// A row of the coefficient table is `[a (d), u (d), gate (d), s (1)]`, and `g = u sigmoid(gate)`.
///
/// # Shapes
/// - input 0, `z`: `[…, d]`, real
/// - input 1, the coefficients: `k (3 d + 1)` numbers of any shape, flow by flow
/// - output 0, `v`: the shape of `z`, in the pointwise storage format
/// - output 1, `m`: `[…, 1]`, in the accumulation format: sums of a log-density bear less rounding than points do
///
/// # Saved for backward
/// `z`; the coefficients are shared. Hidden values are computed again. Sums are formed in the accumulation format, and
/// the gradient of the coefficients is given in it.
///
/// # Errors
/// [`Error::Shape`] if the coefficients are no whole number of flows, [`halfmode_tensor::Error::DType`] for complex
/// operands. A GPU has no kernel of it alone; a solve over
/// given times has one of its own there.
#[derive(Clone, Copy, Debug)]
pub struct PlanarFlow;

const NAME: &str = "planar_flow";

/// Rows of a tile.
const TILE: usize = 128;

/// Coefficients as the loops want them.
struct Flows<R> {
    d: usize,
    n: usize,
    /// `[n, d]`
    a: Vec<R>,
    /// `[n, d]`
    g: Vec<R>,
    /// `sigmoid(gate)`, `[n, d]`
    gate: Vec<R>,
    shift: Vec<R>,
    /// `<a, g>`
    q: Vec<R>,
}

fn n_flows(coefficients: &Tensor, d: usize) -> Result<usize> {
    let n = (coefficients.numel() / (3 * d + 1)).max(1);
    check_len(NAME, "coefficients", coefficients, n * (3 * d + 1))?;
    Ok(n)
}

impl<R: Real> Flows<R> {
    fn new(coefficients: &Tensor, d: usize) -> Result<Self> {
        let (n, values) = (n_flows(coefficients, d)?, coefficients.to_vec::<R>()?);
        let part = |from: usize, len: usize| -> Vec<R> {
            values.chunks_exact(3 * d + 1).flat_map(|row| &row[from..from + len]).copied().collect()
        };
        let (a, u, mut gate, shift) = (part(0, d), part(d, d), part(2 * d, d), part(3 * d, 1));
        let half = R::from_f64(0.5);
        gate.iter_mut().for_each(|it| *it *= half);
        R::tanh(&mut gate);
        gate.iter_mut().for_each(|it| *it = half * (R::ONE + *it));
        let g: Vec<R> = u.iter().zip(&gate).map(|(u, gate)| *u * *gate).collect();
        let q = a.chunks_exact(d).zip(g.chunks_exact(d)).map(|(a, g)| {
            let mut sum = R::ZERO;
            a.iter().zip(g).for_each(|(a, g)| sum += *a * *g);
            sum
        });
        let q = q.collect();
        Ok(Flows { d, n, a, g, gate, shift, q })
    }

    fn weight(&self) -> R {
        R::from_f64(1.0 / self.n as f64)
    }

    fn row<'a>(&self, of: &'a [R], k: usize) -> &'a [R] {
        &of[k * self.d..(k + 1) * self.d]
    }

    /// `h = tanh(<a_k, z> + s_k)` over a tile; `z` is `[d, rows]`.
    fn hidden(&self, k: usize, z: &[R], h: &mut [R]) {
        let (a, shift, n) = (self.row(&self.a, k), self.shift[k], h.len());
        R::vectorised(
            #[inline(always)]
            || {
                h.fill(shift);
                for (a, z) in a.iter().zip(z.chunks_exact(n)) {
                    h.iter_mut().zip(z).for_each(|(h, z)| *h += *a * *z);
                }
            },
        );
        R::tanh(h);
    }

    /// `v` `[d, rows]` and `m` of a tile.
    fn forward(&self, z: &[R], v: &mut [R], m: &mut [R], h: &mut [R]) {
        v.fill(R::ZERO);
        m.fill(R::ZERO);
        let n = m.len();
        for k in 0..self.n {
            self.hidden(k, z, h);
            let (g, q) = (self.row(&self.g, k), self.q[k]);
            let h = &*h;
            R::vectorised(
                #[inline(always)]
                || {
                    for (g, v) in g.iter().zip(v.chunks_exact_mut(n)) {
                        v.iter_mut().zip(h).for_each(|(v, h)| *v += *g * *h);
                    }
                    m.iter_mut().zip(h).for_each(|(m, h)| *m += q * (*h * *h - R::ONE));
                },
            );
        }
        let weight = self.weight();
        v.iter_mut().chain(m).for_each(|it| *it *= weight);
    }

    /// Adds to `gz` `[d, rows]`, and to `sums` of each flow `[<ds, z> (d), <gv, h> (d), <ds, 1>, <1 - h², gm>]`, where
    /// `ds` is the gradient of what tanh is taken of. `gv` `[d, rows]` and `gm` carry the mean's weight.
    fn backward(&self, [z, gv, gm]: [&[R]; 3], gz: &mut [R], sums: &mut [R], [h, ds]: [&mut [R]; 2]) {
        let (d, n) = (self.d, gm.len());
        for (k, sums) in sums.chunks_exact_mut(2 * d + 2).enumerate() {
            self.hidden(k, z, h);
            let (a, g, q) = (self.row(&self.a, k), self.row(&self.g, k), self.q[k] + self.q[k]);
            let (h, ds) = (&*h, &mut *ds);
            R::vectorised(
                #[inline(always)]
                || {
                    for ((ds, h), gm) in ds.iter_mut().zip(h).zip(gm) {
                        *ds = q * *h * *gm;
                    }
                    for (g, gv) in g.iter().zip(gv.chunks_exact(n)) {
                        ds.iter_mut().zip(gv).for_each(|(ds, gv)| *ds += *g * *gv);
                    }
                    ds.iter_mut().zip(h).for_each(|(ds, h)| *ds *= R::ONE - *h * *h);
                    for (a, gz) in a.iter().zip(gz.chunks_exact_mut(n)) {
                        gz.iter_mut().zip(&*ds).for_each(|(gz, ds)| *gz += *a * *ds);
                    }
                    for (c, (z, gv)) in z.chunks_exact(n).zip(gv.chunks_exact(n)).enumerate() {
                        sums[c] += sum(n, |i| ds[i] * z[i]);
                        sums[d + c] += sum(n, |i| gv[i] * h[i]);
                    }
                    sums[2 * d] += sum(n, |i| ds[i]);
                    sums[2 * d + 1] += sum(n, |i| (R::ONE - h[i] * h[i]) * gm[i]);
                },
            );
        }
    }

    /// The gradient of the coefficients from the sums of [`Flows::backward`].
    fn coefficient_grads(&self, sums: &[R]) -> Vec<R> {
        let d = self.d;
        let mut out = Vec::with_capacity(self.n * (3 * d + 1));
        for (k, sums) in sums.chunks_exact(2 * d + 2).enumerate() {
            let (a, g, gate) = (self.row(&self.a, k), self.row(&self.g, k), self.row(&self.gate, k));
            let gq = -sums[2 * d + 1];
            out.extend((0..d).map(|c| sums[c] + gq * g[c]));
            let gg: Vec<R> = (0..d).map(|c| sums[d + c] + gq * a[c]).collect();
            out.extend(gg.iter().zip(gate).map(|(gg, gate)| *gg * *gate));
            // The slope of u sigmoid(gate) by the gate is g (1 - sigmoid).
            out.extend((0..d).map(|c| gg[c] * g[c] * (R::ONE - gate[c])));
            out.push(sums[2 * d]);
        }
        out
    }
}

/// `sum over i < n of term(i)`, in sixteen lanes.
#[inline(always)]
fn sum<R: Real>(n: usize, term: impl Fn(usize) -> R) -> R {
    const LANES: usize = 16;
    let mut lanes = [R::ZERO; LANES];
    let whole = n - n % LANES;
    let mut first = 0;
    while first < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
        first += LANES;
    }
    let mut total = R::ZERO;
    (whole..n).for_each(|i| total += term(i));
    lanes.iter().for_each(|lane| total += *lane);
    total
}

/// Rows `[n, d]` as columns `[d, n]`, each times `factor`.
fn to_columns<R: Real>(rows: &[R], columns: &mut [R], d: usize, factor: R) {
    let n = rows.len() / d;
    for (i, row) in rows.chunks_exact(d).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| columns[c * n + i] = factor * *x);
    }
}

fn to_rows<R: Real>(columns: &[R], rows: &mut [R], d: usize) {
    let n = rows.len() / d;
    for (i, row) in rows.chunks_exact_mut(d).enumerate() {
        row.iter_mut().enumerate().for_each(|(c, x)| *x = columns[c * n + i]);
    }
}

/// Shapes of the two outputs.
fn shapes(z: &Tensor) -> [Shape; 2] {
    let mut last = z.shape().to_vec();
    match last.last_mut() {
        Some(channels) => *channels = 1,
        None => last.push(1),
    }
    [z.shape().clone(), Shape::from(last)]
}

fn forward(cx: &Cx, z: &Tensor, coefficients: &Tensor) -> Result<[Tensor; 2]> {
    on_the_host(&cx.device)?;
    check_real(NAME, &[z, coefficients])?;
    check_axes(NAME, "z", z, 1)?;
    let (n_rows, d) = rows_of(z);
    n_flows(coefficients, d)?;
    let [of_v, of_m] = shapes(z);
    let mut v = cx.device.alloc_unwritten(of_v, storage(cx), Purpose::Activation)?;
    let mut m = cx.device.alloc_unwritten(of_m, weight_dtype(cx), Purpose::Activation)?;
    let accumulate = cx.policy.pointwise.accumulate;
    let scratch = cx.device.scratch(TILE * (4 * d + 2), accumulate.bytes());
    if cx.device.launches() && n_rows > 0 {
        with_real!(accumulate, R => {
            let flows = Flows::<R>::new(coefficients, d)?;
            let z = z.view()?;
            let tasks: Vec<_> = v.view_mut()?.chunks(TILE * d).into_iter().zip(m.view_mut()?.chunks(TILE)).collect();
            cx.device.run(|| tasks.into_par_iter().enumerate().for_each(|(idx, (mut v, mut m))| {
                scratch.with::<R, _>(|scratch| {
                    let n = m.len();
                    let (wide, narrow) = scratch.split_at_mut(4 * TILE * d);
                    let [rows, columns, of_v, out] = split(wide, [TILE * d; 4]);
                    let [h, of_m] = split(narrow, [TILE; 2]);
                    let from = idx * TILE * d;
                    let rows = z.slice(from..from + n * d).widened(&mut rows[..n * d]);
                    to_columns(rows, &mut columns[..n * d], d, R::ONE);
                    m.fill(of_m, |m| flows.forward(&columns[..n * d], &mut of_v[..n * d], m, &mut h[..n]));
                    v.fill(out, |v| to_rows(&of_v[..n * d], v, d));
                });
            }));
            Ok::<(), Error>(())
        })?;
    }
    Ok([v, m])
}

/// The first numbers of a buffer, in pieces.
fn split<R, const N: usize>(buffer: &mut [R], lens: [usize; N]) -> [&mut [R]; N] {
    let mut rest = buffer;
    lens.map(|len| {
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(len);
        rest = tail;
        head
    })
}

/// A tile of a gradient; zeros where there is none.
fn tile<'a, R: Real>(of: Option<View<'a>>, range: std::ops::Range<usize>, buffer: &'a mut [R]) -> &'a [R] {
    let own = &mut buffer[..range.len()];
    match of {
        Some(view) => view.slice(range).widened(own),
        None => {
            own.fill(R::ZERO);
            own
        }
    }
}

fn backward(cx: &Cx, [z, coefficients]: [&Tensor; 2], grads: [Option<&Tensor>; 2]) -> Result<[Tensor; 2]> {
    let (n_rows, d) = rows_of(z);
    let n = n_flows(coefficients, d)?;
    let accumulate = cx.policy.pointwise.accumulate;
    let mut gz = cx.device.alloc_unwritten(z.shape().clone(), storage(cx), Purpose::Activation)?;
    let parts = part_ranges(n_rows, TILE);
    let len = n * (2 * d + 2);
    let mut partial = Partial::new(&cx.device, parts.len(), accumulate, &[len])?;
    let scratch = cx.device.scratch(TILE * (6 * d + 4), accumulate.bytes());
    with_real!(accumulate, R => {
        if !cx.device.launches() {
            let sums = partial.finish::<R>(&cx.device, &[&[len]])?;
            drop(sums);
            return Ok([gz, cx.device.alloc(coefficients.shape().clone(), weight_dtype(cx), Purpose::Grad)?]);
        }
        let flows = Flows::<R>::new(coefficients, d)?;
        let z = z.view()?;
        let views: Vec<Option<View<'_>>> =
            grads.iter().map(|it| it.map(Tensor::view).transpose()).collect::<std::result::Result<_, _>>()?;
        let per_part = parts.first().map_or(1, ExactSizeIterator::len);
        let outputs = gz.view_mut()?.chunks(per_part * d);
        let tasks: Vec<_> = parts.into_iter().zip(outputs).zip(partial.parts()?).collect();
        cx.device.run(|| tasks.into_par_iter().for_each(|((range, mut gz), mut sums)| {
            scratch.with::<R, _>(|scratch| {
                let mut sums = split_sums::<R>(&mut sums, &[len]);
                for first in range.clone().step_by(TILE) {
                    let n = TILE.min(range.end - first);
                    let (wide, narrow) = scratch.split_at_mut(6 * TILE * d);
                    let [rows, columns, gv_rows, gv, out, gz_columns] = split(wide, [TILE * d; 6]);
                    let [gm_rows, gm, h, ds] = split(narrow, [TILE; 4]);
                    let at = first * d..(first + n) * d;
                    to_columns(tile(Some(z), at.clone(), rows), &mut columns[..n * d], d, R::ONE);
                    to_columns(tile(views[0], at, gv_rows), &mut gv[..n * d], d, flows.weight());
                    to_columns(tile(views[1], first..first + n, gm_rows), &mut gm[..n], 1, flows.weight());
                    gz_columns[..n * d].fill(R::ZERO);
                    let inputs = [&columns[..n * d], &gv[..n * d], &gm[..n]];
                    flows.backward(inputs, &mut gz_columns[..n * d], &mut *sums[0], [&mut h[..n], &mut ds[..n]]);
                    let from = (first - range.start) * d;
                    gz.slice_mut(from..from + n * d).fill(out, |out| to_rows(&gz_columns[..n * d], out, d));
                }
            });
        }));
        let sums = {
            let sums = partial.finish::<R>(&cx.device, &[&[len]])?;
            sums.first().map_or(Ok(Vec::new()), Tensor::to_vec::<R>)?
        };
        let values = flows.coefficient_grads(&sums);
        let shape = coefficients.shape().clone();
        Ok([gz, Tensor::from_slice(&cx.device, &values, shape, R::PRECISION, Purpose::Grad)?])
    })
}

impl Op for PlanarFlow {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [z, coefficients] = self.expect_inputs(inputs)?;
        let [v, m] = forward(cx, z, coefficients).map_err(|err| err.in_op(NAME))?;
        let saved = Saved::new(NAME).keep(cx, "z", z)?.share(cx, "coefficients", coefficients);
        Ok((smallvec![v, m], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (z, coefficients) = (saved.take("z")?, saved.take("coefficients")?);
        let grads = [grads[0].take(), grads[1].take()];
        let run = backward(cx, [&z, &coefficients], [grads[0].as_ref(), grads[1].as_ref()]);
        Ok(run.map_err(|err| err.in_op(NAME))?.map(Some).to_vec())
    }
}
