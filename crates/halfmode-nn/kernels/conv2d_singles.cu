// archs: sm_80 sm_90a
// variants: TF32=0,TN=64,TURNED=0 TF32=0,TN=128,TURNED=0 TF32=0,TN=64,TURNED=1 TF32=0,TN=128,TURNED=1
//   TF32=1,TN=64,TURNED=0 TF32=1,TN=128,TURNED=0 TF32=1,TN=64,TURNED=1 TF32=1,TN=128,TURNED=1
//
// Convolutions of f32 as products of matrices that are never formed: a row is a point of the output, a column a channel of
// the output, and sums run over the window and the channels of the input. Counts of channels are multiples of 4.
//
// TF32: products of operands rounded to TF32 on tensor cores, else f32 throughout. TN: the columns of a block. TURNED: the
// weight is read as that of the transpose.
//
// On tensor cores a product is m16n8k8 and a warp has 64 rows and 32 columns. Without, a thread has eight rows and eight
// columns: four neighbours, and four in the other half of the tile.
#include "patches.cuh"

constexpr int THREADS = 256, DEPTH = 4;
constexpr int WARPS_N = TN / 32, WARPS_M = 8 / WARPS_N;
constexpr int TM = 64 * WARPS_M;     // rows of a block
constexpr int GROUPS = 8 * WARPS_M;  // of threads, along the rows

using Tiles = Patches<f32, TM, TN, TURNED>;
using Step = Tiles::Step;
constexpr int CHUNK = Tiles::CHUNK, LINE = Tiles::LINE;

__device__ __forceinline__ int swizzled(int row, int piece) { return Tiles::swizzled(row, piece); }

__device__ __forceinline__ unsigned tf32(unsigned bits) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}
__device__ __forceinline__ unsigned tf32(f32 value) { return tf32(__float_as_uint(value)); }

// c += a b, m16n8k8 of TF32 with sums in f32.
__device__ __forceinline__ void multiply(f32 (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where the eight rows and columns of a thread without tensor cores are.
struct Own {
    int group, column;
    __device__ explicit Own(const Lane& lane)
        : group(lane.warp / WARPS_N * 8 + lane.g), column((lane.warp % WARPS_N * 4 + lane.t) * 4) {}
};

__device__ __forceinline__ float4 four(const f32* at) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float2 two(const f32* at) { return *reinterpret_cast<const float2*>(at); }

// Eight neighbours of a row of a right operand, and the products of a number with them.
struct Eight {
    float4 low, high;
    __device__ Eight(const f32* row, int column) : low(four(row + column)), high(four(row + TN / 2 + column)) {}
    __device__ __forceinline__ void add_to(f32 (&acc)[8], f32 a) const {
        acc[0] += a * low.x;
        acc[1] += a * low.y;
        acc[2] += a * low.z;
        acc[3] += a * low.w;
        acc[4] += a * high.x;
        acc[5] += a * high.y;
        acc[6] += a * high.z;
        acc[7] += a * high.w;
    }
};

// A thread's numbers of a row, `width` of them there.
__device__ __forceinline__ void store_eight(f32* row, int column, int width, const f32 (&acc)[8]) {
    if (column < width) *reinterpret_cast<float4*>(row + column) = {acc[0], acc[1], acc[2], acc[3]};
    column += TN / 2;
    if (column < width) *reinterpret_cast<float4*>(row + column) = {acc[4], acc[5], acc[6], acc[7]};
}

// A step's part of 64 rows and 32 columns of a warp, on tensor cores.
__device__ __forceinline__ void add_products(f32 (&acc)[4][4][4], const Step& now, const int (&window)[4], const Lane& lane) {
    int column_warp = lane.warp % WARPS_N * 32, at[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) at[m] = swizzled(window[m] + now.shift, lane.lane / 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned a[4][4], b[4][2];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            load_matrices(a[m], now.patch + (at[m] ^ half * 2 * Tiles::PIECE));
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m][i] = tf32(a[m][i]);
        }
        if (TURNED) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                unsigned both[4];
                load_matrices(both, now.w + swizzled(column_warp + j * 16 + lane.lane / 16 * 8 + lane.lane % 8,
                                                     half * 2 + lane.lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < 4; ++i) b[2 * j + i / 2][i % 2] = tf32(both[i]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[j][i] = tf32(now.w[(half * 8 + lane.t + 4 * i) * LINE + column_warp + j * 8 + lane.g]);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(acc[m][j], a[m], b[j][0], b[j][1]);
    }
}

// A step's part of eight rows and columns of a thread, in f32.
__device__ __forceinline__ void add_products(f32 (&acc)[8][8], const Step& now, const int (&window)[8], const Own& own) {
    int at[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = swizzled(window[i] + now.shift, 0);
#pragma unroll 2
    for (int k = 0; k < CHUNK; k += 2) {
        float2 a[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = two(now.patch + (at[i] ^ k));
        if (TURNED) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float2 b = two(now.w + swizzled(own.column + j % 4 + j / 4 * (TN / 2), k / 4) + k % 4);
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i][j] += a[i].x * b.x;
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i][j] += a[i].y * b.y;
            }
        } else {
            Eight first(now.w + k * LINE, own.column);
#pragma unroll
            for (int i = 0; i < 8; ++i) first.add_to(acc[i], a[i].x);
            Eight second(now.w + (k + 1) * LINE, own.column);
#pragma unroll
            for (int i = 0; i < 8; ++i) second.add_to(acc[i], a[i].y);
        }
    }
}

