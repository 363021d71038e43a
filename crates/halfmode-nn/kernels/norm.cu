// archs: sm_80 sm_90a
// variants: S=f16,G=f16,T=f16 S=bf16,G=bf16,T=bf16 S=f32,G=f32,T=f32 S=f64,G=f64,T=f64 S=f32,G=f16,T=f16
//   S=f32,G=bf16,T=bf16
//
// Normalisation of fields [batch, rows, channels] by the mean and variance of groups: of one channel of one sample,
// or of one sample. Everything between storage and storage is f64. S is the storage of x, G that of gradients, T that
// of what is written. Blocks of 256 threads: `n_parts` along x for each sample, and one along y for 256 channels.
#include "halfmode.cuh"

// What a thread works on: channel c of rows of sample b.
struct Walk {
    int c, lanes, row_in_block, rows_per_block, part, n_parts;
    long long b;
    bool active;
    __device__ Walk(int channels, int parts) {
        lanes = min(channels, (int)blockDim.x);
        int lane = threadIdx.x % lanes;
        c = blockIdx.y * blockDim.x + lane;
        rows_per_block = blockDim.x / lanes;
        row_in_block = threadIdx.x / lanes;
        active = row_in_block < rows_per_block && c < channels;
        n_parts = parts;
        b = blockIdx.x / parts;
        part = blockIdx.x % parts;
    }
    // The statistics of what the thread works on.
    __device__ long long group(int channels, int per_channel) const { return per_channel ? b * channels + c : b; }
};

template <class F> __device__ __forceinline__ void each_row(const Walk& walk, long long rows, int channels, F f) {
    if (!walk.active) return;
    for (long long row = (long long)walk.part * walk.rows_per_block + walk.row_in_block; row < rows;
         row += (long long)walk.n_parts * walk.rows_per_block)
        f((walk.b * rows + row) * channels + walk.c);
}

// parts[b][part][k][c] = sum over the block's rows, in the order of the rows of a thread, then of threads.
__device__ void store_sums(const Walk& walk, f64 first, f64 second, f64* parts, int channels) {
    __shared__ f64 all[2][256];
    all[0][threadIdx.x] = first;
    all[1][threadIdx.x] = second;
    __syncthreads();
    if (!walk.active || walk.row_in_block) return;
    for (int k = 0; k < 2; ++k) {
        f64 sum = 0;
        for (int r = 0; r < walk.rows_per_block; ++r) sum += all[k][r * walk.lanes + threadIdx.x];
        parts[((walk.b * walk.n_parts + walk.part) * 2 + k) * channels + walk.c] = sum;
    }
}

// Sums of d and d^2 with d = x - s, where s is the first value of the group: it is within sqrt(n) deviations of the
// mean, so the variance that follows is exact to n eps.
extern "C" __global__ void moments(const S* x, f64* parts, long long rows, int channels, int n_parts, int per_channel) {
    Walk walk(channels, n_parts);
    f64 sum = 0, squares = 0;
    if (walk.active) {
        f64 shift = widen<f64>(x[walk.b * rows * channels + (per_channel ? walk.c : 0)]);
        each_row(walk, rows, channels, [&](long long at) {
            f64 d = widen<f64>(x[at]) - shift;
            sum += d;
            squares += d * d;
        });
    }
    store_sums(walk, sum, squares, parts, channels);
}

// stats[0..3][group]: mean, reciprocal deviation, variance. A block per group.
extern "C" __global__ void statistics(const S* x, const f64* parts, f64* stats, long long rows, int channels,
                                      int n_parts, int per_channel) {
    long long group = blockIdx.x, groups = gridDim.x;
    long long b = per_channel ? group / channels : group;
    int first = per_channel ? group % channels : 0, width = per_channel ? 1 : channels;
    f64 sum = 0, squares = 0;
    for (long long i = threadIdx.x; i < (long long)n_parts * width; i += blockDim.x) {
        long long at = (b * n_parts + i / width) * 2 * channels + first + i % width;
        sum += parts[at];
        squares += parts[at + channels];
    }
    sum = block_sum<256>(sum);
    squares = block_sum<256>(squares);
    if (threadIdx.x) return;
    f64 n = f64(rows) * width, d = sum / n, var = fmax(squares / n - d * d, 0.0);
    stats[group] = widen<f64>(x[b * rows * channels + first]) + d;
    stats[groups + group] = 1.0 / sqrt(var + 1e-5);
    stats[2 * groups + group] = var;
}

