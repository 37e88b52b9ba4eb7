// Attention for single tokens. attention_prepare: q/k norms, rotation, the new keys and values into the cache.
// attention_split: a part of the context for the query heads of one KV head, which share every key and value they
// read; attention_combine: the parts, the output gate and the int8 form. The split follows the length that device
// memory states, so one graph serves every position. Reads each key and value once per 8 query heads.
// Set by the compiler: D (head width), N_HEADS, N_KV_HEADS, GATED, QK_NORM, N_ROT, ADJACENT, KV_BF16, N_SPLITS, CHUNK.
#include "common.cuh"

#define GROUP (N_HEADS / N_KV_HEADS)
// Query heads of one block, and blocks per KV head.
#define HEADS (GROUP < 8 ? GROUP : 8)
#define PER_KV ((GROUP + HEADS - 1) / HEADS)
#define Q_STRIDE (GATED ? 2 * D : D)
// Elements of a head in one lane.
#define E ((D + WARP - 1) / WARP)

#if KV_BF16
typedef u16 Kv;
DEVICE float from_kv(Kv v) { return bf16_to_float(v); }
DEVICE Kv to_kv(float v) { return float_to_bf16(v); }
#else
typedef float Kv;
DEVICE float from_kv(Kv v) { return v; }
DEVICE Kv to_kv(float v) { return v; }
#endif

struct Row {
    u32 slot, position, sequence, token;
};

struct AttentionArgs {
    const Row* rows;       // [n_tokens]
    float* q;              // [n_tokens, N_HEADS, Q_STRIDE]: query (rotated in place, scaled), then gate
    const float* k;        // [n_tokens, N_KV_HEADS, D]
    const float* v;        // [n_tokens, N_KV_HEADS, D]
    const float* q_norm;   // [D]
    const float* k_norm;   // [D]
    const double* freq;    // [N_ROT / 2]: radians per position
    Kv* keys;              // [n_slots, n_ctx, N_KV_HEADS, D]
    Kv* values;
    float* parts;          // [n_tokens, N_HEADS, N_SPLITS, D + 2]: sums, then maximum and normaliser
    float* out;            // [n_tokens, N_HEADS, D], or null
    i8* codes;             // [n_tokens, N_HEADS * D], or null
    Q8Head* heads;         // [n_tokens, N_HEADS * D / 32]
    u16* halves;           // [n_tokens, N_HEADS * D] 16-bit, or null
    u64 n_ctx;
    float magnitude;       // of cos and sin
    float eps;
};
static_assert(sizeof(AttentionArgs) == ATTENTION_ARGS, "AttentionArgs differs from attention.rs");

// One warp: norm and rotation of a head in shared memory.
DEVICE void norm_rotate(float* x, const float* weight, const AttentionArgs& a, u32 position) {
    const int lane = threadIdx.x % WARP;
    if (QK_NORM) {
        float sum = 0.0f;
        for (int i = lane; i < D; i += WARP) sum += x[i] * x[i];
        const float scale = rsqrtf(warp_sum(sum) / (float)D + a.eps);
        for (int i = lane; i < D; i += WARP) x[i] *= scale * weight[i];
        __syncwarp();
    }
    for (int j = lane; j < N_ROT / 2; j += WARP) {
        // Angles reach thousands of turns: reduced in double, then sine and cosine in float.
        const double turns = (double)position * a.freq[j] * 0.15915494309189533577;
        float sine, cosine;
        sincospif((float)(2.0 * (turns - floor(turns))), &sine, &cosine);
        sine *= a.magnitude;
        cosine *= a.magnitude;
        const int i0 = ADJACENT ? 2 * j : j, i1 = ADJACENT ? 2 * j + 1 : j + N_ROT / 2;
        const float u = x[i0], w = x[i1];
        x[i0] = u * cosine - w * sine;
        x[i1] = u * sine + w * cosine;
    }
    __syncwarp();
}

