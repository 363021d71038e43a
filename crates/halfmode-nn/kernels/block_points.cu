// archs: sm_80 sm_90a
// variants: T=f16,P=f16,C=32,H=16 T=f16,P=f16,C=64,H=32 T=f16,P=f16,C=128,H=64 T=bf16,P=bf16,C=64,H=32
//   T=f16,P=f32,C=64,H=32
//
// What an FNO block does to each point after the inverse transform, in one pass over the rows, and its adjoint:
// z = act(s + W x + b), m = gelu(W1 z + b1), y = act(W2 m + b2 + gate x), for C channels and H hidden ones, multiples
// of 16. A warp takes 16 rows through all layers in registers: the sums of one product are, rounded to T, the left
// operand of the next. T is the storage of fields, P that of parameters.
#include "tensor_cores.cuh"

constexpr int WARPS = 4;
constexpr int PAD = 8;   // scalars between rows of a weight, so that eight rows are in different banks

// A weight in shared memory: N rows of K.
template <int N, int K> struct Weight { T at[N][K + PAD]; };
// 16 rows of N sums, and the same rounded, as the left operand of a product. Thread (g, t) of a warp holds rows g and
// g + 8 at columns 8 n + 2 t and the next: sums in at[n], pairs of the rounded in at[n / 2][n % 2 * 2 + (row > g)].
template <int N> struct Acc { f32 at[N / 8][4]; };
template <int N> struct Rounded { unsigned at[N / 16][4]; };

struct Pair { f32 x, y; };
__device__ __forceinline__ Pair unpack(unsigned bits) {
    Pack<T, 2> pair = *reinterpret_cast<Pack<T, 2>*>(&bits);
    return {widen<f32>(pair.at[0]), widen<f32>(pair.at[1])};
}
__device__ __forceinline__ Pair params(const P* p, int c) { return {widen<f32>(p[c]), widen<f32>(p[c + 1])}; }

// Where a warp's 16 rows are and which of them exist.
struct Rows {
    long long first;
    bool has[2];
    int g, t;
    __device__ Rows(long long tile, long long rows) {
        g = threadIdx.x % 32 / 4;
        t = threadIdx.x % 4;
        first = tile * 16 + g;
        has[0] = first < rows;
        has[1] = first + 8 < rows;
    }
    template <int N> __device__ __forceinline__ long long at(int half, int n) const {
        return (first + 8 * half) * N + 8 * n + 2 * t;
    }
    template <int N> __device__ __forceinline__ Rounded<N> load(const T* from) const {
        Rounded<N> to;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                to.at[n / 2][n % 2 * 2 + half] =
                    has[half] ? *reinterpret_cast<const unsigned*>(from + at<N>(half, n)) : 0u;
        return to;
    }
    template <int N> __device__ __forceinline__ void store(T* to, const Rounded<N>& from) const {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (has[half]) *reinterpret_cast<unsigned*>(to + at<N>(half, n)) = from.at[n / 2][n % 2 * 2 + half];
    }
};

// sums += rows w^T
template <int N, int K>
__device__ __forceinline__ void multiply(Acc<N>& sums, const Rounded<K>& rows, const Weight<N, K>& w) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int k = 0; k < K / 16; ++k) {
            const T* from = &w.at[8 * n + g][16 * k + 2 * t];
            unsigned b0 = *reinterpret_cast<const unsigned*>(from), b1 = *reinterpret_cast<const unsigned*>(from + 8);
            Mma<T>::run(sums.at[n], rows.at[k], b0, b1);
        }
}

// Calls f(sum, value) for every sum and the value stored beside it.
template <int N, class F> __device__ __forceinline__ void with(Acc<N>& sums, const Rounded<N>& values, F f) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pair v = unpack(values.at[n / 2][n % 2 * 2 + half]);
            f(sums.at[n][2 * half], v.x);
            f(sums.at[n][2 * half + 1], v.y);
        }
}

template <int N> __device__ __forceinline__ Rounded<N> rounded(const Acc<N>& sums) {
    Rounded<N> to;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            to.at[n / 2][n % 2 * 2 + half] = packed<T>(sums.at[n][2 * half], sums.at[n][2 * half + 1]);
    return to;
}

