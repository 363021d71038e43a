// archs: sm_80 sm_90a
// variants: T=f16,W=f16,P=f16 T=bf16,W=bf16,P=f32 T=f32,W=f32,P=f32 T=f64,W=f64,P=f64
//
// Convolutions of any storage and any channels as products of matrices that are never formed, without tensor cores: a
// block forms 64 x 64 sums, a thread 4 x 4. T is the storage of fields, W that of weights, P that of biases.
#include "halfmode.cuh"

using A = wider<T, W>::type;

constexpr int THREADS = 256, TILE = 64, DEPTH = 16;

// Sums over k from `begin` to `end` of a(row, k) b(k, column), from row and column `first` on. `Along`: neighbours of a are
// neighbours in k.
template <bool Along, class Left, class Right, class Store>
__device__ __forceinline__ void product(int first_row, int first_column, int begin, int end, Left left, Right right,
                                        Store store) {
    __shared__ A a[DEPTH][TILE + 1], b[DEPTH][TILE];
    int down = threadIdx.x / 16, across = threadIdx.x % 16;
    A acc[4][4] = {};
    for (int k0 = begin; k0 < end; k0 += DEPTH) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            int item = threadIdx.x + part * THREADS;
            int k = Along ? item % DEPTH : item / TILE, row = Along ? item / DEPTH : item % TILE;
            a[k][row] = k0 + k < end ? left(first_row + row, k0 + k) : A(0);
            k = item / TILE;
            b[k][item % TILE] = k0 + k < end ? right(k0 + k, first_column + item % TILE) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            A rows[4], columns[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rows[i] = a[k][down * 4 + i];
                columns[i] = b[k][across + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][j] += rows[i] * columns[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) store(first_row + down * 4 + i, first_column + across + 16 * j, acc[i][j]);
}

struct Field {
    const T* x;
    int x1, x2, c_x, y1, y2, k2, pad1, pad2;
    // What output point `point` sees at a place of its window, which counts channels as well.
    __device__ __forceinline__ A at(int point, int place) const {
        int tap = place / c_x, c = place % c_x;
        int i = point / y2 % y1 + tap / k2 - pad1, j = point % y2 + tap % k2 - pad2;
        if (unsigned(i) >= unsigned(x1) || unsigned(j) >= unsigned(x2)) return A(0);
        return widen<A>(x[(((long long)(point / y2 / y1) * x1 + i) * x2 + j) * c_x + c]);
    }
};

// y[i, j, o] = sum of w[d_1, d_2, c, o] x[i + d_1 - pad_1, j + d_2 - pad_2, c] plus bias; `turned`: the weight is read as
// that of the transpose. Block x is a tile of points, block y one of channels.
extern "C" __global__ void __launch_bounds__(THREADS)
convolve(const T* x, const W* w, const P* bias, T* y, int batch, int x1, int x2, int c_x, int y1, int y2, int c_y, int k1,
         int k2, int pad1, int pad2, int turned) {
    Field field = {x, x1, x2, c_x, y1, y2, k2, pad1, pad2};
    int points = batch * y1 * y2, taps = k1 * k2;
    product<true>(
        blockIdx.x * TILE, blockIdx.y * TILE, 0, taps * c_x,
        [&](int point, int place) { return point < points ? field.at(point, place) : A(0); },
        [&](int place, int o) {
            if (o >= c_y) return A(0);
            int tap = place / c_x, c = place % c_x;
            long long from = turned ? ((long long)(taps - 1 - tap) * c_y + o) * c_x + c : (long long)place * c_y + o;
            return widen<A>(w[from]);
        },
        [&](int point, int o, A sum) {
            if (point >= points || o >= c_y) return;
            y[(long long)point * c_y + o] = narrow<T>(bias ? sum + widen<A>(bias[o]) : sum);
        });
}

// The gradient by w of <image, K field>: block x is a tile of places of the window, y one of channels of the image, z a
// split of the points. Each split has sums of its own.
extern "C" __global__ void __launch_bounds__(THREADS)
weight_gradient(const T* x, const T* image, A* sums, int batch, int x1, int x2, int c_x, int y1, int y2, int c_y, int k1,
                int k2, int pad1, int pad2) {
    Field field = {x, x1, x2, c_x, y1, y2, k2, pad1, pad2};
    int places = k1 * k2 * c_x;
    long long points = (long long)batch * y1 * y2;
    int begin = int(points * blockIdx.z / gridDim.z), end = int(points * (blockIdx.z + 1) / gridDim.z);
    A* to = sums + (long long)blockIdx.z * places * c_y;
    product<false>(
        blockIdx.x * TILE, blockIdx.y * TILE, begin, end,
        [&](int place, int point) { return place < places ? field.at(point, place) : A(0); },
        [&](int point, int o) { return o < c_y ? widen<A>(image[(long long)point * c_y + o]) : A(0); },
        [&](int place, int o, A sum) {
            if (place < places && o < c_y) to[(long long)place * c_y + o] = sum;
        });
}

// The sum over splits, in their order.
extern "C" __global__ void sum_splits(const A* __restrict__ sums, A* __restrict__ out, int splits, long long n) {
    for (long long i = grid_start(); i < n; i += grid_stride()) {
        A sum = 0;
#pragma unroll 8
        for (int split = 0; split < splits; ++split) sum += sums[split * n + i];
        out[i] = sum;
    }
}
