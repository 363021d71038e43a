// archs: sm_80 sm_90a
// variants: T=f16,D=64,H=256,HIDDEN=3,STAGES=4,A10=0.5,A21=0.5,A32=1.0,B0=0.25,B1=0.25,B2=0.25,B3=0.25,C1=0.5,C2=0.5,C3=1.0
//   T=bf16,D=64,H=256,HIDDEN=3,STAGES=4,A10=0.5,A21=0.5,A32=1.0,B0=0.25,B1=0.25,B2=0.25,B3=0.25,C1=0.5,C2=0.5,C3=1.0
//   T=f16,D=3,H=32,HIDDEN=1,STAGES=1,B0=1.0 T=bf16,D=65,H=40,HIDDEN=2,STAGES=2,A10=1.0,B0=0.5,B1=0.5,C1=1.0
//
// A step of an explicit Runge-Kutta method whose field is a perceptron with tanh, and its vector-Jacobian product, on
// tensor cores. Rows of the state know nothing of each other, so a block keeps 32 of them through all stages of a step:
// state and slopes in registers, activations in shared memory. Weights come from the cache in the order in which
// registers want them.
//
// D channels, H units of a hidden layer, HIDDEN such layers, STAGES stages with the numbers A, B, C of the tableau.
//
// Sums are m16n8k16 products. Thread (g, t) of a warp, g = lane / 4 and t = lane % 4, holds of a sum rows g and g + 8 at
// columns 2 t and 2 t + 1; a block's 32 rows are two such products, and a warp has neighbouring columns.
#include "tableau.cuh"
#include "tensor_cores.cuh"

__device__ constexpr f32 ones[4] = {1, 1, 1, 1};

constexpr int ROWS = 32;  // of a block
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int DP = (D + 31) / 32 * 32;  // columns with those that are zero
constexpr int HP = (H + 31) / 32 * 32;
constexpr int WIDE = DP > HP ? DP : HP;
constexpr int LINE = WIDE + 8;  // of activations in shared memory: neighbouring rows are in other banks
__host__ __device__ constexpr int tiles_of(int columns) { return (columns / 8 + WARPS - 1) / WARPS; }
constexpr int DT = tiles_of(DP);  // products side by side of a warp
constexpr int HT = tiles_of(HP);

// Packed weights in sixteen bytes: forward those of the first layer, of the others between hidden layers, of the last;
// then the same transposed.
constexpr int SMALL = DP * HP / 8, LARGE = HP * HP / 8;
constexpr int WEIGHTS = 2 * SMALL + (HIDDEN - 1) * LARGE;
__host__ __device__ constexpr int forward_of(int layer) { return layer == 0 ? 0 : SMALL + (layer - 1) * LARGE; }
__host__ __device__ constexpr int backward_of(int layer) { return WEIGHTS + forward_of(layer); }

struct Shared {
    T act[2][ROWS][LINE];
    // Slopes of the stages, then gradients of their inputs: each thread has its own.
    f32 slopes[STAGES][DT * 8][THREADS];
    f32 largest[WARPS];
};

__device__ __forceinline__ Pack<T, 2> unpack(unsigned x) { return *reinterpret_cast<Pack<T, 2>*>(&x); }

// Hyperbolic tangent, off by less than 2e-7 for f16, and for bf16 by a part in 2^-11.
__device__ __forceinline__ f32 tanh_of(f32 x, f16) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }
__device__ __forceinline__ f32 tanh_of(f32 x, bf16) {
    f32 y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A warp's part of a block's sums: 32 rows and `Tiles` times 8 columns.
template <int Tiles> struct Sums {
    f32 at[Tiles][2][4];
    // Calls with each value, its tile, its half of the rows, and its place among four: row g + 8 (i / 2), column 2 t + i % 2.
    template <class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int j = 0; j < Tiles; ++j)
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) f(at[j][m][i], j, m, i);
    }
};

