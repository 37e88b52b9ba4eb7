// Choosing the next token on the device, as spec/src/sampler.rs defines it, and bringing the rows of the next decode
// step forward in place. Reads each logit once: groups of logits give their largest keys, and the last block of a row
// collects the candidates from the few groups whose largest is among the k-th largest. Top-k from 1 to
// MAX_CANDIDATES; more is the host's.
// Set by the compiler: N_VOCAB.
#include "common.cuh"

struct Row {
    u32 slot, position, sequence, token;
};

struct Sequence {
    u32 slot, position, first_row, n_tokens;
};

// How a slot chooses.
struct Sampler {
    u64 seed;
    u64 top_p;           // share to keep in units of 2^-64; 0: all
    u64 min_p;           // least weight to keep
    float temperature;   // 0: the most likely token
    float repeat, inverse_repeat, presence, frequency;
    u32 top_k;           // 1 to MAX_CANDIDATES
    u32 window;          // recent tokens at most, up to MAX_WINDOW; 0: no penalties
    u32 n_seen;          // tokens that went through the window
};
static_assert(sizeof(Sampler) == SAMPLER_BYTES, "Sampler differs from head.rs");

struct Clock {
    u64 started;   // when the step began, ns
    u64 busy;      // ns from the first kernel of a step to its last, over all steps
    u32 done;      // rows that have finished; zero before and after
    u32 pad;
};

struct ChooseArgs {
    const float* logits;   // [n_rows, N_VOCAB]
    u32* maxima;           // [n_rows, N_GROUPS]: largest key of each group
    u64* best;             // [n_rows]: largest key so far; zero before and after
    u32* done;             // [n_rows]: blocks that have finished; zero before and after
    Sampler* samplers;     // [n_slots]
    u32* recent;           // [n_slots, MAX_WINDOW]: token number i at entry i % window
    u16* counts;           // [n_slots, N_VOCAB]: occurrences among the recent tokens
    Row* rows;             // [n_rows]: token and position of the next step
    Sequence* sequences;   // [n_rows]
    u32* chosen;           // [n_rows], in host memory: NO_TOKEN where the logits are unusable
    Clock* clock;
};
static_assert(sizeof(ChooseArgs) == CHOOSE_ARGS, "ChooseArgs differs from head.rs");

#define THREADS 512
#define WARPS (THREADS / WARP)
#define NO_TOKEN 0xffffffffu
// Elements of a group: a multiple of 32, so that there are at most 16 groups a thread.
#define GROUP ((N_VOCAB + 16 * THREADS * 32 - 1) / (16 * THREADS * 32) * 32)
#define N_GROUPS ((N_VOCAB + GROUP - 1) / GROUP)
// Candidates that the last block holds at a time.
#define HELD 1024

// Orders like the numbers, -0 below 0. What is not a number comes last, where it is found.
DEVICE u32 key(float x) {
    const u32 u = __float_as_uint(x);
    return x != x ? 0xffffffffu : u & 0x80000000u ? ~u : u | 0x80000000u;
}

DEVICE float logit(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// exp(x) in units of 2^-40: each operation rounded on its own, as on the host.
DEVICE u64 weight(float x) {
    if (!(x > -28.0f)) return 0;
    const float round = 12582912.0f;
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(x, 1.44269504088896340736f), round), round);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    const float series[8] = {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
    float exp = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) exp = __fadd_rn(__fmul_rn(exp, r), series[i]);
    return __float2ull_rz(__fmul_rn(exp, __uint_as_float((u32)((int)n + 127 + 40) << 23)));
}

