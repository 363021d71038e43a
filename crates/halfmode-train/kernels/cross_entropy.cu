// archs: sm_80 sm_90a
// variants: X=f16,L=f32,T=f32 X=bf16,L=f32,T=f32 X=f32,L=f32,T=f32 X=f64,L=f64,T=f64
//
// Cross entropy of logits [rows, n_classes] and labels. Labels come with the launch, four of 16 bits in a number, for 64
// rows from `first` on: nothing is copied to the device. X is the storage of logits, L that of the loss and its gradient, T
// that of the logits' gradient.
#include "halfmode.cuh"

struct Labels {
    long long words[16];
    __device__ int of(int row) const { return int(words[row / 4] >> (row % 4 * 16) & 0xffff); }
};

// The logarithm of the sum of exponentials.
__device__ f64 log_sum(const X* row, int n_classes) {
    f64 largest = widen<f64>(row[0]), sum = 0;
    for (int k = 1; k < n_classes; ++k) largest = fmax(largest, widen<f64>(row[k]));
    for (int k = 0; k < n_classes; ++k) sum += exp(widen<f64>(row[k]) - largest);
    return largest + log(sum);
}

#define LABELS                                                                                                        \
    long long l0, long long l1, long long l2, long long l3, long long l4, long long l5, long long l6, long long l7,   \
        long long l8, long long l9, long long l10, long long l11, long long l12, long long l13, long long l14,        \
        long long l15
#define GIVEN {l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15}

// losses[row] = -log softmax(x)[label], for `n` rows from `first` on.
extern "C" __global__ void row_losses(const X* x, f64* losses, int first, int n, int n_classes, LABELS) {
    Labels labels = {GIVEN};
    int row = threadIdx.x;
    if (row >= n) return;
    const X* from = x + (long long)(first + row) * n_classes;
    losses[first + row] = log_sum(from, n_classes) - widen<f64>(from[labels.of(row)]);
}

// The sum of all rows' losses, times `share`: one block.
extern "C" __global__ void sum_losses(const f64* losses, L* loss, f64 share, int rows) {
    f64 sum = 0;
    for (int row = threadIdx.x; row < rows; row += 256) sum += losses[row];
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) loss[0] = narrow<L>(sum * share);
}

// grad = seed share (softmax(x) - 1 at the label), for `n` rows from `first` on.
extern "C" __global__ void gradient(const X* x, const L* seed, T* grad, f64 share, int first, int n, int n_classes,
                                    LABELS) {
    Labels labels = {GIVEN};
    int row = threadIdx.x;
    if (row >= n) return;
    long long at = (long long)(first + row) * n_classes;
    f64 all = log_sum(x + at, n_classes), factor = widen<f64>(seed[0]) * share;
    for (int k = 0; k < n_classes; ++k)
        grad[at + k] = narrow<T>(factor * (exp(widen<f64>(x[at + k]) - all) - (k == labels.of(row) ? 1.0 : 0.0)));
}
