//! The L^p error of fields, absolute or relative.

use super::field_loss::FieldLoss;
use super::fields::{self, Backward, FieldNorm, Fields, Reduction};
use crate::accumulator::{Accumulator, TILE, sum2};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Device, Tensor, View, with_real};
use rayon::prelude::*;

const NAME: &str = "lp_loss";

/// The L^p error of a prediction `x` against a target `y`, per sample and channel, then reduced.
///
/// - relative: `‖x − y‖_p / (‖y‖_p + 1e-8)` with sums of `|·|^p` over points,
/// - absolute: `(Π_i measure/n_i · Σ |x − y|^p)^(1/p)`, the quadrature of the integral.
///
/// # Shapes
/// - input 0, the prediction: `[batch, channels, n_1, …, n_d]`, real or complex, any precision
/// - input 1, the target: the same shape and domain, any precision; it gets no gradient
/// - returns `[1]` in the policy's loss precision; sums are f32 or f64 (f64 for f64 operands)
///
/// Where a difference vanishes on all points of a field, the gradient there is 0. Of complex fields it is
/// `∂L/∂Re x + i ∂L/∂Im x`.
///
/// # Saved for backward
/// `prediction`, `target` (shared); `norms` `[batch, channels, 2]` in the accumulator's precision.
///
/// # Errors
/// [`Error::Setting`] if `p` is below 1 or not finite or `measure` is not positive;
/// [`Error::Shape`] and [`Error::Fields`] for shapes.
///
/// ```
/// # use {halfmode_autograd::*, halfmode_precision::*, halfmode_tensor::*, std::sync::Arc};
/// use halfmode_train::LpLoss;
/// # fn main() -> Result<()> {
/// let device = Device::cpu(1)?;
/// let mut tape = Tape::new(Cx::new(&device, &Arc::new(PrecisionPolicy::full())));
/// let field = |values| Tensor::from_slice::<f32>(&device, values, [1, 1, 2], Precision::F32, Purpose::Data);
/// let (x, y) = (field(&[3.0, 5.0])?, field(&[3.0, 4.0])?);
/// let (x, y) = (tape.leaf(x), tape.constant(y));
/// let loss = tape.apply(LpLoss::default(), &[&x, &y])?;
/// assert_eq!(loss.value().to_vec::<f64>()?[0] as f32, 0.2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LpLoss {
    /// The exponent, at least 1.
    pub p: f64,
    /// Whether errors are divided by the target's norm.
    pub relative: bool,
    /// Over samples and channels.
    pub reduction: Reduction,
    /// Length of the domain along every axis, in the user's unit; relative errors do not depend on
    /// it.
    pub measure: f64,
}

impl Default for LpLoss {
    /// The relative L2 error, summed.
    fn default() -> Self {
        LpLoss { p: 2.0, relative: true, reduction: Reduction::Sum, measure: 1.0 }
    }
}

/// The kernels that there are; other exponents go through `powf`.
#[derive(Clone, Copy)]
enum Exponent {
    One,
    Two,
    Other(f64),
    /// Any but 2 of complex fields, whose values are pairs.
    OfModulus(f64),
}

