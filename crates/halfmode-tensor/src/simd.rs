//! Conversions of binary16 and table lookups with the processor's own instructions.

#![allow(unsafe_code, reason = "AVX-512 conversion intrinsics have no safe equivalent")]

use crate::features::uses_avx512;
use crate::math::GeluTable;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Widens binary16 to binary32. `src` and `dst` have the same length.
pub(crate) fn widen_f16(src: &[f16], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len());
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::widen(src, dst) };
        return;
    }
    src.convert_to_f32_slice(dst);
}

/// Rounds binary32 to binary16, nearest even. `src` and `dst` have the same length.
pub(crate) fn narrow_f16(src: &[f32], dst: &mut [f16]) {
    assert_eq!(src.len(), dst.len());
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::narrow(src, dst) };
        return;
    }
    dst.convert_from_f32_slice(src);
}

/// [`crate::fold_rows`] from binary16, where the processor has AVX-512; `false` where it has not.
#[allow(unused_variables, reason = "no such processor on other architectures")]
pub(crate) fn fold_f16(
    src: &[f16],
    n: usize,
    (stride, width): (usize, usize),
    even: &mut [f32],
    odd: &mut [f32],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::fold(src, n, (stride, width), even, odd) };
        return true;
    }
    false
}

/// x := gelu(x)
pub(crate) fn gelu(x: &mut [f32]) {
    let table = GeluTable::get();
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::gelu(table, x) };
        return;
    }
    for x in x {
        *x = table.both(*x).0;
    }
}

