//! Complex fields from two real ones, and back, on a GPU.

use crate::Result;
use halfmode_autograd::Cx;
use halfmode_precision::DType;
use halfmode_tensor::cuda::{Arg, Source, count, define};
use halfmode_tensor::{Purpose, Shape, Tensor};

const COMPLEX: Source = Source { name: "complex", text: include_str!("../../kernels/complex.cu") };

/// Elements, channels behind the last grid axis, points of it and turns: what kernels are told.
fn sizes(shape: &Shape, turns: isize) -> [Arg<'static>; 4] {
    let (points, inner) = if let [.., n, c] = shape[..] { (n, c.max(1)) } else { (1, 1) };
    // Turns of more than the points of an axis are none.
    let turns = turns.rem_euclid(points.max(1) as isize);
    [count(shape.numel()), count(inner), Arg::I32(points.max(1) as i32), Arg::I32(turns as i32)]
}

pub(super) fn join(
    cx: &Cx,
    [re, im]: [Option<&Tensor>; 2],
    shape: &Shape,
    dtype: DType,
    turns: isize,
) -> Result<Tensor> {
    let mut z = cx.device.alloc_unwritten(shape.clone(), dtype, Purpose::Activation)?;
    if let Some(cuda) = cx.device.as_cuda().filter(|_| shape.numel() > 0) {
        let stored = |part: Option<&Tensor>| part.map_or(dtype.precision, |it| it.precision());
        let defines = [define("S", stored(re)), define("R", stored(im)), define("T", dtype.precision)];
        let [re, im] = [re, im].map(|part| part.map_or(Ok(Arg::Null), Tensor::input));
        let args = [&[re?, im?, z.output()?][..], &sizes(shape, turns)].concat();
        cuda.launch(COMPLEX, &defines, "join_parts", cuda.grid(shape.numel()), &args)?;
    }
    Ok(z)
}

pub(super) fn split(cx: &Cx, z: &Tensor, dtype: DType, turns: isize) -> Result<[Tensor; 2]> {
    let shape = z.shape();
    let part = || cx.device.alloc_unwritten(shape.clone(), dtype, Purpose::Activation);
    let (mut re, mut im) = (part()?, part()?);
    if let Some(cuda) = cx.device.as_cuda().filter(|_| shape.numel() > 0) {
        let stored = [define("S", z.precision()), define("R", z.precision()), define("T", dtype.precision)];
        let args = [&[z.input()?, re.output()?, im.output()?][..], &sizes(shape, turns)].concat();
        cuda.launch(COMPLEX, &stored, "split_parts", cuda.grid(shape.numel()), &args)?;
    }
    Ok([re, im])
}
