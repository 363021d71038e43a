// Products of halves on tensor cores, and what brings their operands to registers.
#pragma once
#include "halfmode.cuh"

// Where a thread is in its warp: of a product it holds, of the left operand and of the sum, rows g and g + 8; of the right
// operand column g; and of a row, columns that begin at 2 t.
struct Lane {
    int warp, lane, g, t;
    __device__ Lane() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}
};

// Two halves in a register, nearest values.
template <class Stored> __device__ __forceinline__ unsigned packed(f32 low, f32 high) {
    Pack<Stored, 2> pair = {narrow<Stored>(low), narrow<Stored>(high)};
    return *reinterpret_cast<unsigned*>(&pair);
}

// c += a b on tensor cores, m16n8k16 of halves with sums in f32.
template <class Stored> struct Mma;
template <> struct Mma<f16> {
    static __device__ __forceinline__ void run(f32 (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <> struct Mma<bf16> {
    static __device__ __forceinline__ void run(f32 (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// Four 8 x 8 matrices of halves from shared memory: thread 8 k + i names row i of matrix k, and gets of matrix k the two
// halves from column 2 t on of row g; transposed, of column g.
__device__ __forceinline__ void load_matrices(unsigned (&a)[4], const void* from) {
    unsigned address = unsigned(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&a)[4], const void* from) {
    unsigned address = unsigned(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

// Sixteen bytes to shared memory while the thread goes on, or zeros; the second also leaves them in the first cache, for
// blocks that read what their neighbours read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    unsigned address = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_cached(void* to, const void* from, bool there) {
    unsigned address = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Ends a group of copies; waits until at most `Left` groups of this thread are under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}
