// archs: sm_80 sm_90a
// variants: T=f16 T=bf16
//
// The norm between the two convolutions of a symmetric layer, for halves [batch, points, channels] with channels in eights,
// at most 2048 of them. A thread has eight neighbouring channels of some points; blocks are [parts, batch].
#include "halfmode.cuh"

constexpr int THREADS = 256;
using Values = Pack<T, 8>;

struct Walk {
    int c, row_in_block, rows_per_block;
    bool active;
    __device__ Walk(int channels) {
        int lanes = channels / 8;
        c = threadIdx.x % lanes * 8;
        rows_per_block = THREADS / lanes;
        row_in_block = threadIdx.x / lanes;
        active = row_in_block < rows_per_block;
    }
    // Calls with the place of the first of eight values.
    template <class F> __device__ __forceinline__ void each(int points, int channels, F f) const {
        if (!active) return;
        long long first = (long long)blockIdx.y * points;
#pragma unroll 2
        for (int row = blockIdx.x * rows_per_block + row_in_block; row < points; row += gridDim.x * rows_per_block)
            f((first + row) * channels + c);
    }
};

// Eight of two rows of numbers per sample.
struct Two {
    f32 first[8], second[8];
    __device__ Two(const f32* from, int channels, int c) {
        const f32* at = from + 2ll * blockIdx.y * channels + c;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            first[k] = at[k];
            second[k] = at[channels + k];
        }
    }
};

// Warps of a block that sums parts: each takes every 32nd, so that few loads wait for one another.
constexpr int RUNS = 32;

// The sum of a warp's values of each of 32 columns over all warps: column threadIdx.x % 32, in every thread.
__device__ __forceinline__ f64 column_sum(f64 value) {
    __shared__ f64 runs[RUNS][33];
    __syncthreads();
    runs[threadIdx.x / 32][threadIdx.x % 32] = value;
    __syncthreads();
    f64 sum = 0;
#pragma unroll
    for (int run = 0; run < RUNS; ++run) sum += runs[run][threadIdx.x % 32];
    return sum;
}

// A sample of y1 x y2 points in tiles of t1 x t2.
struct Tiles {
    int y1, y2, t1, t2, across, n;
    __device__ Tiles(int y1, int y2, int t1, int t2)
        : y1(y1), y2(y2), t1(t1), t2(t2), across((y2 + t2 - 1) / t2), n((y1 + t1 - 1) / t1 * across) {}
    __device__ __forceinline__ int points(int tile) const {
        return min(t1, y1 - tile / across * t1) * min(t2, y2 - tile % across * t2);
    }
};

// stats[sample] = mean and reciprocal deviation of each channel, from those of tiles: sums of d = x - s, of d^2, and s.
// Blocks are [batch, channels / 32].
extern "C" __global__ void __launch_bounds__(32 * RUNS)
finish_moments(const f32* parts, f32* stats, int y1, int y2, int t1, int t2, int channels) {
    Tiles tiles(y1, y2, t1, t2);
    int points = y1 * y2, c = blockIdx.y * 32 + threadIdx.x % 32;
    const f32* from = parts + 3ll * blockIdx.x * tiles.n * channels + c;
    bool there = c < channels;
    f64 sum = 0, squares = 0;
    for (int k = threadIdx.x / 32; there && k < tiles.n; k += RUNS) {
        const f32* at = from + 3ll * k * channels;
        sum += f64(at[0]) + f64(at[2ll * channels]) * tiles.points(k);
    }
    f64 mean = column_sum(sum) / points;
    for (int k = threadIdx.x / 32; there && k < tiles.n; k += RUNS) {
        const f32* at = from + 3ll * k * channels;
        f64 n = tiles.points(k), d = at[0] / n, off = d + f64(at[2ll * channels]) - mean;
        squares += f64(at[channels]) - n * d * d + n * off * off;
    }
    f64 variance = fmax(column_sum(squares) / points, 0.0);
    if (!there || threadIdx.x >= 32) return;
    stats[2ll * blockIdx.x * channels + c] = f32(mean);
    stats[(2ll * blockIdx.x + 1) * channels + c] = f32(1.0 / sqrt(variance + 1e-5));
}

