// archs: sm_80 sm_90a
// variants: S=f16,R=f16,T=f16 S=bf16,R=bf16,T=bf16 S=f32,R=f32,T=f32 S=f64,R=f64,T=f64 S=f32,R=f16,T=f16
//   S=f32,R=bf16,T=bf16 S=f16,R=f32,T=f32
//
// Functions of the scalars of one or two tensors. S and R are the types that are read, T the one that is written.
#include "halfmode.cuh"

using A = acc_t<T>;

// y = f(x), four at a time.
template <class F> __device__ __forceinline__ void map(const S* x, T* y, long long n, F f) {
    long long whole = n / 4;
    for (long long i = grid_start(); i < whole; i += grid_stride()) {
        Pack<S, 4> in = reinterpret_cast<const Pack<S, 4>*>(x)[i];
        Pack<T, 4> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = narrow<T>(f(widen<A>(in.at[j])));
        reinterpret_cast<Pack<T, 4>*>(y)[i] = out;
    }
    for (long long i = 4 * whole + grid_start(); i < n; i += grid_stride()) y[i] = narrow<T>(f(widen<A>(x[i])));
}

// y = f(a, b), four at a time.
template <class F> __device__ __forceinline__ void join(const S* a, const R* b, T* y, long long n, F f) {
    long long whole = n / 4;
    for (long long i = grid_start(); i < whole; i += grid_stride()) {
        Pack<S, 4> left = reinterpret_cast<const Pack<S, 4>*>(a)[i];
        Pack<R, 4> right = reinterpret_cast<const Pack<R, 4>*>(b)[i];
        Pack<T, 4> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) out.at[j] = narrow<T>(f(widen<A>(left.at[j]), widen<A>(right.at[j])));
        reinterpret_cast<Pack<T, 4>*>(y)[i] = out;
    }
    for (long long i = 4 * whole + grid_start(); i < n; i += grid_stride())
        y[i] = narrow<T>(f(widen<A>(a[i]), widen<A>(b[i])));
}

extern "C" __global__ void gelu_forward(const S* x, T* y, long long n) {
    map(x, y, n, [](A x) { return gelu(x); });
}

// y = g gelu'(x)
extern "C" __global__ void gelu_backward(const S* g, const R* x, T* y, long long n) {
    join(g, x, y, n, [](A g, A x) { return g * gelu_slope(x); });
}

extern "C" __global__ void tanh_forward(const S* x, T* y, long long n) {
    map(x, y, n, [](A x) { return tanh(x); });
}

// y = g (1 - t^2) with t = tanh x
extern "C" __global__ void tanh_backward(const S* g, const R* t, T* y, long long n) {
    join(g, t, y, n, [](A g, A t) { return g * (A(1) - t * t); });
}

extern "C" __global__ void relu_forward(const S* x, T* y, long long n) {
    map(x, y, n, [](A x) { return x < A(0) ? A(0) : x; });
}

// y = g where the rectifier's result is positive
extern "C" __global__ void relu_backward(const S* g, const R* t, T* y, long long n) {
    join(g, t, y, n, [](A g, A t) { return t > A(0) ? g : A(0); });
}

extern "C" __global__ void add(const S* a, const R* b, T* y, long long n) {
    join(a, b, y, n, [](A a, A b) { return a + b; });
}

extern "C" __global__ void subtract(const S* a, const R* b, T* y, long long n) {
    join(a, b, y, n, [](A a, A b) { return a - b; });
}

extern "C" __global__ void negate(const S* x, T* y, long long n) {
    map(x, y, n, [](A x) { return -x; });
}

// A tenth of the way from a running statistic to what a batch showed.
extern "C" __global__ void towards(const S* statistic, const R* seen, T* y, long long n) {
    join(statistic, seen, y, n, [](A s, A seen) { return s * A(0.9) + seen * A(0.1); });
}
