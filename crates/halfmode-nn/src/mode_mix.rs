//! The mode contraction `y_hat[b, k, o] = sum_i x_hat[b, k, i] w[k, i, o]`, complex, mode by mode.
//!
//! Spectra are split complex, `[batch, (re, im), modes, channels]`; weights `[modes, c_in, (re | im)
//! c_out]`. A test across crates binds it to the complex einsum of `halfmode-contract` as well.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::{Error, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Shape, Target, Tensor};

/// The kernels of the contraction. The default bodies are the definition, in double precision; a
/// device overrides them.
pub(crate) trait MixKernels {
    /// Writes `y_hat = x_hat w`.
    fn mix_forward(&self, dims: &Dims, [x_hat, w]: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
        dims.forward_by_definition([x_hat, w], y_hat)
    }

    /// Writes both adjoints; that of the weight is multiplied by `weight_factor`.
    fn mix_backward(
        &self,
        dims: &Dims,
        [x_hat, w, grad]: [&Tensor; 3],
        weight_factor: f64,
        [grad_x, grad_w]: [&mut Tensor; 2],
    ) -> Result<()> {
        dims.backward_by_definition([x_hat, w, grad], weight_factor, [grad_x, grad_w])
    }
}

impl MixKernels for Device {
    fn mix_forward(&self, dims: &Dims, operands: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => cpu::forward(self, dims, operands, y_hat),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::forward(self, dims, operands, y_hat),
        }
    }

    fn mix_backward(
        &self,
        dims: &Dims,
        operands: [&Tensor; 3],
        weight_factor: f64,
        grads: [&mut Tensor; 2],
    ) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => cpu::backward(self, dims, operands, weight_factor, grads),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::backward(self, dims, operands, weight_factor, grads),
        }
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    batch: usize,
    modes: usize,
    c_in: usize,
    c_out: usize,
}

impl Dims {
    fn of(x_hat: &Tensor, w: &Tensor) -> Result<Self> {
        let shape = x_hat.shape();
        let c_in = shape.last().copied().unwrap_or(0);
        let modes = if shape.len() > 3 { shape[2..shape.len() - 1].iter().product() } else { 0 };
        let c_out = w.shape().last().copied().unwrap_or(0) / 2;
        let expected = Shape::from([modes, c_in, 2 * c_out]);
        if *w.shape() != expected || c_out == 0 {
            return Err(Error::Shape { op: "mode_mix", operand: "weight", expected, found: w.shape().clone() });
        }
        Ok(Dims { batch: shape[0], modes, c_in, c_out })
    }

    /// Calls `term` with the places of the real parts of `x_hat`, `w` and `y_hat` in every product.
    fn each_product(&self, mut term: impl FnMut(usize, usize, usize)) {
        let Dims { batch, modes, c_in, c_out } = *self;
        for (b, mode) in (0..batch).flat_map(|b| (0..modes).map(move |mode| (b, mode))) {
            for (i, o) in (0..c_in).flat_map(|i| (0..c_out).map(move |o| (i, o))) {
                let row = 2 * b * modes + mode;
                term(row * c_in + i, (mode * c_in + i) * 2 * c_out + o, row * c_out + o);
            }
        }
    }

    fn forward_by_definition(&self, [x_hat, w]: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
        let (x, w, mut y) = (x_hat.to_vec::<f64>()?, w.to_vec::<f64>()?, vec![0.0; y_hat.numel()]);
        // From a real part to its imaginary part.
        let [x_im, w_im, y_im] = [self.modes * self.c_in, self.c_out, self.modes * self.c_out];
        self.each_product(|at_x, at_w, at_y| {
            let (a, b, c, d) = (x[at_x], x[at_x + x_im], w[at_w], w[at_w + w_im]);
            y[at_y] += a * c - b * d;
            y[at_y + y_im] += a * d + b * c;
        });
        Ok(y_hat.copy_from_slice(&y)?)
    }

    fn backward_by_definition(
        &self,
        [x_hat, w, grad]: [&Tensor; 3],
        weight_factor: f64,
        [grad_x, grad_w]: [&mut Tensor; 2],
    ) -> Result<()> {
        let (x, w, g) = (x_hat.to_vec::<f64>()?, w.to_vec::<f64>()?, grad.to_vec::<f64>()?);
        let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        let [x_im, w_im, g_im] = [self.modes * self.c_in, self.c_out, self.modes * self.c_out];
        self.each_product(|at_x, at_w, at_g| {
            let (a, b, c, d) = (x[at_x], x[at_x + x_im], w[at_w], w[at_w + w_im]);
            let (p, q) = (g[at_g], g[at_g + g_im]);
            gx[at_x] += p * c + q * d;
            gx[at_x + x_im] += q * c - p * d;
            gw[at_w] += weight_factor * (a * p + b * q);
            gw[at_w + w_im] += weight_factor * (a * q - b * p);
        });
        grad_x.copy_from_slice(&gx)?;
        Ok(grad_w.copy_from_slice(&gw)?)
    }
}

/// `y_hat = x_hat w`.
///
/// # Shapes
/// - `x_hat`: `[batch, (re, im), k_1, …, k_d, c_in]`
/// - `w`: `[modes, c_in, 2 c_out]`
/// - returns `[batch, (re, im), k_1, …, k_d, c_out]`, stored in `storage`
pub(crate) fn mode_mix_fwd(
    device: &Device,
    x_hat: &Tensor,
    w: &Tensor,
    storage: Precision,
    purpose: Purpose,
) -> Result<Tensor> {
    let dims = Dims::of(x_hat, w)?;
    let mut extents = x_hat.shape().to_vec();
    if let Some(channels) = extents.last_mut() {
        *channels = dims.c_out;
    }
    let mut y_hat = device.alloc_unwritten(extents, DType::real(storage), purpose)?;
    device.mix_forward(&dims, [x_hat, w], &mut y_hat)?;
    Ok(y_hat)
}

