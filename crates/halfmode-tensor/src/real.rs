//! The two accumulators: f32 and f64.

use crate::gemm::{self, Mat, MatMut};
use crate::view::{View, ViewMut};
use crate::{features, math, scratch, simd};
use half::{bf16, f16};
use halfmode_precision::Precision;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// What sums are formed in: f32 for f32, bf16 and f16 storage, f64 for f64.
///
/// Slice functions run with the widest vector instructions that the processor has; without
/// fused multiply-add, so results do not depend on which those are.
pub trait Real:
    sealed::Sealed
    + Copy
    + PartialEq
    + PartialOrd
    + Send
    + Sync
    + std::fmt::Debug
    + Default
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// The storage precision that holds it exactly.
    const PRECISION: Precision;

    /// Nearest value.
    fn from_f64(value: f64) -> Self;
    /// Exact value.
    fn to_f64(self) -> f64;
    /// The exact value of an f32.
    fn from_f32(value: f32) -> Self;
    /// Accumulators as stored scalars.
    fn view(values: &[Self]) -> View<'_>;
    /// As [`Real::view`], to be written.
    fn view_mut(values: &mut [Self]) -> ViewMut<'_>;
    /// Widens stored scalars; slices have the same length.
    fn widen(src: View<'_>, dst: &mut [Self]);
    /// The stored scalars themselves, where storage and accumulator are the same type.
    fn direct(src: View<'_>) -> Option<&[Self]>;
    /// As [`Real::direct`], to be written.
    fn direct_mut<'a>(dst: &'a mut ViewMut<'_>) -> Option<&'a mut [Self]>;
    /// Rounds to storage, nearest even; slices have the same length.
    fn narrow(src: &[Self], dst: &mut ViewMut<'_>);
    /// `c = keep * c + scale * a b`, `dims = (m, n, k)`; with `keep == 0`, `c` is not read.
    fn gemm(
        dims: (usize, usize, usize),
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        c: MatMut<'_, Self>,
        keep: Self,
        scale: Self,
    );
    /// x := gelu(x)
    fn gelu(x: &mut [Self]);
    /// x := gelu(x), slope := gelu'(x); same length.
    fn gelu_both(x: &mut [Self], slope: &mut [Self]);
    /// x := tanh(x)
    fn tanh(x: &mut [Self]);
    /// Runs `work` with the processor's vector instructions enabled for what is inlined into it.
    fn vectorised<T>(work: impl FnOnce() -> T) -> T {
        features::vectors().dispatch(work)
    }
    #[doc(hidden)]
    fn take_scratch() -> Vec<Self>;
    #[doc(hidden)]
    fn return_scratch(buffer: Vec<Self>);
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const PRECISION: Precision = Precision::F32;

    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }

    #[inline]
    fn view(values: &[f32]) -> View<'_> {
        View::F32(values)
    }

    #[inline]
    fn view_mut(values: &mut [f32]) -> ViewMut<'_> {
        ViewMut::F32(values)
    }

    fn widen(src: View<'_>, dst: &mut [f32]) {
        match src {
            View::F32(src) => dst.copy_from_slice(src),
            View::F16(src) => simd::widen_f16(src, dst),
            View::Bf16(src) => Self::vectorised(
                #[inline(always)]
                || {
                    for (to, from) in dst.iter_mut().zip(src) {
                        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                    }
                },
            ),
            View::F64(src) => {
                for (to, from) in dst.iter_mut().zip(src) {
                    *to = *from as f32;
                }
            }
        }
    }

    #[inline]
    fn direct(src: View<'_>) -> Option<&[f32]> {
        if let View::F32(values) = src { Some(values) } else { None }
    }

    #[inline]
    fn direct_mut<'a>(dst: &'a mut ViewMut<'_>) -> Option<&'a mut [f32]> {
        if let ViewMut::F32(values) = dst { Some(values) } else { None }
    }

    fn narrow(src: &[f32], dst: &mut ViewMut<'_>) {
        match dst {
            ViewMut::F32(dst) => dst.copy_from_slice(src),
            ViewMut::F16(dst) => simd::narrow_f16(src, dst),
            ViewMut::Bf16(dst) => Self::vectorised(
                #[inline(always)]
                || {
                    for (to, from) in dst.iter_mut().zip(src) {
                        let bits = from.to_bits();
                        let even = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
                        let nan = (bits >> 16) | 0x40;
                        *to = bf16::from_bits(if from.is_nan() { nan } else { even } as u16);
                    }
                },
            ),
            ViewMut::F64(dst) => {
                for (to, from) in dst.iter_mut().zip(src) {
                    *to = f64::from(*from);
                }
            }
        }
    }

    #[inline]
    fn gemm(dims: (usize, usize, usize), a: Mat<'_, f32>, b: Mat<'_, f32>, c: MatMut<'_, f32>, keep: f32, scale: f32) {
        gemm::product_f32(dims, a, b, c, keep, scale);
    }

    fn gelu(x: &mut [f32]) {
        simd::gelu(x);
    }

    fn gelu_both(x: &mut [f32], slope: &mut [f32]) {
        simd::gelu_both(x, slope);
    }

    fn tanh(x: &mut [f32]) {
        Self::vectorised(
            #[inline(always)]
            || {
                for x in x {
                    *x = math::tanh_f32(*x);
                }
            },
        );
    }

    fn take_scratch() -> Vec<f32> {
        scratch::take_f32()
    }

    fn return_scratch(buffer: Vec<f32>) {
        scratch::return_f32(buffer);
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const PRECISION: Precision = Precision::F64;

    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> f64 {
        f64::from(value)
    }

    #[inline]
    fn view(values: &[f64]) -> View<'_> {
        View::F64(values)
    }

    #[inline]
    fn view_mut(values: &mut [f64]) -> ViewMut<'_> {
        ViewMut::F64(values)
    }

    fn widen(src: View<'_>, dst: &mut [f64]) {
        match src {
            View::F64(src) => dst.copy_from_slice(src),
            View::F32(src) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = f64::from(*from)),
            View::Bf16(src) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = from.to_f64()),
            View::F16(src) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = from.to_f64()),
        }
    }

    #[inline]
    fn direct(src: View<'_>) -> Option<&[f64]> {
        if let View::F64(values) = src { Some(values) } else { None }
    }

    #[inline]
    fn direct_mut<'a>(dst: &'a mut ViewMut<'_>) -> Option<&'a mut [f64]> {
        if let ViewMut::F64(values) = dst { Some(values) } else { None }
    }

    fn narrow(src: &[f64], dst: &mut ViewMut<'_>) {
        match dst {
            ViewMut::F64(dst) => dst.copy_from_slice(src),
            ViewMut::F32(dst) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = *from as f32),
            // `from_f64` of the halves drops the low bits first, and with them which side of a tie a value is on.
            ViewMut::Bf16(dst) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = bf16::from_f32(to_odd(*from))),
            ViewMut::F16(dst) => dst.iter_mut().zip(src).for_each(|(to, from)| *to = f16::from_f32(to_odd(*from))),
        }
    }

    #[inline]
    fn gemm(dims: (usize, usize, usize), a: Mat<'_, f64>, b: Mat<'_, f64>, c: MatMut<'_, f64>, keep: f64, scale: f64) {
        gemm::product(dims, a, b, c, keep, scale, 0.0);
    }

    fn gelu(x: &mut [f64]) {
        for x in x {
            *x = math::gelu_both_f64(*x).0;
        }
    }

    fn gelu_both(x: &mut [f64], slope: &mut [f64]) {
        for (x, slope) in x.iter_mut().zip(slope) {
            (*x, *slope) = math::gelu_both_f64(*x);
        }
    }

    fn tanh(x: &mut [f64]) {
        for x in x {
            *x = x.tanh();
        }
    }

    fn take_scratch() -> Vec<f64> {
        scratch::take_f64()
    }

    fn return_scratch(buffer: Vec<f64>) {
        scratch::return_f64(buffer);
    }
}

/// Rounds to f32 so that rounding again, to half, gives what rounding once would: an inexact value
/// becomes the neighbour with an odd significand, which is never a tie of the shorter format.
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back.to_bits() == value.to_bits() || value.is_nan() {
        return nearest;
    }
    let toward_zero = nearest.to_bits() - u32::from(back.abs() > value.abs());
    f32::from_bits(toward_zero | 1)
}

/// Evaluates an expression with `$real` naming the accumulator of a storage precision.
///
/// This is the one door from run-time precision to static types: two instances per kernel.
#[macro_export]
macro_rules! with_real {
    ($precision:expr, $real:ident => $body:expr) => {
        match $precision {
            ::halfmode_precision::Precision::F64 => {
                type $real = f64;
                $body
            }
            _ => {
                type $real = f32;
                $body
            }
        }
    };
}
