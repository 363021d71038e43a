// archs: sm_80 sm_90a
// variants: T=f32 T=f64 T=f16
//
// The negative log-likelihood under a standard normal base, of points z and what their log-densities gained. T is what
// points are stored in; the loss, the gain and gradients are in its accumulator.
#include "halfmode.cuh"

using A = acc_t<T>;

// The mean over n points of d axes: one block.
extern "C" __global__ void nll(const T* __restrict__ z, const A* __restrict__ gained, A* loss, long long n, int d) {
    f64 sum = 0;
    for (long long i = threadIdx.x; i < n * d; i += 256) {
        f64 value = widen<f64>(z[i]);
        sum += 0.5 * value * value;
    }
    for (long long i = threadIdx.x; i < n; i += 256) sum += f64(gained[i]);
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) loss[0] = A(sum / f64(n) + 0.5 * d * 1.8378770664093454836);
}

extern "C" __global__ void nll_gradient(const T* __restrict__ z, const A* __restrict__ seed, A* gz, A* gained, long long n,
                                        int d) {
    A each = seed[0] / A(n);
    for (long long i = grid_start(); i < n * d; i += grid_stride()) gz[i] = each * widen<A>(z[i]);
    for (long long i = grid_start(); i < n; i += grid_stride()) gained[i] = each;
}
