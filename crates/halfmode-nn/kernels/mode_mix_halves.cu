// archs: sm_80 sm_90a
// variants: T=f16,L=8 T=bf16,L=8 T=f16,L=4 T=f16,L=2
//
// The mode contraction of halves on tensor cores: a warp per mode and 8 L channels, for up to 8 entries of the batch at a
// time. Weights go from memory to registers once and are never in shared memory. Spectra are [batch, (re, im), modes,
// channels], weights [modes, c_in, (re | im) c_out]; both counts of channels are multiples of 8 L.
//
// A product is m16n8k16. Thread (g, t) of a warp, g = lane / 4 and t = lane % 4, holds of its left operand rows g and g + 8
// at columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; of the right one column g at these rows; of the sum rows g and g + 8 at
// columns 2 t and 2 t + 1. Which channel a row, a column or a term of the sum stands for is free as long as both operands
// agree, so every thread takes neighbours in memory: row g and g + 8 of product j are channels L g + 2 j and the next.
#include "tensor_cores.cuh"

constexpr int TILE = 8 * L;   // channels of a warp
constexpr int M = L / 2;      // products side by side
constexpr int NB = 8;         // entries of the batch at a time
constexpr int WARPS = 4;      // of a block

// Neighbouring halves in registers of two each.
template <int N> struct __align__(2 * N) Halves { unsigned at[N / 2]; };

