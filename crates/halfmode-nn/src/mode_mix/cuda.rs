//! The mode contraction on a GPU: one block of threads per mode, or for halves with channels in sixteens a warp per mode
//! on tensor cores.

use super::Dims;
use crate::Result;
use halfmode_precision::Precision;
use halfmode_tensor::cuda::{Arg, Grid, Source, define};
use halfmode_tensor::{Device, Tensor};

const KERNELS: Source = Source { name: "mode_mix", text: include_str!("../../kernels/mode_mix.cu") };

const HALVES: Source = Source { name: "mode_mix_halves", text: include_str!("../../kernels/mode_mix_halves.cu") };

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

/// The way of halves: a thread takes `lanes` neighbouring channels, a warp eight times as many.
struct Halves {
    defines: [String; 2],
    lanes: usize,
}

impl Halves {
    /// Modes of a block.
    const WARPS: usize = 4;

    /// Where all operands are of one half format and both counts of channels are multiples of a warp's.
    fn new(dims: &Dims, operands: &[&Tensor]) -> Option<Self> {
        let precision = operands.first()?.precision();
        let is_half = matches!(precision, Precision::F16 | Precision::Bf16);
        let lanes = [8, 4, 2].into_iter().find(|lanes| {
            let channels = 8 * lanes;
            dims.c_in.is_multiple_of(channels) && dims.c_out.is_multiple_of(channels)
        })?;
        let fits = is_half && operands.iter().all(|it| it.precision() == precision);
        fits.then(|| Halves { defines: [define("T", precision), define("L", lanes)], lanes })
    }

    /// Warps for these counts of channels of every mode.
    fn grid(&self, dims: &Dims, channels: [usize; 2]) -> Grid {
        let [y, z] = channels.map(|n| n.div_ceil(8 * self.lanes));
        Grid { blocks: [dims.modes.div_ceil(Self::WARPS), y, z], ..Grid::row(1, 32 * Self::WARPS) }
    }
}

pub(super) fn forward(device: &Device, dims: &Dims, [x_hat, w]: [&Tensor; 2], y_hat: &mut Tensor) -> Result<()> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    if let Some(halves) = Halves::new(dims, &[x_hat, w, y_hat]) {
        let grid = halves.grid(dims, [dims.c_out, 1]);
        let args = [&[x_hat.input()?, w.input()?, y_hat.output()?][..], &dims.numbers()].concat();
        return Ok(cuda.launch(HALVES, &halves.defines, "mix_forward", grid, &args)?);
    }
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
    let halves = Halves::new(dims, &[x_hat, w, grad, grad_x]);
    if let Some(halves) = halves.filter(|_| grad_w.precision() == Precision::F32) {
        let args = [&[w.input()?, grad.input()?, grad_x.output()?][..], &dims.numbers()].concat();
        cuda.launch(HALVES, &halves.defines, "mix_backward_x", halves.grid(dims, [dims.c_in, 1]), &args)?;
        let tensors = [x_hat.input()?, grad.input()?, grad_w.output()?, Arg::F32(weight_factor as f32)];
        let grid = halves.grid(dims, [dims.c_in, dims.c_out]);
        let args = [&tensors[..], &dims.numbers()].concat();
        return Ok(cuda.launch(HALVES, &halves.defines, "mix_backward_w", grid, &args)?);
    }
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