DEVICE u64 random(u64 seed, u64 position) {
    u64 z = seed + (position + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Logits of a row as its slot sees them.
struct Logits {
    const float* logits;
    const u16* counts;   // null: no penalties
    float repeat, inverse_repeat, presence, frequency;

    // Key and id, the lower id first among equals: no two are the same.
    __device__ __forceinline__ u64 operator()(u32 i) const {
        float x = logits[i];
        const u32 n = counts ? counts[i] : 0;
        if (n) {
            x = __fmul_rn(x, x > 0.0f ? inverse_repeat : repeat);
            x = __fsub_rn(x, __fadd_rn(presence, __fmul_rn(frequency, (float)n)));
        }
        return (u64)key(x) << 32 | (0xffffffffu - i);
    }
};

// Sum over a warp, returned to all.
DEVICE u32 sum_of_warp(u32 v) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(FULL, v);
#else
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
#endif
}

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// Sum over all threads, returned to all. `scratch`: WARPS in shared memory.
DEVICE u32 sum_of_block(u32 v, u32* scratch) {
    v = sum_of_warp(v);
    const u32 lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    return sum_of_warp(lane < WARPS ? scratch[lane] : 0);
}

// Sum of the values up to this thread's; `total` is that of all. `scratch`: WARPS in shared memory.
DEVICE u64 sum_up_to(u64 v, u64* scratch, u64& total) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int o = 1; o < WARP; o <<= 1) {
        const u64 other = __shfl_up_sync(FULL, v, o);
        if (lane >= o) v += other;
    }
    __syncthreads();
    if (lane == WARP - 1) scratch[warp] = v;
    __syncthreads();
    total = 0;
#pragma unroll 1
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) v += scratch[w];
        total += scratch[w];
    }
    return v;
}

// Collects the keys from `least` on into `held`, as many as it takes, and returns their number. Only groups whose
// largest reaches it are read.
DEVICE u32 collect(const Logits& logits, const u32* maxima, u64 least, u64* held, u32* n_held) {
    const u32 lane = threadIdx.x % WARP;
    __syncthreads();
    if (threadIdx.x == 0) *n_held = 0;
    __syncthreads();
#pragma unroll 1
    for (u32 first = threadIdx.x - lane; first < N_GROUPS; first += THREADS) {
        u32 found = __ballot_sync(FULL, first + lane < N_GROUPS && maxima[first + lane] >= (u32)(least >> 32));
#pragma unroll 1
        for (; found; found &= found - 1) {
            const u32 start = (first + __ffs(found) - 1) * GROUP;
#pragma unroll 1
            for (u32 i = start + lane; i < min(start + GROUP, (u32)N_VOCAB); i += WARP) {
                const u64 k = logits(i);
                if (k < least) continue;
                const u32 at = atomicAdd(n_held, 1u);
                if (at < HELD) held[at] = k;
            }
        }
    }
    __syncthreads();
    return *n_held;
}

// The token that the whole block draws from a row whose largest key is `best`.
DEVICE u32 draw(const Sampler& s, const Logits& logits, const u32* row_maxima, u64 best, u32 position) {
    __shared__ u64 held[HELD], sorted[MAX_CANDIDATES], sums[WARPS];
    __shared__ u32 maxima[N_GROUPS], counts[WARPS], n_held, token;
    const u32 tid = threadIdx.x, k = min(s.top_k, (u32)N_VOCAB);
    // The k-th largest of the groups' largest keys bounds the k-th largest of all from below; a bound that a few more
    // reach will do.
#pragma unroll 8
    for (u32 g = tid; g < N_GROUPS; g += THREADS) maxima[g] = __ldcg(row_maxima + g);
    __syncthreads();
    u32 low = 0, high = (u32)(best >> 32) + 1;   // at least k groups reach `low` (or all do), fewer reach `high`
    // Most logits lie within 2^25 keys below the best.
    for (u32 bound = high > 1u << 25 ? high - (1u << 25) : high / 2; high - low > 1; bound = low + (high - low) / 2) {
        u32 n = 0;
#pragma unroll 4
        for (u32 g = tid; g < N_GROUPS; g += THREADS) n += maxima[g] >= bound;
        n = sum_of_block(n, counts);
        if (n < k) {
            high = bound;
            continue;
        }
        low = bound;
        if (n <= k + 32) break;
    }
    // Where the largest are crowded into few groups there can be more than are held: then the bound is raised.
    u64 least = (u64)low << 32, below = least, above = best + 1;
    u32 n;
    for (;;) {
        n = collect(logits, maxima, least, held, &n_held);
        if (n > HELD) below = least;
        else if (n < k) above = least;
        else break;
        least = below + (above - below) / 2;
    }
#pragma unroll 1
    for (u32 i = tid; i < n; i += THREADS) {
        u32 rank = 0;
#pragma unroll 2
        for (u32 j = 0; j < n; j++) rank += held[j] > held[i];
        if (rank < k) sorted[rank] = held[i];
    }
    __syncthreads();
    const float x = tid < k ? __fsub_rn(logit((u32)(sorted[tid] >> 32)), logit((u32)(best >> 32))) : -INFINITE;
    u64 total, w = weight(x);
    const u64 before = sum_up_to(w, sums, total) - w;
    const bool kept = tid < k && (tid == 0 || s.top_p == 0 || before < __umul64hi(total, s.top_p)) && w >= s.min_p;
    w = kept ? weight(__fdiv_rn(x, s.temperature)) : 0;
    const u64 sum = sum_up_to(w, sums, total), drawn = __umul64hi(total, random(s.seed, position));
    if (drawn < sum && drawn >= sum - w) token = 0xffffffffu - (u32)sorted[tid];
    __syncthreads();
    return token;
}

