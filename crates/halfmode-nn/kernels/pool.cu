// archs: sm_80 sm_90a
// variants: S=f16,T=f16 S=bf16,T=bf16 S=f32,T=f32 S=f64,T=f64 S=f32,T=f16 S=f32,T=bf16
//
// Means over windows of fields [batch, n_1, n_2, c] that lie side by side, m_1 by m_2 of them. S is the storage that is
// read, T the one that is written.
#include "halfmode.cuh"

using A = wider<S, T>::type;

// The first point of window `at`, which counts samples as well.
__device__ __forceinline__ long long window_start(long long at, int n1, int n2, int m1, int m2, int w1, int w2) {
    long long j = at % m2, i = at / m2 % m1, b = at / m2 / m1;
    return (b * n1 + i * w1) * n2 + j * w2;
}

// A thread per mean.
extern "C" __global__ void pool(const S* x, T* y, int n1, int n2, int m1, int m2, int w1, int w2, int channels,
                                long long n) {
    for (long long item = grid_start(); item < n; item += grid_stride()) {
        const S* from = x + window_start(item / channels, n1, n2, m1, m2, w1, w2) * channels + item % channels;
        A sum = 0;
        for (int i = 0; i < w1; ++i)
            for (int j = 0; j < w2; ++j) sum += widen<A>(from[((long long)i * n2 + j) * channels]);
        y[item] = narrow<T>(sum * (A(1) / A(w1 * w2)));
    }
}

// A block per large window and 32 channels: eight runs of points, each in order, then the runs in order.
extern "C" __global__ void pool_large(const S* x, T* y, int n1, int n2, int m1, int m2, int w1, int w2, int channels) {
    __shared__ A runs[8][33];
    int column = threadIdx.x % 32, run = threadIdx.x / 32, c = blockIdx.y * 32 + column;
    const S* from = x + window_start(blockIdx.x, n1, n2, m1, m2, w1, w2) * channels + c;
    A sum = 0;
    for (int point = run; c < channels && point < w1 * w2; point += 8)
        sum += widen<A>(from[((long long)(point / w2) * n2 + point % w2) * channels]);
    runs[run][column] = sum;
    __syncthreads();
    if (run || c >= channels) return;
    sum = 0;
    for (int r = 0; r < 8; ++r) sum += runs[r][column];
    y[(long long)blockIdx.x * channels + c] = narrow<T>(sum * (A(1) / A(w1 * w2)));
}

// gx = g of the window over its points; zero beyond the last whole window. n counts the scalars of gx.
extern "C" __global__ void pool_backward(const S* g, T* gx, int n1, int n2, int m1, int m2, int w1, int w2, int channels,
                                         long long n) {
    for (long long item = grid_start(); item < n; item += grid_stride()) {
        long long point = item / channels;
        int j = point % n2 / w2, i = point / n2 % n1 / w1;
        long long b = point / n2 / n1;
        A value = 0;
        if (i < m1 && j < m2) value = widen<A>(g[((b * m1 + i) * m2 + j) * channels + item % channels]) * (A(1) / A(w1 * w2));
        gx[item] = narrow<T>(value);
    }
}
