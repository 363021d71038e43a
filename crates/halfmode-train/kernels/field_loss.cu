// archs: sm_80 sm_90a
// variants: P=f32,Y=f32,A=f32,L=f32 P=f16,Y=f32,A=f32,L=f32 P=bf16,Y=f32,A=f32,L=f32 P=f16,Y=f16,A=f32,L=f32
//   P=bf16,Y=bf16,A=f32,L=f32 P=f64,Y=f64,A=f64,L=f64
//
// Norms of fields and their gradients. P is the storage of predictions and of their gradients, Y that of targets, A
// what values and derivatives are computed in and norms are kept in, L that of the loss and its gradient. Sums are
// formed in f64, in an order that depends on shapes alone.
//
// A block works on `span` scalars of one field; a field is cut into n_tiles such tiles. A complex field (pairs) is a
// real one of twice as many scalars.
#include "halfmode.cuh"

constexpr int THREADS = 256;

// The difference of two fields, or the second alone.
struct Values {
    const P* x;
    const Y* y;
    __device__ __forceinline__ A difference(long long i) const { return widen<A>(x[i]) - widen<A>(y[i]); }
    __device__ __forceinline__ A target(long long i) const { return widen<A>(y[i]); }
    __device__ Values field(long long first) const { return {x + first, y + first}; }
};

// Which scalars of which field a block works on.
struct Tile {
    long long field, from, to;
    __device__ Tile(long long n_points, int n_tiles, long long span) {
        field = blockIdx.x / n_tiles;
        from = blockIdx.x % n_tiles * span;
        to = min(from + span, n_points);
    }
};

// The sums of a block's values, in thread 0, in the order of a tree.
__device__ void store_sums(f64 error, f64 target, f64* parts) {
    __shared__ f64 sums[2][THREADS];
    sums[0][threadIdx.x] = error;
    sums[1][threadIdx.x] = target;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            sums[0][threadIdx.x] += sums[0][threadIdx.x + half];
            sums[1][threadIdx.x] += sums[1][threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x < 2) parts[2ll * blockIdx.x + threadIdx.x] = sums[threadIdx.x][0];
}

// |u|^p; exponents 1 and 2 have their own code, others are 0.
__device__ __forceinline__ f64 power(A u, int exponent, f64 p) {
    if (exponent == 2) return u * u;
    if (exponent == 1) return fabs(u);
    return pow(fabs(f64(u)), p);
}

// parts[block] = sums of |x - y|^p and |y|^p.
extern "C" __global__ void lp_sums(const P* x, const Y* y, f64* parts, long long n_points, int n_tiles, long long span,
                                   int relative, int exponent, f64 p, int pairs) {
    Tile tile(n_points, n_tiles, span);
    Values values = Values{x, y}.field(tile.field * n_points);
    f64 error = 0, target = 0;
    if (pairs && exponent != 2) {
        for (long long i = tile.from + 2 * threadIdx.x; i < tile.to; i += 2 * THREADS) {
            error += pow(hypot(f64(values.difference(i)), f64(values.difference(i + 1))), p);
            if (relative) target += pow(hypot(f64(values.target(i)), f64(values.target(i + 1))), p);
        }
    } else {
        for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS) {
            error += power(values.difference(i), exponent, p);
            if (relative) target += power(values.target(i), exponent, p);
        }
    }
    store_sums(error, target, parts);
}

// An axis of a grid: its points, the scalars between neighbours, 1 / 2h, and whether it closes.
struct Axis {
    int n, stride, periodic;
    A slope;

    // The derivative at a point of a line; `e` gives the line's values.
    template <class Line> __device__ __forceinline__ A derivative(const Line& e, int at) const {
        if (!periodic && (at == 0 || at == n - 1)) {
            int in = at == 0 ? 1 : -1;
            A sum = A(-11) * e(at) + A(18) * e(at + in) - A(9) * e(at + 2 * in) + A(2) * e(at + 3 * in);
            return A(in) * slope / A(3) * sum;
        }
        return slope * (e(at + 1 < n ? at + 1 : 0) - e(at > 0 ? at - 1 : n - 1));
    }

    // The transposed derivative of the derivative at a point.
    template <class Line> __device__ __forceinline__ A bend(const Line& e, int at) const {
        if (periodic)
            return slope * (derivative(e, at > 0 ? at - 1 : n - 1) - derivative(e, at + 1 < n ? at + 1 : 0));
        const A ends[] = {A(-11), A(18), A(-9), A(2)};
        A sum = 0;
        if (at >= 2) sum += slope * derivative(e, at - 1);
        if (at + 3 <= n) sum -= slope * derivative(e, at + 1);
        if (at < 4) sum += slope / A(3) * ends[at] * derivative(e, 0);
        if (n - 1 - at < 4) sum -= slope / A(3) * ends[n - 1 - at] * derivative(e, n - 1);
        return sum;
    }
};

// A grid of up to three axes; absent ones are before the present ones and have one point.
struct Grid {
    Axis axes[3];
    __device__ Grid(int n1, int n2, int n3, f64 s1, f64 s2, f64 s3, int periodic, int pairs) {
        int extents[] = {n1, n2, n3}, stride = pairs ? 2 : 1;
        f64 slopes[] = {s1, s2, s3};
#pragma unroll
        for (int a = 2; a >= 0; --a) {
            axes[a] = {extents[a], stride, periodic >> a & 1, A(slopes[a])};
            stride *= extents[a];
        }
    }

    // Calls f with each axis, the first scalar of the line through i and the place of i on it.
    template <class F> __device__ __forceinline__ void each(int i, const F& f) const {
#pragma unroll
        for (int a = 0; a < 3; ++a) {
            if (axes[a].n == 1) continue;
            int at = i / axes[a].stride % axes[a].n;
            f(axes[a], i - at * axes[a].stride, at);
        }
    }

