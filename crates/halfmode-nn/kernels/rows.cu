// archs: sm_80 sm_90a
// variants: T=f16,P=f16,V=4 T=f16,P=f16,V=1 T=f16,P=f32,V=4 T=bf16,P=bf16,V=4 T=f32,P=f32,V=4 T=f32,P=f32,V=1
//   T=f64,P=f64,V=1
//
// Pointwise operations on rows of channels, [rows, c], and their sums over rows. T is the storage of fields, P that
// of parameters, V how many neighbouring channels a thread works on (c is a multiple of it).
#include "halfmode.cuh"

using A = acc_t<T>;
using Values = Pack<T, V>;

// What a thread works on: channels c..c+V of every `step`-th row. A block is `lanes` threads wide.
struct Walk {
    int c, row_in_block, rows_per_block;
    bool active;
    __device__ Walk(int channels) {
        int lanes = min(channels / V, (int)blockDim.x);
        int lane = threadIdx.x % lanes;
        c = (blockIdx.y * blockDim.x + lane) * V;
        rows_per_block = blockDim.x / lanes;
        row_in_block = threadIdx.x / lanes;
        active = row_in_block < rows_per_block && c < channels;
    }
};

template <class F> __device__ __forceinline__ void each_row(const Walk& walk, long long rows, int channels, F f) {
    if (!walk.active) return;
    for (long long row = (long long)blockIdx.x * walk.rows_per_block + walk.row_in_block; row < rows;
         row += (long long)gridDim.x * walk.rows_per_block)
        f((row * channels + walk.c) / V);
}

template <int N> struct Sums { A at[N][V]; };

// parts[k][block][c] = sum over the block's rows, in the order of the rows of a thread, then of threads.
template <int N>
__device__ void store_sums(const Walk& walk, const Sums<N>& sums, A* parts, int channels) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* all = reinterpret_cast<A*>(shared);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < V; ++j) all[threadIdx.x * V + j] = sums.at[k][j];
        __syncthreads();
        if (walk.active && walk.row_in_block == 0) {
            int lanes = min(channels / V, (int)blockDim.x);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                A sum = 0;
                for (int r = 0; r < walk.rows_per_block; ++r) sum += all[(r * lanes + threadIdx.x) * V + j];
                parts[((long long)k * gridDim.x + blockIdx.x) * channels + walk.c + j] = sum;
            }
        }
    }
}

template <class S> __device__ __forceinline__ Pack<S, V> get(const S* x, long long at) {
    return reinterpret_cast<const Pack<S, V>*>(x)[at];
}
__device__ __forceinline__ void put(T* x, long long at, Values values) { reinterpret_cast<Values*>(x)[at] = values; }
__device__ __forceinline__ void channels_of(const P* p, int c, A* to) {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = p ? widen<A>(p[c + j]) : A(0);
}

// y = act(x + bias); bias may be absent.
extern "C" __global__ void bias_act(const T* x, const P* bias, T* y, int act, long long rows, int channels) {
    Walk walk(channels);
    A b[V] = {};
    if (walk.active) channels_of(bias, walk.c, b);
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(x, at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A z = widen<A>(v.at[j]) + b[j];
            v.at[j] = narrow<T>(act ? gelu(z) : z);
        }
        put(y, at, v);
    });
}

// g *= act'(x + bias) in place, and the sums of the result over rows.
extern "C" __global__ void bias_act_backward(const T* x, const P* bias, T* g, A* parts, int act, long long rows,
                                             int channels) {
    Walk walk(channels);
    A b[V] = {};
    if (walk.active) channels_of(bias, walk.c, b);
    Sums<1> sums = {};
    each_row(walk, rows, channels, [&](long long at) {
        Values slope = get(g, at);
        if (act) {
            Values v = get(x, at);
#pragma unroll
            for (int j = 0; j < V; ++j)
                slope.at[j] = narrow<T>(widen<A>(slope.at[j]) * gelu_slope(widen<A>(v.at[j]) + b[j]));
            put(g, at, slope);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) sums.at[0][j] += widen<A>(slope.at[j]);
    });
    store_sums<1>(walk, sums, parts, channels);
}

// The sums of g over rows.
extern "C" __global__ void sum_rows(const T* g, A* parts, long long rows, int channels) {
    Walk walk(channels);
    Sums<1> sums = {};
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(g, at);
#pragma unroll
        for (int j = 0; j < V; ++j) sums.at[0][j] += widen<A>(v.at[j]);
    });
    store_sums<1>(walk, sums, parts, channels);
}

// y = act(u + bias + gate x)
extern "C" __global__ void gate_act(const T* u, const T* x, const P* bias, const P* gate, T* y, int act, long long rows,
                                    int channels) {
    Walk walk(channels);
    A b[V] = {}, s[V] = {};
    if (walk.active) {
        channels_of(bias, walk.c, b);
        channels_of(gate, walk.c, s);
    }
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(u, at), skip = get(x, at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A z = widen<A>(v.at[j]) + b[j] + s[j] * widen<A>(skip.at[j]);
            v.at[j] = narrow<T>(act ? gelu(z) : z);
        }
        put(y, at, v);
    });
}

