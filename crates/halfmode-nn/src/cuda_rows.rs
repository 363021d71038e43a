//! Dense layers and pointwise operations on rows of channels on a GPU.
//!
//! Matrix products go to the library with sums in f32; what stands between them is one pass over the rows each,
//! written by the kernels of `rows.cu`. On the planning device everything is allocated and nothing runs.

use crate::Result;
use halfmode_autograd::Cx;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Compute, CudaDevice, Grid, Matmul, Operand, Scalar, Source, count, define};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};

const ROWS: Source = Source { name: "rows", text: include_str!("../kernels/rows.cu") };

/// Threads of a block.
const THREADS: usize = 256;
/// Blocks along the rows where sums are formed. Fixed, so that a sum has one order.
const SUM_BLOCKS: usize = 528;

/// Rows of channels of one storage type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowKernels<'a> {
    pub(crate) device: &'a Device,
    /// Storage of fields and of their parameters.
    pub(crate) storage: Precision,
    pub(crate) params: Precision,
    /// What products of f32 values may use.
    pub(crate) compute: halfmode_precision::Compute,
    pub(crate) rows: usize,
}

/// Rows of channels inside a tensor, from row `first` on.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) tensor: Tensor,
    pub(crate) first: usize,
}

impl From<Tensor> for Rows {
    fn from(tensor: Tensor) -> Self {
        Rows { tensor, first: 0 }
    }
}

impl From<&Tensor> for Rows {
    fn from(tensor: &Tensor) -> Self {
        Rows::from(tensor.clone())
    }
}

/// The scalars of a tensor from `offset` on, `row` apart.
pub(crate) fn matrix(x: &Tensor, offset: usize, row: usize) -> Result<Operand<'_>> {
    Ok(x.operand(offset, row, 0, false)?)
}

/// A field or weight in the storage that kernels read.
pub(crate) fn stored(cx: &Cx, x: &Tensor) -> Result<Tensor> {
    Ok(x.cast(cx.policy.pointwise.storage, Purpose::Workspace)?)
}

impl<'a> RowKernels<'a> {
    /// Rows in the storage of fields, with parameters in `params`.
    pub(crate) fn new(cx: &'a Cx, rows: usize, params: Precision) -> Self {
        let (storage, compute) = (cx.policy.pointwise.storage, cx.policy.compute);
        RowKernels { device: &cx.device, storage, params, compute, rows }
    }
}

