// archs: sm_80 sm_90a
// variants: S=f16,T=f16 S=bf16,T=bf16 S=f32,T=f32 S=f64,T=f64 S=f32,T=f16 S=f32,T=bf16 S=f16,T=f32 S=bf16,T=f32
//
// Complex fields between interleaved pairs, [points, inner, (re, im)], and planes, [points, (re, im), inner]. S is the
// type that is read, T the one that is written, n the number of pairs.
#include "halfmode.cuh"

using A = wider<S, T>::type;

extern "C" __global__ void to_planes(const S* __restrict__ z, T* __restrict__ planes, long long n, long long inner) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long re = 2 * (at / inner) * inner + at % inner;
        Pack<S, 2> pair = reinterpret_cast<const Pack<S, 2>*>(z)[at];
        planes[re] = narrow<T>(widen<A>(pair.at[0]));
        planes[re + inner] = narrow<T>(widen<A>(pair.at[1]));
    }
}

extern "C" __global__ void to_pairs(const S* __restrict__ planes, T* __restrict__ z, long long n, long long inner) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long re = 2 * (at / inner) * inner + at % inner;
        Pack<T, 2> pair;
        pair.at[0] = narrow<T>(widen<A>(planes[re]));
        pair.at[1] = narrow<T>(widen<A>(planes[re + inner]));
        reinterpret_cast<Pack<T, 2>*>(z)[at] = pair;
    }
}
