//! Conversions between binary16 and binary32 with the processor's own instructions.

#![allow(unsafe_code, reason = "AVX-512 conversion intrinsics have no safe equivalent")]

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Widens binary16 to binary32. `src` and `dst` have the same length.
pub(crate) fn widen_f16(src: &[f16], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
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
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F was just found on this processor.
        unsafe { avx512::narrow(src, dst) };
        return;
    }
    dst.convert_from_f32_slice(src);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use half::f16;
    use std::arch::x86_64::{
        _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_cvtph_ps,
        _mm512_cvtps_ph, _mm512_loadu_ps, _mm512_storeu_ps,
    };

    const LANES: usize = 16;

    #[target_feature(enable = "avx512f")]
    pub(super) fn widen(src: &[f16], dst: &mut [f32]) {
        let mut pieces = src.chunks_exact(LANES).zip(dst.chunks_exact_mut(LANES));
        for (from, to) in &mut pieces {
            // SAFETY: both pieces hold exactly 16 scalars, and unaligned access is allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) };
        }
        let done = src.len() / LANES * LANES;
        for (from, to) in src[done..].iter().zip(&mut dst[done..]) {
            *to = from.to_f32();
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
