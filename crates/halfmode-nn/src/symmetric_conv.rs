//! The symmetric residual layer: a convolution, a rectifier, a norm, and the convolution's transpose.

#[cfg(feature = "cuda")]
mod cuda;

use crate::conv2d::cpu::{Correlation, Pair};
use crate::norm::cpu::{Statistics, add_products, scale_rows};
use crate::norm::{Dims, NormKind};
use crate::partial::part_ranges;
use crate::pointwise::{Grads, check_len, check_real, not_accumulators, storage, weight_dtype};
use crate::relu::{relu, relu_grad};
use crate::rows::{add_bias, add_column_sums, add_gated};
use crate::{Conv2d, ConvKind, FieldNorm, Negate, Relu, Result};
#[cfg(feature = "cuda")]
use halfmode_autograd::LeafId;
use halfmode_autograd::{Cx, Op, Outputs, Saved, Tape, Var};
use halfmode_precision::DType;
use halfmode_tensor::{Device, Purpose, Real, Tensor, View, with_real};
use rayon::prelude::*;
use smallvec::smallvec;

/// `y = -K^T N(relu(K x + b))` with `K` as in [`Conv2d`] and `N` the norm of every channel of every sample: the
/// velocity of parabolic residual networks.
///
/// # Shapes
/// - input 0, `x`: `[batch, n_1, n_2, c_in]`, real; output: the same shape
/// - input 1, `w`: `[k_1, k_2, c_in, c_out]`; input 2, `b`: `[c_out]`
///
/// # Saved for backward
/// `x` and `hidden`, `relu(K x + b)`; `weight` is shared. The norm is formed again. On a GPU `bias` is shared, too, and
/// the norm's `statistics` are kept beside `hidden`; where the fused kernels do not serve (other storage than halves,
/// channels that are not in eights) neither is kept, and backward runs the forward pass again by small ops.
///
/// # Errors
/// Those of [`Conv2d`].
///
/// Source: Ruthotto & Haber, "Deep neural networks motivated by partial differential equations" (2018), with the norm
/// of the published mixed-precision experiments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymmetricConv {
    /// Zeros before and after the field along each axis.
    pub padding: [usize; 2],
}

const NAME: &str = "symmetric_conv";
/// Points of a tile of the norm.
const TILE: usize = 64;

impl SymmetricConv {
    fn conv(self, kind: ConvKind) -> Conv2d {
        Conv2d { kind, padding: self.padding }
    }

    /// The same as a user of small ops would write it: the reference of the fused kernels, and what runs where there
    /// are none.
    ///
    /// # Errors
    /// Those of its ops.
    pub fn composed(self, tape: &mut Tape, [x, w, b]: [&Var; 3]) -> halfmode_autograd::Result<Var> {
        let h = tape.apply(self.conv(ConvKind::Forward), &[x, w, b])?;
        let h = tape.apply(Relu, &[&h])?;
        let h = tape.apply(FieldNorm(NormKind::Instance), &[&h])?;
        let h = tape.apply(self.conv(ConvKind::Transposed), &[&h, w])?;
        tape.apply(Negate, &[&h])
    }

    fn sizes(self, x: &Tensor, w: &Tensor, b: &Tensor) -> Result<[Correlation; 2]> {
        check_real(NAME, &[x, w, b])?;
        let forward = self.conv(ConvKind::Forward).correlation(x.shape(), w.shape())?;
        check_len(NAME, "bias", b, forward.c_y)?;
        Ok([forward, self.conv(ConvKind::Transposed).correlation(&forward.output_shape(), w.shape())?])
    }

    fn run(self, cx: &Cx, [x, w, b]: [&Tensor; 3]) -> Result<[Tensor; 2]> {
        let [forward, transposed] = self.sizes(x, w, b)?;
        let panels = self.conv(ConvKind::Forward).panels(cx, w)?;
        let mut hidden = cx.device.alloc_unwritten(forward.output_shape(), storage(cx), Purpose::Activation)?;
        let mut y = cx.device.alloc_unwritten(transposed.output_shape(), storage(cx), Purpose::Activation)?;
        with_real!(cx.policy.pointwise.storage, R => {
            let bias = if cx.device.launches() { b.to_vec::<R>()? } else { Vec::new() };
            let rectified = |_, h: &mut [R]| {
                add_bias(h, &bias);
                relu(h);
            };
            forward.run::<R>(&cx.device, x, &panels, &mut hidden, |_, _| {}, rectified)?;
            drop(panels);
            let panels = self.conv(ConvKind::Transposed).panels(cx, w)?;
            let norm = Norm::<R>::of(&cx.device, &hidden)?;
            let negated = |_, y: &mut [R]| negate(y);
            transposed.run::<R>(&cx.device, &hidden, &panels, &mut y, |b, h| norm.apply(b, h), negated)?;
        });
        Ok([y, hidden])
    }