// Activations [32, K] times weights [K, N]. The first weights are on their way before activations are there.
template <int K, int N> struct Product {
    static constexpr int TILES = tiles_of(N), STEPS = K / 32, DEPTH = STEPS < 3 ? STEPS : 3;
    uint4 ring[DEPTH][TILES];

    __device__ __forceinline__ void load(const Lane& lane, const uint4* __restrict__ weights, int step) {
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            int tile = lane.warp * TILES + j;
            if (tile < N / 8) ring[step % DEPTH][j] = __ldg(weights + (tile * STEPS + step) * 32 + lane.lane);
        }
    }
    __device__ __forceinline__ void begin(const Lane& lane, const uint4* __restrict__ weights) {
#pragma unroll
        for (int step = 0; step < DEPTH; ++step) load(lane, weights, step);
    }
    __device__ __forceinline__ void run(const Lane& lane, const uint4* __restrict__ weights, const T (*act)[LINE],
                                        Sums<TILES>& sums) {
        sums.each([](f32& sum, int, int, int) { sum = 0.0f; });
        if (lane.warp * TILES >= N / 8) return;
        const T* from = &act[lane.lane % 16][lane.lane / 16 * 8];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned a[2][2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    load_matrices(a[m][half], from + m * 16 * LINE + step * 32 + half * 16);
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                uint4 b = ring[step % DEPTH][j];
                if (lane.warp * TILES + j >= N / 8) continue;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    Mma<T>::run(sums.at[j][m], a[m][0], b.x, b.y);
                    Mma<T>::run(sums.at[j][m], a[m][1], b.z, b.w);
                }
            }
            if (step + DEPTH < STEPS) load(lane, weights, step + DEPTH);
        }
    }
};

// Column of tile j, of a block's columns.
template <int Tiles> __device__ __forceinline__ int column_of(const Lane& lane, int j) {
    return (lane.warp * Tiles + j) * 8 + 2 * lane.t;
}

// Writes a warp's sums, rounded, to shared memory. True if something is not finite.
template <int N, int Tiles>
__device__ __forceinline__ bool put(const Lane& lane, Sums<Tiles>& sums, T (*act)[LINE]) {
    bool bad = false;
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
        int column = column_of<Tiles>(lane, j);
        if (column >= N) continue;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                unsigned both = packed<T>(sums.at[j][m][2 * r], sums.at[j][m][2 * r + 1]);
                Pack<T, 2> pair = unpack(both);
                bad |= !isfinite(widen<f32>(pair.at[0])) || !isfinite(widen<f32>(pair.at[1]));
                *reinterpret_cast<unsigned*>(&act[m * 16 + r * 8 + lane.g][column]) = both;
            }
    }
    return bad;
}

// Copies a block's rows from shared memory to memory.
template <int N> __device__ __forceinline__ void keep(const T (*act)[LINE], T* to) {
    constexpr int PARTS = N / 8;
    for (int part = threadIdx.x; part < ROWS * PARTS; part += THREADS) {
        int row = part / PARTS, column = part % PARTS * 8;
        *reinterpret_cast<uint4*>(to + row * N + column) = *reinterpret_cast<const uint4*>(&act[row][column]);
    }
}

// Calls with each value of a block's state [32, D] that a thread has and its place in memory.
template <class F> __device__ __forceinline__ void each_state(const Lane& lane, Sums<DT>& sums, int batch, F f) {
    sums.each([&](f32& value, int j, int m, int i) {
        int row = blockIdx.x * ROWS + m * 16 + i / 2 * 8 + lane.g, column = column_of<DT>(lane, j) + i % 2;
        f(value, row < batch && column < D, (long long)row * D + column);
    });
}

// Where activations of all stages are: those of layer 0 first, [STAGES, rows, DP], then [STAGES, rows, HP] each. Gradients
// of what tanh is taken of are the same way about, the last layer's at the end.
__device__ __forceinline__ T* input_of(T* xs, int layer, long long rows) {
    return layer == 0 ? xs : xs + STAGES * rows * (DP + (layer - 1ll) * HP);
}
__device__ __forceinline__ T* delta_of(T* deltas, int layer, long long rows) {
    return deltas + STAGES * rows * HP * (long long)layer;
}

