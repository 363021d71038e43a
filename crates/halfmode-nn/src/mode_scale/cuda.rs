//! The separable mode product on a GPU.

use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const MODE_SCALE: Source = Source { name: "mode_scale", text: include_str!("../../kernels/mode_scale.cu") };

fn defines([x, w, y]: [&Tensor; 3]) -> [String; 3] {
    [define("X", x.precision()), define("W", w.precision()), define("Y", y.precision())]
}

pub(super) fn forward(
    device: &Device,
    x_hat: &Tensor,
    w: &Tensor,
    (lane, c): (usize, usize),
    storage: Precision,
    purpose: Purpose,
) -> Result<Tensor> {
    let mut y_hat = device.alloc_unwritten(x_hat.shape().clone(), DType::real(storage), purpose)?;
    let n = y_hat.numel() / 2;
    if let Some(cuda) = device.as_cuda().filter(|_| n > 0) {
        let defines = defines([x_hat, w, &y_hat]);
        let args = [x_hat.input()?, w.input()?, y_hat.output()?, count(n), count(lane), Arg::I32(c as i32)];
        cuda.launch(MODE_SCALE, &defines, "scale_forward", cuda.grid(n), &args)?;
    }
    Ok(y_hat)
}

/// Gradients of spectrum and weight.
pub(super) fn backward(
    device: &Device,
    [x_hat, w, grad]: [&Tensor; 3],
    (lane, c): (usize, usize),
    weight_factor: f64,
    storage: Precision,
) -> Result<(Tensor, Tensor)> {
    let x_hat = x_hat.cast(storage, Purpose::Workspace)?;
    let mut grad_x = device.alloc_unwritten(x_hat.shape().clone(), DType::real(storage), Purpose::Workspace)?;
    let dtype = DType::real(storage.accumulate());
    let mut grad_w = device.alloc_unwritten(w.shape().clone(), dtype, Purpose::Grad)?;
    let n = grad_x.numel() / 2;
    if let Some(cuda) = device.as_cuda().filter(|_| n > 0) {
        let defines = defines([&x_hat, w, grad]);
        let sizes = [count(lane), Arg::I32(c as i32)];
        let args = [&[grad.input()?, w.input()?, grad_x.output()?, count(n)][..], &sizes].concat();
        cuda.launch(MODE_SCALE, &defines, "scale_backward", cuda.grid(n), &args)?;
        let args = [x_hat.input()?, grad.input()?, grad_w.output()?, Arg::F64(weight_factor), count(n / lane)];
        let args = [&args[..], &sizes].concat();
        cuda.launch(MODE_SCALE, &defines, "scale_backward_weight", cuda.grid(lane), &args)?;
    }
    Ok((grad_x, grad_w))
}
