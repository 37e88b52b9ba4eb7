// Attention of many tokens: attention_prepare (q/k norm, rotation, new keys and values into the cache), then
// attention_flash (bf16 keys and values on the tensor cores, f32 softmax and sums; head widths that are multiples of
// 64) or attention_plain (any width, keys and values as stored, f32 throughout). Both apply the sigmoid output gate.
// Rows of a work item are (token, query head of one KV head's group) pairs, so that a group shares the keys it reads.
// Set by the compiler: HEAD_DIM (D), N_HEADS, N_KV_HEADS, GATED, N_ROT, ROPE_ADJACENT, KV_BF16, QK_NORM.
#include "common.cuh"
#include "matrix.cuh"

#define D HEAD_DIM
#define GROUP (N_HEADS / N_KV_HEADS)

// One token of a batch.
struct Row {
    u32 slot, position, sequence, token;
};

// A run of tokens of one slot.
struct Sequence {
    u32 slot, position, first_row, n_tokens;
};

// Rows [first, first + height) of a sequence's n_tokens * GROUP rows.
struct RowBlock {
    int sequence;
    int first;
};

struct AttentionPromptArgs {
    const Sequence* sequences;
    const RowBlock* blocks;  // [gridDim.x]
    const Row* rows;         // [n_tokens]
    const float* q;          // [n_tokens, N_HEADS, (GATED ? 2 : 1) * D] f32: query, then gate
    const float* k;          // [n_tokens, N_KV_HEADS, D] f32
    const float* v;          // [n_tokens, N_KV_HEADS, D] f32
    const float* q_norm;     // [D] f32
    const float* k_norm;     // [D] f32
    const double* freq;      // [N_ROT / 2] f64: radians per position
    u8* k_cache;             // [n_slots, n_ctx, N_KV_HEADS, D]
    u8* v_cache;
    void* q_rotated;         // [n_tokens, N_HEADS, D] times the softmax scale: bf16 in base 2 (flash) or f32 (plain)
    void* out;               // [n_tokens, N_HEADS * D]; see out_kind
    u64 n_ctx;
    float rope_magnitude;
    float eps;
    int flash;
    int out_kind;            // 0 f32, 1 f16, 2 bf16
};

static_assert(sizeof(AttentionPromptArgs) == ATTENTION_PROMPT_ARGS, "AttentionPromptArgs differs from prompt.rs");

DEVICE void store_out(const AttentionPromptArgs& a, u64 at, float v) {
    if (a.out_kind == 0) ((float*)a.out)[at] = v;
    else ((u16*)a.out)[at] = a.out_kind == 1 ? to_half<true>(v) : to_half<false>(v);
}

DEVICE void store_kv(u8* cache, u64 at, float v) {
#if KV_BF16
    ((u16*)cache)[at] = float_to_bf16(v);
#else
    ((float*)cache)[at] = v;
#endif
}