// Grid (ceil((N_HEADS + 2 N_KV_HEADS) / 4), n_tokens): a warp per head.
KERNEL __launch_bounds__(128) attention_prepare(const AttentionArgs a) {
    __shared__ float shared[4][D];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.x * 4 + warp;
    const u64 t = blockIdx.y;
    let_next_start();
    wait_for_inputs();
    if (head >= N_HEADS + 2 * N_KV_HEADS) return;
    const Row row = a.rows[t];
    float* x = shared[warp];
    if (head < N_HEADS) {
        float* q = a.q + (t * N_HEADS + head) * Q_STRIDE;
        for (int i = lane; i < D; i += WARP) x[i] = q[i];
        __syncwarp();
        norm_rotate(x, a.q_norm, a, row.position);
        const float scale = rsqrtf((float)D);
        for (int i = lane; i < D; i += WARP) q[i] = x[i] * scale;
    } else {
        const int h = (head - N_HEADS) % N_KV_HEADS;
        const bool is_key = head < N_HEADS + N_KV_HEADS;
        const u64 to = ((row.slot * a.n_ctx + row.position) * N_KV_HEADS + h) * D;
        const float* from = (is_key ? a.k : a.v) + (t * N_KV_HEADS + h) * D;
        for (int i = lane; i < D; i += WARP) x[i] = from[i];
        __syncwarp();
        if (is_key) norm_rotate(x, a.k_norm, a, row.position);
        Kv* cache = is_key ? a.keys : a.values;
        for (int i = lane; i < D; i += WARP) cache[to + i] = to_kv(x[i]);
    }
}

// 16-byte loads of a lane, or 0 where a head is not a whole number of them.
#define LOADS (D == WARP * E ? (int)(E * sizeof(Kv) % 16 ? 0 : E * sizeof(Kv) / 16) : 0)

// This lane's elements lane * E .. of a cached head.
template <int N> DEVICE void load_head(const Kv* p, float (&x)[E]) {
    const int lane = threadIdx.x % WARP;
    if constexpr (N > 0) {
        uint4 v[N];
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = reinterpret_cast<const uint4*>(p + lane * E)[i];
        const u32* w = reinterpret_cast<const u32*>(v);
#pragma unroll
        for (int i = 0; i < E; i++) {
#if KV_BF16
            x[i] = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
#else
            x[i] = __uint_as_float(w[i]);
#endif
        }
    } else {
#pragma unroll
        for (int i = 0; i < E; i++) x[i] = lane * E + i < D ? from_kv(p[lane * E + i]) : 0.0f;
    }
}

// Positions that a warp takes at a time.
#define TILE (HEADS > 4 ? 4 : 8)
#define WARPS 4
// Lanes that hold the score of one position.
#define LANES (WARP / TILE)

// Sums over the warp of each s[p]; this lane gets that of p = lane / LANES. Halves are exchanged while there are
// several, so that TILE sums cost little more than one.
DEVICE float sum_tile(float (&s)[TILE]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = TILE / 2, o = WARP / 2; n > 0; n /= 2, o /= 2) {
        const bool upper = lane & o;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float give = upper ? s[i] : s[i + n], keep = upper ? s[i + n] : s[i];
            s[i] = keep + __shfl_xor_sync(FULL, give, o);
        }
    }
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) s[0] += __shfl_xor_sync(FULL, s[0], o);
    return s[0];
}

