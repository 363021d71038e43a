//! Borrowed storage of any precision, widened and narrowed tile by tile.
//!
//! Kernels are generic over the accumulator ([`Real`]) alone; the storage precision is a run-time
//! value that is looked at once per tile. Two instances of a kernel serve four precisions.

use crate::Real;
use half::{bf16, f16};
use halfmode_precision::Precision;
use std::ops::Range;

/// Borrowed scalars of any precision.
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    /// binary64
    F64(&'a [f64]),
    /// binary32
    F32(&'a [f32]),
    /// bfloat16
    Bf16(&'a [bf16]),
    /// binary16
    F16(&'a [f16]),
}

/// Mutably borrowed scalars of any precision.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// binary64
    F64(&'a mut [f64]),
    /// binary32
    F32(&'a mut [f32]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// binary16
    F16(&'a mut [f16]),
}

/// Evaluates `$body` with `$s` bound to the slice of whichever arm.
macro_rules! each_arm {
    ($ty:ident, $view:expr, $s:ident => $body:expr) => {
        match $view {
            $ty::F64($s) => $body,
            $ty::F32($s) => $body,
            $ty::Bf16($s) => $body,
            $ty::F16($s) => $body,
        }
    };
}

/// As `each_arm`, wrapping the result in the same arm of `$out`.
macro_rules! map_arm {
    ($ty:ident => $out:ident, $view:expr, $s:ident => $body:expr) => {
        match $view {
            $ty::F64($s) => $out::F64($body),
            $ty::F32($s) => $out::F32($body),
            $ty::Bf16($s) => $out::Bf16($body),
            $ty::F16($s) => $out::F16($body),
        }
    };
}

macro_rules! from_slices {
    ($($arm:ident $scalar:ty),*) => {
        $(
            impl<'a> From<&'a [$scalar]> for View<'a> {
                fn from(values: &'a [$scalar]) -> Self {
                    View::$arm(values)
                }
            }

            impl<'a> From<&'a mut [$scalar]> for ViewMut<'a> {
                fn from(values: &'a mut [$scalar]) -> Self {
                    ViewMut::$arm(values)
                }
            }
        )*
    };
}
from_slices!(F64 f64, F32 f32, Bf16 bf16, F16 f16);

impl<'a> View<'a> {
    /// Number of scalars.
    #[must_use]
    pub fn len(&self) -> usize {
        each_arm!(View, self, s => s.len())
    }

    /// Whether there are no scalars.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Storage precision.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self {
            View::F64(_) => Precision::F64,
            View::F32(_) => Precision::F32,
            View::Bf16(_) => Precision::Bf16,
            View::F16(_) => Precision::F16,
        }
    }

    /// The scalars in `range`.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> View<'a> {
        map_arm!(View => View, self, s => &s[range])
    }

    /// One scalar, in double precision.
    #[must_use]
    pub fn get(self, idx: usize) -> f64 {
        match self {
            View::F64(s) => s[idx],
            View::F32(s) => f64::from(s[idx]),
            View::Bf16(s) => s[idx].to_f64(),
            View::F16(s) => s[idx].to_f64(),
        }
    }

    /// The scalars as accumulators: borrowed where they are stored as such, else widened into the
    /// front of `buffer`.
    pub fn widened<R: Real>(self, buffer: &'a mut [R]) -> &'a [R] {
        match R::direct(self) {
            Some(values) => values,
            None => {
                let tile = &mut buffer[..self.len()];
                R::widen(self, tile);
                tile
            }
        }
    }

    /// Widens all scalars into `dst`, which has the same length.
    pub fn widen<R: Real>(self, dst: &mut [R]) {
        R::widen(self, dst);
    }
}

impl<'a> ViewMut<'a> {
    /// Number of scalars.
    #[must_use]
    pub fn len(&self) -> usize {
        each_arm!(ViewMut, self, s => s.len())
    }

    /// Whether there are no scalars.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same scalars, read only.
    #[must_use]
    pub fn as_view(&self) -> View<'_> {
        map_arm!(ViewMut => View, self, s => &**s)
    }

    /// A shorter borrow of the scalars in `range`.
    #[must_use]
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        map_arm!(ViewMut => ViewMut, self, s => &mut s[range])
    }

    /// The scalars before `mid` and those from there on.
    #[must_use]
    pub fn split_at_mut(&mut self, mid: usize) -> (ViewMut<'_>, ViewMut<'_>) {
        macro_rules! halves {
            ($($arm:ident)*) => {
                match self {
                    $(ViewMut::$arm(s) => {
                        let (first, last) = s.split_at_mut(mid);
                        (ViewMut::$arm(first), ViewMut::$arm(last))
                    })*
                }
            };
        }
        halves!(F64 F32 Bf16 F16)
    }

    /// The scalars in `range`, for as long as this borrow would have lived.
    #[must_use]
    pub fn into_slice(self, range: Range<usize>) -> ViewMut<'a> {
        map_arm!(ViewMut => ViewMut, self, s => &mut s[range])
    }

    /// Cuts into consecutive pieces of `len` scalars; the last may be shorter.
    #[must_use]
    pub fn chunks(self, len: usize) -> Vec<ViewMut<'a>> {
        match self {
            ViewMut::F64(s) => s.chunks_mut(len).map(ViewMut::F64).collect(),
            ViewMut::F32(s) => s.chunks_mut(len).map(ViewMut::F32).collect(),
            ViewMut::Bf16(s) => s.chunks_mut(len).map(ViewMut::Bf16).collect(),
            ViewMut::F16(s) => s.chunks_mut(len).map(ViewMut::F16).collect(),
        }
    }

    /// Rounds `src`, which has the same length, to the storage precision.
    pub fn narrow<R: Real>(&mut self, src: &[R]) {
        R::narrow(src, self);
    }

    /// Lets `work` write all scalars as accumulators: in place where they are stored as such, else in the
    /// front of `buffer`, which is then rounded to the storage precision.
    pub fn fill<R: Real>(&mut self, buffer: &mut [R], work: impl FnOnce(&mut [R])) {
        if let Some(values) = R::direct_mut(self) {
            return work(values);
        }
        let tile = &mut buffer[..self.len()];
        work(tile);
        R::narrow(tile, self);
    }

    /// As [`ViewMut::fill`], with the old values there to be changed.
    pub fn update<R: Real>(&mut self, buffer: &mut [R], work: impl FnOnce(&mut [R])) {
        if let Some(values) = R::direct_mut(self) {
            return work(values);
        }
        let tile = &mut buffer[..self.len()];
        R::widen(self.as_view(), tile);
        work(tile);
        R::narrow(tile, self);
    }

    /// Copies the scalars of `src`, which has the same length and precision; of another precision it
    /// copies nothing.
    pub(crate) fn copy_from(&mut self, src: View<'_>) {
        match (self, src) {
            (ViewMut::F64(dst), View::F64(src)) => dst.copy_from_slice(src),
            (ViewMut::F32(dst), View::F32(src)) => dst.copy_from_slice(src),
            (ViewMut::Bf16(dst), View::Bf16(src)) => dst.copy_from_slice(src),
            (ViewMut::F16(dst), View::F16(src)) => dst.copy_from_slice(src),
            _ => {}
        }
    }

    /// Sets every scalar to zero.
    pub fn fill_zero(&mut self) {
        match self {
            ViewMut::F64(s) => s.fill(0.0),
            ViewMut::F32(s) => s.fill(0.0),
            ViewMut::Bf16(s) => s.fill(bf16::ZERO),
            ViewMut::F16(s) => s.fill(f16::ZERO),
        }
    }
}