// The sum over stages of `factors` times what is in shared memory.
__device__ __forceinline__ void combine(const Shared& shared, const f32 (&factors)[4], int first, int end, Sums<DT>& sum) {
    sum.each([](f32& value, int, int, int) { value = 0.0f; });
#pragma unroll 1
    for (int stage = first; stage < end; ++stage) {
        f32 factor = factors[stage];
        if (factor == 0.0f) continue;
        sum.each([&](f32& value, int j, int m, int i) {
            value += factor * shared.slopes[stage][j * 8 + m * 4 + i][threadIdx.x];
        });
    }
}
__device__ __forceinline__ void remember(Shared& shared, int stage, Sums<DT>& sums) {
    sums.each([&](f32& value, int j, int m, int i) { shared.slopes[stage][j * 8 + m * 4 + i][threadIdx.x] = value; });
}

// The velocity at the stage input that is in shared memory; `at` is the buffer that it is in.
template <bool Keeps>
__device__ __forceinline__ void velocity(const Lane& lane, Shared& shared, int& at, Product<DP, HP>& first,
                                         const uint4* __restrict__ weights, const f32* __restrict__ biases, f32 time,
                                         T* xs, int stage, long long rows, Sums<DT>& slope) {
    long long row = stage * rows + blockIdx.x * ROWS;
    __syncthreads();
    if (Keeps) keep<DP>(shared.act[at], input_of(xs, 0, rows) + row * DP);
    Sums<HT> sums;
    Product<HP, HP> middle;
    Product<HP, DP> last;
    first.run(lane, weights, shared.act[at], sums);
#pragma unroll 1
    for (int layer = 0;; ++layer) {
        if (layer + 1 < HIDDEN) middle.begin(lane, weights + forward_of(layer + 1));
        else last.begin(lane, weights + forward_of(HIDDEN));
        const f32* bias = biases + layer * HP;
        const f32* by_time = biases + HIDDEN * HP + DP;
        sums.each([&](f32& sum, int j, int, int i) {
            int column = column_of<HT>(lane, j) + i % 2;
            if (column >= HP) return;
            f32 shift = bias[column];
            if (layer == 0) shift += time * by_time[column];
            sum = tanh_of(sum + shift, T());
        });
        put<HP>(lane, sums, shared.act[at ^ 1]);
        at ^= 1;
        __syncthreads();
        if (Keeps) keep<HP>(shared.act[at], input_of(xs, layer + 1, rows) + row * HP);
        if (layer + 1 == HIDDEN) break;
        middle.run(lane, weights + forward_of(layer + 1), shared.act[at], sums);
    }
    last.run(lane, weights + forward_of(HIDDEN), shared.act[at], slope);
    const f32* bias = biases + HIDDEN * HP;
    slope.each([&](f32& value, int j, int, int i) {
        int column = column_of<DT>(lane, j) + i % 2;
        if (column < DP) value += bias[column];
    });
    at ^= 1;
}

// All slopes of a step from y, to shared memory.
template <bool Keeps>
__device__ __forceinline__ void slopes_of(const Lane& lane, Shared& shared, int& at, const uint4* __restrict__ weights,
                                          const f32* __restrict__ biases, f64 time, f64 h, T* xs, long long rows,
                                          Sums<DT>& y) {
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
        Product<DP, HP> first;
        first.begin(lane, weights);
        Sums<DT> input;
        combine(shared, a_of[stage], 0, stage, input);
        input.each([&](f32& value, int j, int m, int i) { value = y.at[j][m][i] + f32(h) * value; });
        put<DP>(lane, input, shared.act[at]);
        f32 when = f32(time + c_of[stage] * h);
        velocity<Keeps>(lane, shared, at, first, weights, biases, when, xs, stage, rows, input);
        remember(shared, stage, input);
    }
}

