// What stands between the products of a prompt: norms and roundings of rows, SwiGLU, the delta net's gated norm,
// and the sorting of tokens by expert. Rows are written in up to three formats, for weights of different types.
#include "common.cuh"
#include "matrix.cuh"

struct RowsArgs {
    const float* x;          // [n_rows, n] f32 (gather: rows of it)
    const float* w;          // [n] f32, or null: no norm, only rounding
    const int* gather;       // row of x for each row, or null
    float* y_f32;            // [n_rows, n] each, or null
    u16* y_f16;
    u16* y_bf16;
    int n;
    float eps;
};
static_assert(sizeof(RowsArgs) == ROWS_ARGS, "RowsArgs differs from prompt.rs");

// Grid (n_rows), 256 threads: rms(x, w) in up to three formats.
KERNEL __launch_bounds__(256) norm_rows(const RowsArgs a) {
    __shared__ float scratch[33];
    const u64 row = blockIdx.x;
    const float* x = a.x + (a.gather ? (u64)a.gather[row] : row) * a.n;
    float scale = 1.0f;
    if (a.w) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < a.n; i += 256) sum += x[i] * x[i];
        scale = rsqrtf(block_sum(sum, scratch) / a.n + a.eps);
    }
    for (int i = threadIdx.x; i < a.n; i += 256) {
        const float v = x[i] * scale * (a.w ? a.w[i] : 1.0f);
        if (a.y_f32) a.y_f32[row * a.n + i] = v;
        if (a.y_f16) a.y_f16[row * a.n + i] = to_half<true>(v);
        if (a.y_bf16) a.y_bf16[row * a.n + i] = to_half<false>(v);
    }
}

struct RoundArgs {
    const float* x;          // [n]
    i8* codes;               // [n]
    Q8Head* heads;           // [n / 32]
    u64 n;                   // whole groups
    u32 group;               // elements that share a scale: 32 or 256
    u32 pad;
};
static_assert(sizeof(RoundArgs) == ROUND_ARGS, "RoundArgs differs from prompt.rs");

// Grid (ceil(n / 2048)), 256 threads: rounds to 8 bits, eight elements a lane.
KERNEL __launch_bounds__(256) round_rows(const RoundArgs a) {
    const u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 8;
    const bool in = at < a.n;
    float4 v[2] = {};
    if (in) {
        v[0] = *(const float4*)(a.x + at);
        v[1] = *(const float4*)(a.x + at + 4);
    }
    const float x[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
    float d = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) d = fmaxf(d, fabsf(x[i]));
    for (int o = 1; o < a.group / 8; o <<= 1) d = fmaxf(d, __shfl_xor_sync(FULL, d, o));
    d *= 1.0f / 127.0f;
    const float r = inverse_scale(d);
    u32 codes[2] = {};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int code = __float2int_rn(x[i] * r);
        codes[i / 4] |= (code & 255) << (i % 4 * 8);
        sum += code;
    }
    sum += __shfl_xor_sync(FULL, sum, 1);
    const int other = __shfl_xor_sync(FULL, sum, 2);
    if (!in) return;
    *(uint2*)(a.codes + at) = make_uint2(codes[0], codes[1]);
    if (threadIdx.x % 4 == 0) {
        Q8Head head;
        head.d = d;
        head.sum0 = (i16)sum;
        head.sum1 = (i16)other;
        a.heads[at / 32] = head;
    }
}

struct SwigluArgs {
    const float* gate;       // [n] f32
    const float* up;         // [n] f32
    float* y_f32;            // [n] each, or null
    u16* y_f16;
    u16* y_bf16;
    u64 n;
};
static_assert(sizeof(SwigluArgs) == SWIGLU_ARGS, "SwigluArgs differs from prompt.rs");

KERNEL __launch_bounds__(256) swiglu_rows(const SwigluArgs a) {
    const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= a.n) return;
    const float v = silu(a.gate[i]) * a.up[i];
    if (a.y_f32) a.y_f32[i] = v;
    if (a.y_f16) a.y_f16[i] = to_half<true>(v);
    if (a.y_bf16) a.y_bf16[i] = to_half<false>(v);
}

struct SwigluHalvesArgs {
    const u32* gate;         // [n / 2] pairs of 16-bit floats
    const u32* up;
    u32* y;                  // [n / 2]
    u64 n;                   // even
    u32 is_f16;              // of all three, else bf16
    u32 pad;
};

