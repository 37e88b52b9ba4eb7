// y = W x for one token or a few: the bytes of W are what it costs, each read once. Up to four matrices that share the
// input run in one grid (`gemv`); `gemv_swiglu` computes silu(gate) * up and quantises it for the next product.
// A warp takes ROWS rows at a time and, with KSPLIT, a part of the inputs; lanes take 16 bytes of each row.
// Quantised weights meet int8 activations (dp4a), float weights meet f32 ones.
// Set by the compiler: K, TOKENS (at most), ROWS, KSPLIT, WARPS, TYPE0 to TYPE3 (-1: none).
#include "quant.cuh"

struct Segment {
    const u8* weight;     // planes of [n_rows, K]
    float* out;           // [n_tokens, stride]
    const float* scale;   // [1] or null
    const float* bias;    // [n_rows] or null
    u64 n_blocks;         // quantisation blocks of the tensor
    u32 n_rows;
    u32 stride;
    u32 first_block;      // of the grid
    u32 add;              // out += instead of out =
};

struct GemvArgs {
    Segment segment[4];
    const i8* codes;      // [n_tokens, K]
    const Q8Head* heads;  // [n_tokens, K / 32]
    const float* x;       // [n_tokens, K]
    i8* codes_out;        // gemv_swiglu: [n_tokens, n_rows], or null: f32 to segment[0].out
    Q8Head* heads_out;
    u32 n_tokens;
    u32 pad;
};
static_assert(sizeof(GemvArgs) == GEMV_ARGS, "GemvArgs differs from gemv.rs");

// acc[r][t] += this lane's part of row min(row + r, last) . x[t].
template <int TY, int R, int PARTS>
DEVICE void row_dots(const u8* weight, u64 n_blocks, u64 row, u64 last, int part, const GemvArgs& a, float (&acc)[R][TOKENS]) {
    const int lane = threadIdx.x % WARP;
    u64 rows[R];
#pragma unroll
    for (int r = 0; r < R; r++) rows[r] = min(row + r, last);
    if constexpr (is_float(TY)) {
        constexpr int C = K % chunk(TY) == 0 ? chunk(TY) : 1, N = K / C;
        for (int c = part * WARP + lane; c < N; c += PARTS * WARP) {
            float w[R][C];
#pragma unroll
            for (int r = 0; r < R; r++) {
                if constexpr (C == 1) {
                    w[r][0] = value<TY>(weight, 0, rows[r] * K + c);
                } else {
                    const uint4 v = load_weights(reinterpret_cast<const uint4*>(weight) + rows[r] * N + c);
                    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int i = 0; i < C; i++) {
                        if constexpr (TY == F32) w[r][i] = __uint_as_float(words[i]);
                        else if constexpr (TY == BF16) w[r][i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
                        else w[r][i] = i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (TOKENS > 1 && t >= a.n_tokens) break;
                const float* x = a.x + (u64)t * K + c * C;
#pragma unroll
                for (int i = 0; i < C; i++) {
                    const float xi = x[i];
#pragma unroll
                    for (int r = 0; r < R; r++) acc[r][t] += w[r][i] * xi;
                }
            }
        }
    } else {
        typedef Quant<TY> Q;
        constexpr int UNITS = K / 32;
        for (int u = part * WARP + lane; u < UNITS; u += PARTS * WARP) {
            typename Q::Raw raw[R];
#pragma unroll
            for (int r = 0; r < R; r++) raw[r] = Q::load(weight, n_blocks, rows[r] * UNITS + u);
            Unit w[R];
#pragma unroll
            for (int r = 0; r < R; r++) Q::expand(raw[r], rows[r] * UNITS + u, w[r]);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (TOKENS > 1 && t >= a.n_tokens) break;
                const int4* p = reinterpret_cast<const int4*>(a.codes + (u64)t * K) + 2 * u;
                const int4 lo = p[0], hi = p[1];
                const Q8Head head = a.heads[(u64)t * UNITS + u];
                const int x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
                for (int r = 0; r < R; r++) acc[r][t] += dot<TY>(w[r], x, head);
            }
        }
    }
}

template <int TY> DEVICE void segment_rows(const Segment& s, u32 block, const GemvArgs& a, float (*shared)[ROWS][TOKENS]) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = warp / KSPLIT, part = warp % KSPLIT;
    const u64 row = ((u64)block * (WARPS / KSPLIT) + group) * ROWS;
    float acc[ROWS][TOKENS] = {};
    if (row < s.n_rows) row_dots<TY, ROWS, KSPLIT>(s.weight, s.n_blocks, row, s.n_rows - 1, part, a, acc);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) acc[r][t] = warp_sum(acc[r][t]);
    if (lane == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int t = 0; t < TOKENS; t++) shared[warp][r][t] = acc[r][t];
    }
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
        float* out = s.out + (u64)t * s.stride + row + r;
        *out = s.add ? *out + y : y;
    }
}

KERNEL __launch_bounds__(WARPS * WARP) gemv(const GemvArgs a) {
    __shared__ float shared[WARPS][ROWS][TOKENS];
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
// Blocks of 8 warps, 32 outputs: 4 rows of gate and of up per warp.
KERNEL __launch_bounds__(256) gemv_swiglu(const GemvArgs a) {
    constexpr int R = 4;
    __shared__ float act[TOKENS][32];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u64 n_rows = a.segment[0].n_rows, row = (u64)blockIdx.x * 32 + warp * R;
    float gate[R][TOKENS] = {}, up[R][TOKENS] = {};
    if (row < n_rows) {
        row_dots<TYPE0, R, 1>(a.segment[0].weight, a.segment[0].n_blocks, row, n_rows - 1, 0, a, gate);
        row_dots<TYPE1, R, 1>(a.segment[1].weight, a.segment[1].n_blocks, row, n_rows - 1, 0, a, up);
    }
    const float gate_scale = a.segment[0].scale ? a.segment[0].scale[0] : 1.0f;
    const float up_scale = a.segment[1].scale ? a.segment[1].scale[0] : 1.0f;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float g = warp_sum(gate[r][t]) * gate_scale, u = warp_sum(up[r][t]) * up_scale;
            if (lane == 0) act[t][warp * R + r] = silu(g) * u;
        }
    __syncthreads();
    for (int t = warp; t < a.n_tokens; t += 8) {
        const u64 i = (u64)blockIdx.x * 32 + lane;
        const float v = act[t][lane];
        if (a.codes_out) quantise_unit(v, a.codes_out + t * n_rows, a.heads_out + t * (n_rows / 32), i);
        else if (i < n_rows) a.segment[0].out[t * n_rows + i] = v;
    }
}
#endif