// The state after a step, and the one before it rounded, if it is kept. The first step whose state is not finite leaves
// its number, taken off the largest integer, in `status`.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_forward(const f32* __restrict__ y_in, f32* y_out, T* kept, const uint4* __restrict__ weights,
             const f32* __restrict__ biases, int* status, int batch, int step, f64 time, f64 h) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Lane lane;
    int at = 0;
    Sums<DT> y, slope;
    each_state(lane, y, batch, [&](f32& value, bool there, long long place) {
        value = there ? y_in[place] : 0.0f;
        if (there && kept) kept[place] = narrow<T>(value);
    });
    slopes_of<false>(lane, shared, at, weights, biases, time, h, nullptr, 0, y);
    combine(shared, b_of, 0, STAGES, slope);
    y.each([&](f32& value, int j, int m, int i) { value += f32(h) * slope.at[j][m][i]; });
    bool bad = false;
    each_state(lane, y, batch, [&](f32& value, bool there, long long place) {
        if (!there) return;
        bad |= !isfinite(value);
        y_out[place] = value;
    });
    if (__syncthreads_or(bad) && threadIdx.x == 0) atomicMax(status, 0x7fffffff - step);
}

// What a block remembers of the scale of its adjoint, between steps.
struct Scale {
    int is_set, exponent, n_clean, patience, grew, retries, least, most;
};

// Largest absolute value of a block's state; infinite if a value is not finite.
__device__ __forceinline__ f32 largest_of(const Lane& lane, Shared& shared, Sums<DT>& a) {
    f32 most = 0.0f;
    a.each([&](f32& value, int, int, int) {
        most = isfinite(value) ? fmaxf(most, fabsf(value)) : __int_as_float(0x7f800000);
    });
    for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
    __syncthreads();
    if (lane.lane == 0) shared.largest[lane.warp] = most;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) most = fmaxf(most, shared.largest[warp]);
    return most;
}

