//! A perceptron with tanh between its layers as one op: the usual field of a neural differential equation.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod tiled;

use crate::pointwise::{Grads, check_axes, check_len, check_real, rows_of, storage};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor, with_real};
use smallvec::smallvec;

/// Whether a perceptron sees the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeColumn {
    /// It does not.
    None,
    /// As the last input channel of the first layer, the same for all rows.
    Last,
}

/// `y = w_n tanh(… tanh(w_1 [x, t] + b_1) …) + b_n` on the last axis.
///
/// # Shapes
/// - input 0, `x`: `[…, c]`, real; output: `[…, c_n]`
/// - input 1, `t`: `[1]`, f64 (only with [`TimeColumn::Last`])
/// - further inputs, two per layer: `w` `[c_out, c_in]`, `b` `[c_out]`; `c_in` of the first is `c`, plus 1 for the time
///
/// # Saved for backward
/// `x`, and `hidden`, what each tanh returned; weights are shared. Between layers all values are accumulators: what is
/// rounded is what is kept. Where all operands are bf16 and the processor has tile registers (AMX), their products take
/// bf16 numbers: there each layer's values, and the gradients by them, are rounded to bf16 between layers, kept or not. A
/// GPU rounds them, and what products give, to the storage of fields.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if channels disagree, `x` has none, or `t` is not one number;
/// [`halfmode_tensor::Error::DType`] for complex operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TanhMlp(pub TimeColumn);

const NAME: &str = "tanh_mlp";

/// One layer: its operands and how much of the weight's rows the state takes.
pub(crate) struct Layer<'a> {
    w: &'a Tensor,
    b: &'a Tensor,
    /// Inputs without the time.
    c_in: usize,
    /// Length of a row of the weight.
    stride: usize,
    c_out: usize,
}

impl TanhMlp {
    /// Where the weights begin among the inputs.
    fn n_before(self) -> usize {
        match self.0 {
            TimeColumn::None => 1,
            TimeColumn::Last => 2,
        }
    }

    fn layers<'a>(self, x: &Tensor, weights: &[&'a Tensor]) -> Result<Vec<Layer<'a>>> {
        let mut c_in = rows_of(x).1;
        let mut layers = Vec::with_capacity(weights.len() / 2);
        for (idx, pair) in weights.chunks_exact(2).enumerate() {
            let [w, b] = [pair[0], pair[1]];
            let stride = c_in + usize::from(idx == 0 && self.0 == TimeColumn::Last);
            let c_out = w.shape().first().copied().unwrap_or(0);
            if w.numel() != c_out * stride || c_out == 0 {
                let (expected, found) = (Shape::from([c_out, stride]), w.shape().clone());
                return Err(Error::Shape { op: NAME, operand: "weight", expected, found });
            }
            check_len(NAME, "bias", b, c_out)?;
            layers.push(Layer { w, b, c_in, stride, c_out });
            c_in = c_out;
        }
        Ok(layers)
    }

    /// The time, where there is one and it has a value.
    fn time(self, t: Option<&Tensor>) -> Result<f64> {
        match t {
            Some(t) if t.device().launches() => Ok(t.to_vec::<f64>()?.first().copied().unwrap_or(0.0)),
            _ => Ok(0.0),
        }
    }

    fn run(self, cx: &Cx, x: &Tensor, t: Option<&Tensor>, weights: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        check_axes(NAME, "x", x, 1)?;
        if let Some(t) = t {
            check_len(NAME, "t", t, 1)?;
        }
        let layers = self.layers(x, weights)?;
        let n_rows = rows_of(x).0;
        let mut shape = x.shape().to_vec();
        if let (Some(channels), Some(last)) = (shape.last_mut(), layers.last()) {
            *channels = last.c_out;
        }
        let mut y = cx.device.alloc_unwritten(shape, storage(cx), Purpose::Activation)?;
        #[cfg(feature = "cuda")]
        if !cx.device.is_cpu() {
            let hidden = cuda::forward(cx, &layers, (x, t), &mut y)?;
            return Ok((y, hidden));
        }
        let mut hidden = Vec::new();
        if cx.save {
            let dtype = DType::real(cx.policy.saved(NAME, "hidden"));
            for layer in &layers[..layers.len().saturating_sub(1)] {
                hidden.push(cx.device.alloc_unwritten([n_rows, layer.c_out], dtype, Purpose::Saved)?);
            }
        }
        let t = self.time(t)?;
        if tiled::suits(cx, x, &layers) {
            tiled::forward(&cx.device, &layers, x, t, &mut hidden, &mut y)?;
            return Ok((y, hidden));
        }
        with_real!(cx.policy.pointwise.storage, R => cpu::forward::<R>(&cx.device, &layers, x, t, &mut hidden, &mut y))?;
        Ok((y, hidden))
    }
}