    // u^2 and the squares of its derivatives at scalar i.
    template <class Field> __device__ __forceinline__ f64 energy(const Field& u, int i) const {
        f64 sum = u(i) * u(i);
        each(i, [&](const Axis& axis, int first, int at) {
            A slope = axis.derivative([&](int k) { return u(first + k * axis.stride); }, at);
            sum += slope * slope;
        });
        return sum;
    }
};

// parts[block] = energies of x - y and y.
extern "C" __global__ void h1_sums(const P* x, const Y* y, f64* parts, long long n_points, int n_tiles, long long span,
                                   int relative, int n1, int n2, int n3, f64 s1, f64 s2, f64 s3, int periodic,
                                   int pairs) {
    Tile tile(n_points, n_tiles, span);
    Values values = Values{x, y}.field(tile.field * n_points);
    Grid grid(n1, n2, n3, s1, s2, s3, periodic, pairs);
    f64 error = 0, target = 0;
    for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS) {
        error += grid.energy([&](int k) { return values.difference(k); }, i);
        if (relative) target += grid.energy([&](int k) { return values.target(k); }, i);
    }
    store_sums(error, target, parts);
}

__device__ __forceinline__ f64 root(f64 sum, int exponent, f64 p) {
    return exponent == 1 ? sum : exponent == 2 ? sqrt(sum) : pow(sum, 1.0 / p);
}

// norms[field] = (error, weight), which may be absent, and the loss, the sum of their products; one block.
extern "C" __global__ void finish(const f64* parts, A* norms, L* loss, long long n_fields, int n_tiles, int relative,
                                  int exponent, f64 p, f64 share) {
    __shared__ f64 sums[THREADS];
    f64 own = 0;
    for (long long field = threadIdx.x; field < n_fields; field += THREADS) {
        const f64* from = parts + 2 * field * n_tiles;
        f64 error = 0, target = 0;
        for (int i = 0; i < n_tiles; ++i) {
            error += from[2 * i];
            target += from[2 * i + 1];
        }
        error = root(error, exponent, p);
        f64 weight = relative ? share / (root(target, exponent, p) + 1e-8) : share;
        if (norms) {
            norms[2 * field] = narrow<A>(error);
            norms[2 * field + 1] = narrow<A>(weight);
        }
        own += error * weight;
    }
    sums[threadIdx.x] = own;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) loss[0] = narrow<L>(sums[0]);
}

// Norm and weight of a field, the loss's gradient in the weight.
struct Norm {
    f64 error, weight;
    __device__ Norm(const A* norms, const L* seed, long long field)
        : error(norms[2 * field]), weight(widen<f64>(seed[0]) * f64(norms[2 * field + 1])) {}
    __device__ bool vanishes() const { return fabs(error) <= 0.0; }
};

// grad = weight sign(e) (|e| / error)^(p - 1), with e = x - y; 0 where a field has no error.
extern "C" __global__ void lp_gradient(const P* x, const Y* y, const A* norms, const L* seed, P* grad,
                                       long long n_points, int n_tiles, long long span, int exponent, f64 p,
                                       int pairs) {
    Tile tile(n_points, n_tiles, span);
    Norm norm(norms, seed, tile.field);
    Values values = Values{x, y}.field(tile.field * n_points);
    P* out = grad + tile.field * n_points;
    if (norm.vanishes()) {
        for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS) out[i] = narrow<P>(A(0));
    } else if (exponent == 2) {
        A factor = A(norm.weight / norm.error);
        for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS)
            out[i] = narrow<P>(factor * values.difference(i));
    } else if (pairs) {
        for (long long i = tile.from + 2 * threadIdx.x; i < tile.to; i += 2 * THREADS) {
            f64 re = values.difference(i), im = values.difference(i + 1), size = hypot(re, im);
            // 0 where the difference vanishes, NaN where it is NaN.
            f64 slope = size <= 0.0 ? 0.0 : norm.weight * pow(size / norm.error, p - 1.0) / size;
            out[i] = narrow<P>(A(slope * re));
            out[i + 1] = narrow<P>(A(slope * im));
        }
    } else {
        for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS) {
            f64 e = values.difference(i), size = norm.weight;
            if (exponent != 1) size *= pow(fabs(e) / norm.error, p - 1.0);
            // The last case is 0, or NaN where the difference is NaN.
            out[i] = narrow<P>(A(e > 0.0 ? size : e < 0.0 ? -size : e));
        }
    }
}

// grad = weight / error (e + sum over axes of D^T D e), with e = x - y; 0 where a field has no error.
extern "C" __global__ void h1_gradient(const P* x, const Y* y, const A* norms, const L* seed, P* grad,
                                       long long n_points, int n_tiles, long long span, int n1, int n2, int n3, f64 s1,
                                       f64 s2, f64 s3, int periodic, int pairs) {
    Tile tile(n_points, n_tiles, span);
    Norm norm(norms, seed, tile.field);
    Values values = Values{x, y}.field(tile.field * n_points);
    Grid grid(n1, n2, n3, s1, s2, s3, periodic, pairs);
    P* out = grad + tile.field * n_points;
    A factor = norm.vanishes() ? A(0) : A(norm.weight / norm.error);
    for (long long i = tile.from + threadIdx.x; i < tile.to; i += THREADS) {
        A sum = values.difference(i);
        grid.each(i, [&](const Axis& axis, int first, int at) {
            sum += axis.bend([&](int k) { return values.difference(first + k * axis.stride); }, at);
        });
        out[i] = narrow<P>(norm.vanishes() ? A(0) : factor * sum);
    }
}
