//! Sums and differences of rows: what halves the work of a transform whose matrix is cosines and
//! sines.
//!
//! Rows `j` and `n - j` of a matrix of `n` rows meet the same cosine and opposite sines. Its even part
//! holds row 0, the sums `x_j + x_{n-j}` and, for even `n`, row `n/2`; its odd part the differences
//! `x_j - x_{n-j}`. Conversions from and to storage happen on the way.

use crate::{Real, View, ViewMut, simd};
use half::{bf16, f16};

/// Rows of the even part of a matrix of `n` rows.
#[must_use]
pub fn even_rows(n: usize) -> usize {
    n / 2 + 1
}

/// Rows of the odd part of a matrix of `n` rows.
#[must_use]
pub fn odd_rows(n: usize) -> usize {
    n.saturating_sub(1) / 2
}

/// A stored scalar.
trait Stored: Copy {
    fn widen<R: Real>(self) -> R;
}

impl Stored for f64 {
    #[inline(always)]
    fn widen<R: Real>(self) -> R {
        R::from_f64(self)
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn widen<R: Real>(self) -> R {
        R::from_f32(self)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen<R: Real>(self) -> R {
        R::from_f32(f32::from_bits(u32::from(self.to_bits()) << 16))
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen<R: Real>(self) -> R {
        R::from_f32(self.to_f32())
    }
}

/// The even and odd parts of a matrix of `n` rows of `width` scalars, `stride` apart in `src`.
///
/// `even` holds `even_rows(n) * width` scalars, `odd` holds `odd_rows(n) * width`.
pub fn fold_rows<R: Real>(src: View<'_>, n: usize, (stride, width): (usize, usize), even: &mut [R], odd: &mut [R]) {
    if let (View::F16(src), ViewMut::F32(even), ViewMut::F32(odd)) = (src, R::view_mut(even), R::view_mut(odd))
        && simd::fold_f16(src, n, (stride, width), even, odd)
    {
        return;
    }
    R::vectorised(
        #[inline(always)]
        || match src {
            View::F64(src) => fold(src, n, (stride, width), even, odd),
            View::F32(src) => fold(src, n, (stride, width), even, odd),
            View::Bf16(src) => fold(src, n, (stride, width), even, odd),
            View::F16(src) => fold(src, n, (stride, width), even, odd),
        },
    );
}

#[inline(always)]
fn fold<S: Stored, R: Real>(src: &[S], n: usize, (stride, width): (usize, usize), even: &mut [R], odd: &mut [R]) {
    let row = |j: usize| &src[j * stride..][..width];
    for (j, even) in even.chunks_exact_mut(width).enumerate() {
        if j == 0 || 2 * j == n {
            even.iter_mut().zip(row(j)).for_each(|(to, from)| *to = from.widen());
            continue;
        }
        let odd = &mut odd[(j - 1) * width..][..width];
        for ((sum, difference), (a, b)) in even.iter_mut().zip(odd).zip(row(j).iter().zip(row(n - j))) {
            let (a, b) = (a.widen::<R>(), b.widen::<R>());
            (*sum, *difference) = (a + b, a - b);
        }
    }
}

/// The matrix of `n` contiguous rows of `width` scalars whose even and odd parts, in [`fold_rows`]'
/// order, are given: rows `j` and `n - j` are `even_j + odd_j` and `even_j - odd_j`.
pub fn unfold_rows<R: Real>(even: &[R], odd: &[R], width: usize, dst: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            let n = dst.len() / width;
            for (j, even) in even.chunks_exact(width).enumerate() {
                if j == 0 || 2 * j == n {
                    dst[j * width..][..width].copy_from_slice(even);
                    continue;
                }
                let odd = &odd[(j - 1) * width..][..width];
                let (first, last) = dst.split_at_mut((n - j) * width);
                let (sums, differences) = (&mut first[j * width..][..width], &mut last[..width]);
                for ((sum, difference), (e, o)) in sums.iter_mut().zip(differences).zip(even.iter().zip(odd)) {
                    (*sum, *difference) = (*e + *o, *e - *o);
                }
            }
        },
    );
}

/// `sum = a + b` and `difference = a - b` of stored rows of one length.
pub fn add_sub<R: Real>(a: View<'_>, b: View<'_>, sum: &mut [R], difference: &mut [R]) {
    a.widen(sum);
    b.widen(difference);
    add_sub_in_place(sum, difference);
}

/// `sum = a + b` and `difference = a - b`, rounded to storage; what is left in `a` and `b` is arbitrary.
pub fn narrow_add_sub<R: Real>(a: &mut [R], b: &mut [R], sum: &mut ViewMut<'_>, difference: &mut ViewMut<'_>) {
    if let (Some(sum), Some(difference)) = (R::direct_mut(sum), R::direct_mut(difference)) {
        R::vectorised(
            #[inline(always)]
            || {
                for ((sum, difference), (a, b)) in sum.iter_mut().zip(difference).zip(a.iter().zip(&*b)) {
                    (*sum, *difference) = (*a + *b, *a - *b);
                }
            },
        );
        return;
    }
    add_sub_in_place(a, b);
    sum.narrow(a);
    difference.narrow(b);
}

/// `a` becomes `a + b`, and `b` becomes `a - b`.
pub fn add_sub_in_place<R: Real>(a: &mut [R], b: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Purpose, Tensor};
    use halfmode_precision::Precision;

