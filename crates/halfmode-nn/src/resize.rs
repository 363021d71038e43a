//! Fields on other grids: padding, cropping, interpolation.

#[cfg(feature = "cuda")]
#[path = "resize/cuda.rs"]
mod on_gpu;

use crate::pointwise::{Grads, filled, storage};
use crate::spectral_conv::Scales;
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_fft::{Transform, Weights};
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;
use std::sync::Arc;

/// Points added to or taken from a field on both sides of every axis. Each is the other's adjoint.
///
/// # Shapes
/// - input: `[batch, n_1, …, n_d, c]`
/// - output: `[batch, n_1 ± 2 p_1, …, n_d ± 2 p_d, c]`
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// [`Error::Shape`] if the input has another number of axes or not enough points.
#[derive(Clone, Debug)]
pub enum Margin {
    /// Adds `p_i` zeros on each side of axis i.
    Pad(Vec<usize>),
    /// Drops `p_i` points on each side of axis i.
    Crop(Vec<usize>),
}

/// Copies between a field and the middle of a larger one; `widen` says which of the two is the source.
fn copy_middle(cx: &Cx, op: &'static str, x: &Tensor, amount: &[usize], widen: bool) -> Result<Tensor> {
    let shape = x.shape();
    let shape_error = || {
        let expected = vec![0; amount.len() + 2];
        Error::Shape { op, operand: "x", expected: Shape::from(expected), found: shape.clone() }
    };
    if shape.len() != amount.len() + 2 {
        return Err(shape_error());
    }
    let mut extents = shape.to_vec();
    for (extent, &p) in extents[1..].iter_mut().zip(amount) {
        let resized = if widen { Some(*extent + 2 * p) } else { extent.checked_sub(2 * p).filter(|&n| n > 0) };
        *extent = resized.ok_or_else(shape_error)?;
    }
    let out = Shape::from(extents);
    let (large, small) = if widen { (&out, shape) } else { (shape, &out) };
    #[cfg(feature = "cuda")]
    if !cx.device.is_cpu() {
        return on_gpu::copy_middle(cx, x, [large, small], amount, widen);
    }
    with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, &out, storage(cx), Purpose::Activation, || {
        let x = x.to_vec::<R>()?;
        let mut y = vec![R::ZERO; out.numel()];
        // Rows along the last axis, with all channels, are contiguous in both.
        let d = amount.len();
        let row = small[d] * small[d + 1];
        for idx in 0..small.numel().checked_div(row).unwrap_or(0) {
            let (mut rest, mut at, mut stride) = (idx, amount[d - 1] * large[d + 1], large[d] * large[d + 1]);
            for axis in (0..d).rev() {
                let shift = if axis == 0 { 0 } else { amount[axis - 1] };
                at += (rest % small[axis] + shift) * stride;
                rest /= small[axis];
                stride *= large[axis];
            }
            let (from, to) = if widen { (idx * row, at) } else { (at, idx * row) };
            y[to..to + row].copy_from_slice(&x[from..from + row]);
        }
        Ok(y)
    }))
}

impl Margin {
    fn run(&self, cx: &Cx, x: &Tensor, adjoint: bool) -> halfmode_autograd::Result<Tensor> {
        let (amount, widen) = match self {
            Margin::Pad(amount) => (amount, !adjoint),
            Margin::Crop(amount) => (amount, adjoint),
        };
        copy_middle(cx, self.name(), x, amount, widen).map_err(|err| err.in_op(self.name()))
    }
}

impl Op for Margin {
    fn name(&self) -> &'static str {
        match self {
            Margin::Pad(_) => "pad",
            Margin::Crop(_) => "crop",
        }
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        Ok((smallvec![self.run(cx, x, false)?], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.run(cx, &g, true)?)])
    }
}

/// Interpolation onto another grid, axis by axis with the end points kept: linear on one axis, by
/// cubic convolution (a = -0.75) on two.
///
/// # Shapes
/// - input: `[batch, n_1, …, n_d, c]` with d of 1 or 2; output: `[batch, grid_1, …, grid_d, c]`
///
/// # Saved for backward
/// Nothing but the sizes.
///
/// # Errors
/// [`Error::Shape`] if the input has another number of axes.
///
/// Source: `torch.nn.functional.interpolate(mode="linear" or "bicubic", align_corners=True)`, which
/// neuraloperator's skips use.
#[derive(Clone, Debug)]
pub struct Interpolate {
    /// Points of the input's axes.
    pub from: Vec<usize>,
    /// Points of the output's axes.
    pub to: Vec<usize>,
}

