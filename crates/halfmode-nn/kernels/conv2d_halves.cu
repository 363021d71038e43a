// archs: sm_80 sm_90a
// variants: T=f16,P=f16,TN=64,TURNED=0,SUMS=0 T=bf16,P=bf16,TN=64,TURNED=0,SUMS=1 T=bf16,P=bf16,TN=128,TURNED=0,SUMS=1
//   T=bf16,P=bf16,TN=64,TURNED=0,SUMS=2 T=bf16,P=bf16,TN=128,TURNED=0,SUMS=2 T=bf16,P=bf16,TN=64,TURNED=1,SUMS=0
//   T=bf16,P=f32,TN=128,TURNED=1,SUMS=0
//
// Convolutions of halves on tensor cores as products of matrices that are never formed: a row is a point of the output,
// a column a channel of the output, and sums run over the window and the channels of the input. Counts of channels are
// multiples of 8.
//
// T is the storage of fields and weights, P that of biases, TN the columns of a block. TURNED: the weight is read as that
// of the transpose. SUMS: 1 forms moments of what is stored, 2 its sums with a norm's result, per block and channel.
//
// Sums are m16n8k16 products. Thread (g, t) of a warp, g = lane / 4 and t = lane % 4, holds rows g and g + 8 at columns
// 2 t and 2 t + 1; a warp has 64 rows and 32 columns.
#include "patches.cuh"

constexpr int THREADS = 256, DEPTH = 4;
constexpr int WARPS_N = TN / 32, WARPS_M = 8 / WARPS_N;
constexpr int TM = 64 * WARPS_M;  // rows of a block

using Tiles = Patches<T, TM, TN, TURNED>;
constexpr int CHUNK = Tiles::CHUNK, LINE = Tiles::LINE;