impl RowKernels<'_> {
    /// Channels per thread.
    fn lanes(channels: usize) -> usize {
        if channels.is_multiple_of(4) { 4 } else { 1 }
    }

    fn defines(&self, channels: usize) -> [String; 3] {
        [define("T", self.storage), define("P", self.params), define("V", Self::lanes(channels))]
    }

    fn grid(&self, channels: usize, most: usize) -> Grid {
        let threads = channels.div_ceil(Self::lanes(channels));
        let per_block = THREADS / threads.clamp(1, THREADS);
        let blocks = [self.rows.div_ceil(per_block).clamp(1, most), threads.div_ceil(THREADS), 1];
        Grid { blocks, threads: THREADS, shared: 0 }
    }

    /// Launches a kernel of `rows.cu` whose last arguments are rows and channels.
    fn run(&self, cuda: &CudaDevice, entry: &str, channels: usize, args: &[Arg<'_>]) -> Result<()> {
        let grid = self.grid(channels, 16 * SUM_BLOCKS);
        let args = [args, &[count(self.rows), Arg::I32(channels as i32)]].concat();
        Ok(cuda.launch(ROWS, &self.defines(channels), entry, grid, &args)?)
    }

    /// As [`RowKernels::run`] for a kernel that also sums over rows: `parts` goes where `None` stands. Returns the
    /// sums, in accumulators, one tensor per shape.
    fn run_with_sums(
        &self,
        entry: &str,
        channels: usize,
        args: impl FnOnce(Arg<'_>, &dyn Fn(&[Arg<'_>]) -> Result<()>) -> Result<()>,
        shapes: &[&Shape],
    ) -> Result<Vec<Tensor>> {
        let accumulate = self.storage.accumulate();
        let grid = self.grid(channels, SUM_BLOCKS);
        let n_parts = grid.blocks[0];
        let dtype = DType::real(accumulate);
        let mut parts = self.device.alloc_unwritten([shapes.len(), n_parts, channels], dtype, Purpose::Workspace)?;
        let mut sums = shapes
            .iter()
            .map(|shape| Ok(self.device.alloc_unwritten((*shape).clone(), dtype, Purpose::Grad)?))
            .collect::<Result<Vec<_>>>()?;
        let Some(cuda) = self.device.as_cuda() else { return Ok(sums) };
        let defines = self.defines(channels);
        let shared = THREADS * Self::lanes(channels) * accumulate.bytes();
        let launch = |args: &[Arg<'_>]| -> Result<()> {
            let args = [args, &[count(self.rows), Arg::I32(channels as i32)]].concat();
            Ok(cuda.launch(ROWS, &defines, entry, Grid { shared, ..grid }, &args)?)
        };
        args(parts.output()?, &launch)?;
        for (k, sum) in sums.iter_mut().enumerate() {
            let at = k * n_parts * channels;
            let args = [
                Arg::In(matrix(&parts, at, channels)?.span),
                sum.output()?,
                Arg::I32(n_parts as i32),
                Arg::I32(channels as i32),
            ];
            cuda.launch(ROWS, &defines, "add_parts", Grid::row(channels.div_ceil(32), 1024), &args)?;
        }
        Ok(sums)
    }

    /// `y = act(x + bias)`
    pub(crate) fn bias_act(&self, x: &Tensor, bias: Option<&Tensor>, act: bool, purpose: Purpose) -> Result<Tensor> {
        let channels = x.numel() / self.rows.max(1);
        let mut y = self.device.alloc_unwritten(x.shape().clone(), DType::real(self.storage), purpose)?;
        if let Some(cuda) = self.device.as_cuda() {
            let bias = bias.map_or(Ok(Arg::Null), Tensor::input)?;
            self.run(cuda, "bias_act", channels, &[x.input()?, bias, y.output()?, Arg::I32(act.into())])?;
        }
        Ok(y)
    }

    /// As [`RowKernels::bias_act`], in place.
    pub(crate) fn bias_act_assign(&self, x: &mut Tensor, bias: Option<&Tensor>, act: bool) -> Result<()> {
        let channels = x.numel() / self.rows.max(1);
        if let Some(cuda) = self.device.as_cuda() {
            let bias = bias.map_or(Ok(Arg::Null), Tensor::input)?;
            let x = x.output()?;
            self.run(cuda, "bias_act", channels, &[x, bias, x, Arg::I32(act.into())])?;
        }
        Ok(())
    }

    /// `g *= act'(x + bias)`; returns the sum of `g` over rows in the shape of the bias.
    pub(crate) fn bias_act_backward(&self, x: &Tensor, bias: &Tensor, g: &mut Tensor, act: bool) -> Result<Tensor> {
        let channels = x.numel() / self.rows.max(1);
        let sums = self.run_with_sums(
            "bias_act_backward",
            channels,
            |parts, launch| launch(&[x.input()?, bias.input()?, g.output()?, parts, Arg::I32(act.into())]),
            &[bias.shape()],
        )?;
        one(sums)
    }

    /// `y = act(u + bias + gate x)`
    pub(crate) fn gate_act(
        &self,
        [u, x]: [&Tensor; 2],
        [bias, gate]: [&Tensor; 2],
        act: bool,
        y: &mut Tensor,
    ) -> Result<()> {
        let channels = u.numel() / self.rows.max(1);
        if let Some(cuda) = self.device.as_cuda() {
            let args = [u.input()?, x.input()?, bias.input()?, gate.input()?, y.output()?, Arg::I32(act.into())];
            self.run(cuda, "gate_act", channels, &args)?;
        }
        Ok(())
    }

    /// Turns `grad` into the gradient before the activation and writes `gx = gate grad`; returns the gradients of bias
    /// and gate.
    pub(crate) fn gate_act_backward(
        &self,
        [u, x]: [&Tensor; 2],
        [bias, gate]: [&Tensor; 2],
        act: bool,
        [grad, gx]: [&mut Tensor; 2],
    ) -> Result<[Tensor; 2]> {
        let channels = u.numel() / self.rows.max(1);
        let sums = self.run_with_sums(
            "gate_act_backward",
            channels,
            |parts, launch| {
                let (fields, params) = ([u.input()?, x.input()?], [bias.input()?, gate.input()?]);
                let [u, x] = fields;
                let [bias, gate] = params;
                launch(&[u, x, bias, gate, grad.output()?, gx.output()?, parts, Arg::I32(act.into())])
            },
            &[bias.shape(), gate.shape()],
        )?;
        let mut sums = sums.into_iter();
        match (sums.next(), sums.next()) {
            (Some(bias), Some(gate)) => Ok([bias, gate]),
            _ => Err(halfmode_tensor::Error::NotOnGpu.into()),
        }
    }

    /// `y = gate x`
    pub(crate) fn gate(&self, x: &Tensor, gate: &Tensor, purpose: Purpose) -> Result<Tensor> {
        let channels = x.numel() / self.rows.max(1);
        let mut y = self.device.alloc_unwritten(x.shape().clone(), DType::real(self.storage), purpose)?;
        if let Some(cuda) = self.device.as_cuda() {
            self.run(cuda, "gate_rows", channels, &[x.input()?, gate.input()?, y.output()?])?;
        }
        Ok(y)
    }

    /// Writes `gx = gate g`; returns the sum of `g x` over rows in the shape of the gate.
    pub(crate) fn gate_backward(&self, [g, x]: [&Tensor; 2], gate: &Tensor, gx: &mut Tensor) -> Result<Tensor> {
        let channels = x.numel() / self.rows.max(1);
        let sums = self.run_with_sums(
            "gate_rows_backward",
            channels,
            |parts, launch| launch(&[g.input()?, x.input()?, gate.input()?, gx.output()?, parts]),
            &[gate.shape()],
        )?;
        one(sums)
    }

    /// `tanh x`
    pub(crate) fn tanh(&self, x: &Tensor) -> Result<Tensor> {
        let channels = x.numel() / self.rows.max(1);
        let mut y = self.device.alloc_unwritten(x.shape().clone(), DType::real(self.storage), Purpose::Workspace)?;
        if let Some(cuda) = self.device.as_cuda() {
            self.run(cuda, "tanh_forward", channels, &[x.input()?, y.output()?])?;
        }
        Ok(y)
    }

    /// `y = tanh(y + bias)`
    pub(crate) fn bias_tanh_assign(&self, y: &mut Tensor, bias: &Tensor) -> Result<()> {
        let channels = y.numel() / self.rows.max(1);
        match self.device.as_cuda() {
            Some(cuda) => self.run(cuda, "bias_tanh", channels, &[bias.input()?, y.output()?]),
            None => Ok(()),
        }
    }

    /// `g *= 1 - y^2` with `y` as a tanh returned it; returns the sum of `g` over rows in the shape of a bias.
    pub(crate) fn tanh_backward(&self, y: &Tensor, g: &mut Tensor, bias: &Shape) -> Result<Tensor> {
        let channels = y.numel() / self.rows.max(1);
        let sums = self.run_with_sums(
            "tanh_backward",
            channels,
            |parts, launch| launch(&[y.input()?, g.output()?, parts]),
            &[bias],
        )?;
        one(sums)
    }

    /// `gx += g`, through the derivative of tanh at `x` where there was one.
    pub(crate) fn add_input_gradient(&self, g: &Tensor, x: &Tensor, gx: &mut Tensor, tanh: bool) -> Result<()> {
        let channels = x.numel() / self.rows.max(1);
        if let Some(cuda) = self.device.as_cuda() {
            let args = [g.input()?, x.input()?, gx.output()?, Arg::I32(tanh.into())];
            self.run(cuda, "add_input_gradient", channels, &args)?;
        }
        Ok(())
    }

    /// `y = keep y + x w^T` with `w` `[c_out, c_in]`.
    pub(crate) fn linear(&self, x: &Tensor, w: &Tensor, y: &mut Tensor, keep: f64) -> Result<()> {
        let c_in = x.numel() / self.rows.max(1);
        self.linear_rows((&x.into(), c_in), w, y, keep)
    }

    /// As [`RowKernels::linear`] for rows `[rows, c_in]` inside a tensor.
    pub(crate) fn linear_rows(&self, x: (&Rows, usize), w: &Tensor, y: &mut Tensor, keep: f64) -> Result<()> {
        let (c_in, c_out) = (x.1, y.numel() / self.rows.max(1));
        let w = &Rows::from(w.cast(self.storage, Purpose::Workspace)?);
        self.product((self.rows, c_out, c_in), (x, false), ((w, c_in), true), (y, c_out), keep)
    }

    /// `gx = keep gx + g w`: the adjoint of [`RowKernels::linear`] in `x`.
    pub(crate) fn linear_grad_x(&self, g: &Tensor, w: &Tensor, gx: &mut Tensor, keep: f64) -> Result<()> {
        let (c_out, c_in) = (g.numel() / self.rows.max(1), gx.numel() / self.rows.max(1));
        let w = &Rows::from(w.cast(self.storage, Purpose::Workspace)?);
        self.product((self.rows, c_in, c_out), ((&g.into(), c_out), false), ((w, c_in), false), (gx, c_in), keep)
    }

    /// As [`RowKernels::linear_grad_x`] for rows inside a tensor.
    pub(crate) fn linear_grad_x_rows(&self, g: (&Rows, usize), w: &Tensor, gx: &mut Tensor) -> Result<()> {
        let (c_out, c_in) = (g.1, gx.numel() / self.rows.max(1));
        let w = &Rows::from(w.cast(self.storage, Purpose::Workspace)?);
        self.product((self.rows, c_in, c_out), (g, false), ((w, c_in), false), (gx, c_in), 0.0)
    }

    /// `g^T x` in accumulators: the adjoint of [`RowKernels::linear`] in `w`, whose shape the result has.
    pub(crate) fn linear_grad_w(&self, g: &Tensor, x: &Tensor, shape: &Shape) -> Result<Tensor> {
        let (c_out, c_in) = (g.numel() / self.rows.max(1), x.numel() / self.rows.max(1));
        let dtype = DType::real(self.storage.accumulate());
        let mut gw = self.device.alloc_unwritten(shape.clone(), dtype, Purpose::Grad)?;
        self.linear_grad_w_rows((&g.into(), c_out), (&x.into(), c_in), &mut gw, 0.0)?;
        Ok(gw)
    }

    /// `gw = keep gw + g^T x` for rows inside tensors.
    pub(crate) fn linear_grad_w_rows(
        &self,
        g: (&Rows, usize),
        x: (&Rows, usize),
        gw: &mut Tensor,
        keep: f64,
    ) -> Result<()> {
        self.product((g.1, x.1, self.rows), (g, true), (x, false), (gw, x.1), keep)
    }

    /// The sum over rows of rows inside a tensor, in a tensor of the given shape.
    pub(crate) fn column_sums(&self, (g, channels): (&Rows, usize), shape: &Shape) -> Result<Tensor> {
        let sums = self.run_with_sums(
            "sum_rows",
            channels,
            |parts, launch| launch(&[Arg::In(matrix(&g.tensor, g.first * channels, channels)?.span), parts]),
            &[shape],
        )?;
        one(sums)
    }

    fn product(
        &self,
        (m, n, k): (usize, usize, usize),
        ((a, a_row), a_transposed): ((&Rows, usize), bool),
        ((b, b_row), b_transposed): ((&Rows, usize), bool),
        (c, c_row): (&mut Tensor, usize),
        keep: f64,
    ) -> Result<()> {
        let Some(cuda) = self.device.as_cuda() else { return Ok(()) };
        let a = a.tensor.operand(a.first * a_row, a_row, 0, a_transposed)?;
        let b = b.tensor.operand(b.first * b_row, b_row, 0, b_transposed)?;
        let compute = Compute::of(a.precision, self.compute);
        let c = c.result(0, c_row, 0)?;
        let factors = Scalar { scale: 1.0, keep };
        Ok(cuda.matmul(&Matmul { m, n, k, batch: 1, a, b, c, factors, compute })?)
    }
}

fn one(sums: Vec<Tensor>) -> Result<Tensor> {
    sums.into_iter().next().ok_or_else(|| halfmode_tensor::Error::NotOnGpu.into())
}
