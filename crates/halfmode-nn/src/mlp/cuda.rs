//! The pointwise perceptron on a GPU: chunks of points whose hidden layer stays in the second cache.

use super::{Channels, Layout, Plan};
use crate::Result;
use crate::cuda_boxes::three_axes;
use crate::cuda_rows::{RowKernels, Rows};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

/// Fields in either layout from and to rows of channels.
pub(crate) const POINTS: Source = Source { name: "points", text: include_str!("../../kernels/points.cu") };

/// Scalars of a hidden layer that a chunk aims at.
const CHUNK_SCALARS: usize = 8 << 20;

/// Points of a call, in chunks.
struct Chunks<'a> {
    device: &'a Device,
    plan: &'a Plan,
    /// Storage of rows, and of parameters.
    storage: Precision,
    params: Precision,
    total: usize,
    chunk: usize,
}

impl<'a> Chunks<'a> {
    fn new(device: &'a Device, plan: &'a Plan, inputs: &[&Tensor; 5], storage: Precision) -> Result<Self> {
        let params = inputs[2].precision();
        if inputs[1..].iter().any(|it| it.precision() != params) {
            return Err(halfmode_tensor::Error::OnGpu.into());
        }
        let total = plan.x.batch * plan.x.points();
        let chunk = (CHUNK_SCALARS / plan.c_hidden.max(1)).clamp(1, total.max(1));
        Ok(Chunks { device, plan, storage, params, total, chunk })
    }

    fn starts(&self) -> impl Iterator<Item = (usize, usize)> {
        let (total, chunk) = (self.total, self.chunk);
        (0..total).step_by(chunk.max(1)).map(move |start| (start, chunk.min(total - start)))
    }

    fn rows(&self, n: usize) -> RowKernels<'a> {
        let (storage, params, compute) = (self.storage, self.params, self.plan.compute);
        RowKernels { device: self.device, storage, params, compute, rows: n }
    }

    fn tile(&self, n: usize, channels: usize) -> Result<Tensor> {
        Ok(self.device.alloc_unwritten([n, channels], DType::real(self.storage), Purpose::Workspace)?)
    }

    /// Rows of points `start..start + n`: where they are if the field stores them so, else gathered.
    fn load(&self, x: &Tensor, layout: &Layout, width: usize, (start, n): (usize, usize)) -> Result<Rows> {
        let channels = layout.channels;
        if layout.channels_at == Channels::Last && width == channels && x.precision() == self.storage {
            return Ok(Rows { tensor: x.clone(), first: start });
        }
        let mut rows = self.tile(n, width)?;
        if let Some(cuda) = self.device.as_cuda() {
            let [n1, n2, n3] = three_axes(&layout.grid, 1)?.map(|n| Arg::I32(n as i32));
            let defines = [define("S", x.precision()), define("T", self.storage), define("P", self.params)];
            let (points, first) = (count(layout.points()), Arg::I32((layout.channels_at == Channels::First).into()));
            let widths = [Arg::I32(channels as i32), first, Arg::I32((width - channels) as i32)];
            let args = [x.input()?, rows.output()?, count(start), count(n), points];
            let args = [&args[..], &widths, &[Arg::I32(0), n1, n2, n3]].concat();
            cuda.launch(POINTS, &defines, "gather_points", cuda.grid(n * width), &args)?;
        }
        Ok(Rows { tensor: rows, first: 0 })
    }

    /// Writes the first channels of rows, plus a bias, to points `start..start + n` of a field.
    fn store(
        &self,
        (rows, width): (&Tensor, usize),
        bias: Option<&Tensor>,
        layout: &Layout,
        (start, n): (usize, usize),
        y: &mut Tensor,
    ) -> Result<()> {
        let Some(cuda) = self.device.as_cuda() else { return Ok(()) };
        let defines = [define("S", rows.precision()), define("T", y.precision()), define("P", self.params)];
        let args = [
            rows.input()?,
            bias.map_or(Ok(Arg::Null), Tensor::input)?,
            y.output()?,
            count(start),
            count(n),
            count(layout.points()),
            Arg::I32(layout.channels as i32),
            Arg::I32((layout.channels_at == Channels::First).into()),
            Arg::I32(width as i32),
        ];
        Ok(cuda.launch(POINTS, &defines, "scatter_points", cuda.grid(n * layout.channels), &args)?)
    }

    /// `w_1 x` of a chunk, before bias and activation.
    fn hidden(&self, x: &Rows, w1: &Tensor, n: usize) -> Result<Tensor> {
        let mut h = self.tile(n, self.plan.c_hidden)?;
        self.rows(n).linear_rows((x, self.plan.c_first), w1, &mut h, 0.0)?;
        Ok(h)
    }
}