// y[i, j, o] = sum of w[d_1, d_2, c, o] x[i + d_1 - pad_1, j + d_2 - pad_2, c], plus bias. Block x is a tile of points of one
// sample, 2^log_width of them side by side, block y one of channels.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
convolve(const f32* __restrict__ x, const f32* __restrict__ w, const f32* __restrict__ bias, f32* __restrict__ y, int x1,
         int x2, int c_x, int y1, int y2, int c_y, int k1, int k2, int pad1, int pad2, int log_width, int tiles) {
    extern __shared__ __align__(128) unsigned char memory[];
    Lane lane;
    int sample = blockIdx.x / tiles, n0 = blockIdx.y * TN, width = c_y - n0;
    Tiles patches(memory, x + (long long)sample * x1 * x2 * c_x, w, x1, x2, c_x, y2, c_y, k1, k2, pad1, pad2, log_width,
                  blockIdx.x % tiles, n0);
    // Where a row of the tile goes, if it is a point.
    auto line = [&](int row) -> f32* {
        int i = patches.i + (row >> log_width), j = patches.j + (row & ((1 << log_width) - 1));
        return i < y1 && j < y2 ? y + (((long long)sample * y1 + i) * y2 + j) * c_y + n0 : nullptr;
    };
    if constexpr (TF32) {
        int row_warp = lane.warp / WARPS_N * 64, column_warp = lane.warp % WARPS_N * 32;
        int window[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) window[m] = patches.window(row_warp + m * 16 + lane.lane % 16);
        f32 acc[4][4][4] = {};
        for (int step = 0; step < patches.n_steps; ++step) add_products(acc, patches.step(), window, lane);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                f32* to = line(row_warp + m * 16 + r * 8 + lane.g);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    int column = column_warp + j * 8 + 2 * lane.t;
                    if (!to || column >= width) continue;
                    float2 sum = {acc[m][j][2 * r], acc[m][j][2 * r + 1]};
                    if (bias) sum = {sum.x + bias[n0 + column], sum.y + bias[n0 + column + 1]};
                    *reinterpret_cast<float2*>(to + column) = sum;
                }
            }
    } else {
        Own own(lane);
        int window[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) window[i] = patches.window(own.group + i * GROUPS);
        f32 acc[8][8] = {};
        for (int step = 0; step < patches.n_steps; ++step) add_products(acc, patches.step(), window, own);
        if (bias) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                int column = own.column + j % 4 + j / 4 * (TN / 2);
                f32 shift = column < width ? bias[n0 + column] : 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i][j] += shift;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (f32* to = line(own.group + i * GROUPS)) store_eight(to, own.column, width, acc[i]);
    }
}

// Rows of a tile of the weight's gradient: a row is a place of the window and a channel of the field.
constexpr int GM = TN == 64 ? 192 : 128, GT = GM / WARPS_M / 16;
// Of a thread without tensor cores, in twos that are 2 GROUPS apart.
constexpr int TWOS = GM / GROUPS / 2;

struct alignas(16) Pair {
    f32 field[CHUNK][GM + 8];
    f32 image[CHUNK][LINE];
};