// grad becomes g = grad act'(u + bias + gate x); gx = gate g; sums of g and of g x.
extern "C" __global__ void gate_act_backward(const T* u, const T* x, const P* bias, const P* gate, T* grad, T* gx,
                                             A* parts, int act, long long rows, int channels) {
    Walk walk(channels);
    A b[V] = {}, s[V] = {};
    if (walk.active) {
        channels_of(bias, walk.c, b);
        channels_of(gate, walk.c, s);
    }
    Sums<2> sums = {};
    each_row(walk, rows, channels, [&](long long at) {
        Values g = get(grad, at), skip = get(x, at), through;
        if (act) {
            Values v = get(u, at);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                A z = widen<A>(v.at[j]) + b[j] + s[j] * widen<A>(skip.at[j]);
                g.at[j] = narrow<T>(widen<A>(g.at[j]) * gelu_slope(z));
            }
            put(grad, at, g);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A value = widen<A>(g.at[j]);
            through.at[j] = narrow<T>(s[j] * value);
            sums.at[0][j] += value;
            sums.at[1][j] += value * widen<A>(skip.at[j]);
        }
        put(gx, at, through);
    });
    store_sums<2>(walk, sums, parts, channels);
}

// y = gate x
extern "C" __global__ void gate_rows(const T* x, const P* gate, T* y, long long rows, int channels) {
    Walk walk(channels);
    A s[V] = {};
    if (walk.active) channels_of(gate, walk.c, s);
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(x, at);
#pragma unroll
        for (int j = 0; j < V; ++j) v.at[j] = narrow<T>(s[j] * widen<A>(v.at[j]));
        put(y, at, v);
    });
}

// gx = gate g, and the sums of g x.
extern "C" __global__ void gate_rows_backward(const T* g, const T* x, const P* gate, T* gx, A* parts, long long rows,
                                              int channels) {
    Walk walk(channels);
    A s[V] = {};
    if (walk.active) channels_of(gate, walk.c, s);
    Sums<1> sums = {};
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(x, at), grad = get(g, at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A value = widen<A>(grad.at[j]);
            sums.at[0][j] += value * widen<A>(v.at[j]);
            grad.at[j] = narrow<T>(s[j] * value);
        }
        put(gx, at, grad);
    });
    store_sums<1>(walk, sums, parts, channels);
}

// y = tanh x
extern "C" __global__ void tanh_forward(const T* x, T* y, long long rows, int channels) {
    Walk walk(channels);
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(x, at);
#pragma unroll
        for (int j = 0; j < V; ++j) v.at[j] = narrow<T>(tanh(widen<A>(v.at[j])));
        put(y, at, v);
    });
}

// y = tanh(y + bias)
extern "C" __global__ void bias_tanh(const P* bias, T* y, long long rows, int channels) {
    Walk walk(channels);
    A b[V] = {};
    if (walk.active) channels_of(bias, walk.c, b);
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(y, at);
#pragma unroll
        for (int j = 0; j < V; ++j) v.at[j] = narrow<T>(tanh(widen<A>(v.at[j]) + b[j]));
        put(y, at, v);
    });
}

// g *= 1 - y^2 where y is what a tanh gave, and the sums of the result over rows.
extern "C" __global__ void tanh_backward(const T* y, T* g, A* parts, long long rows, int channels) {
    Walk walk(channels);
    Sums<1> sums = {};
    each_row(walk, rows, channels, [&](long long at) {
        Values v = get(y, at), slope = get(g, at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A h = widen<A>(v.at[j]);
            slope.at[j] = narrow<T>(widen<A>(slope.at[j]) * (A(1) - h * h));
            sums.at[0][j] += widen<A>(slope.at[j]);
        }
        put(g, at, slope);
    });
    store_sums<1>(walk, sums, parts, channels);
}

// gx += g, times 1 - tanh(x)^2 where the input went through a tanh.
extern "C" __global__ void add_input_gradient(const T* g, const T* x, T* gx, int stabilized, long long rows,
                                              int channels) {
    Walk walk(channels);
    each_row(walk, rows, channels, [&](long long at) {
        Values sum = get(gx, at), term = get(g, at);
        Values v = stabilized ? get(x, at) : term;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A t = stabilized ? tanh(widen<A>(v.at[j])) : A(0);
            sum.at[j] = narrow<T>(widen<A>(sum.at[j]) + widen<A>(term.at[j]) * (A(1) - t * t));
        }
        put(gx, at, sum);
    });
}

// out[c] = sum over parts[..][c]: 32 columns and 32 runs of parts a block, each in order, then the runs in order.
extern "C" __global__ void add_parts(const A* parts, A* out, int n_parts, int channels) {
    __shared__ A runs[32][33];
    int column = threadIdx.x % 32, run = threadIdx.x / 32, c = blockIdx.x * 32 + column;
    A sum = 0;
    if (c < channels)
        for (int i = run; i < n_parts; i += 32) sum += parts[(long long)i * channels + c];
    runs[run][column] = sum;
    __syncthreads();
    if (run || c >= channels) return;
    sum = 0;
    for (int i = 0; i < 32; ++i) sum += runs[i][column];
    out[c] = sum;
}
