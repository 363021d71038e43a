//! Elementwise functions of jets.

use super::tile::{Rows, map_jets};
use crate::pointwise::{Grads, check_axes, storage};
use crate::{Error, Result};
use halfmode_autograd::{Cx, Op, Outputs, Saved};
use halfmode_precision::Domain;
use halfmode_tensor::{Real, Tensor, with_real};
use smallvec::smallvec;

/// `y = tanh(x)` of a jet: `y_0 = tanh(x_0)`, `y_i = (1 - y_0²) x_i`. Saves `y`.
#[derive(Clone, Copy, Debug)]
pub struct JetTanh;

/// `y = log(1 + exp(x))` of a jet: `y_i = sigmoid(x_0) x_i`. Saves `x`.
#[derive(Clone, Copy, Debug)]
pub struct JetSoftplus;

/// The elementwise product of two jets of the same directions: `y_i = a_i b_0 + a_0 b_i`. Saves both.
#[derive(Clone, Copy, Debug)]
pub struct JetProduct;

type Forward = halfmode_autograd::Result<(Outputs, Saved)>;

/// Refuses what is no jet: complex numbers, no axis beside that of value and tangents, no channels.
pub(super) fn check_jet(op: &'static str, operand: &'static str, x: &Tensor) -> Result<()> {
    x.expect_domain(op, operand, Domain::Real)?;
    check_axes(op, operand, x, 2)
}

/// Elements of a row of a jet.
pub(super) fn row_len(jet: &Tensor) -> usize {
    jet.numel() / jet.shape().first().copied().unwrap_or(1).max(1)
}

/// A jet in the storage format, like `x`.
fn like<R: Real, const N: usize>(
    cx: &Cx,
    inputs: [&Tensor; N],
    work: impl Fn([Rows<'_, R>; N], &mut [R]) + Sync,
) -> Result<Tensor> {
    map_jets(&cx.device, inputs, (inputs[0].shape(), storage(cx), row_len(inputs[0])), work)
}

/// Writes `value(i)` into the first row, and `tangent(k, i)` into that of direction `k`.
fn write<R>(out: &mut [R], len: usize, value: impl Fn(usize) -> R, tangent: impl Fn(usize, usize) -> R) {
    let (first, others) = out.split_at_mut(len);
    first.iter_mut().enumerate().for_each(|(i, out)| *out = value(i));
    for (k, row) in others.chunks_exact_mut(len).enumerate() {
        row.iter_mut().enumerate().for_each(|(i, out)| *out = tangent(k, i));
    }
}

/// `sum over directions of a_i b_i`, element by element, of the tangents of two jets.
fn tangent_products<R: Real>(a: &Rows<'_, R>, b: &Rows<'_, R>) -> Vec<R> {
    let mut sums = vec![R::ZERO; a.len];
    for (a, b) in a.tangents().zip(b.tangents()) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += *a * *b);
    }
    sums
}

impl Op for JetTanh {
    fn name(&self) -> &'static str {
        "jet_tanh"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x] = self.expect_inputs(inputs)?;
        check_jet(self.name(), "x", x).map_err(|err| err.in_op(self.name()))?;
        let y = with_real!(cx.policy.pointwise.storage, R => like::<R, 1>(cx, [x], |[x], y| {
            let n = x.len;
            y[..n].copy_from_slice(x.value());
            <R as Real>::tanh(&mut y[..n]);
            let (value, tangents) = y.split_at_mut(n);
            for (y, x) in tangents.chunks_exact_mut(n).zip(x.tangents()) {
                for ((y, x), value) in y.iter_mut().zip(x).zip(&*value) {
                    *y = (R::ONE - *value * *value) * *x;
                }
            }
        }));
        let y = y.map_err(|err| err.in_op(self.name()))?;
        let saved = Saved::new(self.name()).keep(cx, "y", &y)?;
        Ok((smallvec![y], saved))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let y = saved.take("y")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        let gx = with_real!(cx.policy.pointwise.storage, R => like::<R, 2>(cx, [&g, &y], |[g, y], gx| {
            // A tangent's slope by the value is -2 y_0 y_i.
            let (sums, n, v) = (tangent_products(&g, &y), g.len, y.value());
            let slope = |i: usize| R::ONE - v[i] * v[i];
            let value = |i: usize| g.all[i] * slope(i) - (v[i] + v[i]) * sums[i];
            write(gx, n, value, |k, i| g.all[(k + 1) * n + i] * slope(i));
        }));
        Ok(vec![Some(gx.map_err(|err| err.in_op(self.name()))?)])
    }
}

