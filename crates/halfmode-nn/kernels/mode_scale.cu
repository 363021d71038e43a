// archs: sm_80 sm_90a
// variants: X=f16,W=f16,Y=f16 X=bf16,W=bf16,Y=bf16 X=f32,W=f32,Y=f32 X=f64,W=f64,Y=f64 X=f32,W=f32,Y=f16
//   X=f16,W=f32,Y=f16
//
// The separable mode product of spectra [batch, (re, im), modes, c] with weights [modes, (re | im) c]. X, W and Y are
// the storage of spectrum, weight and result. `lane` is modes times c.
#include "halfmode.cuh"

// y = x w; n is batch times lane.
extern "C" __global__ void scale_forward(const X* __restrict__ x, const W* __restrict__ w, Y* __restrict__ y,
                                         long long n, long long lane, int c) {
    using A = acc_t<Y>;
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long idx = at % lane, re = 2 * (at / lane) * lane + idx, im = re + lane, of = idx / c * 2 * c + idx % c;
        A a = widen<A>(x[re]), b = widen<A>(x[im]), p = widen<A>(w[of]), q = widen<A>(w[of + c]);
        y[re] = narrow<Y>(a * p - b * q);
        y[im] = narrow<Y>(a * q + b * p);
    }
}

// gx = g conj(w)
extern "C" __global__ void scale_backward(const Y* __restrict__ g, const W* __restrict__ w, X* __restrict__ gx,
                                          long long n, long long lane, int c) {
    using A = acc_t<X>;
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long idx = at % lane, re = 2 * (at / lane) * lane + idx, im = re + lane, of = idx / c * 2 * c + idx % c;
        A a = widen<A>(g[re]), b = widen<A>(g[im]), p = widen<A>(w[of]), q = widen<A>(w[of + c]);
        gx[re] = narrow<X>(a * p + b * q);
        gx[im] = narrow<X>(b * p - a * q);
    }
}

// gw = factor times the sum over the batch of conj(x) g, in order.
extern "C" __global__ void scale_backward_weight(const X* __restrict__ x, const Y* __restrict__ g,
                                                 acc_t<X>* __restrict__ gw, f64 factor, long long batch, long long lane,
                                                 int c) {
    using A = acc_t<X>;
    for (long long idx = grid_start(); idx < lane; idx += grid_stride()) {
        A sum_re = 0, sum_im = 0;
        for (long long b = 0; b < batch; ++b) {
            long long re = 2 * b * lane + idx, im = re + lane;
            A a = widen<A>(x[re]), d = widen<A>(x[im]), p = widen<A>(g[re]), q = widen<A>(g[im]);
            sum_re += a * p + d * q;
            sum_im += a * q - d * p;
        }
        long long of = idx / c * 2 * c + idx % c;
        gw[of] = sum_re * A(factor);
        gw[of + c] = sum_im * A(factor);
    }
}