    fn pull_back(self, cx: &Cx, [x, w, hidden, g]: [&Tensor; 4]) -> Result<Vec<Tensor>> {
        let (of_forward, of_transposed) = (self.conv(ConvKind::Forward), self.conv(ConvKind::Transposed));
        let forward = of_forward.correlation(x.shape(), w.shape())?;
        let transposed = of_transposed.correlation(hidden.shape(), w.shape())?;
        with_real!(cx.policy.pointwise.storage, R => {
            let norm = Norm::<R>::of(&cx.device, hidden)?;
            let accumulate = DType::real(R::PRECISION);
            let mut inner = cx.device.alloc_unwritten(hidden.shape().clone(), accumulate, Purpose::Activation)?;
            let panels = of_forward.panels(cx, w)?;
            // The transpose of -K^T is -K.
            let negated = |_, g: &mut [R]| negate(g);
            let image = of_forward.correlation(g.shape(), w.shape())?;
            image.run::<R>(&cx.device, g, &panels, &mut inner, |_, _| {}, negated)?;
            drop(panels);
            let grad_b = norm.pull_back(cx, hidden, &mut inner)?;
            let panels = of_transposed.panels(cx, w)?;
            let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
            transposed.run::<R>(&cx.device, &inner, &panels, &mut gx, |_, _| {}, |_, _| {})?;
            drop(panels);
            let parts = part_ranges(forward.batch, 1);
            let negated = |_, g: &mut [R]| negate(g);
            let normalised = |b, h: &mut [R]| norm.apply(b, h);
            let second = Pair { field: g, image: hidden, load_field: &negated, load_image: &normalised };
            let pairs = [Pair::new(x, &inner), second];
            Ok(vec![gx, forward.weight_gradient::<R>(&cx.device, w.shape(), &parts, &pairs)?, grad_b])
        })
    }

    #[cfg(feature = "cuda")]
    fn pull_back_composed(self, cx: &Cx, inputs: [&Tensor; 3], g: Tensor) -> Grads {
        let mut tape = Tape::new(Cx { save: true, ..cx.clone() });
        let [x, w, b] = inputs.map(|it| tape.leaf(it.clone()));
        let y = self.composed(&mut tape, [&x, &w, &b])?;
        let mut grads = vec![None; 3];
        tape.backward_from(vec![(y, g)], &mut |LeafId(idx), grad| {
            grads[idx] = Some(grad);
            Ok(())
        })?;
        Ok(grads)
    }
}

fn negate<R: Real>(x: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x = -*x),
    );
}

/// The norm of every channel of every sample.
struct Norm<R> {
    dims: Dims,
    samples: Vec<Sample<R>>,
}

/// `x_hat = (x - centre) factor + shift`, per channel.
struct Sample<R> {
    statistics: Statistics<R>,
    factor: Vec<R>,
    shift: Vec<R>,
}

impl<R: Real> Norm<R> {
    fn of(device: &Device, x: &Tensor) -> Result<Self> {
        let dims = Dims::new(NormKind::Instance, x);
        let scratch = device.scratch(TILE * dims.c, R::PRECISION.bytes());
        if !device.launches() {
            return Ok(Norm { dims, samples: Vec::new() });
        }
        let x = x.view()?;
        let sample = |b: usize| {
            scratch.with::<R, _>(|tile| {
                let statistics = dims.statistics::<R>(x.slice(dims.sample(b)), tile);
                let factor = statistics.rstd.iter().map(|&rstd| R::from_f64(rstd)).collect();
                let shift = statistics.above.iter().zip(&statistics.rstd);
                let shift = shift.map(|(above, rstd)| R::from_f64(-above * rstd)).collect();
                Sample { statistics, factor, shift }
            })
        };
        let samples = device.run(|| (0..dims.batch).into_par_iter().map(sample).collect());
        Ok(Norm { samples: samples.unwrap_or_default(), dims })
    }

    fn apply(&self, b: usize, x: &mut [R]) {
        let Sample { statistics, factor, shift } = &self.samples[b];
        R::vectorised(
            #[inline(always)]
            || {
                for x in x.chunks_exact_mut(factor.len()) {
                    let terms = statistics.centre.iter().zip(factor.iter().zip(shift));
                    x.iter_mut().zip(terms).for_each(|(x, (centre, (f, s)))| *x = (*x - *centre) * *f + *s);
                }
            },
        );
    }

