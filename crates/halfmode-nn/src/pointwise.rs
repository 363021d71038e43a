//! Elementwise ops and dense layers on channels-last values: the pieces of the readable
//! compositions that fused ops are tested against.

#[cfg(feature = "cuda")]
mod cuda;

use crate::dense_weights::transpose_weight;
use crate::row_map::{map_rows, sum_rows};
use crate::rows::{add_bias, add_column_products, add_column_sums, linear, linear_grad_w, linear_grad_x, scale_by};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Domain, Precision};
#[cfg(feature = "cuda")]
use halfmode_tensor::cuda::Source;
use halfmode_tensor::{Device, Elementwise, Purpose, Real, Shape, Target, Tensor, with_real};
use smallvec::smallvec;

/// `y = gelu(x)`, the exact (erf) form. Saves `x`.
#[derive(Clone, Copy, Debug)]
pub struct Gelu;

/// `y = tanh(x)`. Saves `y`.
#[derive(Clone, Copy, Debug)]
pub struct Tanh;

/// `y = a + b`. Saves nothing.
#[derive(Clone, Copy, Debug)]
pub struct Add;

/// `y = a - b`. Saves nothing.
#[derive(Clone, Copy, Debug)]
pub struct Subtract;

/// `y = -x`. Saves nothing.
#[derive(Clone, Copy, Debug)]
pub struct Negate;

/// `y[.., c] = gate[c] x[.., c]`, a soft gate. Saves `x`; `gate` is shared.
#[derive(Clone, Copy, Debug)]
pub struct ChannelGate;

/// `y[.., c] = x[.., c] + bias[c]`. Saves nothing.
#[derive(Clone, Copy, Debug)]
pub struct ChannelBias;

/// `y[.., o] = sum_i w[o, i] x[.., i]`, a 1x1 convolution without bias. Saves `x`; `w` is shared.
#[derive(Clone, Copy, Debug)]
pub struct Linear;

/// The elementwise functions of this crate.
#[cfg(feature = "cuda")]
pub(crate) const MAPS: Source = Source { name: "maps", text: include_str!("../kernels/maps.cu") };

struct GeluFwd;
struct GeluBwd;
struct TanhFwd;
struct TanhBwd;
struct Sum;
struct Difference;
struct Negative;

impl Elementwise for GeluFwd {
    fn tile<R: Real>(&self, _: &[&[R]], out: &mut [R]) {
        R::gelu(out);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "gelu_forward"))
    }
}

impl Elementwise for GeluBwd {
    /// inputs: gradient, x
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        let mut x = inputs[1].to_vec();
        let mut slope = vec![R::ZERO; x.len()];
        R::gelu_both(&mut x, &mut slope);
        out.iter_mut().zip(slope).for_each(|(g, slope)| *g *= slope);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "gelu_backward"))
    }
}

impl Elementwise for TanhFwd {
    fn tile<R: Real>(&self, _: &[&[R]], out: &mut [R]) {
        R::tanh(out);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "tanh_forward"))
    }
}

impl Elementwise for TanhBwd {
    /// inputs: gradient, y
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        out.iter_mut().zip(inputs[1]).for_each(|(g, y)| *g *= R::ONE - *y * *y);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "tanh_backward"))
    }
}

impl Elementwise for Sum {
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        out.iter_mut().zip(inputs[1]).for_each(|(a, b)| *a += *b);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "add"))
    }
}

impl Elementwise for Difference {
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        out.iter_mut().zip(inputs[1]).for_each(|(a, b)| *a = *a - *b);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "subtract"))
    }
}

impl Elementwise for Negative {
    fn tile<R: Real>(&self, _: &[&[R]], out: &mut [R]) {
        out.iter_mut().for_each(|a| *a = -*a);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((MAPS, "negate"))
    }
}

pub(crate) type Grads = halfmode_autograd::Result<Vec<Option<Tensor>>>;
type Forward = halfmode_autograd::Result<(Outputs, Saved)>;

pub(crate) fn storage(cx: &Cx) -> DType {
    DType::real(cx.policy.pointwise.storage)
}

impl Op for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &GeluFwd, &[x], storage(cx), Purpose::Activation)?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x", x)?))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let x = saved.take("x")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(Tensor::elementwise(self.name(), &GeluBwd, &[&g, &x], storage(cx), Purpose::Activation)?)])
    }
}

