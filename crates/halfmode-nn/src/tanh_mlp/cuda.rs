//! The perceptron on a GPU, layer by layer: a product of the library each, and one pass over what it gives for bias and
//! tanh. Values between layers are stored as fields are.
//!
//! The time's column is not multiplied: it moves the bias. What is left of the weight is copied, so that its rows begin on
//! whole words: products of halves with rows of 1025 numbers take four times as long as with rows of 1024.

use super::{Layer, NAME};
use crate::Result;
use crate::cuda_rows::{RowKernels, stored};
use crate::pointwise::{rows_of, storage};
use halfmode_autograd::Cx;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, define};
use halfmode_tensor::{Purpose, Tensor};

const KERNELS: Source = Source { name: "time_column", text: include_str!("../../kernels/time_column.cu") };

/// Most blocks of a pass over a weight.
const BLOCKS: usize = 1024;
const THREADS: usize = 256;

/// The accumulators of sums over rows.
fn accumulators(cx: &Cx) -> DType {
    DType::real(cx.policy.pointwise.storage.accumulate())
}

/// The weight and bias that a product and the pass after it take.
struct Operands {
    w: Tensor,
    b: Tensor,
}

impl Operands {
    fn rows<'a>(&self, cx: &'a Cx, rows: usize) -> RowKernels<'a> {
        RowKernels::new(cx, rows, self.b.precision())
    }
}

impl Layer<'_> {
    /// The time, where this layer sees it.
    fn time<'t>(&self, t: Option<&'t Tensor>) -> Option<&'t Tensor> {
        t.filter(|_| self.stride > self.c_in)
    }

    fn launch(&self, (cuda, cx): (&CudaDevice, &Cx), entry: &str, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        let types = [("W", self.w.precision()), ("B", self.b.precision()), ("T", cx.policy.pointwise.storage)];
        let args = [args, &[self.c_out, self.c_in].map(|n| Arg::I32(n as i32))].concat();
        Ok(cuda.launch(KERNELS, &types.map(|(name, it)| define(name, it)), entry, grid, &args)?)
    }

    fn grid(&self) -> Grid {
        Grid::row(self.c_out.clamp(1, BLOCKS), THREADS)
    }

    /// Weight and bias, the time's column taken off the one and added to the other.
    fn operands(&self, cx: &Cx, t: Option<&Tensor>) -> Result<Operands> {
        let Some(t) = self.time(t) else {
            return Ok(Operands { w: stored(cx, self.w)?, b: self.b.clone() });
        };
        let mut w = cx.device.alloc_unwritten([self.c_out, self.c_in], storage(cx), Purpose::Workspace)?;
        let mut b = cx.device.alloc_unwritten([self.c_out], accumulators(cx), Purpose::Workspace)?;
        let t = t.cast(Precision::F64, Purpose::Workspace)?;
        if let Some(cuda) = cx.device.as_cuda() {
            let args = [self.w.input()?, self.b.input()?, t.input()?, w.output()?, b.output()?];
            self.launch((cuda, cx), "split_time", self.grid(), &args)?;
        }
        Ok(Operands { w, b })
    }

    /// The weight's gradient of that by its matrix and that by the bias.
    fn join(&self, cx: &Cx, matrix: Tensor, bias: &Tensor, t: Option<&Tensor>) -> Result<Tensor> {
        let Some(t) = self.time(t) else { return Ok(matrix.reshape(self.w.shape().clone())?) };
        let mut grad = cx.device.alloc_unwritten(self.w.shape().clone(), accumulators(cx), Purpose::Grad)?;
        let t = t.cast(Precision::F64, Purpose::Workspace)?;
        if let Some(cuda) = cx.device.as_cuda() {
            let args = [matrix.input()?, bias.input()?, t.input()?, grad.output()?];
            self.launch((cuda, cx), "join_time", self.grid(), &args)?;
        }
        Ok(grad)
    }

    /// The time's gradient of that by the bias.
    fn time_slope(&self, cx: &Cx, bias: &Tensor) -> Result<Tensor> {
        let mut slope = cx.device.alloc_unwritten([1], DType::real(Precision::F64), Purpose::Grad)?;
        if let Some(cuda) = cx.device.as_cuda() {
            let args = [self.w.input()?, bias.input()?, slope.output()?];
            self.launch((cuda, cx), "time_slope", Grid::row(1, THREADS), &args)?;
        }
        Ok(slope)
    }
}

