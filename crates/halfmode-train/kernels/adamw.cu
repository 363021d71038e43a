// archs: sm_80 sm_90a
// variants: A=f32 A=f64
//
// AdamW on parameters whose storage formats are known at run time. A is what the update is computed in.
#include "halfmode.cuh"

// Storage formats, as the host numbers them.
enum Format { F64, F32, BF16, F16 };

// `Count` neighbouring scalars from `at` on.
template <int Count, class Stored> __device__ __forceinline__ void load_as(const void* x, long long at, A* to) {
    auto values = *reinterpret_cast<const Pack<Stored, Count>*>(static_cast<const Stored*>(x) + at);
#pragma unroll
    for (int j = 0; j < Count; ++j) to[j] = widen<A>(values.at[j]);
}
// They are rounded in place as they are stored.
template <int Count, class Stored> __device__ __forceinline__ void store_as(void* x, long long at, A* from) {
    Pack<Stored, Count> values;
#pragma unroll
    for (int j = 0; j < Count; ++j) {
        values.at[j] = narrow<Stored>(from[j]);
        from[j] = widen<A>(values.at[j]);
    }
    *reinterpret_cast<Pack<Stored, Count>*>(static_cast<Stored*>(x) + at) = values;
}
template <int Count> __device__ __forceinline__ void load(int format, const void* x, long long at, A* to) {
    switch (format) {
    case F64: return load_as<Count, f64>(x, at, to);
    case F32: return load_as<Count, f32>(x, at, to);
    case BF16: return load_as<Count, bf16>(x, at, to);
    default: return load_as<Count, f16>(x, at, to);
    }
}
template <int Count> __device__ __forceinline__ void store(int format, void* x, long long at, A* from) {
    switch (format) {
    case F64: return store_as<Count, f64>(x, at, from);
    case F32: return store_as<Count, f32>(x, at, from);
    case BF16: return store_as<Count, bf16>(x, at, from);
    default: return store_as<Count, f16>(x, at, from);
    }
}

// One parameter. An item is one second moment: a scalar, or a real part and the imaginary part `stride` behind it
// in a row of 2 stride scalars.
struct Parameter {
    // Its first chunk among those of all parameters.
    long long first_chunk;
    const void* grad;
    void *m, *v, *exact, *copy;
    long long n_items;
    // 0 for scalars.
    int stride;
    // Four bits each: gradient, moments, exact weight, copy.
    int formats;
    __device__ int format(int idx) const { return formats >> (4 * idx) & 15; }
};

// p = (p before - step m / (sqrt(v) root + eps)) after
struct Rule {
    A unscale, beta_1, rest_1, beta_2, rest_2, before, after, step, root, eps;
};

template <int Count>
__device__ __forceinline__ void weight(const Rule& rule, const Parameter& at, long long i, const A* m, const A* below) {
    A p[Count];
    load<Count>(at.format(2), at.exact, i, p);
#pragma unroll
    for (int j = 0; j < Count; ++j) p[j] = (p[j] * rule.before - rule.step * m[j] / below[j]) * rule.after;
    store<Count>(at.format(2), at.exact, i, p);
    // Of the weight as it was rounded, as a resumed run would make it.
    if (at.copy) store<Count>(at.format(3), at.copy, i, p);
}

// The new first moment before it is rounded, and the gradient's square in `square`.
template <int Count>
__device__ __forceinline__ void first(const Rule& rule, const Parameter& at, long long i, A* m, A* square) {
    A g[Count], kept[Count];
    load<Count>(at.format(0), at.grad, i, g);
    load<Count>(at.format(1), at.m, i, m);
#pragma unroll
    for (int j = 0; j < Count; ++j) {
        g[j] *= rule.unscale;
        m[j] = rule.beta_1 * m[j] + rule.rest_1 * g[j];
        kept[j] = m[j];
        square[j] += g[j] * g[j];
    }
    store<Count>(at.format(1), at.m, i, kept);
}