/// `sigmoid(x)`
fn sigmoid<R: Real>(x: &[R]) -> Vec<R> {
    let half = R::from_f64(0.5);
    let mut s: Vec<R> = x.iter().map(|x| half * *x).collect();
    <R as Real>::tanh(&mut s);
    s.iter_mut().for_each(|it| *it = half * (R::ONE + *it));
    s
}

/// `log(1 + exp(x))`, of any `x`.
fn softplus<R: Real>(x: R) -> R {
    let x = x.to_f64();
    R::from_f64(x.max(0.0) + (-x.abs()).exp().ln_1p())
}

impl Op for JetSoftplus {
    fn name(&self) -> &'static str {
        "jet_softplus"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [x] = self.expect_inputs(inputs)?;
        check_jet(self.name(), "x", x).map_err(|err| err.in_op(self.name()))?;
        let y = with_real!(cx.policy.pointwise.storage, R => like::<R, 1>(cx, [x], |[x], y| {
            let (s, n) = (sigmoid(x.value()), x.len);
            write(y, n, |i| softplus(x.all[i]), |k, i| s[i] * x.all[(k + 1) * n + i]);
        }));
        let y = y.map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "x", x)?))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Grads {
        let x = saved.take("x")?;
        let Some(g) = grads[0].take() else { return Ok(vec![None]) };
        let gx = with_real!(cx.policy.pointwise.storage, R => like::<R, 2>(cx, [&g, &x], |[g, x], gx| {
            let (s, sums, n) = (sigmoid(x.value()), tangent_products(&g, &x), g.len);
            let value = |i: usize| s[i] * (g.all[i] + (R::ONE - s[i]) * sums[i]);
            write(gx, n, value, |k, i| g.all[(k + 1) * n + i] * s[i]);
        }));
        Ok(vec![Some(gx.map_err(|err| err.in_op(self.name()))?)])
    }
}

impl Op for JetProduct {
    fn name(&self) -> &'static str {
        "jet_product"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Forward {
        let [a, b] = self.expect_inputs(inputs)?;
        let check = || -> Result<()> {
            check_jet(self.name(), "a", a)?;
            check_jet(self.name(), "b", b)?;
            if a.shape() == b.shape() {
                return Ok(());
            }
            let (expected, found) = (a.shape().clone(), b.shape().clone());
            Err(Error::Shape { op: self.name(), operand: "b", expected, found })
        };
        check().map_err(|err| err.in_op(self.name()))?;
        let y = with_real!(cx.policy.pointwise.storage, R => like::<R, 2>(cx, [a, b], |[a, b], y| {
            let (n, a0, b0) = (a.len, a.value(), b.value());
            let at = |k: usize, i: usize| (k + 1) * n + i;
            write(y, n, |i| a0[i] * b0[i], |k, i| a.all[at(k, i)] * b0[i] + a0[i] * b.all[at(k, i)]);
        }));
        let y = y.map_err(|err| err.in_op(self.name()))?;
        Ok((smallvec![y], Saved::new(self.name()).keep(cx, "a", a)?.keep(cx, "b", b)?))
    }

    fn backward(&self, cx: &Cx, mut saved: Saved, grads: &mut [Option<Tensor>], needs: &[bool]) -> Grads {
        let (a, b) = (saved.take("a")?, saved.take("b")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        // By `a`, with `b` as the other factor, and the other way round.
        let by = |other: &Tensor| -> Result<Tensor> {
            with_real!(cx.policy.pointwise.storage, R => like::<R, 2>(cx, [&g, other], |[g, other], out| {
                let (sums, n, value) = (tangent_products(&g, &other), g.len, other.value());
                write(out, n, |i| g.all[i] * value[i] + sums[i], |k, i| g.all[(k + 1) * n + i] * value[i]);
            }))
        };
        let grad = |needed: bool, other: &Tensor| needed.then(|| by(other)).transpose();
        let both = grad(needs[0], &b).and_then(|ga| Ok(vec![ga, grad(needs[1], &a)?]));
        both.map_err(|err| err.in_op(self.name()))
    }
}