impl LpLoss {
    fn exponent(&self, domain: Domain) -> Exponent {
        match self.p {
            // The square of a modulus is the sum of two squares.
            p if p.to_bits() == 2f64.to_bits() => Exponent::Two,
            p if domain == Domain::Complex => Exponent::OfModulus(p),
            p if p.to_bits() == 1f64.to_bits() => Exponent::One,
            p => Exponent::Other(p),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if !(self.p.is_finite() && self.p >= 1.0) {
            return Err(Error::Setting { setting: "p", value: self.p, expected: "a finite exponent of at least 1" });
        }
        fields::check_measure(self.measure)
    }

    pub(super) fn norms_on_cpu(
        &self,
        device: &Device,
        fields: &Fields,
        [x, y]: [&Tensor; 2],
        precision: Precision,
    ) -> Result<Vec<FieldNorm>> {
        if !device.launches() {
            return Ok(Vec::new());
        }
        let (x, y) = (x.view()?, y.view()?);
        Ok(with_real!(precision, R => self.norms::<R>(device, fields, x, y)))
    }

    pub(super) fn gradient_on_cpu(
        &self,
        device: &Device,
        fields: &Fields,
        back: &Backward,
        precision: Precision,
        grad: &mut Tensor,
    ) -> Result<()> {
        if !device.launches() {
            return Ok(());
        }
        Ok(with_real!(precision, R => self.gradient::<R>(device, fields, back, grad))?)
    }

    fn norms<R: Accumulator>(&self, device: &Device, fields: &Fields, x: View<'_>, y: View<'_>) -> Vec<FieldNorm> {
        let n_tiles = fields.n_points.div_ceil(TILE);
        let (exponent, relative) = (self.exponent(fields.domain), self.relative);
        let sums = device.run(|| {
            let tiles = (0..fields.n_fields * n_tiles).into_par_iter().map(|task| {
                let (field, tile) = (task / n_tiles, task % n_tiles);
                let start = tile * TILE;
                let range = start..(start + TILE).min(fields.n_points);
                let range = field * fields.n_points + range.start..field * fields.n_points + range.end;
                let (mut wide_x, mut wide_y) = ([R::ZERO; TILE], [R::ZERO; TILE]);
                let x = R::widened(x.slice(range.clone()), &mut wide_x);
                let y = R::widened(y.slice(range), &mut wide_y);
                tile_sums(exponent, x, y, relative)
            });
            tiles.collect::<Vec<_>>()
        });
        let factor = if relative { 1.0 } else { fields.spacing(self.measure).product::<f64>().powf(1.0 / self.p) };
        let root = |sum: f64| match exponent {
            Exponent::One => sum,
            Exponent::Two => sum.sqrt(),
            Exponent::Other(p) | Exponent::OfModulus(p) => sum.powf(1.0 / p),
        };
        let sums = sums.unwrap_or_default();
        let norms = sums.chunks(n_tiles).map(|tiles| {
            let (error, target) = tiles.iter().fold((0.0, 0.0), |sum, tile| (sum.0 + tile.0, sum.1 + tile.1));
            let weight = fields::weight(self.reduction, fields.n_fields, factor, relative.then(|| root(target)));
            FieldNorm { error: root(error), weight }
        });
        norms.collect()
    }

    fn gradient<R: Accumulator>(
        &self,
        device: &Device,
        fields: &Fields,
        back: &Backward,
        grad: &mut Tensor,
    ) -> halfmode_tensor::Result<()> {
        let (x, y) = (back.prediction.view()?, back.target.view()?);
        let exponent = self.exponent(fields.domain);
        let pieces = fields.pieces(grad.view_mut()?, TILE);
        device.run(|| {
            pieces.into_par_iter().for_each(|(field, start, mut piece)| {
                let norm = back.norms[field];
                if norm.error.abs() <= 0.0 {
                    return;
                }
                let first = field * fields.n_points + start;
                let range = first..first + piece.len();
                let (mut wide_x, mut wide_y, mut wide) = ([R::ZERO; TILE], [R::ZERO; TILE], [R::ZERO; TILE]);
                let x = R::widened(x.slice(range.clone()), &mut wide_x);
                let y = R::widened(y.slice(range), &mut wide_y);
                R::fill(&mut piece, &mut wide, |out| tile_gradient(exponent, norm, x, y, out));
            });
        });
        Ok(())
    }
}

/// Sums of `|x − y|^p` and, if asked for, of `|y|^p`.
fn tile_sums<R: Accumulator>(exponent: Exponent, x: &[R], y: &[R], relative: bool) -> (f64, f64) {
    let error = match exponent {
        Exponent::One => R::vectorised(
            #[inline(always)]
            || sum2(x, y, |x, y| magnitude(x - y)),
        ),
        Exponent::Two => R::vectorised(
            #[inline(always)]
            || sum2(x, y, |x, y| (x - y) * (x - y)),
        ),
        Exponent::Other(p) => x.iter().zip(y).map(|(x, y)| (*x - *y).to_f64().abs().powf(p)).sum(),
        Exponent::OfModulus(p) => pairs(x).zip(pairs(y)).map(|(x, y)| distance(x, y).powf(p)).sum(),
    };
    let target = match exponent {
        _ if !relative => 0.0,
        Exponent::One => R::vectorised(
            #[inline(always)]
            || sum2(y, y, |y, _| magnitude(y)),
        ),
        Exponent::Two => R::vectorised(
            #[inline(always)]
            || sum2(y, y, |y, _| y * y),
        ),
        Exponent::Other(p) => y.iter().map(|y| y.to_f64().abs().powf(p)).sum(),
        Exponent::OfModulus(p) => pairs(y).map(|y| distance(y, [R::ZERO; 2]).powf(p)).sum(),
    };
    (error, target)
}

/// `out = weight · d‖x − y‖_p/dx`, with `e = x − y`: `weight · sign(e) (|e| / ‖e‖_p)^(p−1)`.
fn tile_gradient<R: Accumulator>(exponent: Exponent, norm: FieldNorm, x: &[R], y: &[R], out: &mut [R]) {
    let FieldNorm { error, weight } = norm;
    let points = out.iter_mut().zip(x.iter().zip(y));
    match exponent {
        Exponent::One => {
            let weight = R::from_f64(weight);
            // The last arm is 0, or NaN where the difference is NaN.
            let slope = |e: R| {
                if e > R::ZERO {
                    weight
                } else if e < R::ZERO {
                    -weight
                } else {
                    e
                }
            };
            points.for_each(|(out, (x, y))| *out = slope(*x - *y));
        }
        Exponent::Two => {
            let factor = R::from_f64(weight / error);
            R::vectorised(
                #[inline(always)]
                || points.for_each(|(out, (x, y))| *out = factor * (*x - *y)),
            );
        }
        Exponent::Other(p) => points.for_each(|(out, (x, y))| {
            let e = (*x - *y).to_f64();
            *out = R::from_f64((weight * (e.abs() / error).powf(p - 1.0)).copysign(weight * e));
        }),
        Exponent::OfModulus(p) => {
            for (out, (x, y)) in out.chunks_exact_mut(2).zip(pairs(x).zip(pairs(y))) {
                let size = distance(x, y);
                // 0 where the difference vanishes, NaN where it is NaN.
                let slope = if size.abs() <= 0.0 { 0.0 } else { weight * (size / error).powf(p - 1.0) / size };
                out[0] = R::from_f64(slope * (x[0] - y[0]).to_f64());
                out[1] = R::from_f64(slope * (x[1] - y[1]).to_f64());
            }
        }
    }
}

/// Real and imaginary part of each value; tiles are even.
fn pairs<R: Accumulator>(x: &[R]) -> impl Iterator<Item = [R; 2]> {
    x.chunks_exact(2).map(|z| [z[0], z[1]])
}

/// `|x − y|` of complex values.
fn distance<R: Accumulator>(x: [R; 2], y: [R; 2]) -> f64 {
    (x[0] - y[0]).to_f64().hypot((x[1] - y[1]).to_f64())
}

#[inline(always)]
fn magnitude<R: Accumulator>(x: R) -> R {
    if x < R::ZERO { -x } else { x }
}

impl Op for LpLoss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> halfmode_autograd::Result<(Outputs, Saved)> {
        FieldLoss::Lp(self).forward(cx, inputs)
    }

    fn backward(
        &self,
        cx: &Cx,
        saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> halfmode_autograd::Result<Vec<Option<Tensor>>> {
        FieldLoss::Lp(self).backward(cx, saved, grads, needs)
    }
}