KERNEL __launch_bounds__(256) swiglu_halves(const SwigluHalvesArgs a) {
    const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= a.n / 2) return;
    const u32 g = a.gate[i], u = a.up[i];
    auto low = [&](u32 v) { return a.is_f16 ? half_to_float((u16)v) : bf16_to_float((u16)v); };
    const float x = silu(low(g)) * low(u), y = silu(low(g >> 16)) * low(u >> 16);
    a.y[i] = a.is_f16 ? pack2<true>(x, y) : pack2<false>(x, y);
}

struct GatedNormArgs {
    const float* o;          // [n_rows, s] f32: n_tokens * n_v_heads rows
    const float* z;          // [n_rows, s] f32
    const float* w;          // [s] f32
    float* y_f32;            // [n_rows, s] each, or null
    u16* y_f16;
    u16* y_bf16;
    int n_rows;
    int s;
    float eps;
    u32 pad;
};
static_assert(sizeof(SwigluHalvesArgs) == SWIGLU_HALVES_ARGS, "SwigluHalvesArgs differs from prompt.rs");
static_assert(sizeof(GatedNormArgs) == GATED_NORM_ARGS, "GatedNormArgs differs from prompt.rs");

// Grid (ceil(n_rows / 8)), 256 threads: rms(o, w) * silu(z), a warp a row.
KERNEL __launch_bounds__(256) gated_norm_rows(const GatedNormArgs a) {
    const u64 row = (u64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (row >= a.n_rows) return;
    const int lane = threadIdx.x & 31;
    float sum = 0.0f;
    for (int i = lane; i < a.s; i += 32) sum += a.o[row * a.s + i] * a.o[row * a.s + i];
    const float scale = rsqrtf(warp_sum(sum) / a.s + a.eps);
    for (int i = lane; i < a.s; i += 32) {
        const float v = a.o[row * a.s + i] * scale * a.w[i] * silu(a.z[row * a.s + i]);
        if (a.y_f32) a.y_f32[row * a.s + i] = v;
        if (a.y_f16) a.y_f16[row * a.s + i] = to_half<true>(v);
        if (a.y_bf16) a.y_bf16[row * a.s + i] = to_half<false>(v);
    }
}

// Rows of one expert in the sorted order, at most `height` of them (gemm.cu reads these).
struct RowTile {
    u64 slot;
    int expert;
    int first;
    int n;
    int pad;
};

struct ExpertArgs {
    const float* logits;     // [n_tokens, n_experts] f32
    const u64* table;        // [n_experts]: address of each expert's slot, 0: not here; null (expert_choose): all are
    int* expert;             // [n_tokens, n_used]
    float* weight;           // [n_tokens, n_used] f32
    u64* slot;               // [n_tokens, n_used]: entries of the table
    int* token;              // [n_tokens * n_used]: token of a sorted row
    int* row;                // [n_tokens, n_used]: sorted row of a choice, where its expert is here
    int* count;              // [n_experts], zero before expert_choose
    RowTile* tiles;          // [n_experts + n_tokens * n_used / height]
    int* n_tiles;            // [1]
    int n_tokens;
    int n_experts;
    int n_used;
    int height;
    int first_expert;        // of those that expert_sort sorts
    int pad;
};
static_assert(sizeof(ExpertArgs) == EXPERT_ARGS, "ExpertArgs differs from prompt.rs");

// Grid (ceil(n_tokens / 8)), 256 threads, a warp a token; 8 * n_experts floats of shared memory. The n_used largest
// logits (ties: lower index), softmax over them, which equals the renormalised softmax over all.
KERNEL __launch_bounds__(256) expert_choose(const ExpertArgs a) {
    extern __shared__ float shared[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = blockIdx.x * 8 + warp;
    if (token >= a.n_tokens) return;
    float* p = shared + warp * a.n_experts;
    for (int i = lane; i < a.n_experts; i += 32) p[i] = a.logits[(u64)token * a.n_experts + i];
    __syncwarp();
    float first = 0.0f, total = 0.0f;
    for (int k = 0; k < a.n_used; k++) {
        float best = -3.4e38f;
        int index = 0x7fffffff;
        for (int i = lane; i < a.n_experts; i += 32)
            if (p[i] > best) best = p[i], index = i;
#pragma unroll
        for (int o = 16; o; o >>= 1) {
            const float other = __shfl_xor_sync(FULL, best, o);
            const int other_index = __shfl_xor_sync(FULL, index, o);
            if (other > best || (other == best && other_index < index)) best = other, index = other_index;
        }
        if (index >= a.n_experts) index = k;    // only NaN logits come here
        if (k == 0) first = best;
        const float e = expf(best - first);
        total += e;
        if (lane == 0) {
            p[index] = -3.4e38f;
            a.expert[token * a.n_used + k] = index;
            a.weight[token * a.n_used + k] = e;
            a.slot[token * a.n_used + k] = a.table ? a.table[index] : 1;
            atomicAdd(a.count + index, 1);
        }
        __syncwarp();
    }
    for (int k = lane; k < a.n_used; k += 32) a.weight[token * a.n_used + k] /= total;
}

// Grid (experts from first_expert on), 256 threads: the rows of an expert, in the order of their tokens, and its tiles.
// Experts that are not here have neither, but their rows are left free: those of several launches do not overlap.
KERNEL __launch_bounds__(256) expert_sort(const ExpertArgs a) {
    __shared__ float scratch[33];
    __shared__ int warp_count[8];
    const int e = a.first_expert + blockIdx.x, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    float rows_before = 0.0f, tiles_before = 0.0f;    // exact: below 2^24
    for (int i = tid; i < e; i += 256) {
        const int n = a.count[i];
        rows_before += n;
        if (i >= a.first_expert && a.table[i]) tiles_before += (n + a.height - 1) / a.height;
    }
    const int first = (int)block_sum(rows_before, scratch), first_tile = (int)block_sum(tiles_before, scratch);
    const u64 slot = a.table[e];
    const int n = slot ? a.count[e] : 0, n_tiles = (n + a.height - 1) / a.height;
    for (int i = tid; i < n_tiles; i += 256)
        a.tiles[first_tile + i] = RowTile{slot, e, first + i * a.height, min(a.height, n - i * a.height), 0};
    if (blockIdx.x == gridDim.x - 1 && tid == 0) *a.n_tiles = first_tile + n_tiles;
    if (!slot) return;
    int at = first;
    const int total = a.n_tokens * a.n_used;
    for (int base = 0; base < total; base += 256) {
        const int i = base + tid;
        const bool mine = i < total && a.expert[i] == e;
        const u32 votes = __ballot_sync(FULL, mine);
        if (lane == 0) warp_count[warp] = __popc(votes);
        __syncthreads();
        int before = __popc(votes & ((1u << lane) - 1)), sum = 0;
#pragma unroll
        for (int w = 0; w < 8; w++) {
            if (w < warp) before += warp_count[w];
            sum += warp_count[w];
        }
        if (mine) {
            a.token[at + before] = i / a.n_used;
            a.row[i] = at + before;
        }
        at += sum;
        __syncthreads();
    }
}

struct CombineArgs {
    float* x;                // [n_tokens, n] f32, added to
    const float* y;          // [n_tokens * n_used, n] f32: outputs of the experts in sorted order
    const int* row;          // [n_tokens, n_used]
    const float* weight;     // [n_tokens, n_used] f32
    const u64* slot;         // [n_tokens, n_used]: 0 where the expert is not here
    const float* shared;     // [n_tokens, n] f32 or null
    const float* h;          // [n_tokens, n] f32: the input of the experts
    const float* shared_gate;// [n] f32: weights of the shared expert's gate, or null
    int n;
    int n_used;
};
static_assert(sizeof(CombineArgs) == COMBINE_ARGS, "CombineArgs differs from prompt.rs");

// Grid (n_tokens), 256 threads.
KERNEL __launch_bounds__(256) expert_combine(const CombineArgs a) {
    __shared__ float scratch[33];
    const u64 token = blockIdx.x;
    float gate = 1.0f;
    if (a.shared_gate) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < a.n; i += 256) sum += a.h[token * a.n + i] * a.shared_gate[i];
        gate = sigmoid(block_sum(sum, scratch));
    }
    for (int i = threadIdx.x; i < a.n; i += 256) {
        float v = a.shared ? gate * a.shared[token * a.n + i] : 0.0f;
        for (int k = 0; k < a.n_used; k++)
            if (a.slot[token * a.n_used + k])
                v += a.weight[token * a.n_used + k] * a.y[(u64)a.row[token * a.n_used + k] * a.n + i];
        a.x[token * a.n + i] += v;
    }
}