template <int N> __device__ __forceinline__ Halves<N> get(const T* from) {
    return *reinterpret_cast<const Halves<N>*>(from);
}
template <int N> __device__ __forceinline__ Halves<N> get_if(bool there, const T* from) {
    return there ? get<N>(from) : Halves<N>{};
}
// The lower halves of two registers, and the upper.
__device__ __forceinline__ unsigned lower(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ unsigned upper(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }
__device__ __forceinline__ unsigned minus(unsigned a) { return a ^ 0x80008000u; }

struct ModeLane {
    int mode, g, t;
    __device__ ModeLane() : mode(blockIdx.x * WARPS + threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// Where the channels of entry b of one mode begin; part 1 is the imaginary one.
template <class P> __device__ __forceinline__ P* at(P* x, int b, int part, int modes, int mode, int channels) {
    return x + ((2ll * b + part) * modes + mode) * channels;
}

// The sums of M products whose columns are entries of the batch. A thread has L neighbouring channels of two entries.
struct Sums { f32 at[M][4]; };

__device__ __forceinline__ void put(const Sums& sums, T* to, int column) {
    Halves<L> halves;
#pragma unroll
    for (int j = 0; j < M; ++j) halves.at[j] = packed<T>(sums.at[j][column], sums.at[j][column + 2]);
    *reinterpret_cast<Halves<L>*>(to) = halves;
}

__device__ __forceinline__ void store(const Sums& re, const Sums& im, T* y, const ModeLane& lane, int first, int batch,
                                      int modes, int channels, int channel) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        int b = first + 2 * lane.t + column;
        if (b >= batch) continue;
        put(re, at(y, b, 0, modes, lane.mode, channels) + channel, column);
        put(im, at(y, b, 1, modes, lane.mode, channels) + channel, column);
    }
}

// y = x w: rows are outputs, a term of the sum is an input channel. Thread t has terms 4 t to 4 t + 3 of sixteen.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
mix_forward(const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y, int batch, int modes, int c_in,
            int c_out) {
    ModeLane lane;
    if (lane.mode >= modes) return;
    int o = blockIdx.y * TILE + L * lane.g;
    w += (long long)lane.mode * c_in * 2 * c_out + o;
    for (int first = 0; first < batch; first += NB) {
        Sums re = {}, im = {};
        bool there = first + lane.g < batch;
        const T* x_re = at(x, first + lane.g, 0, modes, lane.mode, c_in);
        const T* x_im = at(x, first + lane.g, 1, modes, lane.mode, c_in);
#pragma unroll 2
        for (int i = 4 * lane.t; i < c_in; i += 16) {
            Halves<4> xr = get_if<4>(there, x_re + i), xi = get_if<4>(there, x_im + i);
            Halves<L> wr[4], wi[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                wr[k] = get<L>(w + (i + k) * 2 * c_out);
                wi[k] = get<L>(w + (i + k) * 2 * c_out + c_out);
            }
#pragma unroll
            for (int j = 0; j < M; ++j) {
                unsigned r[4] = {lower(wr[0].at[j], wr[1].at[j]), upper(wr[0].at[j], wr[1].at[j]),
                                 lower(wr[2].at[j], wr[3].at[j]), upper(wr[2].at[j], wr[3].at[j])};
                unsigned s[4] = {lower(wi[0].at[j], wi[1].at[j]), upper(wi[0].at[j], wi[1].at[j]),
                                 lower(wi[2].at[j], wi[3].at[j]), upper(wi[2].at[j], wi[3].at[j])};
                Mma<T>::run(re.at[j], r, xr.at[0], xr.at[1]);
                Mma<T>::run(re.at[j], s, minus(xi.at[0]), minus(xi.at[1]));
                Mma<T>::run(im.at[j], r, xi.at[0], xi.at[1]);
                Mma<T>::run(im.at[j], s, xr.at[0], xr.at[1]);
            }
        }
        store(re, im, y, lane, first, batch, modes, c_out, o);
    }
}

// gx = g w^H: rows are input channels, a term of the sum is an output. Thread t has terms 4 t to 4 t + 3 of sixteen.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
mix_backward_x(const T* __restrict__ w, const T* __restrict__ g, T* __restrict__ gx, int batch, int modes, int c_in,
               int c_out) {
    ModeLane lane;
    if (lane.mode >= modes) return;
    int i = blockIdx.y * TILE + L * lane.g;
    w += ((long long)lane.mode * c_in + i) * 2 * c_out;
    for (int first = 0; first < batch; first += NB) {
        Sums re = {}, im = {};
        bool there = first + lane.g < batch;
        const T* g_re = at(g, first + lane.g, 0, modes, lane.mode, c_out);
        const T* g_im = at(g, first + lane.g, 1, modes, lane.mode, c_out);
#pragma unroll 2
        for (int o = 4 * lane.t; o < c_out; o += 16) {
            Halves<4> gr = get_if<4>(there, g_re + o), gi = get_if<4>(there, g_im + o);
#pragma unroll
            for (int j = 0; j < M; ++j) {
                const T* row = w + 2 * j * 2 * c_out + o;
                Halves<4> wr_0 = get<4>(row), wr_1 = get<4>(row + 2 * c_out);
                Halves<4> wi_0 = get<4>(row + c_out), wi_1 = get<4>(row + 3 * c_out);
                unsigned r[4] = {wr_0.at[0], wr_1.at[0], wr_0.at[1], wr_1.at[1]};
                unsigned s[4] = {wi_0.at[0], wi_1.at[0], wi_0.at[1], wi_1.at[1]};
                Mma<T>::run(re.at[j], r, gr.at[0], gr.at[1]);
                Mma<T>::run(re.at[j], s, gi.at[0], gi.at[1]);
                Mma<T>::run(im.at[j], r, gi.at[0], gi.at[1]);
                Mma<T>::run(im.at[j], s, minus(gr.at[0]), minus(gr.at[1]));
            }
        }
        store(re, im, gx, lane, first, batch, modes, c_in, i);
    }
}

// gw = factor x^H g: rows are input channels, columns outputs, terms 0 to 7 of the sum the real parts of the batch and 8 to
// 15 the imaginary ones.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
mix_backward_w(const T* __restrict__ x, const T* __restrict__ g, f32* __restrict__ gw, f32 factor, int batch, int modes,
               int c_in, int c_out) {
    ModeLane lane;
    if (lane.mode >= modes) return;
    int i = blockIdx.y * TILE + L * lane.g, o0 = blockIdx.z * TILE;
    gw += ((long long)lane.mode * c_in + i) * 2 * c_out + o0;
    for (int j = 0; j < M; ++j) {
        // Columns g of product n are outputs L g + n; so this thread sums outputs 2 L t to 2 L t + 2 L - 1 of two inputs.
        f32 re[L][4] = {}, im[L][4] = {};
        for (int first = 0; first < batch; first += NB) {
            int b = first + 2 * lane.t;
            Halves<2> x_at[2][2];
            Halves<L> g_at[2][2];
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    bool there = b + k < batch;
                    x_at[part][k] = get_if<2>(there, at(x, b + k, part, modes, lane.mode, c_in) + i + 2 * j);
                    g_at[part][k] = get_if<L>(there, at(g, b + k, part, modes, lane.mode, c_out) + o0 + L * lane.g);
                }
            unsigned a[4] = {lower(x_at[0][0].at[0], x_at[0][1].at[0]), upper(x_at[0][0].at[0], x_at[0][1].at[0]),
                             lower(x_at[1][0].at[0], x_at[1][1].at[0]), upper(x_at[1][0].at[0], x_at[1][1].at[0])};
#pragma unroll
            for (int n = 0; n < L; ++n) {
                unsigned r0 = g_at[0][0].at[n / 2], r1 = g_at[0][1].at[n / 2];
                unsigned s0 = g_at[1][0].at[n / 2], s1 = g_at[1][1].at[n / 2];
                unsigned gr = n % 2 ? upper(r0, r1) : lower(r0, r1), gi = n % 2 ? upper(s0, s1) : lower(s0, s1);
                Mma<T>::run(re[n], a, gr, gi);
                Mma<T>::run(im[n], a, gi, minus(gr));
            }
        }
        // Column 2 t of product n is output 2 L t + n, the next column L further.
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                f32* to = gw + (2ll * j + row) * 2 * c_out + L * (2 * lane.t + column);
                Pack<f32, L> sum_re, sum_im;
#pragma unroll
                for (int n = 0; n < L; ++n) {
                    sum_re.at[n] = factor * re[n][2 * row + column];
                    sum_im.at[n] = factor * im[n][2 * row + column];
                }
                *reinterpret_cast<Pack<f32, L>*>(to) = sum_re;
                *reinterpret_cast<Pack<f32, L>*>(to + c_out) = sum_im;
            }
    }
}
