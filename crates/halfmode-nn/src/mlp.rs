//! A pointwise two-layer perceptron whose hidden layer is recomputed: lifting and projection.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Real, Shape, Target, Tensor};
use smallvec::smallvec;

/// Where the channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channels {
    /// `[batch, channels, n_1, …, n_d]`: how users and files have it.
    First,
    /// `[batch, n_1, …, n_d, channels]`: how everything inside has it.
    Last,
}

/// Whether grid coordinates are appended to the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GridEmbedding {
    /// One channel per axis: `j / n` at point j of n.
    Coordinates,
    /// Nothing is appended.
    None,
}

/// `y = w_2 gelu(w_1 x + b_1) + b_2` at every point, with the hidden layer never stored.
///
/// # Shapes
/// - input 0, `x`: `[batch, …]` with `c_in` channels where `input` says, any real precision
/// - inputs 1 to 4: `w_1` `[c_hidden, c_in + coordinates]`, `b_1` `[c_hidden]`, `w_2` `[c_out, c_hidden]`, `b_2`
///   `[c_out]` (trailing extents of 1 are allowed)
/// - output: `[batch, …]` with `c_out` channels where `output` says
///
/// # Saved for backward
/// `x` in the precision of role `pointwise_mlp.x`; the weights are shared. The hidden layer, the
/// largest activation of a neural operator, is recomputed tile by tile.
///
/// # Errors
/// [`Error::Shape`] if channel counts disagree.
#[derive(Clone, Copy, Debug)]
pub struct PointwiseMlp {
    /// Layout of the input.
    pub input: Channels,
    /// Layout of the output.
    pub output: Channels,
    /// What is appended to the input.
    pub embedding: GridEmbedding,
}

/// The kernels of the perceptron. The default bodies are the definition, point by point in double
/// precision; a device overrides them.
pub(crate) trait MlpKernels {
    /// Writes the output.
    fn mlp_forward(&self, plan: &Plan, inputs: &[&Tensor; 5], y: &mut Tensor) -> Result<()> {
        plan.forward_by_definition(inputs, y)
    }

    /// Writes the gradient of the input where there is a place for it; returns those of the weights,
    /// in the accumulator's precision.
    fn mlp_backward(
        &self,
        plan: &Plan,
        inputs: &[&Tensor; 5],
        grad: Tensor,
        gx: Option<&mut Tensor>,
    ) -> Result<Vec<Tensor>> {
        plan.backward_by_definition(inputs, &grad, gx)
    }
}

impl MlpKernels for Device {
    fn mlp_forward(&self, plan: &Plan, inputs: &[&Tensor; 5], y: &mut Tensor) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => cpu::forward(self, plan, inputs, y),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::forward(self, plan, inputs, y),
        }
    }

    fn mlp_backward(
        &self,
        plan: &Plan,
        inputs: &[&Tensor; 5],
        grad: Tensor,
        gx: Option<&mut Tensor>,
    ) -> Result<Vec<Tensor>> {
        match self.target() {
            Target::Cpu { .. } => cpu::backward(self, plan, inputs, grad, gx),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::backward(self, plan, inputs, grad, gx),
        }
    }
}

/// A field in either layout, cut by batch entry and point.
#[derive(Clone)]
struct Layout {
    channels_at: Channels,
    batch: usize,
    grid: Vec<usize>,
    channels: usize,
}

impl Layout {
    fn of(x: &Tensor, channels_at: Channels) -> Option<Self> {
        let shape = x.shape();
        let (batch, rest) = shape.split_first()?;
        let (channels, grid) = match channels_at {
            Channels::First => rest.split_first()?,
            Channels::Last => rest.split_last()?,
        };
        Some(Layout { channels_at, batch: *batch, grid: grid.to_vec(), channels: *channels })
    }

    fn points(&self) -> usize {
        self.grid.iter().product()
    }

    fn shape(&self) -> Shape {
        let mut extents = vec![self.batch];
        match self.channels_at {
            Channels::First => {
                extents.push(self.channels);
                extents.extend(&self.grid);
            }
            Channels::Last => {
                extents.extend(&self.grid);
                extents.push(self.channels);
            }
        }
        extents.into()
    }

    /// Where channel `c` of a point of a batch entry is.
    fn at(&self, b: usize, point: usize, c: usize) -> usize {
        match self.channels_at {
            Channels::First => (b * self.channels + c) * self.points() + point,
            Channels::Last => (b * self.points() + point) * self.channels + c,
        }
    }
}

/// Sizes of one call.
pub(crate) struct Plan {
    x: Layout,
    y: Layout,
    /// Channels that the first layer sees: data and coordinates.
    c_first: usize,
    c_hidden: usize,
    accumulate: Precision,
    #[cfg(feature = "cuda")]
    compute: halfmode_precision::Compute,
}