    fn check<R: Real>(precision: Precision, n: usize, stride: usize, width: usize) {
        let device = Device::cpu(1).unwrap();
        let values: Vec<f64> = (0..n * stride).map(|i| ((i * 37 % 101) as f64) / 8.0 - 5.0).collect();
        let x = Tensor::from_slice(&device, &values, [n * stride], precision, Purpose::Workspace).unwrap();
        let at = |j: usize, c: usize| values[j * stride + c];
        let same = |got: R, want: f64| (got.to_f64() - want).abs() <= 0.0;
        let (mut even, mut odd) = (vec![R::ZERO; even_rows(n) * width], vec![R::ZERO; odd_rows(n) * width]);
        fold_rows(x.view().unwrap(), n, (stride, width), &mut even, &mut odd);
        let mut twice = vec![R::ZERO; n * width];
        unfold_rows(&even, &odd, width, &mut twice);
        for c in 0..width {
            for j in 0..=n / 2 {
                let paired = j > 0 && 2 * j < n;
                let want = if paired { at(j, c) + at(n - j, c) } else { at(j, c) };
                assert!(same(even[j * width + c], want), "{precision} {n} {width}");
                if paired {
                    assert!(same(odd[(j - 1) * width + c], at(j, c) - at(n - j, c)), "{precision} {n} {width}");
                }
            }
            for j in 0..n {
                let alone = j == 0 || 2 * j == n;
                assert!(same(twice[j * width + c], if alone { 1.0 } else { 2.0 } * at(j, c)), "{precision} {n}");
            }
        }
    }

    /// The values are eighths below 8, exact in every format, and so are their sums.
    #[test]
    fn parts_are_sums_and_differences_in_every_format() {
        for (n, stride, width) in [(1, 3, 3), (2, 1, 1), (5, 20, 17), (8, 70, 70), (7, 33, 16), (16, 48, 32)] {
            for precision in [Precision::F16, Precision::Bf16, Precision::F32] {
                check::<f32>(precision, n, stride, width);
            }
            check::<f64>(Precision::F64, n, stride, width);
            check::<f64>(Precision::F16, n, stride, width);
        }
    }

    #[test]
    fn rows_are_rounded_after_the_sum() {
        let device = Device::cpu(1).unwrap();
        for precision in [Precision::F16, Precision::Bf16, Precision::F32] {
            let row = |seed: usize| (0..37).map(|i| ((i * seed % 23) as f32).mul_add(0.37, -3.3)).collect::<Vec<f32>>();
            let (a, b) = (row(5), row(11));
            let make = || Tensor::from_slice(&device, &[0.0; 37], [37], precision, Purpose::Workspace).unwrap();
            let (mut sum, mut difference) = (make(), make());
            let (mut a_left, mut b_left) = (a.clone(), b.clone());
            let (mut sum_view, mut difference_view) = (sum.view_mut().unwrap(), difference.view_mut().unwrap());
            narrow_add_sub(&mut a_left, &mut b_left, &mut sum_view, &mut difference_view);
            let want = |values: Vec<f32>| {
                let wide: Vec<f64> = values.into_iter().map(f64::from).collect();
                let it = Tensor::from_slice(&device, &wide, [37], precision, Purpose::Workspace).unwrap();
                it.to_vec::<f64>().unwrap()
            };
            let pairs = || a.iter().zip(&b);
            assert_eq!(sum.to_vec::<f64>().unwrap(), want(pairs().map(|(a, b)| a + b).collect()), "{precision}");
            assert_eq!(difference.to_vec::<f64>().unwrap(), want(pairs().map(|(a, b)| a - b).collect()));
            let (mut wide_sum, mut wide_difference) = (vec![0.0f32; 37], vec![0.0f32; 37]);
            add_sub(sum.view().unwrap(), difference.view().unwrap(), &mut wide_sum, &mut wide_difference);
            let stored = |it: &Tensor| it.to_vec::<f64>().unwrap();
            for (idx, (s, d)) in stored(&sum).into_iter().zip(stored(&difference)).enumerate() {
                assert_eq!((wide_sum[idx], wide_difference[idx]), (s as f32 + d as f32, s as f32 - d as f32));
            }
        }
    }
}
