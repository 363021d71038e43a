// archs: sm_80 sm_90a
// variants: W=f16,B=f16,T=f16 W=f32,B=f32,T=f16 W=bf16,B=bf16,T=bf16 W=f32,B=f32,T=bf16 W=f32,B=f32,T=f32
//   W=f64,B=f64,T=f64
//
// The weight of a layer that sees the time, [c_out, c + 1] with the time's column last: taken apart for products, whose
// rows then begin on whole words, and put together for gradients. W and B are the storage of weight and bias, T that of
// products. A block takes rows, its threads take columns.
#include "halfmode.cuh"

using A = acc_t<T>;

// matrix = weight[:, :c]; shift = bias + t weight[:, c]
extern "C" __global__ void split_time(const W* weight, const B* bias, const f64* t, T* matrix, A* shift, int c_out, int c) {
    for (long long row = blockIdx.x; row < c_out; row += gridDim.x) {
        const W* from = weight + row * (c + 1);
        for (int i = threadIdx.x; i < c; i += blockDim.x) matrix[row * c + i] = narrow<T>(widen<A>(from[i]));
        if (threadIdx.x == 0) shift[row] = widen<A>(bias[row]) + A(*t) * widen<A>(from[c]);
    }
}

// The weight's gradient: that of the matrix, and beside it t times that of the shift.
extern "C" __global__ void join_time(const A* matrix, const A* shift, const f64* t, A* weight, int c_out, int c) {
    for (long long row = blockIdx.x; row < c_out; row += gridDim.x) {
        A* to = weight + row * (c + 1);
        for (int i = threadIdx.x; i < c; i += blockDim.x) to[i] = matrix[row * c + i];
        if (threadIdx.x == 0) to[c] = A(*t) * shift[row];
    }
}

// The time's gradient: that of the shift through the time's column. One block.
extern "C" __global__ void time_slope(const W* weight, const A* shift, f64* slope, int c_out, int c) {
    f64 sum = 0;
    for (long long row = threadIdx.x; row < c_out; row += 256)
        sum += widen<f64>(weight[row * (c + 1) + c]) * widen<f64>(shift[row]);
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) *slope = sum;
}