// The adjoint before a step from that after it. Activations and gradients of all stages go to memory, for the gradients
// of the weights, these scaled by one over `inverse` of their block. What overflows is tried again with a smaller scale,
// of this block alone: scales are powers of two, and rows know nothing of each other. `is_dynamic` is 0 for the scale
// 2^exponent throughout, 2 for a first scale of that.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
step_backward(const T* __restrict__ kept, f32* adjoint, T* xs, T* deltas, const uint4* __restrict__ weights,
              const f32* __restrict__ biases, Scale* scales, f32* inverse, unsigned long long* failure, int batch, int step,
              f64 time, f64 h, int is_dynamic, int exponent, f32 target, f32 low, int least, int most, int growth_interval,
              int max_growth_interval, int max_attempts) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Lane lane;
    int at = 0;
    long long rows = (long long)gridDim.x * ROWS;
    Sums<DT> a, w;
    {
        Sums<DT> y;
        each_state(lane, y, batch,
                   [&](f32& value, bool there, long long place) { value = there ? widen<f32>(kept[place]) : 0.0f; });
        slopes_of<true>(lane, shared, at, weights, biases, time, h, xs, rows, y);
    }
    each_state(lane, a, batch,
               [&](f32& value, bool there, long long place) { value = there ? adjoint[place] : 0.0f; });
    f32 largest = largest_of(lane, shared, a);
    Scale scale = scales[blockIdx.x];
    if (!is_dynamic) scale.exponent = exponent;
    else if (!scale.is_set && largest > 0.0f && isfinite(largest)) {
        scale.is_set = 1;
        int first = is_dynamic == 2 ? exponent : int(floorf(log2f(target / largest)));
        scale.least = scale.most = scale.exponent = min(max(first, least), most);
        scale.n_clean = scale.patience = growth_interval;
    }
    int attempt = 1;
    bool fails = is_dynamic && !isfinite(largest);
    for (; !fails; ++attempt) {
        bool bad = false;
        f32 factor = exp2f(f32(scale.exponent));
#pragma unroll 1
        for (int stage = STAGES - 1; stage >= 0; --stage) {
            Product<DP, HP> first;
            Product<HP, HP> middle;
            Product<HP, DP> last;
            first.begin(lane, weights + backward_of(HIDDEN));
            combine(shared, a_from[stage], stage + 1, STAGES, w);
            f32 weight = b_of[stage] * factor;
            w.each([&](f32& value, int j, int m, int i) { value = weight * a.at[j][m][i] + f32(h) * value; });
            bad |= put<DP>(lane, w, shared.act[at]);
            __syncthreads();
            long long row = stage * rows + blockIdx.x * ROWS;
            keep<DP>(shared.act[at], delta_of(deltas, HIDDEN, rows) + row * DP);
            Sums<HT> sums;
            unsigned values[HT][2][2];
            auto activations = [&](int layer) {
                const T* x = input_of(xs, layer, rows) + row * HP;
#pragma unroll
                for (int part = 0; part < HT * 4; ++part) {
                    int j = part / 4, m = part / 2 % 2, r = part % 2, column = column_of<HT>(lane, j);
                    const T* from = x + (m * 16 + r * 8 + lane.g) * HP + column;
                    values[j][m][r] = column < HP ? *reinterpret_cast<const unsigned*>(from) : 0u;
                }
            };
            activations(HIDDEN);
            first.run(lane, weights + backward_of(HIDDEN), shared.act[at], sums);
#pragma unroll 1
            for (int layer = HIDDEN;; --layer) {
                if (layer > 1) middle.begin(lane, weights + backward_of(layer - 1));
                else last.begin(lane, weights + backward_of(0));
                sums.each([&](f32& sum, int j, int m, int i) {
                    f32 y = widen<f32>(unpack(values[j][m][i / 2]).at[i % 2]);
                    sum *= 1.0f - y * y;
                });
                bad |= put<HP>(lane, sums, shared.act[at ^ 1]);
                at ^= 1;
                __syncthreads();
                keep<HP>(shared.act[at], delta_of(deltas, layer - 1, rows) + row * HP);
                if (layer == 1) break;
                activations(layer - 1);
                middle.run(lane, weights + backward_of(layer - 1), shared.act[at], sums);
            }
            last.run(lane, weights + backward_of(0), shared.act[at], w);
            remember(shared, stage, w);
            at ^= 1;
        }
        w.each([&](f32& value, int, int, int) { bad |= !isfinite(value); });
        if (!__syncthreads_or(bad) || !is_dynamic) break;
        if (attempt == 1 && scale.grew) scale.patience = min(2 * scale.patience, max(max_growth_interval, 1));
        scale.grew = scale.n_clean = 0;
        fails = scale.exponent <= least || attempt >= max_attempts;
        if (fails) break;
        scale.exponent = max(scale.exponent - (1 << min(max(attempt - 8, 0), 20)), least);
    }
    f32 unscaled = fails ? __int_as_float(0x7fc00000) : exp2f(-f32(scale.exponent));
    combine(shared, ones, 0, STAGES, w);
    a.each([&](f32& value, int j, int m, int i) { value += f32(h) * unscaled * w.at[j][m][i]; });
    largest = largest_of(lane, shared, a);
    fails |= is_dynamic && !isfinite(largest);
    if (threadIdx.x == 0) {
        inverse[blockIdx.x] = unscaled;
        scale.retries += attempt - 1;
        scale.least = min(scale.least, scale.exponent);
        scale.most = max(scale.most, scale.exponent);
        if (is_dynamic && scale.is_set && !fails) {
            if (attempt == 1) {
                scale.n_clean += 1;
                if (scale.grew) scale.patience = growth_interval;
            }
            scale.grew = 0;
            if (largest > 0.0f) {
                f32 scaled = largest * exp2f(f32(scale.exponent));
                int before = scale.exponent;
                if (scaled < low) scale.exponent += int(ceilf(log2f(low / scaled)));
                else if (attempt == 1 && scaled < 0.5f * target && scale.n_clean >= scale.patience) scale.exponent += 1;
                scale.exponent = max(min(scale.exponent, most), before);
                scale.grew = scale.exponent > before;
            }
        }
        scales[blockIdx.x] = scale;
        if (fails)
            atomicMax(failure, ((unsigned long long)(step + 1) << 32) | (unsigned(attempt) << 16) | unsigned(scale.exponent + 1024));
    }
    each_state(lane, a, batch, [&](f32& value, bool there, long long place) {
        if (there) adjoint[place] = value;
    });
}

