//! The definition of a convolution, loop by loop.

use super::{Conv2d, ConvKind};

/// [`Conv2d`] by its definition in double precision, without bias.
///
/// # Shapes
/// - `x`: `[batch, n_1, n_2, c_x]` of the extents `field`, `w`: `[k_1, k_2, c_in, c_out]` of the extents `weight`
/// - returns the output's extents and values; empty if nothing of the field is left
#[must_use]
pub fn conv2d_reference(
    conv: Conv2d,
    (field, x): ([usize; 4], &[f64]),
    (weight, w): ([usize; 4], &[f64]),
) -> ([usize; 4], Vec<f64>) {
    let ([batch, n1, n2, c_x], [k1, k2, c_in, c_out]) = (field, weight);
    let [p1, p2] = conv.padding;
    let forward = conv.kind == ConvKind::Forward;
    let size = |n: usize, k: usize, p: usize| match forward {
        true => (n + 2 * p + 1).saturating_sub(k),
        false => (n + k).saturating_sub(1 + 2 * p),
    };
    let (y1, y2, c_y) = (size(n1, k1, p1), size(n2, k2, p2), if forward { c_out } else { c_in });
    let mut y = vec![0.0; batch * y1 * y2 * c_y];
    // Every product of the sum, wherever the map or its transpose puts it.
    for (b, i, j) in (0..batch).flat_map(|b| (0..n1).flat_map(move |i| (0..n2).map(move |j| (b, i, j)))) {
        for (d1, d2) in (0..k1).flat_map(|d1| (0..k2).map(move |d2| (d1, d2))) {
            let (to1, to2) = match forward {
                true => ((i + p1).checked_sub(d1), (j + p2).checked_sub(d2)),
                false => ((i + d1).checked_sub(p1), (j + d2).checked_sub(p2)),
            };
            let (Some(to1), Some(to2)) = (to1, to2) else { continue };
            if to1 >= y1 || to2 >= y2 {
                continue;
            }
            for (from, to) in (0..c_x).flat_map(|from| (0..c_y).map(move |to| (from, to))) {
                let (c, o) = if forward { (from, to) } else { (to, from) };
                let factor = w[((d1 * k2 + d2) * c_in + c) * c_out + o];
                y[((b * y1 + to1) * y2 + to2) * c_y + to] += factor * x[((b * n1 + i) * n2 + j) * c_x + from];
            }
        }
    }
    ([batch, y1, y2, c_y], y)
}