/// The adjoints: `(grad_x_hat, grad_w)`, the latter in the accumulator's precision and multiplied by
/// `weight_factor` (the known ratio between the transforms' scales of the two passes).
pub(crate) fn mode_mix_bwd(
    device: &Device,
    (x_hat, w): (&Tensor, &Tensor),
    grad: &Tensor,
    weight_factor: f64,
    storage: Precision,
) -> Result<(Tensor, Tensor)> {
    let dims = Dims::of(x_hat, w)?;
    let mut grad_x = device.alloc_unwritten(x_hat.shape().clone(), DType::real(storage), Purpose::Workspace)?;
    let mut grad_w = device.alloc_unwritten(w.shape().clone(), DType::real(storage.accumulate()), Purpose::Grad)?;
    device.mix_backward(&dims, [x_hat, w, grad], weight_factor, [&mut grad_x, &mut grad_w])?;
    Ok((grad_x, grad_w))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the default bodies.
    struct Definition;
    impl MixKernels for Definition {}

    /// Values without a pattern that blocks or channels could share.
    fn tensor(device: &Device, shape: &[usize], precision: Precision, seed: usize) -> Tensor {
        let n = shape.iter().product::<usize>();
        let values: Vec<f64> =
            (0..n).map(|i| 2.0 * ((i + 1) as f64 * 0.754_877_666 + seed as f64 * 0.1).fract() - 1.0).collect();
        Tensor::from_slice(device, &values, shape, precision, Purpose::Workspace).unwrap()
    }

    fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        assert!(got.len() == want.len() && error <= tolerance, "{name}: relative error {error:.3e}");
    }

    /// Forward and both adjoints against the default bodies, around the edges of blocks of modes.
    fn check(batch: usize, modes: usize, c_in: usize, c_out: usize) {
        let device = Device::cpu(2).unwrap();
        let x = tensor(&device, &[batch, 2, modes, c_in], Precision::F64, 1);
        let w = tensor(&device, &[modes, c_in, 2 * c_out], Precision::F64, 2);
        let g = tensor(&device, &[batch, 2, modes, c_out], Precision::F64, 3);
        let factor = 0.375;
        let y = mode_mix_fwd(&device, &x, &w, Precision::F64, Purpose::Workspace).unwrap();
        let (gx, gw) = mode_mix_bwd(&device, (&x, &w), &g, factor, Precision::F64).unwrap();
        let like = |it: &Tensor| device.alloc(it.shape().clone(), it.dtype(), Purpose::Workspace).unwrap();
        let (mut want_y, mut want_gx, mut want_gw) = (like(&y), like(&gx), like(&gw));
        let dims = Dims::of(&x, &w).unwrap();
        Definition.mix_forward(&dims, [&x, &w], &mut want_y).unwrap();
        Definition.mix_backward(&dims, [&x, &w, &g], factor, [&mut want_gx, &mut want_gw]).unwrap();
        let name = format!("batch {batch}, modes {modes}, channels {c_in} to {c_out}");
        // Sums of at most a few hundred products in f64, with room for two digits of cancellation.
        for (what, got, want) in [("y", y, want_y), ("grad x", gx, want_gx), ("grad w", gw, want_gw)] {
            let [got, want] = [got, want].map(|it| it.to_vec::<f64>().unwrap());
            assert_close(&format!("{what}: {name}"), &got, &want, 1e-13);
        }
    }

    #[test]
    fn the_override_computes_what_the_default_bodies_say() {
        for modes in [1, 15, 16, 17, 33] {
            for (c_in, c_out) in [(1, 1), (3, 5), (7, 2), (1, 9), (33, 31)] {
                for batch in [1, 2, 3] {
                    check(batch, modes, c_in, c_out);
                }
            }
        }
        // Weights of one mode beyond a block's scalars, so blocks of one mode; and blocks of four.
        check(1, 3, 131, 127);
        check(2, 5, 61, 67);
    }

    /// In every storage against double precision: one rounding of each result, sums in f32.
    #[test]
    fn stored_results_are_rounded_once() {
        let device = Device::cpu(3).unwrap();
        for (precision, tolerance) in
            [(Precision::F32, 2f64.powi(-23)), (Precision::Bf16, 2f64.powi(-8)), (Precision::F16, 2f64.powi(-11))]
        {
            let x = tensor(&device, &[2, 2, 19, 3], precision, 4);
            let w = tensor(&device, &[19, 3, 10], precision, 5);
            let [x_wide, w_wide] = [&x, &w].map(|it| it.cast(Precision::F64, Purpose::Workspace).unwrap());
            let got = mode_mix_fwd(&device, &x, &w, precision, Purpose::Workspace).unwrap();
            assert_eq!(got.precision(), precision);
            let want = mode_mix_fwd(&device, &x_wide, &w_wide, Precision::F64, Purpose::Workspace).unwrap();
            assert_close(precision.name(), &got.to_vec::<f64>().unwrap(), &want.to_vec::<f64>().unwrap(), tolerance);
            let (_, grad_w) = mode_mix_bwd(&device, (&x, &w), &got, 1.0, precision).unwrap();
            assert_eq!(grad_w.precision(), Precision::F32);
        }
    }
}