// Tiles of the gradients of all weights, 128 x 128, and where sums of a layer begin in those of a split: [out, in + 8],
// in the columns behind those of the inputs the gradients of the bias and of the time's weight.
constexpr int TILE = 128, CHUNK = 32, STAGE_LINE = TILE + 8, DEPTH = 4;
__host__ __device__ constexpr int outputs_of(int layer) { return layer == HIDDEN ? DP : HP; }
__host__ __device__ constexpr int inputs_of(int layer) { return layer == 0 ? DP : HP; }
__host__ __device__ constexpr int up(int n) { return (n + TILE - 1) / TILE; }
__device__ __forceinline__ long long sums_of(int layer) {
    return layer == 0 ? 0 : HP * (DP + 8ll) + (layer - 1ll) * HP * (HP + 8ll);
}
__device__ __forceinline__ long long split_of() { return sums_of(HIDDEN) + DP * (HP + 8ll); }

struct Chunks {
    T delta[DEPTH][CHUNK][STAGE_LINE];
    T x[DEPTH][CHUNK][STAGE_LINE];
};

// Adds the gradients of the weights in one step to the sums of a split: block x is a tile, block y a split of the rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
weight_gradients(const T* __restrict__ xs, const T* __restrict__ deltas, const f32* __restrict__ inverse, f32* sums,
                 int blocks, int is_first, f64 time, f64 h) {
    extern __shared__ __align__(16) unsigned char memory[];
    Chunks& chunks = *reinterpret_cast<Chunks*>(memory);
    Lane lane;
    int tile = blockIdx.x, layer = 0;
    while (tile >= up(outputs_of(layer)) * up(inputs_of(layer))) {
        tile -= up(outputs_of(layer)) * up(inputs_of(layer));
        ++layer;
    }
    int n_out = outputs_of(layer), n_in = inputs_of(layer);
    int out = tile / up(n_in) * TILE, in = tile % up(n_in) * TILE;
    long long rows = (long long)blocks * ROWS;
    const T* delta = delta_of(const_cast<T*>(deltas), layer, rows) + out;
    const T* x = input_of(const_cast<T*>(xs), layer, rows) + in;

    int n = STAGES * blocks;
    int begin = int((long long)n * blockIdx.y / gridDim.y), end = int((long long)n * (blockIdx.y + 1) / gridDim.y);
    auto load = [&](int chunk) {
        if (chunk < end) {
            int slot = (chunk - begin) % DEPTH;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int part = threadIdx.x + half * THREADS, row = part / 16, column = part % 16 * 8;
                long long from = (long long)chunk * CHUNK + row;
                bool there = out + column < n_out;
                copy_async(&chunks.delta[slot][row][column], there ? delta + from * n_out + column : delta, there);
                there = in + column < n_in;
                copy_async(&chunks.x[slot][row][column], there ? x + from * n_in + column : x, there);
            }
        }
        commit_copies();
    };
    for (int chunk = begin; chunk < begin + DEPTH - 1; ++chunk) load(chunk);

    int row_warp = lane.warp / 4 * 64, column_warp = lane.warp % 4 * 32;
    bool has_bias = in == 0 && column_warp == 0;
    f32 acc[4][4][4] = {}, bias[4][4] = {};
    f32 unit = begin < end ? inverse[begin % blocks] : 1.0f;
    for (int chunk = begin; chunk < end; ++chunk) {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();
        load(chunk + DEPTH - 1);
        f32 scale = inverse[chunk % blocks];
        if (scale != unit) {
            f32 ratio = unit / scale;
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bias[m][i] *= ratio;
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc[m][j][i] *= ratio;
                }
            unit = scale;
        }
        int slot = (chunk - begin) % DEPTH, stage = chunk / blocks;
        f32 column = lane.g == 0 ? 1.0f : lane.g == 1 ? f32(time + c_of[stage] * h) : 0.0f;
        unsigned one = packed<T>(column, column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m)
                load_transposed(a[m], &chunks.delta[slot][half * 16 + lane.lane / 16 * 8 + lane.lane % 8]
                                                   [row_warp + m * 16 + lane.lane / 8 % 2 * 8]);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                load_transposed(b[j], &chunks.x[slot][half * 16 + lane.lane / 8 % 2 * 8 + lane.lane % 8]
                                               [column_warp + j * 16 + lane.lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
                for (int j = 0; j < 4; ++j) Mma<T>::run(acc[m][j], a[m], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                if (has_bias) Mma<T>::run(bias[m], a[m], one, one);
            }
        }
    }
    wait_for_copies<0>();

    // What is there is read, a few rows at a time, before anything is written.
    f32 factor = f32(h) * unit;
    f32* to = sums + blockIdx.y * split_of() + sums_of(layer);
    float2 before[2][5];
    auto pass = [&](int m, bool writes) {
#pragma unroll
        for (int part = 0; part < 10; ++part) {
            int r = part / 5, j = part % 5;
            int row = out + row_warp + m * 16 + r * 8 + lane.g;
            int column = j < 4 ? in + column_warp + j * 8 + 2 * lane.t : n_in + 2 * lane.t;
            if (row >= n_out || (j < 4 ? column >= n_in : !has_bias)) continue;
            float2& sum = *reinterpret_cast<float2*>(to + (long long)row * (n_in + 8) + column);
            float2& old = before[r][j];
            if (!writes) old = is_first ? float2{0.0f, 0.0f} : sum;
            else if (j < 4) sum = {old.x + factor * acc[m][j % 4][2 * r], old.y + factor * acc[m][j % 4][2 * r + 1]};
            else sum = {old.x + factor * bias[m][2 * r], old.y + factor * bias[m][2 * r + 1]};
        }
    };
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        pass(m, false);
        pass(m, true);
    }
}

