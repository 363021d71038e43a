// archs: sm_80 sm_90a
// variants: S=f32,T=f32,P=f32 S=f32,T=f16,P=f16 S=f16,T=f16,P=f16 S=f16,T=f32,P=f16 S=f32,T=bf16,P=bf16
//   S=bf16,T=bf16,P=bf16 S=bf16,T=f32,P=bf16 S=f64,T=f64,P=f64
//
// Points of a field in either layout, [batch, c, points] or [batch, points, c], to rows of channels and back.
#include "halfmode.cuh"

using A = wider<S, T>::type;

__device__ __forceinline__ long long place(long long point, int c, long long points, int channels, int first) {
    long long b = point / points, p = point % points;
    return first ? (b * channels + c) * points + p : point * channels + c;
}

// rows[i, :] = channels of point start + i, then its coordinates j / n_axis on a grid [n_1, n_2, n_3] (absent axes
// before the present ones: 1), of which the last `coordinates` are appended; or as many zeros.
extern "C" __global__ void gather_points(const S* __restrict__ x, T* __restrict__ rows, long long start, long long n,
                                         long long points, int channels, int first, int coordinates, int zeros, int n1,
                                         int n2, int n3) {
    int width = channels + coordinates;
    for (long long at = grid_start(); at < n * width; at += grid_stride()) {
        // Neighbouring threads take neighbouring points of a channel where that is how x is stored.
        long long i = first ? at % n : at / width;
        int c = first ? at / n : at % width;
        A value;
        if (c < channels) {
            value = widen<A>(x[place(start + i, c, points, channels, first)]);
        } else if (zeros) {
            value = A(0);
        } else {
            int axis = c - channels + 3 - coordinates, extents[3] = {n1, n2, n3};
            long long behind = 1;
            for (int a = 2; a > axis; --a) behind *= extents[a];
            value = A((start + i) % points / behind % extents[axis]) / A(extents[axis]);
        }
        rows[i * width + c] = narrow<T>(value);
    }
}

// channels of point start + i = rows[i, ..channels] + bias; rows are `width` long.
extern "C" __global__ void scatter_points(const S* __restrict__ rows, const P* __restrict__ bias, T* __restrict__ y,
                                          long long start, long long n, long long points, int channels, int first,
                                          int width) {
    for (long long at = grid_start(); at < n * channels; at += grid_stride()) {
        long long i = first ? at % n : at / channels;
        int c = first ? at / n : at % channels;
        A value = widen<A>(rows[i * width + c]) + (bias ? widen<A>(bias[c]) : A(0));
        y[place(start + i, c, points, channels, first)] = narrow<T>(value);
    }
}
