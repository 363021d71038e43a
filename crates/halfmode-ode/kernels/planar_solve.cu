// archs: sm_80 sm_90a
// variants: T=f16,DIM=2,FLOWS=128,STAGES=4,NODES=3,A10=0.5,A21=0.5,A32=1.0,B0=0.25,B1=0.25,B2=0.25,B3=0.25,C1=0.5,C2=0.5,C3=1.0,N1=1,N2=1,N3=2
//   T=f32,DIM=2,FLOWS=128,STAGES=4,NODES=3,A10=0.5,A21=0.5,A32=1.0,B0=0.25,B1=0.25,B2=0.25,B3=0.25,C1=0.5,C2=0.5,C3=1.0,N1=1,N2=1,N3=2
//   T=bf16,DIM=3,FLOWS=33,STAGES=1,NODES=1,B0=1.0
//
// A solve whose field is a mean of planar flows with its divergence, all steps in one launch. Points know nothing of each
// other: a warp keeps two of them, its lanes share the flows. The coefficients of the flows depend on the time alone; they
// are computed before, for every time at which a stage asks, and so is a table of what the loops want of them.
//
// STAGES stages with the numbers A, B, C of the tableau; the times of a step's stages are NODES different ones, that of
// stage j the N_j-th. Everything is in f32; T is what states are kept in.
#include "tableau.cuh"

#ifndef N1
#define N1 0
#endif
#ifndef N2
#define N2 0
#endif
#ifndef N3
#define N3 0
#endif

__device__ constexpr int node_of[4] = {0, N1, N2, N3};

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int POINTS = 2;  // of a warp
constexpr int ROW = 2 * DIM + 2;  // of the table: a, g, shift, <a, g>
constexpr int ENTRIES = FLOWS * ROW;
constexpr int TURNS = (FLOWS + 31) / 32;
constexpr f32 MEAN = 1.0f / FLOWS;

struct Point { f32 at[DIM]; };

__device__ __forceinline__ f32 tanh_of(f32 x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }

__device__ __forceinline__ f32 warp_sum(f32 x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

// The times of all nodes, from those between steps.
extern "C" __global__ void node_times(const f64* __restrict__ grid, f32* times, int steps) {
    for (long long i = grid_start(); i < (long long)steps * NODES; i += grid_stride()) {
        int step = int(i / NODES), node = int(i % NODES);
        f64 c = 0;
        for (int stage = STAGES - 1; stage >= 0; --stage)
            if (node_of[stage] == node) c = c_of[stage];
        f64 h = grid[step + 1] - grid[step];
        times[i] = f32(c >= 1 ? grid[step + 1] : grid[step] + c * h);
    }
}

// The table, from rows [a, u, gate, shift] of each flow at each node.
extern "C" __global__ void prepare(const f32* __restrict__ coefficients, f32* table, long long rows) {
    for (long long i = grid_start(); i < rows; i += grid_stride()) {
        const f32* from = coefficients + i * (3 * DIM + 1);
        f32* to = table + i * ROW;
        f32 product = 0.0f;
        for (int c = 0; c < DIM; ++c) {
            f32 gate = 1.0f / (1.0f + expf(-from[2 * DIM + c]));
            f32 g = from[DIM + c] * gate;
            to[c] = from[c];
            to[DIM + c] = g;
            product += from[c] * g;
        }
        to[2 * DIM] = from[3 * DIM];
        to[2 * DIM + 1] = product;
    }
}

struct Flow {
    f32 a[DIM], g[DIM], shift, product;
    __device__ __forceinline__ Flow(const f32* __restrict__ row) {
        f32 all[ROW];
#pragma unroll
        for (int i = 0; i < ROW / 2; ++i) {
            float2 pair = __ldg(reinterpret_cast<const float2*>(row) + i);
            all[2 * i] = pair.x;
            all[2 * i + 1] = pair.y;
        }
#pragma unroll
        for (int c = 0; c < DIM; ++c) {
            a[c] = all[c];
            g[c] = all[DIM + c];
        }
        shift = all[2 * DIM];
        product = all[2 * DIM + 1];
    }
    __device__ __forceinline__ f32 hidden(const Point& u) const {
        f32 sum = shift;
#pragma unroll
        for (int c = 0; c < DIM; ++c) sum += a[c] * u.at[c];
        return tanh_of(sum);
    }
};

// Velocity and minus the divergence at the warp's points.
__device__ __forceinline__ void velocity(const f32* __restrict__ table, int lane, const Point (&u)[POINTS],
                                         Point (&v)[POINTS], f32 (&m)[POINTS]) {
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
        v[p] = Point{};
        m[p] = 0.0f;
    }
#pragma unroll(TURNS <= 4 ? TURNS : 1)
    for (int turn = 0; turn < TURNS; ++turn) {
        int index = turn * 32 + lane;
        if (index >= FLOWS) break;
        Flow flow(table + index * ROW);
#pragma unroll
        for (int p = 0; p < POINTS; ++p) {
            f32 hidden = flow.hidden(u[p]);
#pragma unroll
            for (int c = 0; c < DIM; ++c) v[p].at[c] += flow.g[c] * hidden;
            m[p] += flow.product * (hidden * hidden - 1.0f);
        }
    }
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
#pragma unroll
        for (int c = 0; c < DIM; ++c) v[p].at[c] = MEAN * warp_sum(v[p].at[c]);
        m[p] = MEAN * warp_sum(m[p]);
    }
}