// Given statistics in the place of a batch's.
extern "C" __global__ void given_statistics(const f64* mean, const f64* var, f64* stats, int channels) {
    for (long long c = grid_start(); c < channels; c += grid_stride()) {
        stats[c] = mean[c];
        stats[channels + c] = 1.0 / sqrt(var[c] + 1e-5);
        stats[2 * channels + c] = var[c];
    }
}

// What running statistics move towards: the mean, and the variance times `unbiased`.
extern "C" __global__ void batch_moments(const f64* stats, f64* mean, f64* var, f64 unbiased, int channels) {
    for (long long c = grid_start(); c < channels; c += grid_stride()) {
        mean[c] = stats[c];
        var[c] = stats[2 * channels + c] * unbiased;
    }
}

// y = (x - mean) rstd w + b; w and b may be absent.
extern "C" __global__ void normalise(const S* x, const f64* stats, const f64* w, const f64* b, T* y, long long rows,
                                     int channels, int n_parts, int per_channel, int groups) {
    Walk walk(channels, n_parts);
    if (!walk.active) return;
    long long group = walk.group(channels, per_channel);
    f64 mean = stats[group], factor = stats[groups + group] * (w ? w[walk.c] : 1.0), shift = b ? b[walk.c] : 0.0;
    each_row(walk, rows, channels,
             [&](long long at) { y[at] = narrow<T>((widen<f64>(x[at]) - mean) * factor + shift); });
}

// Sums of g x_hat and of g, with x_hat = (x - mean) rstd.
extern "C" __global__ void backward_sums(const S* x, const G* g, const f64* stats, f64* parts, long long rows,
                                         int channels, int n_parts, int per_channel, int groups) {
    Walk walk(channels, n_parts);
    f64 products = 0, sum = 0;
    if (walk.active) {
        long long group = walk.group(channels, per_channel);
        f64 mean = stats[group], rstd = stats[groups + group];
        each_row(walk, rows, channels, [&](long long at) {
            f64 grad = widen<f64>(g[at]);
            products += grad * ((widen<f64>(x[at]) - mean) * rstd);
            sum += grad;
        });
    }
    store_sums(walk, products, sum, parts, channels);
}

// sums[0..2][group]: those of backward_sums over the group, weighted by w. A block per group.
extern "C" __global__ void group_sums(const f64* parts, const f64* w, f64* sums, int channels, int n_parts,
                                      int per_channel) {
    long long group = blockIdx.x, groups = gridDim.x;
    long long b = per_channel ? group / channels : group;
    int first = per_channel ? group % channels : 0, width = per_channel ? 1 : channels;
    f64 products = 0, sum = 0;
    for (long long i = threadIdx.x; i < (long long)n_parts * width; i += blockDim.x) {
        int c = first + i % width;
        long long at = (b * n_parts + i / width) * 2 * channels + c;
        f64 weight = w ? w[c] : 1.0;
        products += weight * parts[at];
        sum += weight * parts[at + channels];
    }
    products = block_sum<256>(products);
    sum = block_sum<256>(sum);
    if (threadIdx.x) return;
    sums[group] = products;
    sums[groups + group] = sum;
}

// gx = rstd (w g - share (sum + x_hat products)); share is one over the values of a group, or zero where statistics
// are given.
extern "C" __global__ void normalise_backward(const S* x, const G* g, const f64* stats, const f64* sums, const f64* w,
                                              T* gx, f64 share, long long rows, int channels, int n_parts,
                                              int per_channel, int groups) {
    Walk walk(channels, n_parts);
    if (!walk.active) return;
    long long group = walk.group(channels, per_channel);
    f64 mean = stats[group], rstd = stats[groups + group], weight = w ? w[walk.c] : 1.0;
    f64 products = share * sums[group], sum = share * sums[groups + group];
    each_row(walk, rows, channels, [&](long long at) {
        f64 x_hat = (widen<f64>(x[at]) - mean) * rstd;
        gx[at] = narrow<T>(rstd * (weight * widen<f64>(g[at]) - (sum + x_hat * products)));
    });
}

// Gradients of weight and bias: the sums of backward_sums over all samples. A block per channel.
extern "C" __global__ void parameter_sums(const f64* parts, f64* grad_w, f64* grad_b, int channels, long long n) {
    int c = blockIdx.x;
    f64 products = 0, sum = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) {
        products += parts[2 * i * channels + c];
        sum += parts[(2 * i + 1) * channels + c];
    }
    products = block_sum<256>(products);
    sum = block_sum<256>(sum);
    if (threadIdx.x) return;
    grad_w[c] = products;
    grad_b[c] = sum;
}