template <int N> __device__ __forceinline__ Acc<N> biases(const P* bias) {
    Acc<N> to;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        Pair b = params(bias, 8 * n + 2 * t);
        to.at[n][0] = to.at[n][2] = b.x;
        to.at[n][1] = to.at[n][3] = b.y;
    }
    return to;
}

// sums += gate * x, channel by channel.
template <int N> __device__ __forceinline__ void add_gated(Acc<N>& sums, const P* gate, const Rounded<N>& x) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        Pair s = params(gate, 8 * n + 2 * t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pair v = unpack(x.at[n / 2][n % 2 * 2 + half]);
            sums.at[n][2 * half] += s.x * v.x;
            sums.at[n][2 * half + 1] += s.y * v.y;
        }
    }
}

// The activation of all sums, rounded; slopes, rounded, where they are wanted.
template <int N>
__device__ __forceinline__ Rounded<N> activate(Acc<N>& sums, bool act, Rounded<N>* slopes = nullptr) {
    if (!act) return rounded(sums);
    if (slopes) {
        Acc<N> slope;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) slope.at[n][i] = gelu_slope(sums.at[n][i]);
        *slopes = rounded(slope);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.at[n][i] = gelu(sums.at[n][i]);
    return rounded(sums);
}

// Copies a weight [N, K], or the transpose of one [K, N], into shared memory.
template <int N, int K> __device__ void stage(Weight<N, K>& to, const P* from, bool transposed) {
    for (int at = threadIdx.x; at < N * K; at += blockDim.x) {
        int n = transposed ? at % N : at / K, k = transposed ? at / N : at % K;
        to.at[n][k] = narrow<T>(widen<f32>(from[at]));
    }
}

struct Forward {
    Weight<C, C> skip;
    Weight<H, C> w1;
    Weight<C, H> w2;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
points_forward(const T* __restrict__ s, const T* __restrict__ x, const P* bias, const P* skip, const P* w1, const P* b1,
               const P* w2, const P* b2, const P* gate, T* __restrict__ y, int act, long long rows) {
    extern __shared__ __align__(16) unsigned char shared[];
    Forward& w = *reinterpret_cast<Forward*>(shared);
    stage(w.skip, skip, false);
    stage(w.w1, w1, false);
    stage(w.w2, w2, false);
    __syncthreads();
    long long tiles = (rows + 15) / 16;
    for (long long tile = blockIdx.x * WARPS + threadIdx.x / 32; tile < tiles; tile += gridDim.x * WARPS) {
        Rows here(tile, rows);
        Rounded<C> field = here.load<C>(x);
        Acc<C> z = biases<C>(bias);
        with(z, here.load<C>(s), [](f32& sum, f32 value) { sum += value; });
        multiply(z, field, w.skip);
        Acc<H> m = biases<H>(b1);
        multiply(m, activate(z, act), w.w1);
        Acc<C> u = biases<C>(b2);
        multiply(u, activate(m, true), w.w2);
        add_gated(u, gate, field);
        here.store<C>(y, activate(u, act));
    }
}

struct Backward {
    Weight<C, C> skip, skip_t;
    Weight<H, C> w1, w2_t;
    Weight<C, H> w2, w1_t;
    f32 sums[WARPS][3 * C + H];
};

// sums[c] += the sum of each column over the warp's 16 rows.
template <int N> __device__ __forceinline__ void add_columns(f32* sums, const Acc<N>& values) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        f32 x = values.at[n][0] + values.at[n][2], y = values.at[n][1] + values.at[n][3];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            x += __shfl_xor_sync(~0u, x, distance);
            y += __shfl_xor_sync(~0u, y, distance);
        }
        if (lane < 4) {
            sums[8 * n + 2 * lane] += x;
            sums[8 * n + 2 * lane + 1] += y;
        }
    }
}