impl Plan {
    /// Channels and coordinates of a point.
    fn first_layer(&self, x: &[f64], b: usize, point: usize) -> Vec<f64> {
        let mut first: Vec<f64> = (0..self.x.channels).map(|c| x[self.x.at(b, point, c)]).collect();
        if self.c_first > self.x.channels {
            let mut behind = self.x.points();
            for &n in &self.x.grid {
                behind /= n;
                first.push((point / behind % n) as f64 / n as f64);
            }
        }
        first
    }

    /// Calls `each` with batch entry, point, first layer, hidden layer after the activation and its
    /// slope there.
    fn each_point(&self, values: &[Vec<f64>], mut each: impl FnMut(usize, usize, &[f64], &[f64], &[f64])) {
        let [x, w1, b1, ..] = values else { return };
        for (b, point) in (0..self.x.batch).flat_map(|b| (0..self.x.points()).map(move |point| (b, point))) {
            let first = self.first_layer(x, b, point);
            let rows = w1.chunks_exact(self.c_first).zip(b1);
            let mut hidden: Vec<f64> =
                rows.map(|(row, b)| b + row.iter().zip(&first).map(|(w, x)| w * x).sum::<f64>()).collect();
            let mut slope = vec![0.0; hidden.len()];
            f64::gelu_both(&mut hidden, &mut slope);
            each(b, point, &first, &hidden, &slope);
        }
    }

    fn forward_by_definition(&self, inputs: &[&Tensor; 5], y: &mut Tensor) -> Result<()> {
        let values = wide(inputs)?;
        let (w2, b2) = (&values[3], &values[4]);
        let mut out = vec![0.0; y.numel()];
        self.each_point(&values, |b, point, _, hidden, _| {
            for (o, (row, bias)) in w2.chunks_exact(self.c_hidden).zip(b2).enumerate() {
                out[self.y.at(b, point, o)] = bias + row.iter().zip(hidden).map(|(w, h)| w * h).sum::<f64>();
            }
        });
        Ok(y.copy_from_slice(&out)?)
    }

    fn backward_by_definition(
        &self,
        inputs: &[&Tensor; 5],
        grad: &Tensor,
        gx: Option<&mut Tensor>,
    ) -> Result<Vec<Tensor>> {
        let (values, g, c_hidden) = (wide(inputs)?, grad.to_vec::<f64>()?, self.c_hidden);
        let (w1, w2) = (&values[1], &values[3]);
        let mut grads: Vec<Vec<f64>> = values.iter().map(|it| vec![0.0; it.len()]).collect();
        self.each_point(&values, |b, point, first, hidden, slope| {
            let g: Vec<f64> = (0..self.y.channels).map(|o| g[self.y.at(b, point, o)]).collect();
            for (o, g) in g.iter().enumerate() {
                grads[4][o] += g;
                (0..c_hidden).for_each(|h| grads[3][o * c_hidden + h] += g * hidden[h]);
            }
            for h in 0..c_hidden {
                let g_h = slope[h] * g.iter().enumerate().map(|(o, g)| g * w2[o * c_hidden + h]).sum::<f64>();
                grads[2][h] += g_h;
                for (i, first) in first.iter().enumerate() {
                    grads[1][h * self.c_first + i] += g_h * first;
                    if i < self.x.channels {
                        grads[0][self.x.at(b, point, i)] += g_h * w1[h * self.c_first + i];
                    }
                }
            }
        });
        if let Some(gx) = gx {
            gx.copy_from_slice(&grads[0])?;
        }
        let weights = grads.iter().zip(inputs).skip(1).map(|(grad_w, w)| {
            Tensor::from_slice(grad.device(), grad_w, w.shape().clone(), self.accumulate, Purpose::Grad)
        });
        Ok(weights.collect::<std::result::Result<_, _>>()?)
    }
}

fn wide(inputs: &[&Tensor; 5]) -> Result<Vec<Vec<f64>>> {
    Ok(inputs.iter().map(|it| it.to_vec()).collect::<std::result::Result<_, _>>()?)
}

impl PointwiseMlp {
    fn plan(&self, cx: &Cx, inputs: &[&Tensor; 5]) -> Result<Plan> {
        let [x, w1, b1, w2, b2] = inputs;
        let shape_error = |operand, expected: &[usize], found: &Tensor| Error::Shape {
            op: "pointwise_mlp",
            operand,
            expected: Shape::new(expected),
            found: found.shape().clone(),
        };
        let layout = Layout::of(x, self.input).ok_or_else(|| shape_error("x", &[0, 0], x))?;
        let coordinates = if self.embedding == GridEmbedding::Coordinates { layout.grid.len() } else { 0 };
        let c_first = layout.channels + coordinates;
        let c_hidden = w1.shape().first().copied().unwrap_or(0);
        let c_out = w2.shape().first().copied().unwrap_or(0);
        for (operand, tensor, expected) in [
            ("w_1", w1, vec![c_hidden, c_first]),
            ("b_1", b1, vec![c_hidden]),
            ("w_2", w2, vec![c_out, c_hidden]),
            ("b_2", b2, vec![c_out]),
        ] {
            if tensor.numel() != expected.iter().product::<usize>() || tensor.numel() == 0 {
                return Err(shape_error(operand, &expected, tensor));
            }
        }
        let y = Layout { channels_at: self.output, channels: c_out, ..layout.clone() };
        Ok(Plan {
            x: layout,
            y,
            c_first,
            c_hidden,
            accumulate: cx.policy.pointwise.accumulate,
            #[cfg(feature = "cuda")]
            compute: cx.policy.compute,
        })
    }
}