// Items [from, to), `Count` at a time.
template <int Count>
__device__ __forceinline__ void items(const Rule& rule, const Parameter& at, long long from, long long to) {
    for (long long i = from + threadIdx.x * Count; i < to; i += blockDim.x * Count) {
        A v[Count], below[Count], square[Count] = {}, m_re[Count], m_im[Count];
        long long re = at.stride ? i + i / at.stride * at.stride : i, im = re + at.stride;
        first<Count>(rule, at, re, m_re, square);
        if (at.stride) first<Count>(rule, at, im, m_im, square);
        load<Count>(at.format(1), at.v, i, v);
#pragma unroll
        for (int j = 0; j < Count; ++j) {
            v[j] = rule.beta_2 * v[j] + rule.rest_2 * square[j];
            below[j] = sqrt(v[j]) * rule.root + rule.eps;
        }
        store<Count>(at.format(1), at.v, i, v);
        weight<Count>(rule, at, re, m_re, below);
        if (at.stride) weight<Count>(rule, at, im, m_im, below);
    }
}

// Items of a chunk.
constexpr long long CHUNK = 2048;

__device__ void update(const Rule& rule, const Parameter& at, long long chunk) {
    long long from = chunk * CHUNK, to = min(from + CHUNK, at.n_items);
    long long whole = at.stride % 4 ? from : to - to % 4;
    items<4>(rule, at, from, whole);
    items<1>(rule, at, whole, to);
}

// One parameter, its rule in the arguments.
extern "C" __global__ void update_one(const void* grad, void* m, void* v, void* exact, void* copy, long long n_items,
                                      int stride, int formats, f64 unscale, f64 beta_1, f64 rest_1, f64 beta_2,
                                      f64 rest_2, f64 before, f64 after, f64 step, f64 root, f64 eps) {
    Parameter at = {0, grad, m, v, exact, copy, n_items, stride, formats};
    Rule rule = {A(unscale), A(beta_1), A(rest_1), A(beta_2), A(rest_2),
                 A(before),  A(after),  A(step),   A(root),   A(eps)};
    long long n_chunks = (n_items + CHUNK - 1) / CHUNK;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) update(rule, at, chunk);
}

// The place of a step's numbers in memory. First those of the rule, in its order.
enum Number {
    UNSCALE, BETA_1, REST_1, BETA_2, REST_2, BEFORE, AFTER, STEP, ROOT, EPS,
    // Whether the step leaves everything alone.
    SKIP,
    // The loss scale of the next step; the largest norm of all unscaled gradients together, 0 for none.
    SCALE, MAX_NORM,
    // Steps taken, learning rate, weight decay, and whether the convention is torch's.
    TAKEN, RATE, DECAY, TORCH,
    // Whether the loss scale moves; finite steps in a row, and how it moves.
    DYNAMIC, N_FINITE, INTERVAL, GROWTH, BACKOFF, SCALE_MIN, SCALE_MAX,
    N_NUMBERS
};

// The rule of one step, for launches that read it from memory. Nothing is skipped.
extern "C" __global__ void set_rule(f64* to, f64 unscale, f64 beta_1, f64 rest_1, f64 beta_2, f64 rest_2, f64 before,
                                    f64 after, f64 step, f64 root, f64 eps) {
    f64 values[] = {unscale, beta_1, rest_1, beta_2, rest_2, before, after, step, root, eps, 0.0};
    if (threadIdx.x <= SKIP) to[threadIdx.x] = values[threadIdx.x];
}

__device__ __forceinline__ Rule rule_in(const f64* r) {
    return {A(r[UNSCALE]), A(r[BETA_1]), A(r[REST_1]), A(r[BETA_2]), A(r[REST_2]),
            A(r[BEFORE]),  A(r[AFTER]),  A(r[STEP]),   A(r[ROOT]),   A(r[EPS])};
}

// One parameter, its rule and whether to leave everything alone in memory.
extern "C" __global__ void update_next(const void* grad, void* m, void* v, void* exact, void* copy, long long n_items,
                                       int stride, int formats, const f64* numbers) {
    if (numbers[SKIP] != 0.0) return;
    Parameter at = {0, grad, m, v, exact, copy, n_items, stride, formats};
    Rule rule = rule_in(numbers);
    long long n_chunks = (n_items + CHUNK - 1) / CHUNK;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) update(rule, at, chunk);
}