pub(super) fn forward(device: &Device, plan: &Plan, inputs: &[&Tensor; 5], y: &mut Tensor) -> Result<()> {
    let [x, w1, b1, w2, b2] = *inputs;
    let chunks = Chunks::new(device, plan, inputs, y.precision())?;
    for (start, n) in chunks.starts() {
        let x = chunks.load(x, &plan.x, plan.c_first, (start, n))?;
        let mut h = chunks.hidden(&x, w1, n)?;
        let rows = chunks.rows(n);
        rows.bias_act_assign(&mut h, Some(b1), true)?;
        let mut out = chunks.tile(n, plan.y.channels)?;
        rows.linear(&h, w2, &mut out, 0.0)?;
        chunks.store((&out, plan.y.channels), Some(b2), &plan.y, (start, n), y)?;
    }
    Ok(())
}

pub(super) fn backward(
    device: &Device,
    plan: &Plan,
    inputs: &[&Tensor; 5],
    grad: Tensor,
    mut gx: Option<&mut Tensor>,
) -> Result<Vec<Tensor>> {
    let [x, w1, b1, w2, b2] = *inputs;
    // Rows have the storage of fields, which the gradient has.
    let chunks = Chunks::new(device, plan, inputs, grad.precision())?;
    let dtype = DType::real(grad.precision().accumulate());
    let mut grads = [w1, b1, w2, b2]
        .iter()
        .map(|w| Ok(device.alloc_unwritten(w.shape().clone(), dtype, Purpose::Grad)?))
        .collect::<Result<Vec<_>>>()?;
    for (start, n) in chunks.starts() {
        let keep = f64::from(u8::from(start > 0));
        let rows = chunks.rows(n);
        let x = chunks.load(x, &plan.x, plan.c_first, (start, n))?;
        let h_pre = chunks.hidden(&x, w1, n)?;
        let h = rows.bias_act(&h_pre, Some(b1), true, Purpose::Workspace)?;
        let gy = chunks.load(&grad, &plan.y, plan.y.channels, (start, n))?;
        let [gw1, gb1, gw2, gb2] = &mut grads[..] else { return Ok(grads) };
        rows.linear_grad_w_rows((&gy, plan.y.channels), (&h.into(), plan.c_hidden), gw2, keep)?;
        let sums = rows.column_sums((&gy, plan.y.channels), b2.shape())?;
        if start == 0 {
            *gb2 = sums
        } else {
            gb2.add_assign(&sums)?
        }
        let mut gh = chunks.tile(n, plan.c_hidden)?;
        rows.linear_grad_x_rows((&gy, plan.y.channels), w2, &mut gh)?;
        let sums = rows.bias_act_backward(&h_pre, b1, &mut gh, true)?;
        drop(h_pre);
        if start == 0 {
            *gb1 = sums
        } else {
            gb1.add_assign(&sums)?
        }
        let gh = Rows::from(gh);
        rows.linear_grad_w_rows((&gh, plan.c_hidden), (&x, plan.c_first), gw1, keep)?;
        if let Some(gx) = gx.as_deref_mut() {
            // Coordinates want no gradient: theirs are left out.
            let mut out = chunks.tile(n, plan.c_first)?;
            rows.linear_grad_x_rows((&gh, plan.c_hidden), w1, &mut out)?;
            chunks.store((&out, plan.c_first), None, &plan.x, (start, n), gx)?;
        }
    }
    Ok(grads)
}
