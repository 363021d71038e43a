//! Complex fields from two real ones, and back.

#[cfg(feature = "cuda")]
#[path = "complex/cuda.rs"]
mod on_gpu;

use crate::pointwise::{Grads, storage};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Domain};
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;

/// `z_j = (re_j + i im_j) e^(2 pi i turns j / n)`, where j runs over the n points of the last grid axis: a field of
/// frequency f becomes one of frequency f + turns.
///
/// # Shapes
/// - inputs 0 and 1, `re` and `im`: `[batch, n_1, …, n_d, c]`, real; any layout if `turns` is 0
/// - output: the same shape, complex
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// [`Error::Shape`] if the inputs differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct JoinComplex {
    /// Frequencies by which the field is shifted.
    pub turns: isize,
}

/// The inverse map with its own phase: real and imaginary part of `z_j e^(2 pi i turns j / n)`.
///
/// # Shapes
/// - input: `[batch, n_1, …, n_d, c]`, complex; any layout if `turns` is 0
/// - outputs 0 and 1, `re` and `im`: the same shape, real
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// [`halfmode_tensor::Error::Length`] if the input is real.
#[derive(Clone, Copy, Debug, Default)]
pub struct SplitComplex {
    /// Frequencies by which the field is shifted.
    pub turns: isize,
}

/// Cosine and sine of the phase at every point of the last grid axis, and how many channels share it.
fn phases<R: Real>(shape: &Shape, turns: isize) -> (Vec<[R; 2]>, usize) {
    let [.., n, c] = shape[..] else { return (vec![[R::ONE, R::ZERO]], 1) };
    let angle = |j: usize| {
        let turned = (turns * j as isize).rem_euclid(n as isize) as f64 / n as f64;
        let (sin, cos) = (std::f64::consts::TAU * turned).sin_cos();
        [R::from_f64(cos), R::from_f64(sin)]
    };
    ((0..n).map(angle).collect(), c.max(1))
}

fn join(cx: &Cx, [re, im]: [Option<&Tensor>; 2], turns: isize) -> Result<Option<Tensor>> {
    let Some(shape) = re.or(im).map(Tensor::shape) else { return Ok(None) };
    let dtype = DType { domain: Domain::Complex, precision: storage(cx).precision };
    #[cfg(feature = "cuda")]
    if !cx.device.is_cpu() {
        return on_gpu::join(cx, [re, im], shape, dtype, turns).map(Some);
    }
    if !cx.device.launches() {
        return Ok(Some(cx.device.alloc(shape.clone(), dtype, Purpose::Activation)?));
    }
    with_real!(cx.policy.pointwise.accumulate, R => {
        let part = |it: Option<&Tensor>| match it {
            Some(it) => it.to_vec::<R>(),
            None => Ok(vec![<R as Real>::ZERO; shape.numel()]),
        };
        let (re, im) = (part(re)?, part(im)?);
        let (phases, c) = phases::<R>(shape, turns);
        let mut z = Vec::with_capacity(2 * re.len());
        for (idx, (re, im)) in re.into_iter().zip(im).enumerate() {
            let [cos, sin] = phases[idx / c % phases.len()];
            z.extend([re * cos - im * sin, re * sin + im * cos]);
        }
        Ok(Some(Tensor::from_scalars(&cx.device, &z, shape.clone(), dtype, Purpose::Activation)?))
    })
}

fn split(cx: &Cx, z: &Tensor, turns: isize) -> Result<[Tensor; 2]> {
    let (shape, dtype) = (z.shape(), storage(cx));
    #[cfg(feature = "cuda")]
    if !cx.device.is_cpu() {
        return on_gpu::split(cx, z, dtype, turns);
    }
    if !cx.device.launches() {
        let part = || cx.device.alloc(shape.clone(), dtype, Purpose::Activation);
        return Ok([part()?, part()?]);
    }
    with_real!(cx.policy.pointwise.accumulate, R => {
        let z = z.to_vec::<R>()?;
        let (phases, c) = phases::<R>(shape, turns);
        let (mut re, mut im) = (Vec::with_capacity(z.len() / 2), Vec::with_capacity(z.len() / 2));
        for (idx, z) in z.chunks_exact(2).enumerate() {
            let [cos, sin] = phases[idx / c % phases.len()];
            re.push(z[0] * cos - z[1] * sin);
            im.push(z[0] * sin + z[1] * cos);
        }
        let part = |it: &[R]| {
            Tensor::from_slice(&cx.device, it, shape.clone(), dtype.precision, Purpose::Activation)
        };
        Ok([part(&re)?, part(&im)?])
    })
}

impl Op for JoinComplex {
    fn name(&self) -> &'static str {
        "join_complex"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [re, im] = self.expect_inputs(inputs)?;
        if re.shape() != im.shape() {
            let (expected, found) = (re.shape().clone(), im.shape().clone());
            return Err(Error::Shape { op: self.name(), operand: "im", expected, found }.in_op(self.name()));
        }
        let z = join(cx, [Some(re), Some(im)], self.turns).map_err(|err| err.in_op(self.name()))?;
        Ok((z.into_iter().collect(), Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        Ok(split(cx, &g, -self.turns).map_err(|err| err.in_op(self.name()))?.map(Some).into())
    }
}

impl Op for SplitComplex {
    fn name(&self) -> &'static str {
        "split_complex"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [z] = self.expect_inputs(inputs)?;
        let [re, im] = split(cx, z, self.turns).map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![re, im], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (re, im) = (grads[0].take(), grads[1].take());
        Ok(vec![join(cx, [re.as_ref(), im.as_ref()], -self.turns).map_err(|err| err.in_op(self.name()))?])
    }
}
