// archs: sm_80 sm_90a
// variants: X=f16,W=f16,Y=f16,V=2 X=f16,W=f16,Y=f16,V=1 X=bf16,W=bf16,Y=bf16,V=2 X=f32,W=f32,Y=f32,V=2
//   X=f64,W=f64,Y=f64,V=1 X=f16,W=f32,Y=f16,V=2
//
// The mode contraction, one block of threads per mode, so that every weight is read once for NB entries of the
// batch. Spectra are [batch, (re, im), modes, channels], weights [modes, c_in, (re | im) c_out]. V is how many
// neighbouring outputs a thread forms (c_out is a multiple of it).
#include "halfmode.cuh"

using A = acc_t<X>;
constexpr int NB = 8;   // batch entries in shared memory at a time
constexpr int EF = 2, EB = 4;   // entries whose sums a thread forms, forward and for gx
constexpr int CHUNK = 32;   // outputs whose weights are in shared memory at a time: one per thread of a warp

// Scalars (re, im) of NB batch entries of one mode, transposed: tile[c * 2 NB + 2 b + part]; zeros past the batch.
template <class Stored>
__device__ void load(const Stored* x, A* tile, int first, int batch, int modes, int mode, int channels) {
    // A warp per row: no division stands between the loads.
    for (int row = threadIdx.x / 32; row < 2 * NB; row += blockDim.x / 32) {
        int b = first + row / 2;
        const Stored* from = x + ((2ll * b + row % 2) * modes + mode) * channels;
#pragma unroll 4
        for (int c = threadIdx.x % 32; c < channels; c += 32)
            tile[c * 2 * NB + row] = b < batch ? widen<A>(from[c]) : A(0);
    }
}

// The scalars of `N` entries from `entry` on of channel c of a tile, in loads of four.
template <int N> struct Entries {
    A at[2 * N];
    __device__ __forceinline__ Entries(const A* tile, int c, int entry) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            Pack<A, 4> four = reinterpret_cast<const Pack<A, 4>*>(tile + c * 2 * NB + 2 * entry)[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) at[4 * i + j] = four.at[j];
        }
    }
    __device__ __forceinline__ A re(int b) const { return at[2 * b]; }
    __device__ __forceinline__ A im(int b) const { return at[2 * b + 1]; }
};

// Threads side by side that share what they read, and groups of them that share the work along another axis.
struct Groups {
    int lanes, count, lane, group;
    __device__ explicit Groups(int items) {
        lanes = min(items, (int)blockDim.x);
        count = blockDim.x / lanes;
        lane = threadIdx.x % lanes;
        group = threadIdx.x / lanes;
    }
};

template <class Stored> __device__ __forceinline__ Pack<Stored, V> get(const Stored* from) {
    return *reinterpret_cast<const Pack<Stored, V>*>(from);
}

// y = x w
extern "C" __global__ void mix_forward(const X* __restrict__ x, const W* __restrict__ w, Y* __restrict__ y, int batch,
                                       int modes, int c_in, int c_out) {
    extern __shared__ __align__(32) unsigned char shared[];
    A* tile = reinterpret_cast<A*>(shared);
    int mode = blockIdx.x;
    w += (long long)mode * c_in * 2 * c_out;
    Groups groups(c_out / V);
    for (int first = 0; first < batch; first += NB) {
        __syncthreads();
        load(x, tile, first, batch, modes, mode, c_in);
        __syncthreads();
        for (int o = groups.lane * V; o < c_out && groups.group < groups.count; o += groups.lanes * V)
            for (int e = groups.group * EF; e < NB && first + e < batch; e += groups.count * EF) {
                A re[EF][V] = {}, im[EF][V] = {};
#pragma unroll 8
                for (int i = 0; i < c_in; ++i) {
                    Pack<W, V> wr = get(w + i * 2 * c_out + o), wi = get(w + i * 2 * c_out + c_out + o);
                    Entries<EF> row(tile, i, e);
#pragma unroll
                    for (int b = 0; b < EF; ++b)
#pragma unroll
                        for (int j = 0; j < V; ++j) {
                            A r = widen<A>(wr.at[j]), s = widen<A>(wi.at[j]);
                            re[b][j] += row.re(b) * r - row.im(b) * s;
                            im[b][j] += row.re(b) * s + row.im(b) * r;
                        }
                }
#pragma unroll
                for (int b = 0; b < EF; ++b) {
                    if (first + e + b >= batch) break;
                    long long to = (2ll * (first + e + b) * modes + mode) * c_out + o;
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        y[to + j] = narrow<Y>(re[b][j]);
                        y[to + (long long)modes * c_out + j] = narrow<Y>(im[b][j]);
                    }
                }
            }
    }
}

