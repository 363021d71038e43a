//! The spectral convolution as an op of its own.

use crate::mode_mix::{mode_mix_bwd, mode_mix_fwd};
use crate::mode_scale::{mode_scale_bwd, mode_scale_fwd};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_fft::{HalfSafeScale, Transform, Weights};
use halfmode_tensor::{Purpose, Tensor};
use smallvec::smallvec;
use std::sync::Arc;

/// What a spectral weight does to the kept modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModeProduct {
    /// A matrix per mode mixes the channels.
    #[default]
    Dense,
    /// A number per mode and channel, weight `[modes, 2 c]`: channels stay apart.
    Separable,
}

/// Which direction of a transform is divided by the number of points `N`, under the names of `torch.fft`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FftNorm {
    /// The analysis, by `N` of the input's grid.
    #[default]
    Forward,
    /// Both, by the root of `N` of their grids.
    Ortho,
    /// The synthesis, by `N` of the output's grid.
    Backward,
}

/// Spectral convolution `y = F^-1( R · F(x)|kept )`, kept modes only, real fields.
///
/// # Shapes
/// - input 0, `x`: `[batch, n_1, …, n_d, c_in]`, real
/// - input 1, `weight`: `[modes, c_in, 2 c_out]`, split complex (re | im)
/// - output: `[batch, m_1, …, m_d, c_out]`, real; `m` is the output grid
///
/// # Saved for backward
/// `x_hat` `[batch, (re, im), k_1, …, k_d, c_in]` in the precision of role `spectral_conv.x_hat`;
/// `weight` is shared. The field itself is not kept.
///
/// # Errors
/// [`Error::Shape`] if channel or mode counts disagree, those of the transform for a wrong grid.
///
/// Source: Li et al. 2021, "Fourier neural operator", eq. 4; the truncated transform as a matrix
/// product and the half-safe scale are this project's (`docs/decisions/`).
#[derive(Clone, Debug)]
pub struct SpectralConv {
    analysis: Arc<Transform>,
    synthesis: Arc<Transform>,
    product: ModeProduct,
    norm: FftNorm,
}

impl SpectralConv {
    /// A convolution on one grid.
    #[must_use]
    pub fn new(transform: Arc<Transform>) -> Self {
        SpectralConv::resampling(Arc::clone(&transform), transform)
    }

    /// A convolution that evaluates its output on another grid.
    #[must_use]
    pub fn resampling(analysis: Arc<Transform>, synthesis: Arc<Transform>) -> Self {
        SpectralConv { analysis, synthesis, product: ModeProduct::Dense, norm: FftNorm::Forward }
    }

    /// The same with another product of modes and weight.
    #[must_use]
    pub fn with_product(self, product: ModeProduct) -> Self {
        SpectralConv { product, ..self }
    }

    /// The same with another norm of the transforms. On one grid they are all the same.
    #[must_use]
    pub fn with_norm(self, norm: FftNorm) -> Self {
        SpectralConv { norm, ..self }
    }

    fn scales(&self) -> Scales {
        Scales::with_norm(&self.analysis, &self.synthesis, self.norm)
    }

    fn run_forward(&self, cx: &Cx, x: &Tensor, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let (transform, mix) = (cx.policy.transform.storage, cx.policy.contraction.storage);
        let scales = self.scales();
        let purpose = if cx.save { Purpose::Saved } else { Purpose::Workspace };
        let x_hat = self.analysis.to_modes(x, Weights::Plain, &scales.forward.to_modes, transform, purpose)?;
        let multiply = match self.product {
            ModeProduct::Dense => mode_mix_fwd,
            ModeProduct::Separable => mode_scale_fwd,
        };
        let y_hat = multiply(&cx.device, &x_hat, w, mix, Purpose::Workspace)?;
        let to_grid = &scales.forward.to_grid;
        let y = self.synthesis.to_grid(
            &y_hat,
            Weights::Doubled,
            to_grid,
            cx.policy.pointwise.storage,
            Purpose::Activation,
        )?;
        Ok((y, x_hat))
    }

    fn run_backward(&self, cx: &Cx, (x_hat, w): (&Tensor, &Tensor), grad: Tensor) -> Result<(Tensor, Tensor)> {
        let (transform, mix) = (cx.policy.transform.storage, cx.policy.contraction.storage);
        let scales = self.scales();
        let to_modes = &scales.backward.to_modes;
        let grad_y = self.synthesis.to_modes(&grad, Weights::Doubled, to_modes, transform, Purpose::Workspace)?;
        drop(grad);
        let multiply = match self.product {
            ModeProduct::Dense => mode_mix_bwd,
            ModeProduct::Separable => mode_scale_bwd,
        };
        let (grad_x, grad_w) = multiply(&cx.device, (x_hat, w), &grad_y, scales.weight_factor, mix)?;
        drop(grad_y);
        let to_grid = &scales.backward.to_grid;
        let gx = self.analysis.to_grid(
            &grad_x,
            Weights::Plain,
            to_grid,
            cx.policy.pointwise.storage,
            Purpose::Activation,
        )?;
        Ok((gx, grad_w))
    }
}

/// The half-safe scales of both passes, and what they leave for the weight gradient.
pub(crate) struct Scales {
    pub(crate) forward: HalfSafeScale,
    pub(crate) backward: HalfSafeScale,
    /// True gradient of the weight over what the backward pass's spectra give.
    pub(crate) weight_factor: f64,
}

impl Scales {
    pub(crate) fn new(analysis: &Transform, synthesis: &Transform) -> Self {
        Scales::with_norm(analysis, synthesis, FftNorm::Forward)
    }

    fn with_norm(analysis: &Transform, synthesis: &Transform, norm: FftNorm) -> Self {
        let (grid_in, grid_out) = (&analysis.config().grid, &synthesis.config().grid);
        let mut forward = HalfSafeScale::new(grid_in, grid_in);
        let mut backward = HalfSafeScale::new(grid_in, grid_out);
        for (axis, (&n, &m)) in grid_in.iter().zip(grid_out).enumerate() {
            let ratio = n as f64 / m as f64;
            let factor = match norm {
                FftNorm::Forward => 1.0,
                FftNorm::Ortho => ratio.sqrt(),
                FftNorm::Backward => ratio,
            };
            forward.to_grid[axis] *= factor;
            backward.to_grid[axis] *= factor;
        }
        // x_hat carries the forward to_modes factor, which is in the product that the weight sees;
        // the gradient of y_hat should carry forward.to_grid but carries backward.to_modes.
        let weight_factor = forward.to_grid_product() / backward.to_modes_product();
        Scales { forward, backward, weight_factor }
    }
}

impl Op for SpectralConv {
    fn name(&self) -> &'static str {
        "spectral_conv"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        let [x, w] = self.expect_inputs(inputs)?;
        let (y, x_hat) = self.run_forward(cx, x, w).map_err(|err: Error| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x_hat", &x_hat)?.share(cx, "weight", w)))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        let (x_hat, w) = (saved.take("x_hat")?, saved.take("weight")?);
        let Some(grad) = grads[0].take() else { return Ok(vec![None, None]) };
        let (gx, gw) = self.run_backward(cx, (&x_hat, &w), grad).map_err(|err: Error| err.in_op(self.name()))?;
        Ok(vec![Some(gx), Some(gw)])
    }
}
