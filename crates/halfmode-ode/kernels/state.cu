// archs: sm_80 sm_90a
// variants: S=f16,Q=f16,R=f16,T=f16,A=f32,N=4,BASE=0,FIRST=0 S=f32,Q=f32,R=f16,T=f16,A=f32,N=3,BASE=1,FIRST=0
//   S=f32,Q=bf16,R=bf16,T=f32,A=f32,N=4,BASE=1,FIRST=0 S=f64,Q=f64,R=f64,T=f64,A=f64,N=2,BASE=1,FIRST=0
//   S=f64,Q=f16,R=f16,T=f64,A=f64,N=1,BASE=1,FIRST=0 S=f32,Q=f32,R=f16,T=f16,A=f32,N=2,BASE=0,FIRST=1
//
// What a solver does to whole states: sums over stages, time as one more channel, the largest value.
#include "halfmode.cuh"

// The first term may be of another type.
struct Terms {
    const Q* first;
    const R* at[8];
    A factor[8];
};

// `Count` neighbouring sums base + by * sum_j factor_j term_j: the sum over j first, then one addition, in A, rounded once;
// with FIRST, `by` is a factor of the first term alone. All that is read is on its way before anything is summed.
template <int Count>
__device__ __forceinline__ void combine_some(const S* base, const Terms& terms, const f64* by, A times, T* out, long long i) {
    Pack<Q, Count> first = reinterpret_cast<const Pack<Q, Count>*>(terms.first)[i];
    Pack<R, Count> others[N];
#pragma unroll
    for (int j = 1; j < N; ++j) others[j] = reinterpret_cast<const Pack<R, Count>*>(terms.at[j])[i];
    Pack<S, Count> start;
    if (BASE) start = reinterpret_cast<const Pack<S, Count>*>(base)[i];
    Pack<T, Count> sums;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        A sum = terms.factor[0] * widen<A>(first.at[k]);
        if (FIRST && by) sum *= times;
#pragma unroll
        for (int j = 1; j < N; ++j) sum += terms.factor[j] * widen<A>(others[j].at[k]);
        if (!FIRST && by) sum *= times;
        if (BASE) sum += widen<A>(start.at[k]);
        sums.at[k] = narrow<T>(sum);
    }
    reinterpret_cast<Pack<T, Count>*>(out)[i] = sums;
}

// `by` is a power of two that only the device knows.
__device__ __forceinline__ void combine_all(const S* base, const Terms& terms, const f64* by, T* out, long long n) {
    A times = by ? A(*by) : A(1);
    constexpr int COUNT = sizeof(A) == 8 ? 2 : 4;
    long long whole = n / COUNT;
    for (long long i = grid_start(); i < whole; i += grid_stride()) combine_some<COUNT>(base, terms, by, times, out, i);
    for (long long i = whole * COUNT + grid_start(); i < n; i += grid_stride())
        combine_some<1>(base, terms, by, times, out, i);
}

extern "C" __global__ void combine(const S* base, const Q* t0, const R* t1, const R* t2, const R* t3, const R* t4,
                                   const R* t5, const R* t6, const R* t7, f64 f0, f64 f1, f64 f2, f64 f3, f64 f4, f64 f5,
                                   f64 f6, f64 f7, const f64* by, T* out, long long n) {
    Terms terms = {t0, {nullptr, t1, t2, t3, t4, t5, t6, t7}, {A(f0), A(f1), A(f2), A(f3), A(f4), A(f5), A(f6), A(f7)}};
    combine_all(base, terms, by, out, n);
}

// sign base + round(factor term) on multiples of `spacing`, NaN beyond `most`. Both products round once or not at all, so
// that a contracted sum has the same bits.
extern "C" __global__ void lattice_sum(const S* base, const R* term, f64 sign, f64 factor, f64 spacing, f64 most, T* out,
                                       long long n) {
    for (long long i = grid_start(); i < n; i += grid_stride()) {
        f64 sum = rint(factor * widen<f64>(term[i]) / spacing) * spacing;
        if (BASE) sum += sign * widen<f64>(base[i]);
        out[i] = narrow<T>(fabs(sum) <= most ? sum : f64(__longlong_as_double(0x7ff8000000000000ll)));
    }
}

extern "C" __global__ void set(T* out, f64 value) { out[0] = narrow<T>(value); }

extern "C" __global__ void set_some(T* out, int first, int n, f64 v0, f64 v1, f64 v2, f64 v3, f64 v4, f64 v5, f64 v6,
                                    f64 v7, f64 v8, f64 v9, f64 v10, f64 v11, f64 v12, f64 v13, f64 v14, f64 v15) {
    f64 values[16] = {v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15};
#pragma unroll
    for (int i = 0; i < 16; ++i)
        if (threadIdx.x == i && i < n) out[first + i] = narrow<T>(values[i]);
}

// [rows, channels] with the time appended, and back.
extern "C" __global__ void append_time(const S* y, const R* time, T* out, long long rows, int channels) {
    T last = narrow<T>(widen<A>(time[0]));
    for (long long i = grid_start(); i < rows * (channels + 1); i += grid_stride()) {
        int channel = int(i % (channels + 1));
        out[i] = channel == channels ? last : narrow<T>(widen<A>(y[i / (channels + 1) * channels + channel]));
    }
}

extern "C" __global__ void drop_time(const S* grad, T* out, long long rows, int channels) {
    for (long long i = grid_start(); i < rows * channels; i += grid_stride())
        out[i] = narrow<T>(widen<A>(grad[i / channels * (channels + 1) + i % channels]));
}

// The gradient of the time: one block.
extern "C" __global__ void sum_time(const S* grad, T* out, long long rows, int channels) {
    f64 sum = 0;
    for (long long row = threadIdx.x; row < rows; row += 256) sum += widen<f64>(grad[row * (channels + 1) + channels]);
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) out[0] = narrow<T>(sum);
}

// The largest absolute value, as a positive float's bits grow with it; infinite if a value is not finite. `out` begins
// as zero.
extern "C" __global__ void largest(const S* x, int* out, long long n) {
    f32 most = 0;
    for (long long i = grid_start(); i < n; i += grid_stride()) {
        f32 value = fabsf(widen<f32>(x[i]));
        most = value <= 3.402823466e38f ? fmaxf(most, value) : __int_as_float(0x7f800000);
    }
    for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
    if (threadIdx.x % 32 == 0) atomicMax(out, __float_as_int(most));
}

// The scale that takes the largest value to the target, a power of two, and one over it; 1 if the largest value is zero
// or not finite.
extern "C" __global__ void choose_scale(const int* largest, f64* scale, f64* inverse, f64 target, int least, int most) {
    f64 value = __int_as_float(*largest);
    int exponent = 0;
    if (value > 0 && value <= 3.4e38) exponent = min(max(int(floor(log2(target / value))), least), most);
    scale[0] = exp2(f64(exponent));
    inverse[0] = exp2(-f64(exponent));
}
