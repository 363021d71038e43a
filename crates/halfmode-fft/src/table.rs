//! The matrices of the truncated DFT, built in double precision with exact argument reduction.

use std::f64::consts::TAU;

/// The frequency of stored index `idx` on an axis of `k` modes in centred order: `idx - k/2`.
#[must_use]
pub fn signed_frequency(idx: usize, k: usize) -> i64 {
    idx as i64 - (k / 2) as i64
}

/// (cos, sin) of 2 pi f j / n. The product is reduced modulo n in integers first, and the angle
/// is folded into an eighth of the circle, so that symmetries hold exactly: sin(pi) is 0.
pub(crate) fn unit_root(f: i64, j: usize, n: usize) -> (f64, f64) {
    let n_wide = n as i128;
    let turn = (i128::from(f) * j as i128).rem_euclid(n_wide);
    // Eighths of the circle, counted in integers: 8 * turn / n.
    let octant = (8 * turn / n_wide) as u8;
    let angle = |part: i128| TAU * part as f64 / n as f64;
    // In each octant the angle is measured from the nearest axis.
    let from_axis = |axis: i128| angle((4 * turn - axis * n_wide).abs()) / 4.0;
    match octant {
        0 => (from_axis(0).cos(), from_axis(0).sin()),
        1 => (from_axis(1).sin(), from_axis(1).cos()),
        2 => (-from_axis(1).sin(), from_axis(1).cos()),
        3 => (-from_axis(2).cos(), from_axis(2).sin()),
        4 => (-from_axis(2).cos(), -from_axis(2).sin()),
        5 => (-from_axis(3).sin(), -from_axis(3).cos()),
        6 => (from_axis(3).sin(), -from_axis(3).cos()),
        _ => (from_axis(4).cos(), -from_axis(4).sin()),
    }
}

/// The weight of column `f` of a half spectrum on a grid of `n` points: 2 for columns whose
/// conjugate is omitted, 1 for the mean and the Nyquist frequency.
pub(crate) fn half_weight(f: usize, n: usize) -> f64 {
    if f == 0 || 2 * f == n { 1.0 } else { 2.0 }
}

/// `[2k, n]`: rows (re, im) x mode; maps n real points to k modes. `weighted` multiplies row f by
/// its half-spectrum weight.
pub(crate) fn real_matrix(n: usize, k: usize, weighted: bool) -> Vec<f64> {
    let mut matrix = vec![0.0; 2 * k * n];
    for f in 0..k {
        let w = if weighted { half_weight(f, n) } else { 1.0 };
        for j in 0..n {
            let (c, s) = unit_root(f as i64, j, n);
            matrix[f * n + j] = w * c;
            matrix[(k + f) * n + j] = -w * s;
        }
    }
    matrix
}

/// `[2k, 2n]`: rows (re, im) x mode, columns point x (re, im); maps n complex points to k modes.
pub(crate) fn complex_matrix(n: usize, k: usize) -> Vec<f64> {
    let mut matrix = vec![0.0; 4 * k * n];
    for idx in 0..k {
        for j in 0..n {
            let (c, s) = unit_root(signed_frequency(idx, k), j, n);
            let (re_row, im_row) = (idx * 2 * n, (k + idx) * 2 * n);
            matrix[re_row + 2 * j] = c;
            matrix[re_row + 2 * j + 1] = s;
            matrix[im_row + 2 * j] = -s;
            matrix[im_row + 2 * j + 1] = c;
        }
    }
    matrix
}

/// `[frequencies, points]`: `weight(f)` times the cosine of 2 pi f j / n, f from 0, j from 0.
pub(crate) fn cosines(n: usize, frequencies: usize, points: usize, weight: impl Fn(usize) -> f64) -> Vec<f64> {
    let at = |f: usize, j: usize| weight(f) * unit_root(f as i64, j, n).0;
    (0..frequencies).flat_map(|f| (0..points).map(move |j| (f, j))).map(|(f, j)| at(f, j)).collect()
}

/// As [`cosines`], of sines; f from 1, j from 1: at 0 they are 0.
pub(crate) fn sines(n: usize, frequencies: usize, points: usize, weight: impl Fn(usize) -> f64) -> Vec<f64> {
    let at = |f: usize, j: usize| weight(f) * unit_root(f as i64, j, n).1;
    (1..=frequencies).flat_map(|f| (1..=points).map(move |j| (f, j))).map(|(f, j)| at(f, j)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_match_the_library_and_symmetries_are_exact() {
        for n in [1usize, 2, 3, 4, 5, 7, 8, 12, 16, 421, 1024] {
            for f in [-513i64, -7, -1, 0, 1, 2, 3, 210, 512] {
                for j in [0, 1, 2, n / 2, n - 1] {
                    let (c, s) = unit_root(f, j, n);
                    let turn = (i128::from(f) * j as i128).rem_euclid(n as i128) as f64;
                    let (want_s, want_c) = (TAU * turn / n as f64).sin_cos();
                    assert!((c - want_c).abs() < 1e-15 && (s - want_s).abs() < 1e-15, "{n} {f} {j}");
                }
            }
        }
        assert_eq!(unit_root(1, 4, 8), (-1.0, 0.0));
        assert_eq!(unit_root(1, 2, 8), (0.0, 1.0));
        let (c, s) = unit_root(1, 1, 8);
        assert!((c - s).abs() < 2e-16);
    }
}
