//! The truncated DFT of one axis as products with its cosines and sines.
//!
//! Points `j` and `n - j` meet the same cosine and opposite sines, so a field goes in as its even and
//! odd parts; on a complex axis the frequencies `f` and `-f` share both products as well. That takes a
//! half of the multiplies of the plain matrix on a real axis, and a quarter on a complex one.

use halfmode_tensor::{
    Mat, MatMut, Real, Rows, RowsMut, add_sub, add_sub_in_place, fold_rows, narrow_add_sub, unfold_rows,
};

/// The tables of an axis: cosines `[top + 1, even]`, sines `[top, odd]` of frequencies and points from 1.
pub(crate) struct Waves<'a, R> {
    pub(crate) cosines: &'a [R],
    pub(crate) sines: &'a [R],
    /// Rows of a field's even and odd parts.
    pub(crate) even: usize,
    pub(crate) odd: usize,
    /// The highest frequency.
    pub(crate) top: usize,
}

impl<R: Real> Waves<'_, R> {
    /// `c = scale cos even`, `[top + 1, cols]`, and `s = sin_scale sin odd`, `[top, cols]`.
    fn analyse(&self, parts: &[R], cols: usize, [c, s]: [&mut [R]; 2], [scale, sin_scale]: [R; 2]) {
        let (even, odd) = parts.split_at(self.even * cols);
        let dims = (self.top + 1, cols, self.even);
        let matrix = Mat::rows(self.cosines, self.even);
        R::gemm(dims, matrix, Mat::rows(even, cols), MatMut::rows(c, cols), R::ZERO, scale);
        let matrix = Mat::rows(self.sines, self.odd);
        R::gemm((self.top, cols, self.odd), matrix, Mat::rows(odd, cols), MatMut::rows(s, cols), R::ZERO, sin_scale);
    }

    /// The even part `scale cos^T c` and the odd part `sin_scale sin^T s`; rows of `c` and `s` are `stride`
    /// apart.
    fn synthesise(
        &self,
        (c, s, stride): (&[R], &[R], usize),
        cols: usize,
        parts: &mut [R],
        [scale, sin_scale]: [R; 2],
    ) {
        let (even, odd) = parts.split_at_mut(self.even * cols);
        let rows = |data| Mat { data, row: stride, col: 1 };
        let matrix = Mat::transposed(self.cosines, self.even);
        R::gemm((self.even, cols, self.top + 1), matrix, rows(c), MatMut::rows(even, cols), R::ZERO, scale);
        let matrix = Mat::transposed(self.sines, self.odd);
        R::gemm((self.odd, cols, self.top), matrix, rows(s), MatMut::rows(odd, cols), R::ZERO, sin_scale);
    }

    /// Scalars of the even and odd parts together.
    fn parts(&self, cols: usize) -> usize {
        (self.even + self.odd) * cols
    }

    /// The parts, then real and imaginary rows that meet cosines, then those that meet sines.
    fn complex_scratch<'s>(&self, cols: usize, mut scratch: &'s mut [R]) -> [&'s mut [R]; 5] {
        let (cosine_len, sine_len) = ((self.top + 1) * cols, self.top * cols);
        [self.parts(cols), cosine_len, cosine_len, sine_len, sine_len].map(|len| {
            let (own, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            own
        })
    }

    /// `n` real rows to rows (re, im) x frequency: `re = C`, `im = -S`.
    pub(crate) fn real_to_modes(
        &self,
        n: usize,
        field: Rows<'_>,
        modes: &mut RowsMut<'_, '_>,
        cols: usize,
        scale: R,
        scratch: &mut [R],
    ) {
        let (parts, scratch) = scratch.split_at_mut(self.parts(cols));
        let (even, odd) = parts.split_at_mut(self.even * cols);
        fold_rows(field.view, n, (field.stride, cols), even, odd);
        let write = |out: &mut [R]| {
            let (re, im) = out.split_at_mut((self.top + 1) * cols);
            let (mean, im) = im.split_at_mut(cols);
            mean.fill(R::ZERO);
            self.analyse(parts, cols, [re, im], [scale, -scale]);
        };
        let len = 2 * (self.top + 1) * cols;
        match modes {
            RowsMut::Strided(view, stride) if *stride == cols => view.slice_mut(0..len).fill(scratch, write),
            _ => {
                write(&mut scratch[..len]);
                modes.narrow(&scratch[..len], cols);
            }
        }
    }

    /// The adjoint of [`Waves::real_to_modes`].
    pub(crate) fn real_to_grid(
        &self,
        n: usize,
        modes: Rows<'_>,
        field: &mut RowsMut<'_, '_>,
        cols: usize,
        scale: R,
        scratch: &mut [R],
    ) {
        let (parts, scratch) = scratch.split_at_mut(self.parts(cols));
        let k = self.top + 1;
        let (stored, stride) = match R::direct(modes.view) {
            Some(stored) => (stored, modes.stride),
            None => {
                modes.widen(2 * k, cols, scratch);
                (&*scratch, cols)
            }
        };
        // The imaginary part of the mean has no wave.
        let sine_rows = stored.get((k + 1) * stride..).unwrap_or_default();
        self.synthesise((stored, sine_rows, stride), cols, parts, [scale, -scale]);
        self.unfold(n, parts, cols, (0, 1), field);
    }

    /// `n` complex points, rows (point, (re, im)), to rows (re, im) x mode, `-k/2..k - k/2`.
    ///
    /// With `C` and `S` the products of the complex points, `X_f = C - i S` and `X_-f = C + i S`.
    pub(crate) fn complex_to_modes(
        &self,
        (n, k): (usize, usize),
        field: Rows<'_>,
        modes: &mut RowsMut<'_, '_>,
        cols: usize,
        scale: R,
        scratch: &mut [R],
    ) {
        let [parts, c_re, c_im, s_re, s_im] = self.complex_scratch(cols, scratch);
        for (idx, sums) in [[&mut *c_re, &mut *s_re], [&mut *c_im, &mut *s_im]].into_iter().enumerate() {
            let (even, odd) = parts.split_at_mut(self.even * cols);
            let view = field.view.slice(idx * field.stride..field.view.len());
            fold_rows(view, n, (2 * field.stride, cols), even, odd);
            self.analyse(parts, cols, sums, [scale, scale]);
        }
        let mean = k / 2;
        modes.row(mean, cols).narrow(&c_re[..cols]);
        modes.row(k + mean, cols).narrow(&c_im[..cols]);
        for f in 1..=self.top {
            let (c, s) = (f * cols..(f + 1) * cols, (f - 1) * cols..f * cols);
            let (c_re, c_im) = (&mut c_re[c.clone()], &mut c_im[c]);
            let (s_re, s_im) = (&mut s_re[s.clone()], &mut s_im[s]);
            let (above, below) = (mean + f, mean - f);
            if above < k {
                let (mut re_below, mut re_above) = modes.two_rows((below, above), cols);
                narrow_add_sub(c_re, s_im, &mut re_above, &mut re_below);
                let (mut im_below, mut im_above) = modes.two_rows((k + below, k + above), cols);
                narrow_add_sub(c_im, s_re, &mut im_below, &mut im_above);
            } else {
                add_sub_in_place(c_re, s_im);
                modes.row(below, cols).narrow(s_im);
                add_sub_in_place(c_im, s_re);
                modes.row(k + below, cols).narrow(c_im);
            }
        }
    }

    /// The adjoint of [`Waves::complex_to_modes`].
    ///
    /// With `A = X_f + X_-f` and `B = X_f - X_-f`, point `j` is `cos A + sin (i B)` and point `n - j`
    /// is `cos A - sin (i B)`.
    pub(crate) fn complex_to_grid(
        &self,
        (n, k): (usize, usize),
        modes: Rows<'_>,
        field: &mut RowsMut<'_, '_>,
        cols: usize,
        scale: R,
        scratch: &mut [R],
    ) {
        let [parts, a_re, a_im, ib_re, ib_im] = self.complex_scratch(cols, scratch);
        let mean = k / 2;
        modes.row(mean, cols).widen(&mut a_re[..cols]);
        modes.row(k + mean, cols).widen(&mut a_im[..cols]);
        for f in 1..=self.top {
            let (c, s) = (f * cols..(f + 1) * cols, (f - 1) * cols..f * cols);
            let (a_re, a_im) = (&mut a_re[c.clone()], &mut a_im[c]);
            let (ib_re, ib_im) = (&mut ib_re[s.clone()], &mut ib_im[s]);
            let (above, below) = (mean + f, mean - f);
            if above < k {
                add_sub(modes.row(above, cols), modes.row(below, cols), a_re, ib_im);
                add_sub(modes.row(k + below, cols), modes.row(k + above, cols), a_im, ib_re);
            } else {
                modes.row(below, cols).widen(a_re);
                modes.row(k + below, cols).widen(a_im);
                ib_re.copy_from_slice(a_im);
                ib_im.iter_mut().zip(&*a_re).for_each(|(b, a)| *b = -*a);
            }
        }
        for (idx, (a, ib)) in [(&*a_re, &*ib_re), (&*a_im, &*ib_im)].into_iter().enumerate() {
            self.synthesise((a, ib, cols), cols, parts, [scale, scale]);
            self.unfold(n, parts, cols, (idx, 2), field);
        }
    }

    /// Writes rows `first + j step` of `field`, `j` below `n`, from their even and odd parts.
    fn unfold(
        &self,
        n: usize,
        parts: &mut [R],
        cols: usize,
        (first, step): (usize, usize),
        field: &mut RowsMut<'_, '_>,
    ) {
        let (even, odd) = parts.split_at_mut(self.even * cols);
        if let RowsMut::Strided(view, stride) = field
            && (*stride, step) == (cols, 1)
            && let Some(rows) = R::direct_mut(view)
        {
            return unfold_rows(even, odd, cols, &mut rows[..n * cols]);
        }
        for (j, even) in even.chunks_exact_mut(cols).enumerate() {
            let row = first + j * step;
            if j == 0 || 2 * j == n {
                field.row(row, cols).narrow(even);
            } else {
                let (mut sum, mut difference) = field.two_rows((row, first + (n - j) * step), cols);
                narrow_add_sub(even, &mut odd[(j - 1) * cols..j * cols], &mut sum, &mut difference);
            }
        }
    }
}
