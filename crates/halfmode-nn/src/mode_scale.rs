//! The separable mode product `y_hat[b, k, c] = x_hat[b, k, c] w[k, c]`, complex.
//!
//! Layouts are those of the mode contraction; weights are `[modes, (re | im) c]`.

#[cfg(feature = "cuda")]
#[path = "mode_scale/cuda.rs"]
mod on_gpu;

use crate::pointwise::filled;
use crate::{Error, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Shape, Tensor, with_real};

/// Scalars between the real and the imaginary part of a spectrum: modes times channels.
fn check(x_hat: &Tensor, w: &Tensor) -> Result<usize> {
    let shape = x_hat.shape();
    let c = shape.last().copied().unwrap_or(0);
    let modes = if shape.len() > 3 { shape[2..shape.len() - 1].iter().product() } else { 0 };
    let expected = Shape::from([modes, 2 * c]);
    if *w.shape() != expected || modes * c == 0 {
        return Err(Error::Shape { op: "mode_scale", operand: "weight", expected, found: w.shape().clone() });
    }
    Ok(modes * c)
}

/// Calls `each` with the places of real and imaginary part in the spectrum and in the weight.
fn each_element(n_entries: usize, lane: usize, c: usize, mut each: impl FnMut([usize; 2], [usize; 2])) {
    for (entry, idx) in (0..n_entries).flat_map(|entry| (0..lane).map(move |idx| (entry, idx))) {
        let (x, w) = (2 * entry * lane + idx, idx / c * 2 * c + idx % c);
        each([x, x + lane], [w, w + c]);
    }
}

/// `y_hat = x_hat w`, stored in `storage`.
pub(crate) fn mode_scale_fwd(
    device: &Device,
    x_hat: &Tensor,
    w: &Tensor,
    storage: Precision,
    purpose: Purpose,
) -> Result<Tensor> {
    let lane = check(x_hat, w)?;
    let c = w.shape()[1] / 2;
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return on_gpu::forward(device, x_hat, w, (lane, c), storage, purpose);
    }
    with_real!(storage, R => filled::<R>(device, x_hat.shape(), DType::real(storage), purpose, || {
        let (mut y, w) = (x_hat.to_vec::<R>()?, w.to_vec::<R>()?);
        each_element(x_hat.shape()[0], lane, c, |[x_re, x_im], [w_re, w_im]| {
            let (a, b) = (y[x_re], y[x_im]);
            y[x_re] = a * w[w_re] - b * w[w_im];
            y[x_im] = a * w[w_im] + b * w[w_re];
        });
        Ok(y)
    }))
}

/// The adjoints `(grad_x_hat, grad_w)`, as those of the mode contraction.
pub(crate) fn mode_scale_bwd(
    device: &Device,
    (x_hat, w): (&Tensor, &Tensor),
    grad: &Tensor,
    weight_factor: f64,
    storage: Precision,
) -> Result<(Tensor, Tensor)> {
    let lane = check(x_hat, w)?;
    let c = w.shape()[1] / 2;
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return on_gpu::backward(device, [x_hat, w, grad], (lane, c), weight_factor, storage);
    }
    let n_entries = x_hat.shape()[0];
    let grad_x = with_real!(storage, R => filled::<R>(device, x_hat.shape(), DType::real(storage), Purpose::Workspace, || {
        let (mut g, w) = (grad.to_vec::<R>()?, w.to_vec::<R>()?);
        each_element(n_entries, lane, c, |[g_re, g_im], [w_re, w_im]| {
            let (p, q) = (g[g_re], g[g_im]);
            g[g_re] = p * w[w_re] + q * w[w_im];
            g[g_im] = q * w[w_re] - p * w[w_im];
        });
        Ok(g)
    }))?;
    let dtype = DType::real(storage.accumulate());
    let grad_w = with_real!(storage, R => filled::<R>(device, w.shape(), dtype, Purpose::Grad, || {
        let (x, g, mut sums) = (x_hat.to_vec::<R>()?, grad.to_vec::<R>()?, vec![R::ZERO; w.numel()]);
        each_element(n_entries, lane, c, |[re, im], [w_re, w_im]| {
            sums[w_re] += x[re] * g[re] + x[im] * g[im];
            sums[w_im] += x[re] * g[im] - x[im] * g[re];
        });
        let factor = R::from_f64(weight_factor);
        sums.iter_mut().for_each(|sum| *sum *= factor);
        Ok(sums)
    }))?;
    Ok((grad_x, grad_w))
}
