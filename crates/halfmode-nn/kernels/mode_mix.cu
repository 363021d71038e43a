// archs: sm_80 sm_90a
// variants: X=f16,W=f16,Y=f16 X=bf16,W=bf16,Y=bf16 X=f32,W=f32,Y=f32 X=f64,W=f64,Y=f64 X=f16,W=f32,Y=f16
//
// The mode contraction, one block of threads per mode, so that every weight is read once for NB entries of the
// batch. Spectra are [batch, (re, im), modes, channels], weights [modes, c_in, (re | im) c_out].
#include "halfmode.cuh"

using A = acc_t<X>;
constexpr int NB = 8;   // batch entries whose sums are in registers
constexpr int CHUNK = 32;   // outputs whose weights are in shared memory at a time

// Scalars (re, im) of NB batch entries of one mode, transposed: tile[c * 2 NB + 2 b + part]; zeros past the batch.
template <class T>
__device__ void load(const T* x, A* tile, int first, int batch, int modes, int mode, int channels) {
    for (int at = threadIdx.x; at < 2 * NB * channels; at += blockDim.x) {
        int c = at % channels, row = at / channels, b = first + row / 2;
        long long from = ((2ll * b + row % 2) * modes + mode) * channels + c;
        tile[c * 2 * NB + row] = b < batch ? widen<A>(x[from]) : A(0);
    }
}

// y = x w
extern "C" __global__ void mix_forward(const X* __restrict__ x, const W* __restrict__ w, Y* __restrict__ y, int batch,
                                       int modes, int c_in, int c_out) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* tile = reinterpret_cast<A*>(shared);
    int mode = blockIdx.x;
    w += (long long)mode * c_in * 2 * c_out;
    for (int first = 0; first < batch; first += NB) {
        __syncthreads();
        load(x, tile, first, batch, modes, mode, c_in);
        __syncthreads();
        for (int o = threadIdx.x; o < c_out; o += blockDim.x) {
            A re[NB] = {}, im[NB] = {};
            for (int i = 0; i < c_in; ++i) {
                A wr = widen<A>(w[i * 2 * c_out + o]), wi = widen<A>(w[i * 2 * c_out + c_out + o]);
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    A xr = tile[i * 2 * NB + 2 * b], xi = tile[i * 2 * NB + 2 * b + 1];
                    re[b] += xr * wr - xi * wi;
                    im[b] += xr * wi + xi * wr;
                }
            }
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                if (first + b >= batch) break;
                long long to = (2ll * (first + b) * modes + mode) * c_out + o;
                y[to] = narrow<Y>(re[b]);
                y[to + (long long)modes * c_out] = narrow<Y>(im[b]);
            }
        }
    }
}

// gx = g w^H and gw = factor x^H g; g is stored as Y, gx as X, gw as accumulators.
extern "C" __global__ void mix_backward(const X* __restrict__ x, const W* __restrict__ w, const Y* __restrict__ g,
                                        X* __restrict__ gx, A* __restrict__ gw, A factor, int batch, int modes,
                                        int c_in, int c_out) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* x_tile = reinterpret_cast<A*>(shared);
    A* g_tile = x_tile + 2 * NB * c_in;
    A* w_tile = g_tile + 2 * NB * c_out;   // [2 CHUNK][c_in + 1]
    int mode = blockIdx.x;
    w += (long long)mode * c_in * 2 * c_out;
    gw += (long long)mode * c_in * 2 * c_out;
    for (int first = 0; first < batch; first += NB) {
        __syncthreads();
        load(x, x_tile, first, batch, modes, mode, c_in);
        load(g, g_tile, first, batch, modes, mode, c_out);
        __syncthreads();
        for (int o = threadIdx.x; o < c_out; o += blockDim.x) {
            A gr[NB], gi[NB];
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                gr[b] = g_tile[o * 2 * NB + 2 * b];
                gi[b] = g_tile[o * 2 * NB + 2 * b + 1];
            }
            for (int i = 0; i < c_in; ++i) {
                A re = 0, im = 0;
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    A xr = x_tile[i * 2 * NB + 2 * b], xi = x_tile[i * 2 * NB + 2 * b + 1];
                    re += xr * gr[b] + xi * gi[b];
                    im += xr * gi[b] - xi * gr[b];
                }
                A* to = gw + i * 2 * c_out + o;
                to[0] = factor * re + (first ? to[0] : A(0));
                to[c_out] = factor * im + (first ? to[c_out] : A(0));
            }
        }
        // Input channels in rounds of one per thread; every thread stays for the barriers.
        for (int i0 = 0; i0 < c_in; i0 += blockDim.x) {
            int i = i0 + threadIdx.x;
            A re[NB] = {}, im[NB] = {};
            for (int o0 = 0; o0 < c_out; o0 += CHUNK) {
                int n = min(CHUNK, c_out - o0), rows = min((int)blockDim.x, c_in - i0);
                __syncthreads();
                for (int at = threadIdx.x; at < rows * 2 * n; at += blockDim.x) {
                    int o = at % n, part = at / n % 2, row = at / (2 * n);
                    w_tile[(2 * o + part) * (blockDim.x + 1) + row] =
                        widen<A>(w[(i0 + row) * 2 * c_out + part * c_out + o0 + o]);
                }
                __syncthreads();
                if (i < c_in) {
                    for (int o = 0; o < n; ++o) {
                        A wr = w_tile[2 * o * (blockDim.x + 1) + threadIdx.x];
                        A wi = w_tile[(2 * o + 1) * (blockDim.x + 1) + threadIdx.x];
#pragma unroll
                        for (int b = 0; b < NB; ++b) {
                            A gr = g_tile[(o0 + o) * 2 * NB + 2 * b], gi = g_tile[(o0 + o) * 2 * NB + 2 * b + 1];
                            re[b] += gr * wr + gi * wi;
                            im[b] += gi * wr - gr * wi;
                        }
                    }
                }
            }
            if (i < c_in) {
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    if (first + b >= batch) break;
                    long long to = (2ll * (first + b) * modes + mode) * c_in + i;
                    gx[to] = narrow<X>(re[b]);
                    gx[to + (long long)modes * c_in] = narrow<X>(im[b]);
                }
            }
        }
    }
}
