// archs: sm_80 sm_90a
// variants: BLOCKS=512
//
// The sum of squares of many tensors, whose formats are known at run time, in one fixed order.
#include "halfmode.cuh"

// One tensor of the table.
struct Values {
    // Its first chunk among those of all tensors.
    long long first_chunk;
    const void* x;
    long long n;
    // 0 f64, 1 f32, 2 bf16, 3 f16
    long long format;
};

constexpr int THREADS = 256;
// Scalars of a chunk.
constexpr long long CHUNK = 8192;

template <class Stored> __device__ f64 squares(const void* x, long long from, long long to) {
    const Stored* values = static_cast<const Stored*>(x);
    f64 sum = 0;
    long long whole = from + (to - from) / 4 * 4;
    for (long long i = from + 4 * threadIdx.x; i < whole; i += 4 * THREADS) {
        auto four = *reinterpret_cast<const Pack<Stored, 4>*>(values + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += widen<f64>(four.at[j]) * widen<f64>(four.at[j]);
    }
    for (long long i = whole + threadIdx.x; i < to; i += THREADS) sum += widen<f64>(values[i]) * widen<f64>(values[i]);
    return sum;
}

// parts[block] = the sum over the block's chunks.
extern "C" __global__ void sum_parts(const Values* table, int n_tensors, long long n_chunks, f64* parts) {
    f64 sum = 0;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += BLOCKS) {
        // The last tensor that does not start after the chunk.
        int low = 0, high = n_tensors;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (table[middle].first_chunk <= chunk) low = middle;
            else high = middle;
        }
        Values at = table[low];
        long long from = (chunk - at.first_chunk) * CHUNK, to = min(from + CHUNK, at.n);
        switch (at.format) {
        case 0: sum += squares<f64>(at.x, from, to); break;
        case 1: sum += squares<f32>(at.x, from, to); break;
        case 2: sum += squares<bf16>(at.x, from, to); break;
        default: sum += squares<f16>(at.x, from, to);
        }
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// sum[0] = the sum of all parts; one block.
extern "C" __global__ void sum_all(const f64* parts, f64* sum) {
    f64 own = 0;
    for (int i = threadIdx.x; i < BLOCKS; i += THREADS) own += parts[i];
    own = block_sum<THREADS>(own);
    if (threadIdx.x == 0) sum[0] = own;
}