impl Interpolate {
    /// The neighbours of output point `i` along an axis of `n` points that becomes one of `m`, and their weights.
    fn row(&self, i: usize, n: usize, m: usize) -> Vec<(usize, f64)> {
        let at = if m > 1 { i as f64 * (n - 1) as f64 / (m - 1) as f64 } else { 0.0 };
        let (first, t) = (at.floor(), at - at.floor());
        let clamp = |offset: f64| (first + offset).clamp(0.0, (n - 1) as f64) as usize;
        if self.to.len() == 1 {
            return vec![(clamp(0.0), 1.0 - t), (clamp(1.0), t)];
        }
        const A: f64 = -0.75;
        let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
        let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        weights.into_iter().enumerate().map(|(idx, w)| (clamp(idx as f64 - 1.0), w)).collect()
    }

    fn run(&self, cx: &Cx, x: &Tensor, adjoint: bool) -> Result<Tensor> {
        let (from, to) = if adjoint { (&self.to, &self.from) } else { (&self.from, &self.to) };
        let shape = x.shape();
        let (batch, c) = (shape.first().copied().unwrap_or(0), shape.last().copied().unwrap_or(0));
        let expected = Shape::from([&[batch][..], from, &[c]].concat());
        if *shape != expected || !(1..=2).contains(&from.len()) {
            return Err(Error::Shape { op: "interpolate", operand: "x", expected, found: shape.clone() });
        }
        let out = Shape::from([&[batch][..], to, &[c]].concat());
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return on_gpu::interpolate(self, cx, x, [from, to], adjoint);
        }
        with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, &out, storage(cx), Purpose::Activation, || {
            let mut values = x.to_vec::<R>()?;
            for axis in 0..from.len() {
                let (n, m) = (self.from[axis], self.to[axis]);
                let (n_in, n_out) = (from[axis], to[axis]);
                let outer = batch * to[..axis].iter().product::<usize>();
                let inner = c * from[axis + 1..].iter().product::<usize>();
                let mut resized = vec![R::ZERO; outer * n_out * inner];
                for i in 0..m {
                    for (j, weight) in self.row(i, n, m) {
                        let (source, target) = if adjoint { (i, j) } else { (j, i) };
                        let weight = R::from_f64(weight);
                        for o in 0..outer {
                            let line = &values[(o * n_in + source) * inner..][..inner];
                            let sums = &mut resized[(o * n_out + target) * inner..][..inner];
                            sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += weight * *value);
                        }
                    }
                }
                values = resized;
            }
            Ok(values)
        }))
    }
}

impl Op for Interpolate {
    fn name(&self) -> &'static str {
        "interpolate"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        let y = self.run(cx, x, false).map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.run(cx, &g, true).map_err(|err| err.in_op(self.name()))?)])
    }
}

/// Trigonometric interpolation: analysis on one grid, synthesis on another, exact for fields that
/// both transforms' modes resolve.
///
/// # Shapes
/// - input: `[batch, n_1, …, n_d, c]`, the grid of `analysis`; output: `[batch, m_1, …, m_d, c]`
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// Those of the transforms.
#[derive(Clone, Debug)]
pub struct FourierResample {
    /// On the grid of the input.
    pub analysis: Arc<Transform>,
    /// On the grid of the output, with the same modes.
    pub synthesis: Arc<Transform>,
}

impl FourierResample {
    fn run(&self, cx: &Cx, x: &Tensor, adjoint: bool) -> Result<Tensor> {
        let scales = Scales::new(&self.analysis, &self.synthesis);
        let (first, second, weights, scale) = if adjoint {
            (&self.synthesis, &self.analysis, [Weights::Doubled, Weights::Plain], &scales.backward)
        } else {
            (&self.analysis, &self.synthesis, [Weights::Plain, Weights::Doubled], &scales.forward)
        };
        let (transform, pointwise) = (cx.policy.transform.storage, cx.policy.pointwise.storage);
        let x_hat = first.to_modes(x, weights[0], &scale.to_modes, transform, Purpose::Workspace)?;
        Ok(second.to_grid(&x_hat, weights[1], &scale.to_grid, pointwise, Purpose::Activation)?)
    }
}

impl Op for FourierResample {
    fn name(&self) -> &'static str {
        "fourier_resample"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        let y = self.run(cx, x, false).map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.run(cx, &g, true).map_err(|err| err.in_op(self.name()))?)])
    }
}
