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
    u32 kind;             // not used here
};

struct GemvArgs {
    Segment segment[4];
    Activations in;
    i8* codes_out;        // gemv_swiglu: [n_tokens, n_rows], or null: f32 to segment[0].out
    Q8Head* heads_out;
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
// A block makes a unit of 32 outputs: its row groups take ROWS rows of gate and as many of up at a time, and load the
// next ones before they sum.
KERNEL __launch_bounds__(WARPS * WARP) gemv_swiglu(const GemvArgs a) {
    __shared__ float shared[KSPLIT][2][32][TOKENS];
    constexpr int STEP = GROUPS * ROWS;
    static_assert(32 % STEP == 0, "blocks make whole units");
    let_next_start();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = warp / KSPLIT, part = warp % KSPLIT;
    const u64 n_rows = a.segment[0].n_rows, first = (u64)blockIdx.x * 32;
    Rows<TYPE0, K, ROWS, KSPLIT> gate;
    Rows<TYPE1, K, ROWS, KSPLIT> up;
    gate.start(a.segment[0].weight, a.segment[0].n_blocks, first + group * ROWS, n_rows - 1, part);
    up.start(a.segment[1].weight, a.segment[1].n_blocks, first + group * ROWS, n_rows - 1, part);
    wait_for_inputs();
#pragma unroll 1
    for (int at = group * ROWS; at < 32; at += STEP) {
        auto this_gate = gate;
        auto this_up = up;
        if (at + STEP < 32) {
            gate.start(a.segment[0].weight, a.segment[0].n_blocks, first + at + STEP, n_rows - 1, part);
            up.start(a.segment[1].weight, a.segment[1].n_blocks, first + at + STEP, n_rows - 1, part);
        }
        float g[ROWS][TOKENS] = {}, u[ROWS][TOKENS] = {};
        this_gate.finish(a.in, a.n_tokens, g);
        this_up.finish(a.in, a.n_tokens, u);
        reduce<ROWS>(g, &shared[part][0][at]);
        reduce<ROWS>(u, &shared[part][1][at]);
    }
    __syncthreads();
    for (int t = warp; t < a.n_tokens; t += WARPS) {
        float g = 0.0f, u = 0.0f;
#pragma unroll
        for (int p = 0; p < KSPLIT; p++) {
            g += shared[p][0][lane][t];
            u += shared[p][1][lane][t];
        }
        if (a.segment[0].scale) g *= a.segment[0].scale[0];
        if (a.segment[1].scale) u *= a.segment[1].scale[0];
        const float v = silu(g) * u;
        if (a.codes_out) quantise_unit(v, a.codes_out + t * n_rows, a.heads_out + t * (n_rows / 32), first + lane);
        else if (first + lane < n_rows) a.segment[0].out[t * n_rows + first + lane] = v;
    }
}
#endif