// Grid (n_blocks, n_rows).
KERNEL __launch_bounds__(THREADS, 1) choose(const ChooseArgs a) {
    __shared__ u64 warps[WARPS];
    __shared__ bool last;
    const u32 row = blockIdx.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32* maxima = a.maxima + (u64)row * N_GROUPS;
    wait_for_inputs();
    const u32 slot = a.rows[row].slot;
    const Sampler s = a.samplers[slot];
    const u16* counts = s.window ? a.counts + (u64)slot * N_VOCAB : nullptr;
    const Logits logits = {a.logits + (u64)row * N_VOCAB, counts, s.repeat, s.inverse_repeat, s.presence, s.frequency};
    u64 best = 0;
#pragma unroll 2
    for (u32 g = blockIdx.x * WARPS + warp; g < N_GROUPS; g += gridDim.x * WARPS) {
        u64 most = 0;
#pragma unroll
        for (u32 i = g * GROUP + lane; i < (g + 1) * GROUP; i += WARP)
            if (i < N_VOCAB) most = larger(most, logits(i));
        best = larger(best, most);
        const u32 of_group = warp_max((u32)(most >> 32));
        if (lane == 0) maxima[g] = of_group;
    }
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) best = larger(best, __shfl_xor_sync(FULL, best, o));
    if (lane == 0) warps[warp] = best;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int w = 0; w < WARPS; w++) best = larger(best, warps[w]);
        atomicMax(a.best + row, best);
        __threadfence();
        last = atomicAdd(a.done + row, 1u) == gridDim.x - 1;
        __threadfence();
        warps[0] = last ? atomicExch(a.best + row, 0ull) : 0;
    }
    __syncthreads();
    if (!last) return;
    best = warps[0];
    const u32 top = (u32)(best >> 32), position = a.rows[row].position + 1;
    const bool usable = top > key(-INFINITE) && top < key(INFINITE);
    u32 token = 0xffffffffu - (u32)best;
    if (usable && s.temperature > 0.0f && s.top_k > 1) token = draw(s, logits, maxima, best, position);
    if (threadIdx.x != 0) return;
    a.done[row] = 0;
    a.chosen[row] = usable ? token : NO_TOKEN;
    a.rows[row].token = usable ? token : 0;
    a.rows[row].position = position;
    a.sequences[row].position += 1;
    if (atomicAdd(&a.clock->done, 1u) == gridDim.y - 1) {
        a.clock->done = 0;
        a.clock->busy += nanoseconds() - a.clock->started;
    }
    if (s.window == 0 || !usable) return;
    u32* recent = a.recent + (u64)slot * MAX_WINDOW + s.n_seen % s.window;
    u16* seen = a.counts + (u64)slot * N_VOCAB;
    if (s.n_seen >= s.window) seen[*recent] -= 1;
    *recent = token;
    seen[token] += 1;
    a.samplers[slot].n_seen = s.n_seen + 1;
}
