// archs: sm_80 sm_90a
// variants: S=f16,T=f16 S=bf16,T=bf16 S=f32,T=f32 S=f64,T=f64 S=f32,T=f16 S=f32,T=bf16 S=f16,T=f32 S=bf16,T=f32
//
// Parts of a field, and fields on other grids. S is the type that is read, T the one that is written.
#include "halfmode.cuh"

using A = wider<S, T>::type;

// box[o, j1, j2, j3, i] = whole[o, f1 + j1, f2 + j2, f3 + j3, i]: w are the extents of the whole, b of the box.
extern "C" __global__ void take_box(const S* __restrict__ whole, T* __restrict__ box, long long n, int w1, int w2,
                                    int w3, int b1, int b2, int b3, int f1, int f2, int f3, long long inner) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long i = at % inner, rest = at / inner;
        int j3 = rest % b3;
        rest /= b3;
        int j2 = rest % b2;
        rest /= b2;
        int j1 = rest % b1;
        long long o = rest / b1;
        long long from = (((o * w1 + f1 + j1) * w2 + f2 + j2) * w3 + f3 + j3) * inner + i;
        box[at] = narrow<T>(widen<A>(whole[from]));
    }
}

// The adjoint: the box in a whole that is zero around it.
extern "C" __global__ void put_box(const S* __restrict__ box, T* __restrict__ whole, long long n, int w1, int w2,
                                   int w3, int b1, int b2, int b3, int f1, int f2, int f3, long long inner) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        long long i = at % inner, rest = at / inner;
        int j3 = int(rest % w3) - f3;
        rest /= w3;
        int j2 = int(rest % w2) - f2;
        rest /= w2;
        int j1 = int(rest % w1) - f1;
        long long o = rest / w1;
        bool inside = 0 <= j1 && j1 < b1 && 0 <= j2 && j2 < b2 && 0 <= j3 && j3 < b3;
        long long from = (((o * b1 + j1) * b2 + j2) * b3 + j3) * inner + i;
        whole[at] = narrow<T>(inside ? widen<A>(box[from]) : A(0));
    }
}

// The neighbours of point i of an axis of m points that was one of n, and their weights: two of a line, or four of
// cubic convolution (a = -0.75). Points beyond the ends are the end points.
struct Neighbours {
    int n_taps, at[4];
    f64 weight[4];
    __device__ Neighbours(int i, int n, int m, int cubic) {
        f64 place = m > 1 ? f64((long long)i * (n - 1)) / f64(m - 1) : 0.0;
        int below = int(floor(place));
        f64 t = place - below;
        n_taps = cubic ? 4 : 2;
        for (int k = 0; k < n_taps; ++k) {
            at[k] = min(max(below + k - (cubic ? 1 : 0), 0), n - 1);
            f64 distance = fabs(t + 1 - k);
            if (!cubic) weight[k] = k ? t : 1.0 - t;
            else if (k == 1 || k == 2) weight[k] = (1.25 * distance - 2.25) * distance * distance + 1.0;
            else weight[k] = ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0;
        }
    }
};

// One axis: [outer, n, inner] to [outer, m, inner]. `size` is the number of scalars that are written.
extern "C" __global__ void interpolate(const S* __restrict__ x, T* __restrict__ y, long long size, int n, int m,
                                       long long inner, int cubic) {
    for (long long at = grid_start(); at < size; at += grid_stride()) {
        long long column = at % inner, row = at / inner;
        Neighbours near(int(row % m), n, m, cubic);
        const S* line = x + row / m * n * inner + column;
        A sum = 0;
        for (int k = 0; k < near.n_taps; ++k) sum += A(near.weight[k]) * widen<A>(line[near.at[k] * inner]);
        y[at] = narrow<T>(sum);
    }
}

// The adjoint, [outer, m, inner] to [outer, n, inner]: every point gathers from those that it is a neighbour of.
extern "C" __global__ void interpolate_backward(const S* __restrict__ g, T* __restrict__ gx, long long size, int n,
                                                int m, long long inner, int cubic) {
    for (long long at = grid_start(); at < size; at += grid_stride()) {
        long long column = at % inner, row = at / inner;
        int j = row % n;
        const S* line = g + row / n * m * inner + column;
        // Places between j - 2 and j + 2, with a point to spare.
        f64 step = n > 1 ? f64(m - 1) / f64(n - 1) : f64(m);
        int first = max(int(floor((j - 2) * step)) - 1, 0), last = min(int(ceil((j + 2) * step)) + 1, m - 1);
        A sum = 0;
        for (int i = first; i <= last; ++i) {
            Neighbours near(i, n, m, cubic);
            for (int k = 0; k < near.n_taps; ++k)
                if (near.at[k] == j) sum += A(near.weight[k]) * widen<A>(line[i * inner]);
        }
        gx[at] = narrow<T>(sum);
    }
}