impl Op for TanhMlp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let before = self.n_before();
        if inputs.len() < before + 2 || (inputs.len() - before) % 2 == 1 {
            return Err(halfmode_autograd::Error::Arity { op: NAME, expected: before + 2, found: inputs.len() });
        }
        check_real(NAME, inputs).map_err(|err| err.in_op(NAME))?;
        let (head, weights) = inputs.split_at(before);
        let (y, hidden) = self.run(cx, head[0], head.get(1).copied(), weights).map_err(|err| err.in_op(NAME))?;
        let mut saved = Saved::new(NAME).keep(cx, "x", head[0])?;
        saved = hidden.iter().fold(saved, |saved, it| saved.share(cx, "hidden", it));
        saved = head[1..].iter().fold(saved, |saved, it| saved.share(cx, "t", it));
        saved = weights.iter().fold(saved, |saved, it| saved.share(cx, "weight", it));
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let (x, hidden, weights) = (saved.take("x")?, saved.take_all("hidden"), saved.take_all("weight"));
        let t = saved.take_all("t").pop();
        let Some(g) = grads[0].take() else { return Ok(vec![None; needs.len()]) };
        let run = || -> Result<Vec<Option<Tensor>>> {
            let refs: Vec<&Tensor> = weights.iter().collect();
            let layers = self.layers(&x, &refs)?;
            let want_time = t.is_some() && needs[1];
            let want_weights = needs[self.n_before()..].contains(&true) || want_time;
            #[cfg(feature = "cuda")]
            if !cx.device.is_cpu() {
                let back = cuda::Backward { layers: &layers, x: &x, hidden: &hidden, t: t.as_ref() };
                let cuda::Gradients { x: gx, t: slope, weights } = back.run(cx, &g, [want_weights, want_time])?;
                let slope = t.is_some().then_some(slope);
                let mut out: Vec<_> = std::iter::once(Some(gx)).chain(slope).collect();
                out.extend(weights.into_iter().map(Some));
                out.resize(needs.len(), None);
                return Ok(out);
            }
            let time = self.time(t.as_ref())?;
            let mut gx = cx.device.alloc_unwritten(x.shape().clone(), storage(cx), Purpose::Activation)?;
            let back = cpu::Backward { layers: &layers, x: &x, hidden: &hidden, t: time };
            let sums = if tiled::suits(cx, &x, &layers) {
                let inner = back.rows_tiled(&cx.device, &g, &mut gx)?;
                if want_weights { back.weights_tiled(&cx.device, &inner)? } else { Vec::new() }
            } else {
                with_real!(cx.policy.pointwise.storage, R => {
                    let inner = back.rows::<R>(&cx.device, &g, &mut gx)?;
                    if want_weights { back.weights::<R>(&cx.device, &inner)? } else { Vec::new() }
                })
            };
            let mut out = vec![Some(gx)];
            if t.is_some() {
                // What the first layer's bias gets, through the weights of the time.
                let slope = match sums.get(1) {
                    Some(bias) if want_time && cx.device.launches() => cpu::time_slope(&layers[0], bias)?,
                    _ => 0.0,
                };
                let grad = || Tensor::from_slice(&cx.device, &[slope], [1], Precision::F64, Purpose::Grad);
                out.push(if want_time { Some(grad()?) } else { None });
            }
            out.extend(sums.into_iter().map(Some));
            out.resize(needs.len(), None);
            Ok(out)
        };
        run().map_err(|err| err.in_op(NAME))
    }
}
