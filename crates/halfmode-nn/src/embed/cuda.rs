//! Channels to the end, and more of them, on a GPU.

use super::{Embed, ExtraChannels};
use crate::Result;
use crate::cuda_boxes::three_axes;
use crate::mlp::cuda::POINTS;
use crate::pointwise::storage;
use halfmode_autograd::Cx;
use halfmode_tensor::cuda::{Arg, count, define};
use halfmode_tensor::{Purpose, Shape, Tensor};

fn defines(x: &Tensor, y: &Tensor) -> [String; 3] {
    [define("S", x.precision()), define("T", y.precision()), define("P", y.precision())]
}

/// Points of a sample, and of all.
fn points(channels_last: &Shape) -> (usize, usize) {
    let points = channels_last[1..channels_last.len() - 1].iter().product();
    (points, points * channels_last[0])
}

/// From `[batch, c, grid…]` to `shape`, `[batch, grid…, c + extra]`.
pub(super) fn run(op: Embed, cx: &Cx, x: &Tensor, shape: Shape) -> Result<Tensor> {
    let (points, all) = points(&shape);
    let (c, width) = (x.shape()[1], shape[shape.len() - 1]);
    let grid = if width == c { vec![points] } else { x.shape()[2..].to_vec() };
    let [n1, n2, n3] = three_axes(&grid, 1)?.map(|n| Arg::I32(n as i32));
    let mut y = cx.device.alloc_unwritten(shape, storage(cx), Purpose::Activation)?;
    if let Some(cuda) = cx.device.as_cuda().filter(|_| all * width > 0) {
        let defines = defines(x, &y);
        let [channels, extra] = [c, width - c].map(|n| Arg::I32(n as i32));
        let zeros = Arg::I32((op.0 == ExtraChannels::Zeros).into());
        let args = [x.input()?, y.output()?, count(0), count(all), count(points)];
        let args = [&args[..], &[channels, Arg::I32(1), extra, zeros, n1, n2, n3]].concat();
        cuda.launch(POINTS, &defines, "gather_points", cuda.grid(all * width), &args)?;
    }
    Ok(y)
}

/// From `[batch, grid…, c + extra]` to `shape`, `[batch, c, grid…]`.
pub(super) fn adjoint(cx: &Cx, g: &Tensor, shape: Shape) -> Result<Tensor> {
    let (points, all) = points(g.shape());
    let (c, width) = (shape[1], g.shape()[g.shape().len() - 1]);
    let mut gx = cx.device.alloc_unwritten(shape, storage(cx), Purpose::Activation)?;
    if let Some(cuda) = cx.device.as_cuda().filter(|_| all * c > 0) {
        let defines = defines(g, &gx);
        let [channels, width] = [c, width].map(|n| Arg::I32(n as i32));
        let args = [g.input()?, Arg::Null, gx.output()?, count(0), count(all), count(points)];
        let args = [&args[..], &[channels, Arg::I32(1), width]].concat();
        cuda.launch(POINTS, &defines, "scatter_points", cuda.grid(all * c), &args)?;
    }
    Ok(gx)
}