impl Op for PointwiseMlp {
    fn name(&self) -> &'static str {
        "pointwise_mlp"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let inputs: [&Tensor; 5] = self.expect_inputs(inputs)?;
        let run = || {
            let plan = self.plan(cx, &inputs)?;
            let dtype = DType::real(cx.policy.pointwise.storage);
            let mut y = cx.device.alloc_unwritten(plan.y.shape(), dtype, Purpose::Activation)?;
            cx.device.mlp_forward(&plan, &inputs, &mut y)?;
            Ok(y)
        };
        let y = run().map_err(|err: Error| err.in_op(self.name()))?;
        // A batch of data outlives the step anyway: a copy in half would only cost.
        let saved = Saved::new(self.name());
        let mut saved = match inputs[0].purpose() {
            Purpose::Data => saved.share(cx, "x", inputs[0]),
            _ => saved.keep(cx, "x", inputs[0])?,
        };
        for (role, w) in ["w_1", "b_1", "w_2", "b_2"].into_iter().zip(&inputs[1..]) {
            saved = saved.share(cx, role, w);
        }
        Ok((smallvec![y], saved))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let inputs = ["x", "w_1", "b_1", "w_2", "b_2"].map(|role| saved.take(role));
        let [x, w1, b1, w2, b2] = inputs;
        let (x, w1, b1, w2, b2) = (x?, w1?, b1?, w2?, b2?);
        let Some(grad) = grads[0].take() else { return Ok(vec![None; 5]) };
        let inputs = [&x, &w1, &b1, &w2, &b2];
        let run = || {
            let plan = self.plan(cx, &inputs)?;
            let dtype = DType::real(cx.policy.pointwise.storage);
            let mut gx =
                needs[0].then(|| cx.device.alloc_unwritten(plan.x.shape(), dtype, Purpose::Activation)).transpose()?;
            let weights = cx.device.mlp_backward(&plan, &inputs, grad, gx.as_mut())?;
            Ok(std::iter::once(gx).chain(weights.into_iter().map(Some)).collect())
        };
        run().map_err(|err: Error| err.in_op(self.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_precision::PrecisionPolicy;
    use std::sync::Arc;

    /// Runs the default bodies.
    struct Definition;
    impl MlpKernels for Definition {}

    fn tensor(device: &Device, shape: &[usize], seed: usize) -> Tensor {
        let n = shape.iter().product::<usize>();
        let values: Vec<f64> =
            (0..n).map(|i| 2.0 * ((i + 1) as f64 * 0.754_877_666 + seed as f64 * 0.1).fract() - 1.0).collect();
        Tensor::from_slice(device, &values, shape, Precision::F64, Purpose::Workspace).unwrap()
    }

    #[test]
    fn the_override_computes_what_the_default_bodies_say() {
        let device = Device::cpu(2).unwrap();
        let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::double()));
        for (input, output) in [(Channels::First, Channels::Last), (Channels::Last, Channels::First)] {
            for embedding in [GridEmbedding::Coordinates, GridEmbedding::None] {
                // Three channels on 11x13 points, more than one tile, with an odd rest.
                let shape = if input == Channels::First { [2, 3, 11, 13] } else { [2, 11, 13, 3] };
                let c_first = if embedding == GridEmbedding::Coordinates { 5 } else { 3 };
                let shapes: [&[usize]; 5] = [&shape, &[7, c_first], &[7], &[2, 7], &[2]];
                let inputs: Vec<Tensor> =
                    shapes.iter().enumerate().map(|(seed, shape)| tensor(&device, shape, seed)).collect();
                let [x, w1, b1, w2, b2] = &inputs[..] else { unreachable!() };
                let inputs = [x, w1, b1, w2, b2];
                let plan = PointwiseMlp { input, output, embedding }.plan(&cx, &inputs).unwrap();
                let grad = tensor(&device, &plan.y.shape(), 9);
                let run = |kernels: &dyn MlpKernels| {
                    let [mut y, mut gx] =
                        [grad.copy(Purpose::Workspace), x.copy(Purpose::Workspace)].map(|it| it.unwrap());
                    kernels.mlp_forward(&plan, &inputs, &mut y).unwrap();
                    let weights = kernels.mlp_backward(&plan, &inputs, grad.clone(), Some(&mut gx)).unwrap();
                    [y, gx].into_iter().chain(weights).map(|it| it.to_vec::<f64>().unwrap()).collect::<Vec<_>>()
                };
                for (got, want) in run(&device).iter().zip(run(&Definition)) {
                    let size = want.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
                    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                    // Sums of at most 286 terms.
                    assert!(got.len() == want.len() && worst <= 1e-13 * size, "{input:?} {embedding:?}: {worst}");
                }
            }
        }
    }
}