// u = y + h sum_k a_jk k, stage by stage; leaves inputs and slopes, and minus the mean divergence.
__device__ __forceinline__ void stages(const f32* __restrict__ table, int lane, f32 h, const Point (&y)[POINTS],
                                       Point (&inputs)[STAGES][POINTS], Point (&slopes)[STAGES][POINTS],
                                       f32 (&gained)[POINTS]) {
#pragma unroll
    for (int p = 0; p < POINTS; ++p) gained[p] = 0.0f;
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
#pragma unroll
        for (int p = 0; p < POINTS; ++p)
#pragma unroll
            for (int c = 0; c < DIM; ++c) {
                f32 sum = 0.0f;
#pragma unroll
                for (int k = 0; k < stage; ++k) sum += a_of[stage][k] * slopes[k][p].at[c];
                inputs[stage][p].at[c] = y[p].at[c] + h * sum;
            }
        f32 m[POINTS];
        velocity(table + node_of[stage] * ENTRIES, lane, inputs[stage], slopes[stage], m);
#pragma unroll
        for (int p = 0; p < POINTS; ++p) gained[p] += b_of[stage] * m[p];
    }
}

__device__ __forceinline__ int first_point() { return (blockIdx.x * WARPS + threadIdx.x / 32) * POINTS; }

// A warp's points from `point` on, and a number of each; zeros beyond the batch.
__device__ __forceinline__ void load_points(Point (&z)[POINTS], f32 (&l)[POINTS], const f32* z_in, const f32* l_in, int point,
                                            int batch) {
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
        bool there = point + p < batch;
        l[p] = there ? l_in[point + p] : 0.0f;
#pragma unroll
        for (int c = 0; c < DIM; ++c) z[p].at[c] = there ? z_in[(point + p) * DIM + c] : 0.0f;
    }
}