    /// Turns the gradient by the norm's result into that by what the rectifier was given, in place, and returns the
    /// bias's.
    fn pull_back(&self, cx: &Cx, hidden: &Tensor, g: &mut Tensor) -> Result<Tensor> {
        let (dims, c) = (&self.dims, self.dims.c);
        let scratch = cx.device.scratch(2 * TILE * c, R::PRECISION.bytes());
        let mut grad_b = cx.device.alloc_unwritten([c], weight_dtype(cx), Purpose::Grad)?;
        if !cx.device.launches() {
            return Ok(grad_b);
        }
        let (hidden, dtype) = (hidden.view()?, g.dtype());
        let mut g = g.view_mut()?;
        let g = R::direct_mut(&mut g).ok_or_else(|| not_accumulators::<R>(NAME, "gradient", dtype))?;
        let sums = cx.device.run(|| {
            let sample = |(b, g): (usize, &mut [R])| {
                scratch.with::<R, _>(|scratch| self.pull_back_sample(b, hidden.slice(dims.sample(b)), g, scratch))
            };
            g.par_chunks_mut((dims.rows * c).max(1)).enumerate().map(sample).collect::<Vec<_>>()
        });
        let mut total = vec![0.0; c];
        for sums in sums.unwrap_or_default() {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        grad_b.copy_from_slice(&total)?;
        Ok(grad_b)
    }

    fn pull_back_sample(&self, b: usize, hidden: View<'_>, g: &mut [R], scratch: &mut [R]) -> Vec<f64> {
        let (dims, c, Statistics { centre, above, rstd }) = (&self.dims, self.dims.c, &self.samples[b].statistics);
        let (tile, changed) = scratch.split_at_mut(TILE * c);
        let mut start = 0;
        let mut sums = vec![0.0; c];
        let products = dims.sums(hidden, tile, |rows, products| {
            let g = &g[start..start + rows.len()];
            start += rows.len();
            add_products(rows, g, centre, products);
            let mut part = vec![R::ZERO; c];
            add_column_sums(g, &mut part);
            sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part.to_f64());
        });
        // As in the norm: g -> rstd (g - mean g - x_hat mean(g x_hat)).
        let n = dims.rows as f64;
        let (mut slope, mut shift) = (Vec::with_capacity(c), Vec::with_capacity(c));
        for i in 0..c {
            let product = rstd[i] * (products[i] - above[i] * sums[i]);
            slope.push(R::from_f64(-rstd[i] * rstd[i] * product / n));
            shift.push(R::from_f64(rstd[i] * (rstd[i] * above[i] * product - sums[i]) / n));
        }
        let mut bias = vec![0.0; c];
        for (start, g) in g.chunks_mut(TILE * c).enumerate() {
            let start = start * TILE * c;
            let rows = hidden.slice(start..start + g.len()).widened(tile);
            let changed = &mut changed[..g.len()];
            scale_rows(rows, centre, [&slope, &shift], changed);
            add_gated(changed, &self.samples[b].factor, g);
            relu_grad(changed, rows);
            let mut part = vec![R::ZERO; c];
            add_column_sums(changed, &mut part);
            bias.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part.to_f64());
            g.copy_from_slice(changed);
        }
        bias
    }
}

impl Op for SymmetricConv {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x, w, b] = self.expect_inputs(inputs)?;
        let saved = Saved::new(NAME).keep(cx, "x", x)?.share(cx, "weight", w);
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            let Some(fused) = cuda::Fused::new(*self, cx, [x, w, b]).map_err(|err| err.in_op(NAME))? else {
                let mut tape = Tape::new(Cx { save: false, ..cx.clone() });
                let vars = [x, w, b].map(|it| tape.constant(it.clone()));
                let y = self.composed(&mut tape, vars.each_ref())?;
                return Ok((smallvec![y.into_value()], saved.share(cx, "bias", b)));
            };
            let [y, hidden, statistics] = fused.run([x, w, b]).map_err(|err| err.in_op(NAME))?;
            let saved = saved.share(cx, "bias", b).share(cx, "statistics", &statistics);
            return Ok((smallvec![y], saved.keep(cx, "hidden", &hidden)?));
        }
        let [y, hidden] = self.run(cx, [x, w, b]).map_err(|err| err.in_op(NAME))?;
        Ok((smallvec![y], saved.keep(cx, "hidden", &hidden)?))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (x, w) = (saved.take("x")?, saved.take("weight")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None; 3]) };
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            let b = saved.take("bias")?;
            let fused = cuda::Fused::new(*self, cx, [&x, &w, &b]).map_err(|err| err.in_op(NAME))?;
            let Some(fused) = fused else { return self.pull_back_composed(cx, [&x, &w, &b], g) };
            let (hidden, statistics) = (saved.take("hidden")?, saved.take("statistics")?);
            let grads = fused.pull_back([&x, &w, &hidden, &g], &statistics).map_err(|err| err.in_op(NAME))?;
            return Ok(grads.into_iter().map(Some).collect());
        }
        let hidden = saved.take("hidden")?;
        let grads = self.pull_back(cx, [&x, &w, &hidden, &g]).map_err(|err| err.in_op(NAME))?;
        Ok(grads.into_iter().map(Some).collect())
    }
}