impl Op for Tanh {
    fn name(&self) -> &'static str {
        "tanh"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &TanhFwd, &[x], storage(cx), Purpose::Activation)?;
        let saved = Saved::new(self.name()).keep(cx, "y", &y)?;
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let y = saved.take("y")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(Tensor::elementwise(self.name(), &TanhBwd, &[&g, &y], storage(cx), Purpose::Activation)?)])
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [a, b] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &Sum, &[a, b], storage(cx), Purpose::Activation)?;
        Ok((smallvec![y], Saved::new(self.name())))
    }

    fn backward(&self, _: &Cx, _: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let g = grads[0].take();
        Ok(needs.iter().map(|&need| if need { g.clone() } else { None }).collect())
    }
}

impl Op for Subtract {
    fn name(&self) -> &'static str {
        "subtract"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [a, b] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &Difference, &[a, b], storage(cx), Purpose::Activation)?;
        Ok((smallvec![y], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let minus = needs[1]
            .then(|| Tensor::elementwise(self.name(), &Negative, &[&g], storage(cx), Purpose::Activation))
            .transpose()?;
        Ok(vec![needs[0].then_some(g), minus])
    }
}

impl Op for Negate {
    fn name(&self) -> &'static str {
        "negate"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &Negative, &[x], storage(cx), Purpose::Activation)?;
        Ok((smallvec![y], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(Tensor::elementwise(self.name(), &Negative, &[&g], storage(cx), Purpose::Activation)?)])
    }
}

/// Rows and channels of a channels-last tensor.
pub(crate) fn rows_of(x: &Tensor) -> (usize, usize) {
    let channels = x.shape().last().copied().unwrap_or(1);
    (x.numel() / channels.max(1), channels)
}

pub(crate) fn check_len(op: &'static str, operand: &'static str, w: &Tensor, expected: usize) -> Result<()> {
    if w.numel() == expected {
        return Ok(());
    }
    Err(Error::Shape { op, operand, expected: Shape::from([expected]), found: w.shape().clone() })
}

/// Refuses complex operands.
pub(crate) fn check_real(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    Ok(inputs.iter().try_for_each(|it| it.expect_domain(op, "inputs", Domain::Real))?)
}

/// Refuses fewer than `rank` axes, and a last axis without channels.
pub(crate) fn check_axes(op: &'static str, operand: &'static str, x: &Tensor, rank: usize) -> Result<()> {
    let mut expected = x.shape().to_vec();
    while expected.len() < rank {
        expected.insert(0, 1);
    }
    if let Some(channels) = expected.last_mut() {
        *channels = (*channels).max(1);
    }
    if x.shape()[..] == expected[..] {
        return Ok(());
    }
    Err(Error::Shape { op, operand, expected: expected.into(), found: x.shape().clone() })
}

/// A tensor's scalars, which are stored as accumulators.
pub(crate) fn accumulators<'a, R: Real>(op: &'static str, operand: &'static str, x: &'a Tensor) -> Result<&'a [R]> {
    R::direct(x.view()?).ok_or_else(|| not_accumulators::<R>(op, operand, x.dtype()))
}

/// What is said of a tensor that is not stored as accumulators.
pub(crate) fn not_accumulators<R: Real>(op: &'static str, operand: &'static str, found: DType) -> Error {
    let expected = if R::PRECISION == Precision::F64 { "f64" } else { "f32" };
    halfmode_tensor::Error::DType { op, operand, expected, found }.into()
}

/// A small tensor as accumulators; nothing where kernels do not run.
fn whole<R: Real>(tensor: &Tensor) -> Result<Vec<R>> {
    if tensor.device().launches() { Ok(tensor.to_vec::<R>()?) } else { Ok(Vec::new()) }
}

/// A new tensor filled by `fill` where kernels run. On a GPU this is an error: its kernels write tensors themselves.
pub(crate) fn filled<R: Real>(
    device: &Device,
    shape: &Shape,
    dtype: DType,
    purpose: Purpose,
    fill: impl FnOnce() -> Result<Vec<R>>,
) -> Result<Tensor> {
    on_the_host(device)?;
    if device.launches() {
        Ok(Tensor::from_slice(device, &fill()?, shape.clone(), dtype.precision, purpose)?)
    } else {
        Ok(device.alloc(shape.clone(), dtype, purpose)?)
    }
}

/// Refuses what only the CPU computes, on a GPU and on its plan alike.
pub(crate) fn on_the_host(device: &Device) -> Result<()> {
    match device.target() {
        Target::Cpu { .. } => Ok(()),
        #[cfg(feature = "cuda")]
        Target::Cuda => Err(halfmode_tensor::Error::OnGpu.into()),
    }
}