// Points and log-densities after the steps from `first` to `end`; the points before each of them, rounded, if they are
// kept. The first step after which something is not finite leaves its number, taken off the largest integer, in `status`.
extern "C" __global__ void __launch_bounds__(THREADS)
planar_forward(const f32* z_in, const f32* l_in, f32* z_out, f32* l_out, T* kept, const f32* __restrict__ table,
               const f64* __restrict__ grid, int* status, int batch, int first, int end) {
    int lane = threadIdx.x % 32, point = first_point();
    Point z[POINTS], inputs[STAGES][POINTS], slopes[STAGES][POINTS];
    f32 l[POINTS], gained[POINTS];
    load_points(z, l, z_in, l_in, point, batch);
#pragma unroll 1
    for (int step = first; step < end; ++step) {
        f32 h = f32(grid[step + 1] - grid[step]);
        if (kept && lane < POINTS && point + lane < batch) {
#pragma unroll
            for (int p = 0; p < POINTS; ++p)
                if (lane == p)
#pragma unroll
                    for (int c = 0; c < DIM; ++c)
                        kept[((long long)step * batch + point + p) * DIM + c] = narrow<T>(z[p].at[c]);
        }
        stages(table + (long long)step * NODES * ENTRIES, lane, h, z, inputs, slopes, gained);
        bool bad = false;
#pragma unroll
        for (int p = 0; p < POINTS; ++p) {
            l[p] += h * gained[p];
            bad |= !isfinite(l[p]);
#pragma unroll
            for (int c = 0; c < DIM; ++c) {
                f32 sum = 0.0f;
#pragma unroll
                for (int k = 0; k < STAGES; ++k) sum += b_of[k] * slopes[k][p].at[c];
                z[p].at[c] += h * sum;
                bad |= !isfinite(z[p].at[c]);
            }
        }
        if (bad && lane == 0) atomicMax(status, 0x7fffffff - step);
    }
    if (lane > 0) return;
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
        if (point + p >= batch) continue;
        l_out[point + p] = l[p];
#pragma unroll
        for (int c = 0; c < DIM; ++c) z_out[(point + p) * DIM + c] = z[p].at[c];
    }
}

// Whether a later stage of a step, which the way back meets before, has the same node.
__device__ constexpr bool is_met(int stage) {
    for (int later = stage + 1; later < STAGES; ++later)
        if (node_of[later] == node_of[stage]) return true;
    return false;
}