// The last parameter that does not start after the chunk.
__device__ __forceinline__ const Parameter& parameter_of(const Parameter* table, int n_parameters, long long chunk) {
    int low = 0, high = n_parameters;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (table[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return table[low];
}

// All parameters of a table; the rule's numbers and whether to leave everything alone are read from memory.
extern "C" __global__ void update_all(const Parameter* table, int n_parameters, long long n_chunks, const f64* numbers) {
    if (numbers[SKIP] != 0.0) return;
    Rule rule = rule_in(numbers);
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Parameter at = parameter_of(table, n_parameters, chunk);
        update(rule, at, chunk - at.first_chunk);
    }
}

constexpr int THREADS = 256;

// parts[block] = sum of squares of the gradients in the block's chunks; one order for a number of blocks.
extern "C" __global__ void sum_squares(const Parameter* table, int n_parameters, long long n_chunks, f64* parts) {
    f64 sum = 0;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Parameter at = parameter_of(table, n_parameters, chunk);
        long long scalars = at.stride ? 2 : 1, from = (chunk - at.first_chunk) * CHUNK * scalars;
        long long to = min(from + CHUNK * scalars, at.n_items * scalars), whole = to - to % 4;
        for (long long i = from + 4 * threadIdx.x; i < whole; i += 4 * THREADS) {
            A g[4];
            load<4>(at.format(0), at.grad, i, g);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += f64(g[j]) * f64(g[j]);
        }
        for (long long i = whole + threadIdx.x; i < to; i += THREADS) {
            A g[1];
            load<1>(at.format(0), at.grad, i, g);
            sum += f64(g[0]) * f64(g[0]);
        }
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// What the host reads of a step: loss, sum of squares of the gradients, whether it was taken; and what the next begins
// with: loss scale, finite steps in a row, steps taken.
struct Report {
    f64 loss, sum, taken, scale, n_finite, n_taken;
};

// The loss scale after a step, as DynamicScaler moves it.
__device__ __forceinline__ void move_scale(f64* numbers, bool finite) {
    f64 scale = numbers[SCALE], n_finite = finite ? numbers[N_FINITE] + 1.0 : 0.0;
    if (!finite) scale = max(scale * numbers[BACKOFF], numbers[SCALE_MIN]);
    if (n_finite >= numbers[INTERVAL]) {
        n_finite = 0.0;
        scale = min(scale * numbers[GROWTH], numbers[SCALE_MAX]);
    }
    numbers[SCALE] = scale;
    numbers[N_FINITE] = n_finite;
}

// Decides over a step from its loss and its gradients, which have the loss scale in them, or without `parts` from its
// loss alone: clips gradients to MAX_NORM, skips the step if something is not finite, and sets the rule of the update
// and the scale of the next step, with which its backward pass begins. One block.
extern "C" __global__ void judge(const f64* parts, int n_parts, const void* loss, int loss_format, f64* numbers,
                                 void* seed, int seed_format, Report* report) {
    f64 sum = 0;
    for (int i = threadIdx.x; i < n_parts; i += THREADS) sum += parts[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x != 0) return;
    A value[1];
    load<1>(loss_format, loss, 0, value);
    bool finite = isfinite(sum) && isfinite(f64(value[0]));
    if (finite) {
        f64 scale = numbers[SCALE], most = numbers[MAX_NORM];
        f64 clip = most > 0.0 ? min(1.0, most / (sqrt(sum) / scale + 1e-6)) : 1.0;
        f64 t = numbers[TAKEN] + 1.0, rate = numbers[RATE], keep = 1.0 - rate * numbers[DECAY];
        f64 c_1 = 1.0 - pow(numbers[BETA_1], t), root_c_2 = sqrt(1.0 - pow(numbers[BETA_2], t));
        bool torch = numbers[TORCH] != 0.0;
        numbers[UNSCALE] = clip / scale;
        numbers[BEFORE] = torch ? keep : 1.0;
        numbers[AFTER] = torch ? 1.0 : keep;
        numbers[STEP] = torch ? rate / c_1 : rate * root_c_2 / c_1;
        numbers[ROOT] = torch ? 1.0 / root_c_2 : 1.0;
        numbers[TAKEN] = t;
    }
    numbers[SKIP] = finite ? 0.0 : 1.0;
    if (numbers[DYNAMIC] != 0.0) move_scale(numbers, finite);
    A scale[1] = {A(numbers[SCALE])};
    store<1>(seed_format, seed, 0, scale);
    *report = {f64(value[0]), sum, finite ? 1.0 : 0.0, numbers[SCALE], numbers[N_FINITE], numbers[TAKEN]};
}