// y[i, j, o] = sum of w[d_1, d_2, c, o] x[i + d_1 - pad_1, j + d_2 - pad_2, c], plus bias, rectified, negated. Block x is
// a tile of points of one sample, 2^log_width of them side by side, block y one of channels. `stats` and `hidden` are those
// of the norm of SUMS == 2.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
convolve(const T* __restrict__ x, const T* __restrict__ w, const P* __restrict__ bias, T* __restrict__ y,
         const T* __restrict__ hidden, const f32* __restrict__ stats, f32* __restrict__ parts, int x1, int x2, int c_x,
         int y1, int y2, int c_y, int k1, int k2, int pad1, int pad2, int log_width, int tiles, int rectifies, int negates) {
    extern __shared__ __align__(128) unsigned char memory[];
    Lane lane;
    int sample = blockIdx.x / tiles, n0 = blockIdx.y * TN;
    Tiles patches(memory, x + (long long)sample * x1 * x2 * c_x, w, x1, x2, c_x, y2, c_y, k1, k2, pad1, pad2, log_width,
                  blockIdx.x % tiles, n0);

    int row_warp = lane.warp / WARPS_N * 64, column_warp = lane.warp % WARPS_N * 32;
    int window[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) window[m] = patches.window(row_warp + m * 16 + lane.lane % 16);
    f32 acc[4][4][4] = {};
    for (int step = 0; step < patches.n_steps; ++step) {
        Tiles::Step now = patches.step();
        int at[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) at[m] = Tiles::swizzled(window[m] + now.shift, lane.lane / 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) load_matrices(a[m], now.patch + (at[m] ^ half * 2 * Tiles::PIECE));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (TURNED)
                    load_matrices(b[j], now.w + Tiles::swizzled(column_warp + j * 16 + lane.lane / 16 * 8 + lane.lane % 8,
                                                                half * 2 + lane.lane / 8 % 2));
                else
                    load_transposed(b[j], now.w + (half * 16 + lane.lane / 8 % 2 * 8 + lane.lane % 8) * LINE + column_warp +
                                              j * 16 + lane.lane / 16 * 8);
            }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int j = 0; j < 4; ++j) Mma<T>::run(acc[m][j], a[m], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    wait_for_copies<0>();
    __syncthreads();

    // Through shared memory, so that threads store sixteen bytes side by side.
    T(*out)[LINE] = reinterpret_cast<T(*)[LINE]>(memory);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int column = column_warp + j * 8 + 2 * lane.t;
        bool has_bias = bias && n0 + column < c_y;
        f32 shift[2] = {has_bias ? widen<f32>(bias[n0 + column]) : 0.0f, has_bias ? widen<f32>(bias[n0 + column + 1]) : 0.0f};
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                f32 value[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    value[i] = acc[m][j][2 * r + i] + shift[i];
                    if (rectifies && value[i] < 0.0f) value[i] = 0.0f;
                    if (negates) value[i] = -value[i];
                }
                *reinterpret_cast<unsigned*>(&out[row_warp + m * 16 + r * 8 + lane.g][column]) = packed<T>(value[0], value[1]);
            }
    }
    __syncthreads();
    constexpr int PIECES = TN / 8, GROUPS = THREADS / PIECES;
    int column = threadIdx.x % PIECES * 8, group = threadIdx.x / PIECES;
    bool there = n0 + column < c_y;
    long long first = (long long)sample * y1 * y2 * c_y + n0 + column;
    f32 sum[8] = {}, other[8] = {}, shift[8] = {}, factor[8] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        if (SUMS == 1) shift[k] = widen<f32>(out[0][column + k]);
        if (SUMS == 2 && there) {
            shift[k] = stats[2ll * sample * c_y + n0 + column + k];
            factor[k] = stats[(2ll * sample + 1) * c_y + n0 + column + k];
        }
    }
    for (int r = group; there && r < TM; r += GROUPS) {
        int i = patches.i + (r >> log_width), j = patches.j + (r & ((1 << log_width) - 1));
        if (i >= y1 || j >= y2) continue;
        long long at = first + (long long)(i * y2 + j) * c_y;
        Pack<T, 8> values = *reinterpret_cast<const Pack<T, 8>*>(&out[r][column]);
        *reinterpret_cast<Pack<T, 8>*>(y + at) = values;
        Pack<T, 8> beside = values;
        if (SUMS == 2) beside = *reinterpret_cast<const Pack<T, 8>*>(hidden + at);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            f32 value = widen<f32>(values.at[k]);
            if (SUMS == 1) {
                sum[k] += value - shift[k];
                other[k] += (value - shift[k]) * (value - shift[k]);
            }
            if (SUMS == 2) {
                sum[k] += value;
                other[k] += value * ((widen<f32>(beside.at[k]) - shift[k]) * factor[k]);
            }
        }
    }
    if (SUMS == 0) return;
    f32(*sums)[2][TN] = reinterpret_cast<f32(*)[2][TN]>(memory + sizeof(T) * TM * LINE);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        sums[group][0][column + k] = sum[k];
        sums[group][1][column + k] = other[k];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < 3 * TN; item += THREADS) {
        int which = item / TN, at = item % TN;
        if (n0 + at >= c_y) continue;
        f32 total = widen<f32>(out[0][at]);
        if (which < 2) {
            total = 0.0f;
            for (int r = 0; r < GROUPS; ++r) total += sums[r][which][at];
        }
        parts[(3ll * blockIdx.x + which) * c_y + n0 + at] = total;
    }
}

// Rows of a tile of the weight's gradient: a row is a place of the window and a channel of the field.
constexpr int GM = TN == 64 ? 192 : 128, GT = GM / WARPS_M / 16;

struct alignas(16) Pair {
    T field[CHUNK][GM + 8];
    T image[CHUNK][LINE];
};