// The gradient by the points, back through the steps from `end` to `first`; that of the log-densities stays as it is.
// Each block leaves, for each node of these steps, sums of the gradients of the table's entries over its points.
extern "C" __global__ void __launch_bounds__(THREADS)
planar_backward(const T* __restrict__ kept, f32* gz, const f32* __restrict__ gl, const f32* __restrict__ table,
                f32* partial, const f64* __restrict__ grid, int batch, int first, int end) {
    extern __shared__ f32 sums[];  // [WARPS][ENTRIES]
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, point = first_point();
    partial += (long long)blockIdx.x * (end - first) * NODES * ENTRIES;
    Point a[POINTS];
    f32 al[POINTS];
    load_points(a, al, gz, gl, point, batch);
#pragma unroll 1
    for (int step = end - 1; step >= first; --step) {
        f32 h = f32(grid[step + 1] - grid[step]);
        const f32* here = table + (long long)step * NODES * ENTRIES;
        Point y[POINTS], inputs[STAGES][POINTS], slopes[STAGES][POINTS], w[STAGES][POINTS];
        f32 gained[POINTS];
#pragma unroll
        for (int p = 0; p < POINTS; ++p)
#pragma unroll
            for (int c = 0; c < DIM; ++c)
                y[p].at[c] = point + p < batch ? widen<f32>(kept[((long long)step * batch + point + p) * DIM + c]) : 0.0f;
        stages(here, lane, h, y, inputs, slopes, gained);
#pragma unroll
        for (int stage = STAGES - 1; stage >= 0; --stage) {
            Point b[POINTS];
            f32 bm[POINTS];
#pragma unroll
            for (int p = 0; p < POINTS; ++p) {
                bm[p] = MEAN * b_of[stage] * al[p];
#pragma unroll
                for (int c = 0; c < DIM; ++c) {
                    f32 sum = 0.0f;
#pragma unroll
                    for (int k = stage + 1; k < STAGES; ++k) sum += a_of[k][stage] * w[k][p].at[c];
                    b[p].at[c] = MEAN * (b_of[stage] * a[p].at[c] + h * sum);
                    w[stage][p].at[c] = 0.0f;
                }
            }
#pragma unroll(TURNS <= 4 ? TURNS : 1)
            for (int turn = 0; turn < TURNS; ++turn) {
                int index = turn * 32 + lane;
                if (index >= FLOWS) break;
                Flow flow(here + node_of[stage] * ENTRIES + index * ROW);
                f32 grads[ROW] = {};
#pragma unroll
                for (int p = 0; p < POINTS; ++p) {
                    f32 hidden = flow.hidden(inputs[stage][p]), slope = 1.0f - hidden * hidden;
                    f32 ds = 2.0f * flow.product * hidden * bm[p];
#pragma unroll
                    for (int c = 0; c < DIM; ++c) ds += flow.g[c] * b[p].at[c];
                    ds *= slope;
#pragma unroll
                    for (int c = 0; c < DIM; ++c) {
                        w[stage][p].at[c] += flow.a[c] * ds;
                        grads[c] += ds * inputs[stage][p].at[c];
                        grads[DIM + c] += hidden * b[p].at[c];
                    }
                    grads[2 * DIM] += ds;
                    grads[2 * DIM + 1] -= slope * bm[p];
                }
#pragma unroll
                for (int i = 0; i < ROW; ++i) sums[warp * ENTRIES + i * FLOWS + index] = h * grads[i];
            }
#pragma unroll
            for (int p = 0; p < POINTS; ++p)
#pragma unroll
                for (int c = 0; c < DIM; ++c) w[stage][p].at[c] = warp_sum(w[stage][p].at[c]);
            __syncthreads();
            f32* to = partial + ((long long)(step - first) * NODES + node_of[stage]) * ENTRIES;
            for (int entry = threadIdx.x; entry < ENTRIES; entry += THREADS) {
                f32 sum = is_met(stage) ? to[entry] : 0.0f;
#pragma unroll
                for (int other = 0; other < WARPS; ++other) sum += sums[other * ENTRIES + entry];
                to[entry] = sum;
            }
            __syncthreads();
        }
#pragma unroll
        for (int p = 0; p < POINTS; ++p)
#pragma unroll
            for (int c = 0; c < DIM; ++c) {
                f32 sum = 0.0f;
#pragma unroll
                for (int k = 0; k < STAGES; ++k) sum += w[k][p].at[c];
                a[p].at[c] += h * sum;
            }
    }
    if (lane > 0) return;
#pragma unroll
    for (int p = 0; p < POINTS; ++p)
#pragma unroll
        for (int c = 0; c < DIM; ++c)
            if (point + p < batch) gz[(point + p) * DIM + c] = a[p].at[c];
}

// Gradients of the coefficients of some nodes from node `first` on, from the sums of all blocks.
extern "C" __global__ void coefficient_gradients(const f32* __restrict__ partial, const f32* __restrict__ coefficients,
                                                 f32* grads, int blocks, int nodes, int first) {
    for (long long i = grid_start(); i < (long long)nodes * FLOWS; i += grid_stride()) {
        int node = int(i / FLOWS), flow = int(i % FLOWS);
        f32 sum[ROW] = {};
        for (int block = 0; block < blocks; ++block) {
            const f32* from = partial + ((long long)block * nodes + node) * ENTRIES + flow;
#pragma unroll
            for (int j = 0; j < ROW; ++j) sum[j] += from[j * FLOWS];
        }
        long long place = (long long)first * FLOWS + i;
        const f32* row = coefficients + place * (3 * DIM + 1);
        f32* to = grads + place * (3 * DIM + 1);
        f32 of_product = sum[2 * DIM + 1];
#pragma unroll
        for (int c = 0; c < DIM; ++c) {
            f32 gate = 1.0f / (1.0f + expf(-row[2 * DIM + c])), g = row[DIM + c] * gate;
            f32 of_g = sum[DIM + c] + of_product * row[c];
            to[c] = sum[c] + of_product * g;
            to[DIM + c] = of_g * gate;
            to[2 * DIM + c] = of_g * g * (1.0f - gate);
        }
        to[3 * DIM] = sum[2 * DIM];
    }
}
