//! Time as one more channel of a state.

use halfmode_autograd::{Cx, Op, Outputs, Result, Saved};
use halfmode_precision::DType;
use halfmode_tensor::{Purpose, Real, Shape, Tensor, with_real};
use smallvec::smallvec;

/// `y[.., c]` with the time appended: `[y, t]`.
///
/// # Shapes
/// - input 0, `y`: `[…, c]`, real; input 1, `t`: `[1]`
/// - output: `[…, c + 1]`
///
/// # Saved for backward
/// Nothing.
///
/// # Errors
/// Those of reading the tensors.
#[derive(Clone, Copy, Debug)]
pub struct TimeChannel;

/// `shape` with another number of channels.
fn with_channels(shape: &Shape, channels: usize) -> Shape {
    let mut shape = shape.to_vec();
    match shape.last_mut() {
        Some(last) => *last = channels,
        None => shape.push(channels),
    }
    Shape::from(shape)
}

impl Op for TimeChannel {
    fn name(&self) -> &'static str {
        "time_channel"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [y, t] = self.expect_inputs(inputs)?;
        let c = y.shape().last().copied().unwrap_or(1);
        let (shape, storage) = (with_channels(y.shape(), c + 1), cx.policy.pointwise.storage);
        #[cfg(feature = "cuda")]
        if let Some(cuda) = cx.device.as_cuda() {
            let mut out = cx.device.alloc_unwritten(shape, DType::real(storage), Purpose::Activation)?;
            crate::state_cuda::append_time(cuda, y, t, &mut out).map_err(|err| err.in_op(self.name()))?;
            return Ok((smallvec![out], Saved::new(self.name())));
        }
        let out = if cx.device.launches() {
            with_real!(storage, R => {
                let (values, time) = (y.to_vec::<R>()?, t.to_vec::<R>()?);
                let time = time.first().copied().unwrap_or(R::ZERO);
                let rows = values.chunks(c.max(1)).flat_map(|row| row.iter().copied().chain([time]));
                Tensor::from_slice(&cx.device, &rows.collect::<Vec<R>>(), shape, storage, Purpose::Activation)?
            })
        } else {
            cx.device.alloc(shape, DType::real(storage), Purpose::Activation)?
        };
        Ok((smallvec![out], Saved::new(self.name())))
    }

    fn backward(&self, cx: &Cx, _: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let wide = g.shape().last().copied().unwrap_or(1);
        let shape = with_channels(g.shape(), wide - 1);
        let (storage, accumulate) = (cx.policy.pointwise.storage, cx.policy.pointwise.accumulate);
        #[cfg(feature = "cuda")]
        if let Some(cuda) = cx.device.as_cuda() {
            let unwritten =
                |shape: Shape, precision, purpose| cx.device.alloc_unwritten(shape, DType::real(precision), purpose);
            let mut grads = vec![None, None];
            if needs[0] {
                let mut gy = unwritten(shape, storage, Purpose::Activation)?;
                crate::state_cuda::drop_time(cuda, &g, &mut gy).map_err(|err| err.in_op(self.name()))?;
                grads[0] = Some(gy);
            }
            if needs[1] {
                let mut gt = unwritten(Shape::from([1]), accumulate, Purpose::Grad)?;
                crate::state_cuda::sum_time(cuda, &g, &mut gt).map_err(|err| err.in_op(self.name()))?;
                grads[1] = Some(gt);
            }
            return Ok(grads);
        }
        if !cx.device.launches() {
            let gy = needs[0].then(|| cx.device.alloc(shape, DType::real(storage), Purpose::Activation));
            let gt = needs[1].then(|| cx.device.alloc([1], DType::real(accumulate), Purpose::Grad));
            return Ok(vec![gy.transpose()?, gt.transpose()?]);
        }
        with_real!(storage, R => {
            let values = g.to_vec::<R>()?;
            let rows = || values.chunks(wide);
            let gy = needs[0].then(|| {
                let kept: Vec<R> = rows().flat_map(|row| row[..wide - 1].iter().copied()).collect();
                Tensor::from_slice(&cx.device, &kept, shape, storage, Purpose::Activation)
            });
            let gt = needs[1].then(|| {
                let mut sum = R::ZERO;
                rows().for_each(|row| sum += row[wide - 1]);
                Tensor::from_slice(&cx.device, &[sum], [1], accumulate, Purpose::Grad)
            });
            Ok(vec![gy.transpose()?, gt.transpose()?])
        })
    }
}