// The forward pass again up to the last sums, and back: writes z, m and the gradients g (of the last sums), gm and gz
// (before their activations), which the gradients of the weights are products of, and gx through gate and skip. z may
// take the place of s, and g that of grad: a thread reads a value before it writes there.
// parts[block] = sums over the block's rows of g, g x, gz (C each) and gm (H).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
points_backward(const T* s, const T* __restrict__ x, const T* grad, const P* bias, const P* skip, const P* w1,
                const P* b1, const P* w2, const P* b2, const P* gate, T* z_out, T* __restrict__ m_out, T* g_out,
                T* __restrict__ gm_out, T* __restrict__ gz_out, T* __restrict__ gx_out, f32* __restrict__ parts,
                int act, long long rows) {
    extern __shared__ __align__(16) unsigned char shared[];
    Backward& w = *reinterpret_cast<Backward*>(shared);
    stage(w.skip, skip, false);
    stage(w.skip_t, skip, true);
    stage(w.w1, w1, false);
    stage(w.w1_t, w1, true);
    stage(w.w2, w2, false);
    stage(w.w2_t, w2, true);
    f32* sums = w.sums[threadIdx.x / 32];
    for (int at = threadIdx.x % 32; at < 3 * C + H; at += 32) sums[at] = 0;
    __syncthreads();
    long long tiles = (rows + 15) / 16;
    for (long long tile = blockIdx.x * WARPS + threadIdx.x / 32; tile < tiles; tile += gridDim.x * WARPS) {
        Rows here(tile, rows);
        Rounded<C> z_slope, z_here, g_here, gz_here;
        Rounded<H> m_slope, m_here, gm_here;
        {
            Acc<C> z = biases<C>(bias);
            with(z, here.load<C>(s), [](f32& sum, f32 value) { sum += value; });
            multiply(z, here.load<C>(x), w.skip);
            z_here = activate(z, act, &z_slope);
            here.store<C>(z_out, z_here);
        }
        {
            Acc<H> m = biases<H>(b1);
            multiply(m, z_here, w.w1);
            m_here = activate(m, true, &m_slope);
            here.store<H>(m_out, m_here);
        }
        {
            Acc<C> g;
            Rounded<C> field = here.load<C>(x);
            if (act) {
                g = biases<C>(b2);
                multiply(g, m_here, w.w2);
                add_gated(g, gate, field);
                with(g, here.load<C>(grad), [](f32& sum, f32 value) { sum = value * gelu_slope(sum); });
            } else {
                g = Acc<C>{};
                with(g, here.load<C>(grad), [](f32& sum, f32 value) { sum = value; });
            }
            g_here = rounded(g);
            here.store<C>(g_out, g_here);
            add_columns(sums, g);
            with(g, field, [](f32& sum, f32 value) { sum *= value; });
            add_columns(sums + C, g);
        }
        {
            Acc<H> gm = {};
            multiply(gm, g_here, w.w2_t);
            with(gm, m_slope, [](f32& sum, f32 slope) { sum *= slope; });
            gm_here = rounded(gm);
            here.store<H>(gm_out, gm_here);
            add_columns(sums + 3 * C, gm);
        }
        {
            Acc<C> gz = {};
            multiply(gz, gm_here, w.w1_t);
            if (act) with(gz, z_slope, [](f32& sum, f32 slope) { sum *= slope; });
            gz_here = rounded(gz);
            here.store<C>(gz_out, gz_here);
            add_columns(sums + 2 * C, gz);
        }
        {
            Acc<C> gx = {};
            add_gated(gx, gate, g_here);
            multiply(gx, gz_here, w.skip_t);
            here.store<C>(gx_out, rounded(gx));
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < 3 * C + H; at += blockDim.x) {
        f32 sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += w.sums[warp][at];
        parts[blockIdx.x * (3ll * C + H) + at] = sum;
    }
}

// The sums over all parts, by what they are: 32 columns and 32 runs of parts a block, each in order, then the runs.
extern "C" __global__ void sum_parts(const f32* parts, f32* g_b2, f32* g_gate, f32* g_bias, f32* g_b1, int n_parts) {
    __shared__ f32 runs[32][33];
    constexpr int N = 3 * C + H;
    int column = threadIdx.x % 32, run = threadIdx.x / 32, c = blockIdx.x * 32 + column;
    f32 sum = 0;
    if (c < N)
        for (int i = run; i < n_parts; i += 32) sum += parts[(long long)i * N + c];
    runs[run][column] = sum;
    __syncthreads();
    if (run || c >= N) return;
    sum = 0;
    for (int i = 0; i < 32; ++i) sum += runs[i][column];
    f32* to = c < C ? g_b2 + c : c < 2 * C ? g_gate + (c - C) : c < 3 * C ? g_bias + (c - 2 * C) : g_b1 + (c - 3 * C);
    *to = sum;
}