// means[sample] = those of the two first rows of `parts`. Blocks as above.
extern "C" __global__ void __launch_bounds__(32 * RUNS)
finish_sums(const f32* parts, f32* means, int y1, int y2, int t1, int t2, int channels) {
    Tiles tiles(y1, y2, t1, t2);
    int points = y1 * y2, c = blockIdx.y * 32 + threadIdx.x % 32;
    const f32* from = parts + 3ll * blockIdx.x * tiles.n * channels + c;
    for (int which = 0; which < 2; ++which) {
        f64 sum = 0;
        for (int k = threadIdx.x / 32; c < channels && k < tiles.n; k += RUNS) sum += from[(3ll * k + which) * channels];
        sum = column_sum(sum) / points;
        if (c < channels && threadIdx.x < 32) means[(2ll * blockIdx.x + which) * channels + c] = f32(sum);
    }
}

// y = (x - mean) rstd
extern "C" __global__ void normalise(const T* __restrict__ x, const f32* __restrict__ stats, T* __restrict__ y, int points,
                                     int channels) {
    Walk walk(channels);
    Two norm(stats, channels, walk.c);
    walk.each(points, channels, [&](long long at) {
        Values v = *reinterpret_cast<const Values*>(x + at);
#pragma unroll
        for (int k = 0; k < 8; ++k) v.at[k] = narrow<T>((widen<f32>(v.at[k]) - norm.first[k]) * norm.second[k]);
        *reinterpret_cast<Values*>(y + at) = v;
    });
}

// Turns the gradient by the norm's result into that by what the rectifier was given, in place, writes what the norm gave
// with its sign turned, and sums the former over points. `means` are those of the gradient and of its products with what
// the norm gave.
extern "C" __global__ void norm_backward(T* __restrict__ g, const T* __restrict__ hidden, const f32* __restrict__ stats,
                                         const f32* __restrict__ means, T* __restrict__ turned, f32* __restrict__ parts,
                                         int points, int channels) {
    __shared__ f32 all[THREADS][9];
    Walk walk(channels);
    Two norm(stats, channels, walk.c), mean(means, channels, walk.c);
    f32 sums[8] = {};
    walk.each(points, channels, [&](long long at) {
        Values grad = *reinterpret_cast<const Values*>(g + at), h = *reinterpret_cast<const Values*>(hidden + at);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            f32 x = widen<f32>(h.at[k]), x_hat = (x - norm.first[k]) * norm.second[k];
            f32 z = norm.second[k] * (widen<f32>(grad.at[k]) - (mean.first[k] + x_hat * mean.second[k]));
            if (!(x > 0.0f)) z = 0.0f;
            sums[k] += z;
            grad.at[k] = narrow<T>(z);
            h.at[k] = narrow<T>(-x_hat);
        }
        *reinterpret_cast<Values*>(g + at) = grad;
        *reinterpret_cast<Values*>(turned + at) = h;
    });
#pragma unroll
    for (int k = 0; k < 8; ++k) all[threadIdx.x][k] = sums[k];
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        f32 sum = 0;
        for (int row = 0; row < walk.rows_per_block; ++row) sum += all[row * (channels / 8) + c / 8][c % 8];
        parts[((long long)blockIdx.y * gridDim.x + blockIdx.x) * channels + c] = sum;
    }
}

// out[c] = sum over parts[..][c]: a block for 32 channels, a run of parts each warp, in order, then the runs in order.
extern "C" __global__ void __launch_bounds__(32 * RUNS)
sum_parts(const f32* parts, f32* out, int n, int channels) {
    int c = blockIdx.x * 32 + threadIdx.x % 32;
    f64 sum = 0;
    for (int k = threadIdx.x / 32; c < channels && k < n; k += RUNS) sum += parts[(long long)k * channels + c];
    sum = column_sum(sum);
    if (c < channels && threadIdx.x < 32) out[c] = f32(sum);
}