/// x := gelu(x), slope := gelu'(x); same length.
pub(crate) fn gelu_both(x: &mut [f32], slope: &mut [f32]) {
    assert_eq!(x.len(), slope.len());
    let table = GeluTable::get();
    #[cfg(target_arch = "x86_64")]
    if uses_avx512() {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::gelu_both(table, x, slope) };
        return;
    }
    for (x, slope) in x.iter_mut().zip(slope) {
        (*x, *slope) = table.both(*x);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use crate::math::{GeluTable, ROUND};
    use half::f16;
    use std::arch::x86_64::{
        __m512, __mmask16, _CMP_GE_OQ, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0,
        _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_ps, _mm512_castps_si512, _mm512_cmp_ps_mask,
        _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps,
        _mm512_mask_cmp_ps_mask, _mm512_mask_storeu_ps, _mm512_maskz_add_ps, _mm512_maskz_loadu_ps, _mm512_max_ps,
        _mm512_permutex2var_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_sub_ps,
    };

    const LANES: usize = 16;
    /// Scalars between what is widened and what is fetched.
    const AHEAD: usize = 2048;

    /// The coefficients of [`GeluTable`] in registers.
    struct Gelu([[__m512; 2]; 7]);

    impl Gelu {
        #[target_feature(enable = "avx512f")]
        fn new(table: &GeluTable) -> Self {
            Gelu(table.coefficients.each_ref().map(|it| {
                let (low, high) = it.split_at(LANES);
                // SAFETY: both halves hold 16 scalars.
                unsafe { [_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())] }
            }))
        }

        /// [`GeluTable::both`] of 16 scalars.
        #[target_feature(enable = "avx512f")]
        #[inline]
        fn both(&self, x: __m512) -> (__m512, __m512) {
            let (zero, round) = (_mm512_setzero_ps(), _mm512_set1_ps(ROUND));
            let shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(GeluTable::PER_UNIT), round);
            // A lookup takes the low five bits of each index.
            let column = _mm512_castps_si512(shifted);
            let coefficient = |power: usize| _mm512_permutex2var_ps(self.0[power][0], column, self.0[power][1]);
            let r = _mm512_fmadd_ps(_mm512_sub_ps(shifted, round), _mm512_set1_ps(-GeluTable::STEP), x);
            let (mut value, mut slope) = (coefficient(6), zero);
            for power in (0..6).rev() {
                slope = _mm512_fmadd_ps(slope, r, value);
                value = _mm512_fmadd_ps(value, r, coefficient(power));
            }
            let inside = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(GeluTable::FIRST));
            let inside = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(inside, x, _mm512_set1_ps(GeluTable::LAST));
            let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, zero);
            let far_slope = _mm512_maskz_add_ps(!negative, _mm512_set1_ps(1.0), _mm512_sub_ps(x, x));
            // The second operand where one is a NaN.
            let far = _mm512_max_ps(zero, x);
            (_mm512_mask_blend_ps(inside, far, value), _mm512_mask_blend_ps(inside, far_slope, slope))
        }
    }

    /// Calls `work` with pointers to 16 scalars each, and a mask of those that exist.
    #[inline(always)]
    fn pieces(len: usize, mut work: impl FnMut(usize, __mmask16)) {
        for start in (0..len).step_by(LANES) {
            let rest = len - start;
            work(start, if rest < LANES { (1 << rest) - 1 } else { !0 });
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn gelu(table: &GeluTable, x: &mut [f32]) {
        let gelu = Gelu::new(table);
        pieces(x.len(), |start, mask| {
            let x = x[start..].as_mut_ptr();
            // SAFETY: the mask names scalars of the slice only.
            unsafe { _mm512_mask_storeu_ps(x, mask, gelu.both(_mm512_maskz_loadu_ps(mask, x)).0) };
        });
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn gelu_both(table: &GeluTable, x: &mut [f32], slope: &mut [f32]) {
        let gelu = Gelu::new(table);
        pieces(x.len(), |start, mask| {
            let (x, slope) = (x[start..].as_mut_ptr(), slope[start..].as_mut_ptr());
            // SAFETY: the mask names scalars of both slices only; they have one length.
            unsafe {
                let (value, derivative) = gelu.both(_mm512_maskz_loadu_ps(mask, x));
                _mm512_mask_storeu_ps(x, mask, value);
                _mm512_mask_storeu_ps(slope, mask, derivative);
            }
        });
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn widen(src: &[f16], dst: &mut [f32]) {
        let mut pieces = src.chunks_exact(LANES).zip(dst.chunks_exact_mut(LANES));
        for (from, to) in &mut pieces {
            // Tiles follow one another: the next one's lines are asked for while this one is in work.
            _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(AHEAD).cast());
            // SAFETY: both pieces hold exactly 16 scalars, and unaligned access is allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) };
        }
        let done = src.len() / LANES * LANES;
        for (from, to) in src[done..].iter().zip(&mut dst[done..]) {
            *to = from.to_f32();
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fold(src: &[f16], n: usize, (stride, width): (usize, usize), even: &mut [f32], odd: &mut [f32]) {
        for (j, even) in even.chunks_exact_mut(width).enumerate() {
            let first = &src[j * stride..][..width];
            if j == 0 || 2 * j == n {
                widen(first, even);
                continue;
            }
            let (last, odd) = (&src[(n - j) * stride..][..width], &mut odd[(j - 1) * width..][..width]);
            let pieces = even.chunks_exact_mut(LANES).zip(odd.chunks_exact_mut(LANES));
            for ((a, b), (sum, difference)) in first.chunks_exact(LANES).zip(last.chunks_exact(LANES)).zip(pieces) {
                // SAFETY: all pieces hold exactly 16 scalars, and unaligned access is allowed.
                unsafe {
                    let a = _mm512_cvtph_ps(_mm256_loadu_si256(a.as_ptr().cast()));
                    let b = _mm512_cvtph_ps(_mm256_loadu_si256(b.as_ptr().cast()));
                    _mm512_storeu_ps(sum.as_mut_ptr(), _mm512_add_ps(a, b));
                    _mm512_storeu_ps(difference.as_mut_ptr(), _mm512_sub_ps(a, b));
                }
            }
            for idx in width / LANES * LANES..width {
                let (a, b) = (first[idx].to_f32(), last[idx].to_f32());
                (even[idx], odd[idx]) = (a + b, a - b);
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn narrow(src: &[f32], dst: &mut [f16]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        let mut pieces = src.chunks_exact(LANES).zip(dst.chunks_exact_mut(LANES));
        for (from, to) in &mut pieces {
            // SAFETY: both pieces hold exactly 16 scalars, and unaligned access is allowed.
            unsafe {
                let rounded = _mm512_cvtps_ph::<NEAREST>(_mm512_loadu_ps(from.as_ptr()));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), rounded);
            }
        }
        let done = src.len() / LANES * LANES;
        for (from, to) in src[done..].iter().zip(&mut dst[done..]) {
            *to = f16::from_f32(*from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookups_have_the_bits_of_the_portable_table() {
        let special = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            3e38,
            -3e38,
            5.8125,
            -6.1875,
            5.811_5,
            -6.186_5,
            1e-40,
        ];
        let x: Vec<f32> = (0..100_003).map(|i| (i - 50_000) as f32 * 1.7e-4).chain(special).collect();
        let want: Vec<(f32, f32)> = x.iter().map(|&x| GeluTable::get().both(x)).collect();
        let (mut alone, mut value, mut slope) = (x.clone(), x.clone(), vec![7.0; x.len()]);
        gelu(&mut alone);
        gelu_both(&mut value, &mut slope);
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        for (i, x) in x.iter().enumerate() {
            assert!(same(value[i], want[i].0) && same(alone[i], want[i].0), "{x}: {} {:?}", value[i], want[i]);
            assert!(same(slope[i], want[i].1), "{x}: {} {:?}", slope[i], want[i]);
        }
    }

    #[test]
    fn every_bit_pattern_survives_and_rounding_is_that_of_the_library() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut wide = vec![0.0; all.len()];
        widen_f16(&all, &mut wide);
        let mut back = vec![f16::ZERO; all.len()];
        narrow_f16(&wide, &mut back);
        for ((&from, &to), &w) in all.iter().zip(&back).zip(&wide) {
            assert!(from.is_nan() && to.is_nan() && w.is_nan() || from.to_bits() == to.to_bits());
            assert!(w.is_nan() || w.to_bits() == from.to_f32().to_bits());
        }
        // Midpoints, neighbours of midpoints, overflow and underflow; an odd length for the tail.
        let hard: Vec<f32> = (0..20_011u32)
            .map(|i| f32::from_bits(0x3300_0000u32.wrapping_add(i.wrapping_mul(0x0000_3001))))
            .chain([65519.9, 65520.0, 65536.0, 1e30, -1e30, 2e-8, 3e-8, -0.0])
            .collect();
        let mut got = vec![f16::ZERO; hard.len()];
        narrow_f16(&hard, &mut got);
        for (&from, &to) in hard.iter().zip(&got) {
            assert_eq!(to.to_bits(), f16::from_f32(from).to_bits(), "{from}");
        }
    }
}