// gx = g w^H and gw = factor x^H g; g is stored as Y, gx as X, gw as accumulators.
extern "C" __global__ void mix_backward(const X* __restrict__ x, const W* __restrict__ w, const Y* __restrict__ g,
                                        X* __restrict__ gx, A* __restrict__ gw, A factor, int batch, int modes,
                                        int c_in, int c_out) {
    extern __shared__ __align__(32) unsigned char shared[];
    A* x_tile = reinterpret_cast<A*>(shared);
    A* g_tile = x_tile + 2 * NB * c_in;
    A* w_tile = g_tile + 2 * NB * c_out;   // [(re, im)][CHUNK][threads + 1]
    int mode = blockIdx.x;
    w += (long long)mode * c_in * 2 * c_out;
    gw += (long long)mode * c_in * 2 * c_out;
    // For gw, groups take input channels in turn; for gx, entries of the batch.
    Groups outputs(c_out / V), inputs(c_in);
    for (int first = 0; first < batch; first += NB) {
        __syncthreads();
        load(x, x_tile, first, batch, modes, mode, c_in);
        load(g, g_tile, first, batch, modes, mode, c_out);
        __syncthreads();
        for (int o = outputs.lane * V; o < c_out && outputs.group < outputs.count; o += outputs.lanes * V) {
            A gr[NB][V], gi[NB][V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                Entries<NB> column(g_tile, o + j, 0);
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    gr[b][j] = column.re(b);
                    gi[b][j] = column.im(b);
                }
            }
#pragma unroll 2
            for (int i = outputs.group; i < c_in; i += outputs.count) {
                A re[V] = {}, im[V] = {};
                Entries<NB> row(x_tile, i, 0);
#pragma unroll
                for (int b = 0; b < NB; ++b)
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        re[j] += row.re(b) * gr[b][j] + row.im(b) * gi[b][j];
                        im[j] += row.re(b) * gi[b][j] - row.im(b) * gr[b][j];
                    }
                A* to = gw + i * 2 * c_out + o;
                Pack<A, V> sum_re, sum_im, old_re = {}, old_im = {};
                if (first) {
                    old_re = get(to);
                    old_im = get(to + c_out);
                }
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    sum_re.at[j] = factor * re[j] + old_re.at[j];
                    sum_im.at[j] = factor * im[j] + old_im.at[j];
                }
                *reinterpret_cast<Pack<A, V>*>(to) = sum_re;
                *reinterpret_cast<Pack<A, V>*>(to + c_out) = sum_im;
            }
        }
        // Input channels in rounds of one per lane; every thread stays for the barriers. Groups beyond the entries
        // and lanes beyond the channels only help to load.
        for (int i0 = 0; i0 < c_in; i0 += inputs.lanes) {
            int i = i0 + inputs.lane, e = inputs.group * EB, rows = min(inputs.lanes, c_in - i0);
            A re[NB / EB][EB] = {}, im[NB / EB][EB] = {};
            for (int o0 = 0; o0 < c_out; o0 += CHUNK) {
                int n = min(CHUNK, c_out - o0);
                __syncthreads();
                int column = threadIdx.x % 32;
#pragma unroll 4
                for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
                    const W* from = w + (i0 + row) * 2 * c_out + o0 + column;
                    if (column < n) {
                        w_tile[column * (blockDim.x + 1) + row] = widen<A>(from[0]);
                        w_tile[(CHUNK + column) * (blockDim.x + 1) + row] = widen<A>(from[c_out]);
                    }
                }
                __syncthreads();
                if (i >= c_in || inputs.group >= inputs.count) continue;
#pragma unroll
                for (int turn = 0; turn < NB / EB; ++turn) {
                    int entry = e + turn * inputs.count * EB;
                    if (entry >= NB || first + entry >= batch) break;
#pragma unroll 4
                    for (int o = 0; o < n; ++o) {
                        A wr = w_tile[o * (blockDim.x + 1) + inputs.lane];
                        A wi = w_tile[(CHUNK + o) * (blockDim.x + 1) + inputs.lane];
                        Entries<EB> column(g_tile, o0 + o, entry);
#pragma unroll
                        for (int b = 0; b < EB; ++b) {
                            re[turn][b] += column.re(b) * wr + column.im(b) * wi;
                            im[turn][b] += column.im(b) * wr - column.re(b) * wi;
                        }
                    }
                }
            }
            if (i >= c_in || inputs.group >= inputs.count) continue;
#pragma unroll
            for (int turn = 0; turn < NB / EB; ++turn)
#pragma unroll
                for (int b = 0; b < EB; ++b) {
                    int entry = e + turn * inputs.count * EB + b;
                    if (entry >= NB || first + entry >= batch) break;
                    long long to = (2ll * (first + entry) * modes + mode) * c_in + i;
                    gx[to] = narrow<X>(re[turn][b]);
                    gx[to + (long long)modes * c_in] = narrow<X>(im[turn][b]);
                }
        }
    }
}