// The sum over splits of one layer: gradients of its weight [out, in] and bias.
extern "C" __global__ void sum_gradients(const f32* __restrict__ sums, f32* weight, f32* bias, int splits, int layer,
                                         int c_out, int c_in) {
    int n_in = inputs_of(layer), columns = layer == 0 ? D : H;
    const f32* from = sums + sums_of(layer);
    for (long long item = grid_start(); item < (long long)c_out * (c_in + 1); item += grid_stride()) {
        int row = int(item / (c_in + 1)), column = int(item % (c_in + 1));
        // The time's weight is the column behind those of the state.
        int place = column == c_in ? n_in : column < columns ? column : n_in + 1;
        f32 sum = 0.0f;
        for (int split = 0; split < splits; ++split) sum += from[split * split_of() + (long long)row * (n_in + 8) + place];
        if (column == c_in) bias[row] = sum;
        else weight[(long long)row * c_in + column] = sum;
    }
}

#ifndef W
#define W T
#endif

// Weights [out, in] and bias of one layer in the order of the products, forward and transposed.
extern "C" __global__ void pack_weights(const W* __restrict__ weight, const W* __restrict__ bias, T* packed, f32* biases,
                                        int layer, int c_out, int c_in) {
    int n_in = inputs_of(layer), n_out = outputs_of(layer), columns = layer == 0 ? D : H;
    auto at = [&](int row, int column) {
        return row < c_out && column < columns ? narrow<T>(widen<f32>(weight[(long long)row * c_in + column])) : narrow<T>(0.0f);
    };
    T* forward = packed + 8ll * forward_of(layer);
    T* backward = packed + 8ll * backward_of(layer);
    for (long long item = grid_start(); item < (long long)n_in * n_out; item += grid_stride()) {
        int part = int(item % 8), l = int(item / 8 % 32);
        int k = part / 2 * 8 + l % 4 * 2 + part % 2, n = l / 4;
        int block = int(item / 256);
        forward[item] = at(block / (n_in / 32) * 8 + n, block % (n_in / 32) * 32 + k);
        backward[item] = at(block % (n_out / 32) * 32 + k, block / (n_out / 32) * 8 + n);
    }
    for (int row = int(grid_start()); row < n_out; row += int(grid_stride())) {
        biases[layer * HP + row] = row < c_out ? widen<f32>(bias[row]) : 0.0f;
        if (layer == 0) biases[HIDDEN * HP + DP + row] = row < c_out && c_in > D ? widen<f32>(narrow<T>(widen<f32>(weight[(long long)row * c_in + D]))) : 0.0f;
    }
}
