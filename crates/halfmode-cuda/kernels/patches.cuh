// What a block of a convolution multiplies, in shared memory: a patch of a field, which the windows of a tile of points
// share, and the weights of some channels at one place of the window. A step takes 64 bytes of channels of one place; a
// patch of so many channels serves the steps of all places.
#pragma once
#include "tensor_cores.cuh"

// Points of a tile are rows, 2^log_width of them side by side; channels of the output are columns. Turned: the weight is read
// as that of the transpose. A block has 256 threads. Counts of channels are multiples of a piece, and 32 bits count the weight
// and a sample.
template <class Stored, int Rows, int Columns, bool Turned> struct Patches {
    static constexpr int PIECE = 16 / sizeof(Stored), CHUNK = 4 * PIECE;
    static constexpr int LINE = Columns + 8;  // of weights: neighbouring rows are in other banks
    static constexpr int PARTS = Columns / 64;
    static constexpr int DEPTH = 4;  // steps whose weights are there or on their way

    struct alignas(128) Weights {
        Stored at[Turned ? Columns * CHUNK : CHUNK * LINE];
    };

    // Where a piece of sixteen bytes of a row is: eight rows, or four pieces of two, are in different banks. Piece p is piece 0
    // with bits of p turned.
    static __device__ __forceinline__ int swizzled(int row, int piece) {
        return row * CHUNK + (piece ^ (row >> 1 & 3)) * PIECE;
    }

    // The field of the sample, the weight, and their sizes.
    const Stored *x, *w;
    int x1, x2, c_x, c_y, k1, k2;
    // The tile, and the patch: where both begin, and points of a row.
    int log_width, i, j, i0, j0, width, n_rows, n_patches, n_steps;
    Weights* weights;
    Stored* patches;
    // A thread brings some pieces of a step's weights; where these begin, from w on, or -1 where there are none.
    int part[PARTS];
    // The next step to bring, and the next to use: place, channels.
    struct Place {
        int step = 0, d1 = 0, d2 = 0, chunk = 0;
        __device__ __forceinline__ void next(int k1, int k2) {
            ++step;
            if (++d2 < k2) return;
            d2 = 0;
            if (++d1 < k1) return;
            d1 = 0;
            ++chunk;
        }
    } bringing, using_;

    // The `tile`-th tile of a sample of y1 x y2 points, and channels from n0 on.
    __device__ Patches(unsigned char* memory, const Stored* x, const Stored* w, int x1, int x2, int c_x, int y2, int c_y, int k1,
                       int k2, int pad1, int pad2, int log_width, int tile, int n0)
        : x(x), w(w), x1(x1), x2(x2), c_x(c_x), c_y(c_y), k1(k1), k2(k2), log_width(log_width) {
        int across = 1 << log_width, tiles = (y2 + across - 1) >> log_width;
        i = tile / tiles * (Rows >> log_width);
        j = tile % tiles << log_width;
        i0 = i - pad1;
        j0 = j - pad2;
        width = across + k2 - 1;
        n_rows = ((Rows >> log_width) + k1 - 1) * width;
        // One is used, one on its way; where a window has few places, more of them.
        n_patches = k1 * k2 < DEPTH - 1 ? DEPTH : 2;
        n_steps = (c_x + CHUNK - 1) / CHUNK * k1 * k2;
        weights = reinterpret_cast<Weights*>(memory);
        patches = reinterpret_cast<Stored*>(memory + DEPTH * sizeof(Weights));
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            int n = n0 + (Turned ? threadIdx.x / 4 + 64 * p : line_part(p) % (Columns / PIECE) * PIECE);
            int k = Turned ? threadIdx.x % 4 * PIECE : line_part(p) / (Columns / PIECE);
            part[p] = n >= c_y ? -1 : Turned ? n * c_x + k : k * c_y + n;
        }
        for (int step = 0; step < DEPTH - 1; ++step) bring();
    }

    // Where in a patch the window of the tile's point `row` begins.
    __device__ __forceinline__ int window(int row) const {
        return (row >> log_width) * width + (row & ((1 << log_width) - 1));
    }

    // What a step multiplies: the patch, how far its place is from where windows begin, and the weights.
    struct Step {
        const Stored *patch, *w;
        int shift;
    };
    // Waits for the next step, for all threads, and starts to bring a later one.
    __device__ __forceinline__ Step step() {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();
        bring();
        Step now = {patch_of(using_.chunk), weights[using_.step % DEPTH].at, using_.d1 * width + using_.d2};
        using_.next(k1, k2);
        return now;
    }

private:
    // A piece of the weights of a chunk: rows are channels of the field.
    static __device__ __forceinline__ int line_part(int p) { return threadIdx.x + 256 * p; }

    // Rows of a patch are even in number, so that swizzled rows of all patches are in the same banks.
    __device__ __forceinline__ Stored* patch_of(int chunk) const {
        return patches + chunk % n_patches * ((n_rows + 1) / 2 * 2 * CHUNK);
    }

    __device__ __forceinline__ void bring() {
        if (bringing.step < n_steps) {
            int d1 = bringing.d1, d2 = bringing.d2, c = bringing.chunk * CHUNK;
            if (d1 == 0 && d2 == 0) bring_patch(patch_of(bringing.chunk), c);
            Stored* to = weights[bringing.step % DEPTH].at;
            int place = Turned ? (k1 - 1 - d1) * k2 + k2 - 1 - d2 : d1 * k2 + d2;
            int at = place * c_x * c_y + (Turned ? c : c * c_y);
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                int row = threadIdx.x / 4 + 64 * p, piece = threadIdx.x % 4;
                int k = line_part(p) / (Columns / PIECE), n = line_part(p) % (Columns / PIECE) * PIECE;
                bool there = part[p] >= 0 && (Turned ? c + piece * PIECE : c + k) < c_x;
                copy_async_cached(to + (Turned ? swizzled(row, piece) : k * LINE + n), w + (there ? part[p] + at : 0), there);
            }
            bringing.next(k1, k2);
        }
        commit_copies();
    }

    __device__ __forceinline__ void bring_patch(Stored* to, int c) {
        for (int item = threadIdx.x; item < 4 * n_rows; item += 256) {
            int row = item / 4, piece = item % 4, down = row / width, i = i0 + down, j = j0 + row - down * width;
            bool there = c + piece * PIECE < c_x && unsigned(i) < unsigned(x1) && unsigned(j) < unsigned(x2);
            copy_async(to + swizzled(row, piece), x + (there ? (i * x2 + j) * c_x + c + piece * PIECE : 0), there);
        }
    }
};