// Grid (n_tokens, ceil((N_HEADS + 2 N_KV_HEADS) / 4)), 128 threads, a warp a head.
KERNEL __launch_bounds__(128) attention_prepare(const AttentionPromptArgs a) {
    __shared__ float rows[4][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int head = blockIdx.y * 4 + warp;
    if (head >= N_HEADS + 2 * N_KV_HEADS) return;
    const u64 token = blockIdx.x;
    const Row at_row = a.rows[token];
    const int position = at_row.position;
    const u64 cache_row = ((u64)at_row.slot * a.n_ctx + position) * N_KV_HEADS;
    if (head >= N_HEADS + N_KV_HEADS) {
        const int h = head - N_HEADS - N_KV_HEADS;
        for (int i = lane; i < D; i += 32) store_kv(a.v_cache, (cache_row + h) * D + i, a.v[(token * N_KV_HEADS + h) * D + i]);
        return;
    }
    const bool is_q = head < N_HEADS;
    const float* src = is_q ? a.q + (token * N_HEADS + head) * (GATED ? 2 : 1) * D : a.k + (token * N_KV_HEADS + head - N_HEADS) * D;
    float* x = rows[warp];
    float sum = 0.0f;
    for (int i = lane; i < D; i += 32) {
        const float v = src[i];
        x[i] = v;
        sum += v * v;
    }
#if QK_NORM
    const float scale = rsqrtf(warp_sum(sum) / D + a.eps);
    const float* w = is_q ? a.q_norm : a.k_norm;
    for (int i = lane; i < D; i += 32) x[i] *= scale * w[i];
#endif
    __syncwarp();
    for (int j = lane; j < N_ROT / 2; j += 32) {
        const double turns = position * a.freq[j] * 0.15915494309189535;
        float s, c;
        sincospif(2.0f * (float)(turns - rint(turns)), &s, &c);
        s *= a.rope_magnitude;
        c *= a.rope_magnitude;
        const int i0 = ROPE_ADJACENT ? 2 * j : j, i1 = ROPE_ADJACENT ? 2 * j + 1 : j + N_ROT / 2;
        const float u = x[i0], v = x[i1];
        x[i0] = u * c - v * s;
        x[i1] = u * s + v * c;
    }
    __syncwarp();
    if (is_q) {
        const float scale = rsqrtf((float)D) * (a.flash ? 1.4426950408889634f : 1.0f);
        const u64 at = (token * N_HEADS + head) * D;
        for (int i = lane; i < D; i += 32) {
            if (a.flash) ((u16*)a.q_rotated)[at + i] = float_to_bf16(x[i] * scale);
            else ((float*)a.q_rotated)[at + i] = x[i] * scale;
        }
    } else {
        for (int i = lane; i < D; i += 32) store_kv(a.k_cache, (cache_row + head - N_HEADS) * D + i, x[i]);
    }
}

// Keys of a step and rows of a work item of attention_plain.
#define PLAIN 16
// Grid (blocks of PLAIN rows, N_KV_HEADS), 256 threads, 3 * PLAIN * (D + 1) floats of shared memory.
// Left to itself a compiler (NVRTC 13.0 for 7.5) stops at 80 registers and spills.
KERNEL __launch_bounds__(256, 2) attention_plain(const AttentionPromptArgs a) {
    extern __shared__ float shared[];
    float* q = shared;                          // [PLAIN][D + 1]
    float* k = q + PLAIN * (D + 1);             // [PLAIN][D + 1]
    float* v = k + PLAIN * (D + 1);             // [PLAIN][D + 1]
    __shared__ float p[PLAIN][PLAIN + 1], rescale[PLAIN], total[PLAIN];
    const RowBlock block = a.blocks[blockIdx.x];
    const Sequence run = a.sequences[block.sequence];
    const int kv_head = blockIdx.y, tid = threadIdx.x;
    const int rows = min(PLAIN, (int)run.n_tokens * GROUP - block.first);
    auto q_row = [&](int r) {
        const int row = block.first + r;
        return (u64)(run.first_row + row / GROUP) * N_HEADS + kv_head * GROUP + row % GROUP;
    };
    for (int i = tid; i < PLAIN * D; i += 256) {
        const int r = i / D, c = i % D;
        q[r * (D + 1) + c] = r < rows ? ((const float*)a.q_rotated)[q_row(r) * D + c] : 0.0f;
    }
    // A thread holds columns tid, tid + 256, .. of all rows; for the scores it holds one (row, key) pair.
    constexpr int COLUMNS = (D + 255) / 256;
    float o[PLAIN][COLUMNS] = {};
    const int r = tid / PLAIN, s = tid % PLAIN;
    const int last = (int)run.position + (block.first + rows - 1) / GROUP, own = (int)run.position + (block.first + r) / GROUP;
    float highest = -1e30f, sum = 0.0f;
    for (int key = 0; key <= last; key += PLAIN) {
        __syncthreads();
        for (int i = tid; i < PLAIN * D; i += 256) {
            const int row = i / D, c = i % D;
            const u64 at = (((u64)run.slot * a.n_ctx + min(key + row, last)) * N_KV_HEADS + kv_head) * D + c;
#if KV_BF16
            k[row * (D + 1) + c] = bf16_to_float(((const u16*)a.k_cache)[at]);
            v[row * (D + 1) + c] = bf16_to_float(((const u16*)a.v_cache)[at]);
#else
            k[row * (D + 1) + c] = ((const float*)a.k_cache)[at];
            v[row * (D + 1) + c] = ((const float*)a.v_cache)[at];
#endif
        }
        __syncthreads();
        float x = 0.0f;
        for (int c = 0; c < D; c++) x += q[r * (D + 1) + c] * k[s * (D + 1) + c];
        if (key + s > own) x = -1e30f;
        float m = fmaxf(highest, x);
#pragma unroll
        for (int d = PLAIN / 2; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(FULL, m, d));
        const float e = key + s > own ? 0.0f : expf(x - m), change = expf(highest - m);
        float e_sum = e;
#pragma unroll
        for (int d = PLAIN / 2; d; d >>= 1) e_sum += __shfl_xor_sync(FULL, e_sum, d);
        sum = sum * change + e_sum;
        highest = m;
        p[r][s] = e;
        if (s == 0) rescale[r] = change;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            const int c = tid + i * 256;
            if (c >= D) break;
#pragma unroll
            for (int row = 0; row < PLAIN; row++) {
                float y = o[row][i] * rescale[row];
#pragma unroll
                for (int j = 0; j < PLAIN; j++) y += p[row][j] * v[j * (D + 1) + c];
                o[row][i] = y;
            }
        }
    }
    if (s == 0) total[r] = sum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const int c = tid + i * 256;
        if (c >= D) break;
#pragma unroll
        for (int row = 0; row < PLAIN; row++) {
            if (row >= rows) continue;
            float y = o[row][i] / total[row];
            const u64 at = q_row(row);
#if GATED
            y *= sigmoid(a.q[(at * 2 + 1) * D + c]);
#endif
            store_out(a, at * D + c, y);
        }
    }
}