/// A matrix in storage: row `j` begins at `j * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The scalars, from the first of row 0 on.
    pub view: View<'a>,
    /// Distance between rows.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// The first `width` scalars of row `j`.
    #[must_use]
    pub fn row(self, j: usize, width: usize) -> View<'a> {
        self.view.slice(j * self.stride..j * self.stride + width)
    }

    /// Widens the first `width` scalars of each of `n` rows into `dst`, `[n, width]`.
    pub fn widen<R: Real>(self, n: usize, width: usize, dst: &mut [R]) {
        if self.stride == width {
            return self.view.slice(0..n * width).widen(&mut dst[..n * width]);
        }
        for (j, dst) in dst.chunks_exact_mut(width).enumerate().take(n) {
            self.row(j, width).widen(dst);
        }
    }
}

/// A matrix in storage that is written.
#[derive(Debug)]
pub enum RowsMut<'r, 'a> {
    /// Row `j` begins at `j` times the distance.
    Strided(ViewMut<'r>, usize),
    /// One piece per row.
    Pieces(&'r mut [ViewMut<'a>]),
}

impl RowsMut<'_, '_> {
    /// The first `width` scalars of row `j`.
    #[must_use]
    pub fn row(&mut self, j: usize, width: usize) -> ViewMut<'_> {
        match self {
            RowsMut::Strided(view, stride) => view.slice_mut(j * *stride..j * *stride + width),
            RowsMut::Pieces(rows) => rows[j].slice_mut(0..width),
        }
    }

    /// The first `width` scalars of rows `i < j`.
    #[must_use]
    pub fn two_rows(&mut self, (i, j): (usize, usize), width: usize) -> (ViewMut<'_>, ViewMut<'_>) {
        match self {
            RowsMut::Strided(view, stride) => {
                let (first, last) = view.split_at_mut(j * *stride);
                (first.into_slice(i * *stride..i * *stride + width), last.into_slice(0..width))
            }
            RowsMut::Pieces(rows) => {
                let (first, last) = rows.split_at_mut(j);
                (first[i].slice_mut(0..width), last[0].slice_mut(0..width))
            }
        }
    }

    /// Rounds the rows of `src`, `[n, width]`, to storage.
    pub fn narrow<R: Real>(&mut self, src: &[R], width: usize) {
        if let RowsMut::Strided(view, stride) = self
            && *stride == width
        {
            return view.slice_mut(0..src.len()).narrow(src);
        }
        for (j, src) in src.chunks_exact(width).enumerate() {
            self.row(j, width).narrow(src);
        }
    }
}
