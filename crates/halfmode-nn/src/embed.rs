//! A field with its channels last and more of them.

#[cfg(feature = "cuda")]
#[path = "embed/cuda.rs"]
mod on_gpu;

use crate::pointwise::{Grads, filled, storage};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;

/// What is appended to a field's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraChannels {
    /// Nothing.
    None,
    /// One coordinate per axis, `j / n`.
    Coordinates,
    /// A zero per axis: the imaginary part of coordinates.
    Zeros,
}

/// Moves the channels of a field to its end and appends more.
///
/// # Shapes
/// - input: `[batch, c, n_1, …, n_d]`, real; output: `[batch, n_1, …, n_d, c + extra]`
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// [`Error::Shape`] if the input has fewer than three axes.
#[derive(Clone, Copy, Debug)]
pub struct Embed(pub ExtraChannels);

impl Embed {
    fn run(self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let [batch, c, ref grid @ ..] = x.shape()[..] else {
            let expected = Shape::from([1, 1, 1]);
            return Err(Error::Shape { op: "embed", operand: "x", expected, found: x.shape().clone() });
        };
        let extra = if self.0 == ExtraChannels::None { 0 } else { grid.len() };
        let points: usize = grid.iter().product();
        let shape = Shape::from([&[batch][..], grid, &[c + extra]].concat());
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return on_gpu::run(self, cx, x, shape);
        }
        with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, &shape, storage(cx), Purpose::Activation, || {
            let x = x.to_vec::<R>()?;
            let mut y = Vec::with_capacity(shape.numel());
            for (b, point) in (0..batch).flat_map(|b| (0..points).map(move |point| (b, point))) {
                y.extend((0..c).map(|channel| x[(b * c + channel) * points + point]));
                let mut behind = points;
                for &n in &grid[..extra] {
                    behind /= n;
                    let at = (point / behind % n) as f64 / n as f64;
                    y.push(R::from_f64(if self.0 == ExtraChannels::Zeros { 0.0 } else { at }));
                }
            }
            Ok(y)
        }))
    }

    fn adjoint(self, cx: &Cx, g: &Tensor) -> Result<Tensor> {
        let [batch, ref grid @ .., wide] = g.shape()[..] else { return Ok(g.clone()) };
        let c = if self.0 == ExtraChannels::None { wide } else { wide - grid.len() };
        let points: usize = grid.iter().product();
        let shape = Shape::from([&[batch, c][..], grid].concat());
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            return on_gpu::adjoint(cx, g, shape);
        }
        with_real!(cx.policy.pointwise.accumulate, R => filled::<R>(&cx.device, &shape, storage(cx), Purpose::Activation, || {
            let g = g.to_vec::<R>()?;
            let at = |idx: usize| g[(idx / (c * points) * points + idx % points) * wide + idx / points % c];
            Ok((0..shape.numel()).map(at).collect())
        }))
    }
}

impl Op for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        Ok((smallvec![self.run(cx, x).map_err(|err| err.in_op(self.name()))?], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(self.adjoint(cx, &g).map_err(|err| err.in_op(self.name()))?)])
    }
}