// The gradient by w of <image, K field>, where sums run over points: block x is a tile of rows, y one of channels of the
// image, z a split of all points. Each split has sums of its own.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
weight_gradient(const f32* __restrict__ field, const f32* __restrict__ image, f32* __restrict__ sums, int batch, int x1,
                int x2, int c_x, int y1, int y2, int c_y, int k1, int k2, int pad1, int pad2) {
    extern __shared__ __align__(16) unsigned char memory[];
    Pair* stages = reinterpret_cast<Pair*>(memory);
    Lane lane;
    int m0 = blockIdx.x * GM, n0 = blockIdx.y * TN, n_rows = k1 * k2 * c_x;
    int points = batch * y1 * y2;
    long long chunks = (points + CHUNK - 1) / CHUNK;
    int begin = int(chunks * blockIdx.z / gridDim.z), end = int(chunks * (blockIdx.z + 1) / gridDim.z);

    // A thread loads some pieces of one row of a chunk: a point, its window shifted to the piece's place.
    int row = threadIdx.x / 16, piece = threadIdx.x % 16;
    int shift1[GM / 64], shift2[GM / 64], offset[GM / 64];
#pragma unroll
    for (int r = 0; r < GM / 64; ++r) {
        int m = m0 + (piece + 16 * r) * 4, tap = m / c_x;
        shift1[r] = m < n_rows ? tap / k2 - pad1 : -(1 << 24);
        shift2[r] = tap % k2 - pad2;
        offset[r] = m < n_rows ? (shift1[r] * x2 + shift2[r]) * c_x + m % c_x : 0;
    }
    int point = begin * CHUNK + row, j = point % y2, i = point / y2 % y1, b = point / y2 / y1;
    auto load = [&](int chunk) {
        if (chunk < end) {
            Pair& to = stages[(chunk - begin) % DEPTH];
            bool inside = point < points;
            const f32* from = field + (((long long)b * x1 + i) * x2 + j) * c_x;
#pragma unroll
            for (int r = 0; r < GM / 64; ++r) {
                bool there = inside && unsigned(i + shift1[r]) < unsigned(x1) && unsigned(j + shift2[r]) < unsigned(x2);
                copy_async_cached(&to.field[row][(piece + 16 * r) * 4], there ? from + offset[r] : field, there);
            }
#pragma unroll
            for (int r = 0; r < TN / 64; ++r) {
                int column = (piece + 16 * r) * 4;
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
    auto loaded = [&](int chunk) -> const Pair& {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();
        load(chunk + DEPTH - 1);
        return stages[(chunk - begin) % DEPTH];
    };

    f32* to = sums + ((long long)blockIdx.z * n_rows + m0) * c_y + n0;
    int rows = n_rows - m0, width = c_y - n0;
    if constexpr (TF32) {
        int row_warp = lane.warp / WARPS_N * GT * 16, column_warp = lane.warp % WARPS_N * 32;
        f32 acc[GT][4][4] = {};
        for (int chunk = begin; chunk < end; ++chunk) {
            const Pair& now = loaded(chunk);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                unsigned a[GT][4], b[4][2];
                int k = half * 8 + lane.t;
#pragma unroll
                for (int m = 0; m < GT; ++m)
#pragma unroll
                    for (int part = 0; part < 4; ++part)
                        a[m][part] = tf32(now.field[k + part / 2 * 4][row_warp + m * 16 + part % 2 * 8 + lane.g]);
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        b[n][part] = tf32(now.image[k + part * 4][column_warp + n * 8 + lane.g]);
#pragma unroll
                for (int m = 0; m < GT; ++m)
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply(acc[m][n], a[m], b[n][0], b[n][1]);
            }
        }
#pragma unroll
        for (int m = 0; m < GT; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    int at = row_warp + m * 16 + r * 8 + lane.g, column = column_warp + n * 8 + 2 * lane.t;
                    if (at < rows && column < width)
                        *reinterpret_cast<float2*>(to + (long long)at * c_y + column) = {acc[m][n][2 * r],
                                                                                       acc[m][n][2 * r + 1]};
                }
    } else {
        Own own(lane);
        f32 acc[2 * TWOS][8] = {};
        for (int chunk = begin; chunk < end; ++chunk) {
            const Pair& now = loaded(chunk);
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) {
                Eight columns(now.image[k], own.column);
#pragma unroll
                for (int m = 0; m < TWOS; ++m) {
                    float2 a = two(&now.field[k][2 * own.group + m * 2 * GROUPS]);
                    columns.add_to(acc[2 * m], a.x);
                    columns.add_to(acc[2 * m + 1], a.y);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2 * TWOS; ++m) {
            int at = 2 * own.group + m / 2 * 2 * GROUPS + m % 2;
            if (at < rows) store_eight(to + (long long)at * c_y, own.column, width, acc[m]);
        }
    }
}
