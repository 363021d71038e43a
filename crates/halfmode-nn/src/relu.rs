//! The rectifier.

use crate::pointwise::{Grads, storage};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_tensor::{Elementwise, Purpose, Real, Tensor};
use smallvec::smallvec;

/// `y = max(x, 0)`, with slope 0 at 0; a NaN stays a NaN. Saves `y`.
#[derive(Clone, Copy, Debug)]
pub struct Relu;

/// `x := max(x, 0)`
pub(crate) fn relu<R: Real>(x: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x = if *x < R::ZERO { R::ZERO } else { *x }),
    );
}

/// `g := 0` where `y`, the rectifier's result, is not positive.
pub(crate) fn relu_grad<R: Real>(g: &mut [R], y: &[R]) {
    R::vectorised(
        #[inline(always)]
        || g.iter_mut().zip(y).for_each(|(g, y)| *g = if *y > R::ZERO { *g } else { R::ZERO }),
    );
}

struct Forward;
struct Backward;

impl Elementwise for Forward {
    fn tile<R: Real>(&self, _: &[&[R]], out: &mut [R]) {
        relu(out);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(halfmode_tensor::cuda::Source, &'static str)> {
        Some((crate::pointwise::MAPS, "relu_forward"))
    }
}

impl Elementwise for Backward {
    /// inputs: gradient, y
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        relu_grad(out, inputs[1]);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(halfmode_tensor::cuda::Source, &'static str)> {
        Some((crate::pointwise::MAPS, "relu_backward"))
    }
}

impl Op for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        let y = Tensor::elementwise(self.name(), &Forward, &[x], storage(cx), Purpose::Activation)?;
        let saved = Saved::new(self.name()).keep(cx, "y", &y)?;
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let y = saved.take("y")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        Ok(vec![Some(Tensor::elementwise(self.name(), &Backward, &[&g, &y], storage(cx), Purpose::Activation)?)])
    }
}