#if HEAD_DIM % 64 == 0 && HEAD_DIM <= 256 && KV_BF16 && __CUDA_ARCH__ >= 800
#define KEYS 64
DEVICE u32 tile_offset(int row, int chunk) { return row * (D * 2) + ((chunk ^ (row & 7)) << 4); }

// 64 rows of D 16-bit numbers; `address` tells where row r lies, null for a row of zeros.
template <class F> DEVICE void load_rows(u8* tile, F address) {
    constexpr int CHUNKS = D / 8;
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += 128) {
        const int r = i / CHUNKS, c = i % CHUNKS;
        bool valid;
        const u16* src = address(r, valid);
        copy_async_16(tile + tile_offset(r, c), src + c * 8, valid);
    }
}

// Grid (blocks of 64 rows, N_KV_HEADS), 128 threads, 3 * 64 * D * 2 bytes of shared memory. A warp takes 16 rows.
KERNEL __launch_bounds__(128) attention_flash(const AttentionPromptArgs a) {
    extern __shared__ __align__(128) u8 shared8[];
    u8* qs = shared8;
    u8* ks = qs + 64 * D * 2;
    u8* vs = ks + 64 * D * 2;
    const RowBlock block = a.blocks[blockIdx.x];
    const Sequence run = a.sequences[block.sequence];
    const int kv_head = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int rows = min(64, (int)run.n_tokens * GROUP - block.first);
    auto q_row = [&](int r) {
        const int row = block.first + r;
        return (u64)(run.first_row + row / GROUP) * N_HEADS + kv_head * GROUP + row % GROUP;
    };
    const int last = (int)run.position + (block.first + rows - 1) / GROUP;
    const u64 kv_row0 = (u64)run.slot * a.n_ctx;
    auto load_kv = [&](u8* tile, const u8* cache, int key) {
        if (key <= last)
            load_rows(tile, [&](int r, bool& valid) {
                valid = key + r <= last;
                return (const u16*)cache + ((kv_row0 + (valid ? key + r : key)) * N_KV_HEADS + kv_head) * D;
            });
        copy_async_commit();
    };
    load_rows(qs, [&](int r, bool& valid) {
        valid = r < rows;
        return (const u16*)a.q_rotated + q_row(valid ? r : 0) * D;
    });
    load_kv(ks, a.k_cache, 0);
    load_kv(vs, a.v_cache, 0);

    float o[D / 8][4];
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[j][e] = 0.0f;
    float highest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
    const u32 qa = smem_address(qs), ka = smem_address(ks), va = smem_address(vs);
    const int q_fragment_row = warp * 16 + (lane & 15);
    const int own[2] = {(int)run.position + (block.first + warp * 16 + lane / 4) / GROUP,
                        (int)run.position + (block.first + warp * 16 + lane / 4 + 8) / GROUP};
    const int first_own = (int)run.position + (block.first + warp * 16) / GROUP;

    for (int key = 0; key <= last; key += KEYS) {
        float s[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
        copy_async_wait<1>();
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < D / 16; k++) {
            u32 fq[4];
            ldmatrix_x4(fq, qa + tile_offset(q_fragment_row, k * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 fk[4];
                ldmatrix_x4(fk, ka + tile_offset(j * 16 + (lane & 7) + ((lane >> 4) << 3), k * 2 + ((lane >> 3) & 1)));
                mma_16816<false>(s[2 * j], fq, fk[0], fk[1]);
                mma_16816<false>(s[2 * j + 1], fq, fk[2], fk[3]);
            }
        }
        __syncthreads();
        load_kv(ks, a.k_cache, key + KEYS);
        if (key + KEYS - 1 > first_own) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (key + j * 8 + (lane & 3) * 2 + (e & 1) > own[e >> 1]) s[j][e] = -1e30f;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float m = highest[h];
#pragma unroll
            for (int j = 0; j < 8; j++) m = fmaxf(m, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
            m = fmaxf(m, __shfl_xor_sync(FULL, m, 1));
            m = fmaxf(m, __shfl_xor_sync(FULL, m, 2));
            const float change = exp2f(highest[h] - m);
            highest[h] = m;
            sum[h] *= change;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                o[j][2 * h] *= change;
                o[j][2 * h + 1] *= change;
            }
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float x = exp2f(s[j][2 * h + e] - m);
                    s[j][2 * h + e] = x;
                    sum[h] += x;
                }
        }
        copy_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const u32 fp[4] = {pack2<false>(s[2 * k][0], s[2 * k][1]), pack2<false>(s[2 * k][2], s[2 * k][3]),
                               pack2<false>(s[2 * k + 1][0], s[2 * k + 1][1]), pack2<false>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                u32 fv[4];
                ldmatrix_x4_trans(fv, va + tile_offset(k * 16 + (lane & 15), j * 2 + (lane >> 4)));
                mma_16816<false>(o[2 * j], fp, fv[0], fv[1]);
                mma_16816<false>(o[2 * j + 1], fp, fv[2], fv[3]);
            }
        }
        __syncthreads();
        load_kv(vs, a.v_cache, key + KEYS);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float t = sum[h];
        t += __shfl_xor_sync(FULL, t, 1);
        t += __shfl_xor_sync(FULL, t, 2);
        const int r = warp * 16 + lane / 4 + h * 8;
        if (r >= rows) continue;
        const u64 at = q_row(r);
        const float inverse = 1.0f / t;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const int c = j * 8 + (lane & 3) * 2;
            float y[2] = {o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse};
#if GATED
            const float2 gate = *(const float2*)(a.q + (at * 2 + 1) * D + c);
            y[0] *= sigmoid(gate.x);
            y[1] *= sigmoid(gate.y);
#endif
            if (a.out_kind == 0) *(float2*)((float*)a.out + at * D + c) = make_float2(y[0], y[1]);
            else *(u32*)((u16*)a.out + at * D + c) = a.out_kind == 1 ? pack2<true>(y[0], y[1]) : pack2<false>(y[0], y[1]);
        }
    }
}
#endif