pub(crate) fn weight_dtype(cx: &Cx) -> DType {
    DType::real(cx.policy.pointwise.accumulate)
}

impl Op for ChannelGate {
    fn name(&self) -> &'static str {
        "channel_gate"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, gate] = self.expect_inputs(inputs)?;
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_len(self.name(), "gate", gate, rows_of(x).1)?;
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return cuda::gate(cx, x, gate);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                let gate = whole::<R>(gate)?;
                map_rows(&cx.device, [x], (x.shape(), storage(cx)), |[x], y| gate_rows(x, &gate, y))
            })
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x", x)?.share(cx, "gate", gate)))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (x, gate) = (saved.take("x")?, saved.take("gate")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let run = || -> Result<Vec<Option<Tensor>>> {
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return cuda::gate_backward(cx, [&g, &x], &gate);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                let wide = whole::<R>(&gate)?;
                let sums = sum_rows::<R, 2, 1>(&cx.device, [&g, &x], [gate.shape()], |[g, x], sums| {
                    add_column_products(g, x, sums[0]);
                })?;
                let gx = map_rows(&cx.device, [&g], (x.shape(), storage(cx)), |[g], gx| gate_rows(g, &wide, gx))?;
                Ok(std::iter::once(gx).chain(sums).map(Some).collect())
            })
        };
        run().map_err(|err| err.in_op(self.name()))
    }
}

/// `y[row, c] = gate[c] * x[row, c]`
fn gate_rows<R: Real>(x: &[R], gate: &[R], y: &mut [R]) {
    y.copy_from_slice(x);
    y.chunks_exact_mut(gate.len().max(1)).for_each(|row| scale_by(row, gate));
}

impl Op for ChannelBias {
    fn name(&self) -> &'static str {
        "channel_bias"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, bias] = self.expect_inputs(inputs)?;
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_len(self.name(), "bias", bias, rows_of(x).1)?;
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return cuda::bias(cx, x, bias);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                let bias = whole::<R>(bias)?;
                map_rows(&cx.device, [x], (x.shape(), storage(cx)), |[x], y| {
                    y.copy_from_slice(x);
                    add_bias(y, &bias);
                })
            })
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).share(cx, "bias", bias)))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let bias = saved.take("bias")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let run = || -> Result<Vec<Tensor>> {
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return Ok(vec![cuda::bias_gradient(cx, &g, &bias)?]);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                sum_rows::<R, 1, 1>(&cx.device, [&g], [bias.shape()], |[g], sums| add_column_sums(g, sums[0]))
            })
        };
        let sums = run().map_err(|err| err.in_op(self.name()))?;
        Ok(std::iter::once(g).chain(sums).map(Some).collect())
    }
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x, w] = self.expect_inputs(inputs)?;
        let c_in = rows_of(x).1;
        let c_out = w.shape().first().copied().unwrap_or(0);
        let mut shape = x.shape().to_vec();
        if let Some(channels) = shape.last_mut() {
            *channels = c_out;
        }
        let shape = Shape::from(shape);
        let run = || -> Result<Tensor> {
            check_real(self.name(), inputs)?;
            check_len(self.name(), "weight", w, c_in * c_out)?;
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return cuda::linear(cx, x, w, &shape);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                let w_t = whole::<R>(&transpose_weight(&w.cast(R::PRECISION, Purpose::Workspace)?)?)?;
                map_rows(&cx.device, [x], (&shape, storage(cx)), |[x], y| linear(x, &w_t, y, (c_in, c_out), R::ZERO))
            })
        };
        let y = run().map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x", x)?.share(cx, "weight", w)))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let (x, w) = (saved.take("x")?, saved.take("weight")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let (c_in, c_out) = (rows_of(&x).1, rows_of(&g).1);
        let run = || -> Result<Vec<Option<Tensor>>> {
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                return cuda::linear_backward(cx, [&g, &x], &w);
            }
            with_real!(cx.policy.pointwise.storage, R => {
                let wide = whole::<R>(&w)?;
                let sums = sum_rows::<R, 2, 1>(&cx.device, [&g, &x], [w.shape()], |[g, x], sums| {
                    linear_grad_w(g, x, sums[0], (c_in, c_out));
                })?;
                let gx = map_rows(&cx.device, [&g], (x.shape(), storage(cx)), |[g], gx| {
                    linear_grad_x(g, &wide, gx, (c_in, c_out), R::ZERO);
                })?;
                Ok(std::iter::once(gx).chain(sums).map(Some).collect())
            })
        };
        run().map_err(|err| err.in_op(self.name()))
    }
}
