// y = W x for one token or a few: the bytes of W are what it costs, each read once. Up to four matrices that share the
// input run in one grid (`gemv`); `gemv_swiglu` computes silu(gate) * up and quantises it for the next product.
// A warp takes ROWS rows; KSPLIT warps share the columns, as many as make one round of loads (16 bytes a lane and row).
// Quantised weights meet int8 activations (dp4a), float weights meet f32 ones.
// Set by the compiler: K, TOKENS (at most), ROWS, KSPLIT, GROUPS (row groups of a block), TYPE0 to TYPE3 (-1: none).
#include "rows.cuh"

#define WARPS (KSPLIT * GROUPS)

struct Segment {
    const u8* weight;     // planes of [n_rows, K]
    float* out;           // [n_tokens, n_rows]
    const float* scale;   // [1] or null
    const float* bias;    // [n_rows] or null
    u64 n_blocks;         // quantisation blocks of the tensor
    u32 n_rows;
    u32 first_block;      // of the grid
    u32 add;              // out += instead of out =
    u32 pad;
};

struct GemvArgs {
    Segment segment[4];
    Activations in;
    i8* codes_out;        // gemv_swiglu: [n_tokens, n_rows], or null: only f32 to segment[0].out
    Q8Head* heads_out;
    u32* done;            // [n_rows / 32]: blocks that have finished a unit; zero before and after
    u32 n_tokens;
    u32 pad;
};
static_assert(sizeof(GemvArgs) == GEMV_ARGS, "GemvArgs differs from gemv.rs");

// Sums of this warp's rows and tokens to shared memory.
template <int R> DEVICE void reduce(float (&acc)[R][TOKENS], float (*out)[TOKENS]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float sum = warp_sum(acc[r][t]);
            if (threadIdx.x % WARP == 0) out[r][t] = sum;
        }
}

template <int TY> DEVICE void segment_rows(const Segment& s, u32 block, const GemvArgs& a, float (*shared)[ROWS][TOKENS]) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = warp / KSPLIT, part = warp % KSPLIT;
    const u64 row = ((u64)block * GROUPS + group) * ROWS;
    Rows<TY, K, ROWS, KSPLIT> rows;
    float acc[ROWS][TOKENS] = {};
    rows.start(s.weight, s.n_blocks, row, s.n_rows - 1, part);
    wait_for_inputs();
    rows.finish(a.in, a.n_tokens, acc);
    reduce<ROWS>(acc, shared[warp]);
    if (KSPLIT > 1) __syncthreads();
    else __syncwarp();
    if (part != 0) return;
    for (int i = lane; i < ROWS * TOKENS; i += WARP) {
        const int t = i / ROWS, r = i % ROWS;
        if (row + r >= s.n_rows || t >= a.n_tokens) continue;
        float y = 0.0f;
#pragma unroll
        for (int p = 0; p < KSPLIT; p++) y += shared[warp + p][r][t];
        if (s.scale) y *= s.scale[0];
        if (s.bias) y += s.bias[row + r];
        float* out = s.out + (u64)t * s.n_rows + row + r;
        *out = s.add ? *out + y : y;
    }
}

KERNEL __launch_bounds__(WARPS * WARP) gemv(const GemvArgs a) {
    __shared__ float shared[WARPS][ROWS][TOKENS];
    let_next_start();
    const u32 b = blockIdx.x;
#if TYPE3 >= 0
    if (b >= a.segment[3].first_block) return segment_rows<TYPE3>(a.segment[3], b - a.segment[3].first_block, a, shared);
#endif
#if TYPE2 >= 0
    if (b >= a.segment[2].first_block) return segment_rows<TYPE2>(a.segment[2], b - a.segment[2].first_block, a, shared);
#endif
#if TYPE1 >= 0
    if (b >= a.segment[1].first_block) return segment_rows<TYPE1>(a.segment[1], b - a.segment[1].first_block, a, shared);
#endif
    segment_rows<TYPE0>(a.segment[0], b, a, shared);
}

#if TYPE1 >= 0 && TYPE2 < 0
// ROWS rows of gate and as many of up per warp; the last block of a unit of 32 outputs quantises it.
KERNEL __launch_bounds__(WARPS * WARP) gemv_swiglu(const GemvArgs a) {
    __shared__ float shared[WARPS][2][ROWS][TOKENS];
    __shared__ bool last;
    let_next_start();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = warp / KSPLIT, part = warp % KSPLIT;
    const u64 n_rows = a.segment[0].n_rows, row = ((u64)blockIdx.x * GROUPS + group) * ROWS;
    Rows<TYPE0, K, ROWS, KSPLIT> gate;
    Rows<TYPE1, K, ROWS, KSPLIT> up;
    gate.start(a.segment[0].weight, a.segment[0].n_blocks, row, n_rows - 1, part);
    up.start(a.segment[1].weight, a.segment[1].n_blocks, row, n_rows - 1, part);
    wait_for_inputs();
    float acc[ROWS][TOKENS] = {};
    gate.finish(a.in, a.n_tokens, acc);
    reduce<ROWS>(acc, shared[warp][0]);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) acc[r][t] = 0.0f;
    up.finish(a.in, a.n_tokens, acc);
    reduce<ROWS>(acc, shared[warp][1]);
    if (KSPLIT > 1) __syncthreads();
    else __syncwarp();
    if (part == 0) {
        for (int i = lane; i < ROWS * TOKENS; i += WARP) {
            const int t = i / ROWS, r = i % ROWS;
            if (row + r >= n_rows || t >= a.n_tokens) continue;
            float g = 0.0f, u = 0.0f;
#pragma unroll
            for (int p = 0; p < KSPLIT; p++) {
                g += shared[warp + p][0][r][t];
                u += shared[warp + p][1][r][t];
            }
            if (a.segment[0].scale) g *= a.segment[0].scale[0];
            if (a.segment[1].scale) u *= a.segment[1].scale[0];
            __stcg(a.segment[0].out + (u64)t * n_rows + row + r, silu(g) * u);
        }
    }
    if (!a.codes_out) return;
    constexpr int OUTPUTS = GROUPS * ROWS;
    static_assert(32 % OUTPUTS == 0, "blocks make up units");
    const u64 unit = (u64)blockIdx.x * OUTPUTS / 32;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.done + unit, 1u) == 32 / OUTPUTS - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) a.done[unit] = 0;
    for (int t = warp; t < a.n_tokens; t += WARPS) {
        const float v = __ldcg(a.segment[0].out + t * n_rows + unit * 32 + lane);
        quantise_unit(v, a.codes_out + t * n_rows, a.heads_out + t * (n_rows / 32), unit * 32 + lane);
    }
}
#endif
