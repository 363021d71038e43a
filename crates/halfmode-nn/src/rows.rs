//! Small dense operations on tiles of rows, `[rows, channels]` row-major.

use halfmode_tensor::{Mat, MatMut, Real};

/// `y = keep * y + x w^T` with `x` `[rows, c_in]`, and `w` `[c_out, c_in]` given as its transpose `w_t`.
pub(crate) fn linear<R: Real>(x: &[R], w_t: &[R], y: &mut [R], (c_in, c_out): (usize, usize), keep: R) {
    let rows = y.len() / c_out;
    R::gemm((rows, c_out, c_in), Mat::rows(x, c_in), Mat::rows(w_t, c_out), MatMut::rows(y, c_out), keep, R::ONE);
}

/// `gx = keep * gx + gy w`: the adjoint of [`linear`] in `x`.
pub(crate) fn linear_grad_x<R: Real>(gy: &[R], w: &[R], gx: &mut [R], (c_in, c_out): (usize, usize), keep: R) {
    let rows = gy.len() / c_out;
    R::gemm((rows, c_in, c_out), Mat::rows(gy, c_out), Mat::rows(w, c_in), MatMut::rows(gx, c_in), keep, R::ONE);
}

/// `gw += gy^T x`: the adjoint of [`linear`] in `w`.
pub(crate) fn linear_grad_w<R: Real>(gy: &[R], x: &[R], gw: &mut [R], (c_in, c_out): (usize, usize)) {
    let rows = gy.len() / c_out;
    R::gemm(
        (c_out, c_in, rows),
        Mat::transposed(gy, c_out),
        Mat::rows(x, c_in),
        MatMut::rows(gw, c_in),
        R::ONE,
        R::ONE,
    );
}

/// `y[row, c] += b[c]`
pub(crate) fn add_bias<R: Real>(y: &mut [R], b: &[R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for row in y.chunks_exact_mut(b.len()) {
                for (y, b) in row.iter_mut().zip(b) {
                    *y += *b;
                }
            }
        },
    );
}

/// Channels whose sums stay in one register over all rows.
const LANES: usize = 16;

/// Blocks of at most [`LANES`] channels.
fn blocks(c: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..c).step_by(LANES).map(move |first| first..(first + LANES).min(c))
}

/// `sums[c] += sum over rows of g[row, c]`
pub(crate) fn add_column_sums<R: Real>(g: &[R], sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            let c = sums.len();
            for block in blocks(c) {
                let mut lanes = [R::ZERO; LANES];
                lanes[..block.len()].copy_from_slice(&sums[block.clone()]);
                if block.len() == LANES {
                    for row in g.chunks_exact(c) {
                        lanes.iter_mut().zip(&row[block.start..][..LANES]).for_each(|(sum, g)| *sum += *g);
                    }
                } else {
                    for row in g.chunks_exact(c) {
                        lanes.iter_mut().zip(&row[block.clone()]).for_each(|(sum, g)| *sum += *g);
                    }
                }
                sums[block.clone()].copy_from_slice(&lanes[..block.len()]);
            }
        },
    );
}

/// `y[row, c] += gate[c] * x[row, c]`
pub(crate) fn add_gated<R: Real>(y: &mut [R], gate: &[R], x: &[R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (y, x) in y.chunks_exact_mut(gate.len()).zip(x.chunks_exact(gate.len())) {
                for ((y, x), gate) in y.iter_mut().zip(x).zip(gate) {
                    *y += *gate * *x;
                }
            }
        },
    );
}

/// `gx[row, c] = gate[c] * g[row, c]` and `sums[c] += sum over rows of g[row, c] x[row, c]`
pub(crate) fn gate_grads<R: Real>(g: &[R], gate: &[R], x: &[R], gx: &mut [R], sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            let c = gate.len();
            for (gx, g) in gx.chunks_exact_mut(c).zip(g.chunks_exact(c)) {
                for ((gx, g), gate) in gx.iter_mut().zip(g).zip(gate) {
                    *gx = *gate * *g;
                }
            }
        },
    );
    add_column_products(g, x, sums);
}

/// `sums[c] += sum over rows of g[row, c] x[row, c]`
pub(crate) fn add_column_products<R: Real>(g: &[R], x: &[R], sums: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            let c = sums.len();
            for block in blocks(c) {
                let mut lanes = [R::ZERO; LANES];
                lanes[..block.len()].copy_from_slice(&sums[block.clone()]);
                let rows = g.chunks_exact(c).zip(x.chunks_exact(c));
                if block.len() == LANES {
                    for (g, x) in rows {
                        let terms = g[block.start..][..LANES].iter().zip(&x[block.start..][..LANES]);
                        lanes.iter_mut().zip(terms).for_each(|(sum, (g, x))| *sum += *g * *x);
                    }
                } else {
                    for (g, x) in rows {
                        let terms = g[block.clone()].iter().zip(&x[block.clone()]);
                        lanes.iter_mut().zip(terms).for_each(|(sum, (g, x))| *sum += *g * *x);
                    }
                }
                sums[block.clone()].copy_from_slice(&lanes[..block.len()]);
            }
        },
    );
}

/// `g *= slope`, elementwise.
pub(crate) fn scale_by<R: Real>(g: &mut [R], slope: &[R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (g, slope) in g.iter_mut().zip(slope) {
                *g *= *slope;
            }
        },
    );
}

/// `sum += term`, elementwise.
pub(crate) fn add<R: Real>(sum: &mut [R], term: &[R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for (sum, term) in sum.iter_mut().zip(term) {
                *sum += *term;
            }
        },
    );
}

/// `gx += g (1 - t^2)`, the adjoint of `t = tanh x`.
pub(crate) fn add_tanh_grad<R: Real>(gx: &mut [R], g: &[R], t: &[R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for ((gx, g), t) in gx.iter_mut().zip(g).zip(t) {
                *gx += *g * (R::ONE - *t * *t);
            }
        },
    );
}
