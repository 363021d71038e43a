//! The dense layers of a block in one pass over the rows, on tensor cores.

use crate::Result;
use crate::cuda_rows::RowKernels;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Purpose, Shape, Tensor};

const KERNELS: Source = Source { name: "block_points", text: include_str!("../../kernels/block_points.cu") };

/// Warps of a block and scalars of padding: the kernel's numbers.
const WARPS: usize = 4;
const PAD: usize = 8;
/// Blocks. Fixed, so that sums over rows have one order.
const BLOCKS: usize = 528;
/// Bytes of shared memory that every GPU with these instructions gives a block.
const MAX_SHARED: usize = 160 << 10;

/// One call: sizes, and what the kernels are compiled for.
pub(super) struct Points<'a> {
    rows: RowKernels<'a>,
    c: usize,
    h: usize,
    act: bool,
}

/// The dense parameters in the order of the block: bias, skip, w_1, b_1, w_2, b_2, gate.
type Dense<'a> = [&'a Tensor; 7];

/// What the weights' gradients are products of, and the gradients that are sums over rows.
pub(super) struct Adjoint {
    pub(super) z: Tensor,
    pub(super) m: Tensor,
    pub(super) g: Tensor,
    pub(super) gm: Tensor,
    pub(super) gz: Tensor,
    pub(super) gx: Tensor,
    pub(super) g_bias: Tensor,
    pub(super) g_b1: Tensor,
    pub(super) g_b2: Tensor,
    pub(super) g_gate: Tensor,
}

impl<'a> Points<'a> {
    /// `None` where the kernels do not fit: other storage than a half, widths that are not multiples of 16, or too wide.
    pub(super) fn new(rows: RowKernels<'a>, (c, h): (usize, usize), act: bool) -> Option<Self> {
        let half = matches!(rows.storage, Precision::F16 | Precision::Bf16);
        let whole = c.is_multiple_of(16) && h.is_multiple_of(16) && c <= 128 && h <= 128;
        let points = Points { rows, c, h, act };
        (half && whole && points.shared(2) <= MAX_SHARED).then_some(points)
    }

    /// Bytes of shared memory: each weight once, or also its transpose and the sums.
    fn shared(&self, copies: usize) -> usize {
        let Points { c, h, .. } = *self;
        let weights = c * (c + PAD) + h * (c + PAD) + c * (h + PAD);
        2 * copies * weights + if copies > 1 { 4 * WARPS * self.n_sums() } else { 0 }
    }

    fn n_sums(&self) -> usize {
        3 * self.c + self.h
    }

    fn grid(&self, copies: usize) -> Grid {
        let blocks = self.rows.rows.div_ceil(16 * WARPS).clamp(1, BLOCKS);
        Grid { shared: self.shared(copies), ..Grid::row(blocks, 32 * WARPS) }
    }

    fn defines(&self) -> [String; 4] {
        let (storage, params) = (self.rows.storage, self.rows.params);
        [define("T", storage), define("P", params), define("C", self.c), define("H", self.h)]
    }

    /// `y` from the spectral part `s` and the input `x`.
    pub(super) fn forward(&self, s: &Tensor, x: &Tensor, dense: Dense<'_>, y: &mut Tensor) -> Result<()> {
        let Some(cuda) = self.rows.device.as_cuda() else { return Ok(()) };
        let [bias, skip, w1, b1, w2, b2, gate] = inputs(dense)?;
        let (act, rows) = (Arg::I32(self.act.into()), count(self.rows.rows));
        let args = [s.input()?, x.input()?, bias, skip, w1, b1, w2, b2, gate, y.output()?, act, rows];
        Ok(cuda.launch(KERNELS, &self.defines(), "points_forward", self.grid(1), &args)?)
    }

    /// The adjoint of [`Points::forward`]: `s` and `grad` are used up.
    pub(super) fn backward(&self, s: Tensor, x: &Tensor, grad: Tensor, dense: Dense<'_>) -> Result<Adjoint> {
        let (c, h, device) = (self.c, self.h, self.rows.device);
        let (mut z, mut g) = (s, grad);
        let dtype = DType::real(self.rows.storage);
        let field = |channels: usize| device.alloc_unwritten([self.rows.rows, channels], dtype, Purpose::Workspace);
        let (mut m, mut gm, mut gz) = (field(h)?, field(h)?, field(c)?);
        let mut gx = device.alloc_unwritten(x.shape().clone(), dtype, Purpose::Activation)?;
        let grid = self.grid(2);
        let (n_parts, wide) = (grid.blocks[0], DType::real(Precision::F32));
        let mut parts = device.alloc_unwritten([n_parts, self.n_sums()], wide, Purpose::Workspace)?;
        if let Some(cuda) = device.as_cuda() {
            let [bias, skip, w1, b1, w2, b2, gate] = inputs(dense)?;
            let (z, g) = (z.output()?, g.output()?);
            let (m, gm, gz) = (m.output()?, gm.output()?, gz.output()?);
            let (act, rows) = (Arg::I32(self.act.into()), count(self.rows.rows));
            let fields = [z, x.input()?, g];
            let params = [bias, skip, w1, b1, w2, b2, gate];
            let outputs = [z, m, g, gm, gz, gx.output()?, parts.output()?, act, rows];
            let args = [&fields[..], &params, &outputs].concat();
            cuda.launch(KERNELS, &self.defines(), "points_backward", grid, &args)?;
        }
        let [bias, _, _, b1, _, b2, gate] = dense.map(|it| it.shape().clone());
        let sum = |shape: Shape| device.alloc_unwritten(shape, wide, Purpose::Grad);
        let (mut g_b2, mut g_gate, mut g_bias, mut g_b1) = (sum(b2)?, sum(gate)?, sum(bias)?, sum(b1)?);
        if let Some(cuda) = device.as_cuda() {
            let sums = [g_b2.output()?, g_gate.output()?, g_bias.output()?, g_b1.output()?];
            let args = [&[parts.input()?][..], &sums, &[Arg::I32(n_parts as i32)]].concat();
            let grid = Grid::row(self.n_sums().div_ceil(32), 1024);
            cuda.launch(KERNELS, &self.defines(), "sum_parts", grid, &args)?;
        }
        Ok(Adjoint { z, m, g, gm, gz, gx, g_bias, g_b1, g_b2, g_gate })
    }
}

fn inputs(dense: Dense<'_>) -> Result<[Arg<'_>; 7]> {
    let [bias, skip, w1, b1, w2, b2, gate] = dense;
    Ok([bias.input()?, skip.input()?, w1.input()?, b1.input()?, w2.input()?, b2.input()?, gate.input()?])
}
