// archs: sm_80 sm_90a
// variants: S=f32,T=f16 S=f16,T=f32 S=f32,T=bf16 S=bf16,T=f32 S=f32,T=f32 S=f64,T=f64 S=f16,T=f16 S=bf16,T=bf16
//
// Elementwise operations on whole tensors and sums over them. S is the type that is read, T the one that is written.
#include "halfmode.cuh"

using A = wider<S, T>::type;

// Applies `f` to `n` pairs of scalars, four at a time.
template <class F> __device__ __forceinline__ void each(const S* x, T* y, long long n, F f) {
    long long whole = n / 4;
    for (long long i = grid_start(); i < whole; i += grid_stride()) {
        Pack<S, 4> in = reinterpret_cast<const Pack<S, 4>*>(x)[i];
        Pack<T, 4> out = reinterpret_cast<Pack<T, 4>*>(y)[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = narrow<T>(f(widen<A>(in.at[j]), widen<A>(out.at[j])));
        reinterpret_cast<Pack<T, 4>*>(y)[i] = out;
    }
    for (long long i = 4 * whole + grid_start(); i < n; i += grid_stride())
        y[i] = narrow<T>(f(widen<A>(x[i]), widen<A>(y[i])));
}

// y = x
extern "C" __global__ void convert(const S* __restrict__ x, T* __restrict__ y, long long n) {
    long long whole = n / 4;
    for (long long i = grid_start(); i < whole; i += grid_stride()) {
        Pack<S, 4> in = reinterpret_cast<const Pack<S, 4>*>(x)[i];
        Pack<T, 4> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = narrow<T>(widen<A>(in.at[j]));
        reinterpret_cast<Pack<T, 4>*>(y)[i] = out;
    }
    for (long long i = 4 * whole + grid_start(); i < n; i += grid_stride()) y[i] = narrow<T>(widen<A>(x[i]));
}

// y += x
extern "C" __global__ void add_assign(const S* __restrict__ x, T* __restrict__ y, long long n) {
    each(x, y, n, [](A term, A sum) { return sum + term; });
}

// x *= factor
extern "C" __global__ void scale_assign(T* x, f64 factor, long long n) {
    acc_t<T> by = acc_t<T>(factor);
    for (long long i = grid_start(); i < n; i += grid_stride()) x[i] = narrow<T>(widen<acc_t<T>>(x[i]) * by);
}

// parts[block] = sum of x^2 over the block's share: the same order for every launch with as many blocks.
extern "C" __global__ void sum_squares(const S* __restrict__ x, f64* __restrict__ parts, long long n) {
    __shared__ f64 sums[256];
    f64 sum = 0;
    for (long long i = grid_start(); i < n; i += grid_stride()) {
        f64 value = widen<f64>(x[i]);
        sum += value * value;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}
