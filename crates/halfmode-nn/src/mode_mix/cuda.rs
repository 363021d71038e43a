//! The mode contraction on a GPU: one block of threads per mode.

use super::Dims;
use crate::Result;
use halfmode_precision::Precision;
use halfmode_tensor::cuda::{Arg, Grid, Source, define};
use halfmode_tensor::{Device, Tensor};

const KERNELS: Source = Source { name: "mode_mix", text: include_str!("../../kernels/mode_mix.cu") };

/// Batch entries whose sums are in registers, and outputs whose weights are in shared memory: the kernel's numbers.
const NB: usize = 8;
const CHUNK: usize = 32;
/// Threads of a block.
const THREADS: usize = 128;

impl Dims {
    fn numbers(&self) -> [Arg<'static>; 4] {
        // Counts of modes and channels: their products are tensors that exist.
        [self.batch, self.modes, self.c_in, self.c_out].map(|n| Arg::I32(n as i32))
    }
}

/// Neighbouring outputs that a thread forms.
fn lanes(dims: &Dims, x: &Tensor) -> usize {
    if dims.c_out.is_multiple_of(2) && x.precision() != Precision::F64 { 2 } else { 1 }
}

fn defines(dims: &Dims, [x, w, y]: [&Tensor; 3]) -> [String; 4] {
    let storage = [("X", x), ("W", w), ("Y", y)].map(|(name, it)| define(name, it.precision()));
    let [x_type, w_type, y_type] = storage;
    [x_type, w_type, y_type, define("V", lanes(dims, x))]
}

pub(super) fn forward(device: &Device, dims: &Dims, [x_hat, w]: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let defines = defines(dims, [x_hat, w, y_hat]);
    let shared = 2 * NB * dims.c_in * x_hat.precision().accumulate().bytes();
    let grid = Grid { shared, ..Grid::row(dims.modes, THREADS) };
    let [batch, modes, c_in, c_out] = dims.numbers();
    let args = [x_hat.input()?, w.input()?, y_hat.output()?, batch, modes, c_in, c_out];
    Ok(cuda.launch(KERNELS, &defines, "mix_forward", grid, &args)?)
}

pub(super) fn backward(
    device: &Device,
    dims: &Dims,
    [x_hat, w, grad]: [&Tensor; 3],
    weight_factor: f64,
    [grad_x, grad_w]: [&mut Tensor; 2],
) -> Result<()> {
    let x_hat = &x_hat.cast(grad_x.precision(), halfmode_tensor::Purpose::Workspace)?;
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let defines = defines(dims, [x_hat, w, grad]);
    let scalars = 2 * NB * (dims.c_in + dims.c_out) + 2 * CHUNK * (THREADS + 1);
    let grid = Grid { shared: scalars * grad_w.precision().bytes(), ..Grid::row(dims.modes, THREADS) };
    let factor = match grad_w.precision() {
        Precision::F64 => Arg::F64(weight_factor),
        _ => Arg::F32(weight_factor as f32),
    };
    let [batch, modes, c_in, c_out] = dims.numbers();
    let args = [
        x_hat.input()?,
        w.input()?,
        grad.input()?,
        grad_x.output()?,
        grad_w.output()?,
        factor,
        batch,
        modes,
        c_in,
        c_out,
    ];
    Ok(cuda.launch(KERNELS, &defines, "mix_backward", grid, &args)?)
}
