// What every kernel file shares: stored scalars, their accumulators, and how one becomes the other.
//
// Kernel files are compiled with definitions of one letter for their types: names here are longer.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using f16 = __half;
using bf16 = __nv_bfloat16;
using f32 = float;
using f64 = double;

// What sums of a storage type are formed in.
template <class Stored> struct accumulator { using type = f32; };
template <> struct accumulator<f64> { using type = f64; };
template <class Stored> using acc_t = typename accumulator<Stored>::type;

// The accumulator of two storage types: the wider of theirs.
template <class First, class Second> struct wider { using type = f32; };
template <class Second> struct wider<f64, Second> { using type = f64; };
template <class First> struct wider<First, f64> { using type = f64; };
template <> struct wider<f64, f64> { using type = f64; };

template <class Wide> __device__ __forceinline__ Wide widen(f64 x) { return Wide(x); }
template <class Wide> __device__ __forceinline__ Wide widen(f32 x) { return Wide(x); }
template <class Wide> __device__ __forceinline__ Wide widen(f16 x) { return Wide(__half2float(x)); }
template <class Wide> __device__ __forceinline__ Wide widen(bf16 x) { return Wide(__bfloat162float(x)); }

// Nearest value, ties to even.
template <class Stored> __device__ __forceinline__ Stored narrow(f32 x);
template <> __device__ __forceinline__ f64 narrow<f64>(f32 x) { return f64(x); }
template <> __device__ __forceinline__ f32 narrow<f32>(f32 x) { return x; }
template <> __device__ __forceinline__ f16 narrow<f16>(f32 x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(f32 x) { return __float2bfloat16_rn(x); }
template <class Stored> __device__ __forceinline__ Stored narrow(f64 x);
template <> __device__ __forceinline__ f64 narrow<f64>(f64 x) { return x; }
template <> __device__ __forceinline__ f32 narrow<f32>(f64 x) { return f32(x); }
template <> __device__ __forceinline__ f16 narrow<f16>(f64 x) { return __double2half(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(f64 x) { return __double2bfloat16(x); }

// `Count` neighbouring values that are loaded and stored at once.
template <class Stored, int Count> struct alignas(sizeof(Stored) * Count) Pack { Stored at[Count]; };

// The exact GELU and its derivative.
__device__ __forceinline__ f32 gelu(f32 x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ f64 gelu(f64 x) { return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440)); }
__device__ __forceinline__ f32 gelu_slope(f32 x) {
    f32 cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return cdf + x * 0.39894228040143268f * expf(-0.5f * x * x);
}
__device__ __forceinline__ f64 gelu_slope(f64 x) {
    f64 cdf = 0.5 * (1.0 + erf(x * 0.70710678118654752440));
    return cdf + x * 0.39894228040143267794 * exp(-0.5 * x * x);
}

// First item and stride of a thread that walks over a row of items with all threads of the grid.
__device__ __forceinline__ long long grid_start() { return blockIdx.x * (long long)blockDim.x + threadIdx.x; }
__device__ __forceinline__ long long grid_stride() { return gridDim.x * (long long)blockDim.x; }

// The sum of the values of a block of `Threads` threads, in thread 0, in the order of a tree.
template <int Threads> __device__ __forceinline__ f64 block_sum(f64 value) {
    __shared__ f64 sums[Threads];
    // An earlier sum of this block may still be read there.
    __syncthreads();
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int half = Threads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}