// Grid (N_SPLITS, N_KV_HEADS * PER_KV, n_tokens).
KERNEL __launch_bounds__(WARPS * WARP) attention_split(const AttentionArgs a) {
    __shared__ float sums[WARPS][HEADS][E * WARP], maxima[WARPS][HEADS], totals[WARPS][HEADS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv = blockIdx.y / PER_KV, first_head = kv * GROUP + blockIdx.y % PER_KV * HEADS;
    const int n_heads = min(HEADS, (kv + 1) * GROUP - first_head);
    const u64 t = blockIdx.z;
    let_next_start();
    wait_for_inputs();
    const Row row = a.rows[t];
    const int length = row.position + 1;
    // Positions of a split: a multiple of CHUNK, so that short contexts use few blocks.
    const int chunk = (length + N_SPLITS * CHUNK - 1) / (N_SPLITS * CHUNK) * CHUNK;
    const int begin = blockIdx.x * chunk, end = min(length, begin + chunk);
    if (begin >= length) return;
    const u64 base = (row.slot * a.n_ctx * N_KV_HEADS + kv) * D;
    float q[HEADS][E], o[HEADS][E] = {}, m[HEADS], l[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        m[h] = -1e30f;
        const float* p = a.q + (t * N_HEADS + first_head + (h < n_heads ? h : 0)) * Q_STRIDE;
#pragma unroll
        for (int i = 0; i < E; i++) q[h][i] = lane * E + i < D ? p[lane * E + i] : 0.0f;
    }
    for (int tile = begin + warp * TILE; tile < end; tile += WARPS * TILE) {
        float key[TILE][E], value[TILE][E];
#pragma unroll
        for (int p = 0; p < TILE; p++) load_head<LOADS>(a.keys + base + (u64)min(tile + p, end - 1) * N_KV_HEADS * D, key[p]);
#pragma unroll
        for (int p = 0; p < TILE; p++) load_head<LOADS>(a.values + base + (u64)min(tile + p, end - 1) * N_KV_HEADS * D, value[p]);
        const bool in = tile + lane / LANES < end;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float s[TILE];
#pragma unroll
            for (int p = 0; p < TILE; p++) {
                s[p] = 0.0f;
#pragma unroll
                for (int i = 0; i < E; i++) s[p] += q[h][i] * key[p][i];
            }
            const float sum = sum_tile(s), score = in ? sum : -1e30f;
            float best = score;
#pragma unroll
            for (int o = LANES; o < WARP; o <<= 1) best = fmaxf(best, __shfl_xor_sync(FULL, best, o));
            best = fmaxf(best, m[h]);
            const float weight = in ? __expf(score - best) : 0.0f, shrink = __expf(m[h] - best);
            float total = weight;
#pragma unroll
            for (int o = LANES; o < WARP; o <<= 1) total += __shfl_xor_sync(FULL, total, o);
            m[h] = best;
            l[h] = l[h] * shrink + total;
#pragma unroll
            for (int i = 0; i < E; i++) o[h][i] *= shrink;
#pragma unroll
            for (int p = 0; p < TILE; p++) {
                const float w = __shfl_sync(FULL, weight, p * LANES);
#pragma unroll
                for (int i = 0; i < E; i++) o[h][i] += w * value[p][i];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int i = 0; i < E; i++) sums[warp][h][i * WARP + lane] = o[h][i];
        if (lane == 0) {
            maxima[warp][h] = m[h];
            totals[warp][h] = l[h];
        }
    }
    __syncthreads();
    for (int h = warp; h < n_heads; h += WARPS) {
        float best = -1e30f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, maxima[w][h]);
        float factor[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            factor[w] = __expf(maxima[w][h] - best);
            total += factor[w] * totals[w][h];
        }
        float* part = a.parts + ((t * N_HEADS + first_head + h) * N_SPLITS + blockIdx.x) * (D + 2);
#pragma unroll
        for (int i = 0; i < E; i++) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += factor[w] * sums[w][h][i * WARP + lane];
            if (lane * E + i < D) part[lane * E + i] = sum;
        }
        if (lane == 0) {
            part[D] = best;
            part[D + 1] = total;
        }
    }
}

// Grid (N_HEADS, n_tokens), a thread per element of the head (whole warps).
KERNEL attention_combine(const AttentionArgs a) {
    const int head = blockIdx.x, i = threadIdx.x;
    const u64 t = blockIdx.y;
    let_next_start();
    wait_for_inputs();
    const int length = a.rows[t].position + 1;
    const int chunk = (length + N_SPLITS * CHUNK - 1) / (N_SPLITS * CHUNK) * CHUNK, n = (length + chunk - 1) / chunk;
    const float* part = a.parts + (t * N_HEADS + head) * N_SPLITS * (D + 2);
    float best = -1e30f, sum = 0.0f, total = 0.0f;
    for (int s = 0; s < n; s++) best = fmaxf(best, part[s * (D + 2) + D]);
    for (int s = 0; s < n; s++) {
        const float w = __expf(part[s * (D + 2) + D] - best);
        total += w * part[s * (D + 2) + D + 1];
        if (i < D) sum += w * part[s * (D + 2) + i];
    }
    float y = sum / total;
    if (GATED && i < D) y *= sigmoid(a.q[(t * N_HEADS + head) * Q_STRIDE + D + i]);
    const u64 at = t * N_HEADS * D + head * D + i;
    if (a.out && i < D) a.out[at] = y;
    if (a.halves && i < D) a.halves[at] = to_half<HALF_IS_F16>(y);
    if (a.codes) quantise_unit(y, a.codes + t * N_HEADS * D, a.heads + t * (N_HEADS * D / 32), head * D + i);
}
