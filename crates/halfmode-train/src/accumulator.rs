//! What the kernels of this crate need of an accumulator beyond [`Real`].

use halfmode_tensor::{Real, View, ViewMut};

/// Scalars that one task works on. Fixed, so that sums do not depend on the number of threads.
pub(crate) const TILE: usize = 4096;

/// Independent partial sums of a reduction: one vector register of f32.
pub(crate) const LANES: usize = 16;

/// An accumulator that may also be the storage itself, in which case nothing is converted.
pub(crate) trait Accumulator: Real {
    fn sqrt(self) -> Self;
    /// The stored scalars, if they are accumulators already.
    fn stored(view: View<'_>) -> Option<&[Self]>;
    /// The stored scalars to be written, if they are accumulators already.
    fn stored_mut<'a>(view: &'a mut ViewMut<'_>) -> Option<&'a mut [Self]>;

    /// The scalars of `view`, widened into `buffer` only if need be.
    #[inline]
    fn widened<'a>(view: View<'a>, buffer: &'a mut [Self]) -> &'a [Self] {
        match Self::stored(view) {
            Some(values) => values,
            None => {
                let buffer = &mut buffer[..view.len()];
                view.widen(buffer);
                buffer
            }
        }
    }

    /// Lets `work` fill `view`, through `buffer` only if need be.
    #[inline]
    fn fill(view: &mut ViewMut<'_>, buffer: &mut [Self], work: impl FnOnce(&mut [Self])) {
        if let Some(values) = Self::stored_mut(view) {
            return work(values);
        }
        let buffer = &mut buffer[..view.len()];
        work(buffer);
        view.narrow(buffer);
    }
}

impl Accumulator for f32 {
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    #[inline]
    fn stored(view: View<'_>) -> Option<&[f32]> {
        if let View::F32(values) = view { Some(values) } else { None }
    }

    #[inline]
    fn stored_mut<'a>(view: &'a mut ViewMut<'_>) -> Option<&'a mut [f32]> {
        if let ViewMut::F32(values) = view { Some(values) } else { None }
    }
}

impl Accumulator for f64 {
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    #[inline]
    fn stored(view: View<'_>) -> Option<&[f64]> {
        if let View::F64(values) = view { Some(values) } else { None }
    }

    #[inline]
    fn stored_mut<'a>(view: &'a mut ViewMut<'_>) -> Option<&'a mut [f64]> {
        if let ViewMut::F64(values) = view { Some(values) } else { None }
    }
}

/// Sum of `term(a, b)` over two slices of one length, in lanes that are joined in double precision.
#[inline(always)]
pub(crate) fn sum2<R: Real>(a: &[R], b: &[R], term: impl Fn(R, R) -> R) -> f64 {
    let mut lanes = [R::ZERO; LANES];
    let (mut left, mut right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut left).zip(&mut right) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(*a, *b);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(left.remainder()).zip(right.remainder()) {
        *lane += term(*a, *b);
    }
    lanes.iter().map(|lane| lane.to_f64()).sum()
}