/// Writes `y`; returns what the tanhs gave, where it is kept.
pub(super) fn forward(
    cx: &Cx,
    layers: &[Layer<'_>],
    (x, t): (&Tensor, Option<&Tensor>),
    y: &mut Tensor,
) -> Result<Vec<Tensor>> {
    let n_rows = rows_of(x).0;
    let kept = cx.policy.saved(NAME, "hidden");
    let purpose = if cx.save && kept == cx.policy.pointwise.storage { Purpose::Saved } else { Purpose::Workspace };
    let mut hidden = Vec::new();
    let mut x = stored(cx, x)?;
    for (idx, layer) in layers.iter().enumerate() {
        let own = layer.operands(cx, t)?;
        let rows = own.rows(cx, n_rows);
        if idx + 1 == layers.len() {
            if n_rows > 0 {
                rows.linear(&x, &own.w, y, 0.0)?;
                rows.bias_act_assign(y, Some(&own.b), false)?;
            }
            break;
        }
        let mut out = cx.device.alloc_unwritten([n_rows, layer.c_out], storage(cx), purpose)?;
        if n_rows > 0 {
            rows.linear(&x, &own.w, &mut out, 0.0)?;
            rows.bias_tanh_assign(&mut out, &own.b)?;
        }
        if cx.save {
            hidden.push(out.cast(kept, Purpose::Saved)?);
        }
        x = out;
    }
    Ok(hidden)
}

/// What a forward pass kept.
pub(super) struct Backward<'a> {
    pub(super) layers: &'a [Layer<'a>],
    pub(super) x: &'a Tensor,
    pub(super) hidden: &'a [Tensor],
    pub(super) t: Option<&'a Tensor>,
}

/// What a perceptron's inputs get.
pub(super) struct Gradients {
    pub(super) x: Tensor,
    pub(super) t: Option<Tensor>,
    /// Of weights and biases, layer by layer; none if nobody wants them.
    pub(super) weights: Vec<Tensor>,
}

impl Backward<'_> {
    pub(super) fn run(&self, cx: &Cx, g: &Tensor, [want_weights, want_time]: [bool; 2]) -> Result<Gradients> {
        let n_rows = rows_of(self.x).0;
        let (mut g, mut weights, mut t) = (stored(cx, g)?, Vec::new(), None);
        let mut sums: Option<Tensor> = None;
        for (idx, layer) in self.layers.iter().enumerate().rev() {
            let below = if idx == 0 { self.x } else { &self.hidden[idx - 1] };
            let below = stored(cx, below)?;
            let own = layer.operands(cx, self.t)?;
            let rows = own.rows(cx, n_rows);
            if want_weights {
                let (w, b) = if n_rows == 0 {
                    let zeros = |like: &Tensor| cx.device.alloc(like.shape().clone(), accumulators(cx), Purpose::Grad);
                    (zeros(layer.w)?, zeros(layer.b)?)
                } else {
                    let b = match sums.take() {
                        Some(b) => b,
                        None => rows.column_sums((&(&g).into(), layer.c_out), layer.b.shape())?,
                    };
                    (layer.join(cx, rows.linear_grad_w(&g, &below, own.w.shape())?, &b, self.t)?, b)
                };
                if want_time && layer.time(self.t).is_some() {
                    t = Some(layer.time_slope(cx, &b)?);
                }
                weights.extend([b, w]);
            }
            let purpose = if idx == 0 { Purpose::Activation } else { Purpose::Workspace };
            let shape = if idx == 0 { self.x.shape() } else { below.shape() };
            let mut inner = cx.device.alloc_unwritten(shape.clone(), storage(cx), purpose)?;
            if n_rows > 0 {
                rows.linear_grad_x(&g, &own.w, &mut inner, 0.0)?;
                if let Some(before) = idx.checked_sub(1).and_then(|it| self.layers.get(it)) {
                    sums = Some(rows.tanh_backward(&below, &mut inner, before.b.shape())?);
                }
            }
            g = inner;
        }
        weights.reverse();
        Ok(Gradients { x: g, t, weights })
    }
}