// The gradient by w of the sum over pairs of <image, K field>, where sums run over points: block x is a tile of rows, y one
// of channels of the image, z a split of all pairs' points. Each split has sums of its own.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
weight_gradient(const T* __restrict__ field0, const T* __restrict__ image0, const T* __restrict__ field1,
                const T* __restrict__ image1, f32* __restrict__ sums, int pairs, int batch, int x1, int x2, int c_x, int y1,
                int y2, int c_y, int k1, int k2, int pad1, int pad2) {
    extern __shared__ __align__(16) unsigned char memory[];
    Pair* stages = reinterpret_cast<Pair*>(memory);
    Lane lane;
    int m0 = blockIdx.x * GM, n0 = blockIdx.y * TN, n_rows = k1 * k2 * c_x;
    int points = batch * y1 * y2, chunks = (points + CHUNK - 1) / CHUNK;
    long long n = (long long)pairs * chunks;
    int begin = int(n * blockIdx.z / gridDim.z), end = int(n * (blockIdx.z + 1) / gridDim.z);

    // A thread loads some pieces of one row of a chunk: a point, its window shifted to the piece's place.
    int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    int shift1[GM / 64], shift2[GM / 64], offset[GM / 64];
#pragma unroll
    for (int r = 0; r < GM / 64; ++r) {
        int m = m0 + (piece + 8 * r) * 8, tap = m / c_x;
        shift1[r] = m < n_rows ? tap / k2 - pad1 : -(1 << 24);
        shift2[r] = tap % k2 - pad2;
        offset[r] = m < n_rows ? (shift1[r] * x2 + shift2[r]) * c_x + m % c_x : 0;
    }
    bool second = begin >= chunks;
    int point, b, i, j;
    auto seek = [&](int to) {
        point = to;
        j = to % y2;
        i = to / y2 % y1;
        b = to / y2 / y1;
    };
    seek((second ? begin - chunks : begin) * CHUNK + row);
    auto load = [&](int chunk) {
        if (chunk < end) {
            if (!second && chunk >= chunks) {
                second = true;
                seek(row);
            }
            Pair& to = stages[(chunk - begin) % DEPTH];
            const T* field = second ? field1 : field0;
            const T* image = second ? image1 : image0;
            bool inside = point < points;
            const T* from = field + (((long long)b * x1 + i) * x2 + j) * c_x;
#pragma unroll
            for (int r = 0; r < GM / 64; ++r) {
                bool there = inside && unsigned(i + shift1[r]) < unsigned(x1) && unsigned(j + shift2[r]) < unsigned(x2);
                copy_async_cached(&to.field[row][(piece + 8 * r) * 8], there ? from + offset[r] : field, there);
            }
#pragma unroll
            for (int r = 0; r < TN / 64; ++r) {
                int column = (piece + 8 * r) * 8;
                bool there = inside && n0 + column < c_y;
                copy_async_cached(&to.image[row][column], there ? image + (long long)point * c_y + n0 + column : image, there);
            }
            point += CHUNK;
            j += CHUNK;
            while (j >= y2) {
                j -= y2;
                if (++i == y1) {
                    i = 0;
                    ++b;
                }
            }
        }
        commit_copies();
    };
    for (int chunk = begin; chunk < begin + DEPTH - 1; ++chunk) load(chunk);

    int row_warp = lane.warp / WARPS_N * GT * 16, column_warp = lane.warp % WARPS_N * 32;
    f32 acc[GT][4][4] = {};
    for (int chunk = begin; chunk < end; ++chunk) {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();
        load(chunk + DEPTH - 1);
        const Pair& now = stages[(chunk - begin) % DEPTH];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned a[GT][4], b[2][4];
#pragma unroll
            for (int m = 0; m < GT; ++m)
                load_transposed(a[m], &now.field[half * 16 + lane.lane / 16 * 8 + lane.lane % 8]
                                                [row_warp + m * 16 + lane.lane / 8 % 2 * 8]);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                load_transposed(b[j], &now.image[half * 16 + lane.lane / 8 % 2 * 8 + lane.lane % 8]
                                                [column_warp + j * 16 + lane.lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < GT; ++m)
#pragma unroll
                for (int j = 0; j < 4; ++j) Mma<T>::run(acc[m][j], a[m], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    wait_for_copies<0>();
    f32* to = sums + (long long)blockIdx.z * n_rows * c_y;
#pragma unroll
    for (int m = 0; m < GT; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int at = m0 + row_warp + m * 16 + r * 8 + lane.g, column = n0 + column_warp + j * 8 + 2 * lane.t;
                if (at < n_rows && column < c_y)
                    *reinterpret_cast<float2*>(to + (long long)at * c_y + column) = {acc[m][j][2 * r], acc[m][j][2 * r + 1]};
            }
}
