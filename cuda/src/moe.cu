// Mixture of experts for single tokens. moe_route: router, softmax, the n_used largest and their weights, the shared
// expert's gate; moe_gate_up: silu(gate) * up of all chosen experts and the shared one in one grid; moe_down: their
// weighted sum onto the residual stream. Reads the chosen experts' weights once.
// Set by the compiler: N (width), N_EXPERTS, N_USED, N_FF, N_FF_SHARED (0: none), TYPE_GATE, TYPE_UP, TYPE_DOWN and the
// same of the shared expert (TYPE_GATE_S ...).
#include "quant.cuh"

struct Expert {
    const u8* weight;      // planes of [n_experts * n_out, n_in]
    const float* scale;    // [n_experts], or null
    u64 n_blocks;
};

struct MoeArgs {
    const float* h;        // [n_tokens, N]
    const i8* codes;       // [n_tokens, N]
    const Q8Head* heads;
    const float* router;   // [N_EXPERTS, N]
    const float* gate_shared;  // [N], or null
    Expert gate, up, down, gate_s, up_s, down_s;
    float* logits;         // [n_tokens, N_EXPERTS + 1]
    u32* done;             // [n_tokens]: blocks that have finished; zero before and after
    u32* ids;              // [n_tokens, N_USED]
    float* weights;        // [n_tokens, N_USED + 1]; the last is the shared expert's
    float* act;            // [n_tokens, N_USED + 1, FF_STRIDE], for float down matrices
    i8* act_codes;         // the same, for quantised ones
    Q8Head* act_heads;     // [n_tokens, N_USED + 1, FF_STRIDE / 32]
    float* x;              // [n_tokens, N]
};
static_assert(sizeof(MoeArgs) == MOE_ARGS, "MoeArgs differs from moe.rs");

#define FF_MAX (N_FF > N_FF_SHARED ? N_FF : N_FF_SHARED)
#define FF_STRIDE ((FF_MAX + 31) / 32 * 32)

// Grid (ceil((N_EXPERTS + 1) / 8), n_tokens): a warp per expert; the last block of a token chooses.
KERNEL __launch_bounds__(256) moe_route(const MoeArgs a) {
    __shared__ bool last;
    __shared__ float p[N_EXPERTS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, e = blockIdx.x * 8 + warp;
    const u64 t = blockIdx.y;
    float* logits = a.logits + t * (N_EXPERTS + 1);
    if (e < N_EXPERTS || (e == N_EXPERTS && a.gate_shared)) {
        const float* w = e < N_EXPERTS ? a.router + (u64)e * N : a.gate_shared;
        const float* h = a.h + t * N;
        float sum = 0.0f;
        if constexpr (N % 4 == 0) {
            for (int i = lane; i < N / 4; i += WARP) {
                const float4 x = reinterpret_cast<const float4*>(w)[i], y = reinterpret_cast<const float4*>(h)[i];
                sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
            }
        } else {
            for (int i = lane; i < N; i += WARP) sum += w[i] * h[i];
        }
        sum = warp_sum(sum);
        if (lane == 0) logits[e] = sum;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.done + t, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < N_EXPERTS; i += blockDim.x) p[i] = __ldcg(logits + i);
    __syncthreads();
    if (warp != 0) return;
    if (lane == 0) a.done[t] = 0;
    // Softmax of the chosen logits equals that of all, renormalised; the clamp of the sum needs the full one.
    float best = -INFINITE, total = 0.0f;
    for (int i = lane; i < N_EXPERTS; i += WARP) best = fmaxf(best, p[i]);
    best = warp_max(best);
    for (int i = lane; i < N_EXPERTS; i += WARP) total += __expf(p[i] - best);
    total = warp_sum(total);
    float chosen_sum = 0.0f, mine = 0.0f;
    for (int j = 0; j < N_USED; j++) {
        // Largest logit, ties to the lower index.
        float top = -INFINITE;
        int at = N_EXPERTS;
        for (int i = lane; i < N_EXPERTS; i += WARP)
            if (p[i] > top) {
                top = p[i];
                at = i;
            }
#pragma unroll
        for (int o = WARP / 2; o > 0; o >>= 1) {
            const float other = __shfl_xor_sync(FULL, top, o);
            const int other_at = __shfl_xor_sync(FULL, at, o);
            if (other > top || (other == top && other_at < at)) {
                top = other;
                at = other_at;
            }
        }
        const float w = __expf(top - best) / total;
        chosen_sum += w;
        if (lane == j) mine = w;
        if (lane == 0) a.ids[t * N_USED + j] = min(at, N_EXPERTS - 1);
        if (lane == at % WARP && at < N_EXPERTS) p[at] = -INFINITE;
        __syncwarp();
    }
    static_assert(N_USED < WARP, "one lane per chosen expert");
    if (lane < N_USED) a.weights[t * (N_USED + 1) + lane] = mine / fmaxf(chosen_sum, 0.00006103515625f);
    if (lane == N_USED) a.weights[t * (N_USED + 1) + lane] = a.gate_shared ? sigmoid(__ldcg(logits + N_EXPERTS)) : 1.0f;
}

// This lane's part of R rows . x, over K inputs; x as codes or floats, as the type asks.
template <int TY, int K, int R> DEVICE void rows_dot(const Expert& w, u64 row, u64 last, const i8* codes, const Q8Head* heads,
                                                     const float* x, int part, int parts, float factor, float (&acc)[R]) {
    const int lane = threadIdx.x % WARP;
    if constexpr (is_float(TY)) {
        for (int i = part * WARP + lane; i < K; i += parts * WARP) {
            const float xi = x[i] * factor;
#pragma unroll
            for (int r = 0; r < R; r++) acc[r] += value<TY>(w.weight, w.n_blocks, min(row + r, last) * K + i) * xi;
        }
    } else {
        typedef Quant<TY> Q;
        constexpr int UNITS = K / 32;
        for (int u = part * WARP + lane; u < UNITS; u += parts * WARP) {
            typename Q::Raw raw[R];
#pragma unroll
            for (int r = 0; r < R; r++) raw[r] = Q::load(w.weight, w.n_blocks, min(row + r, last) * UNITS + u);
            const int4* p = reinterpret_cast<const int4*>(codes) + 2 * u;
            const int4 lo = p[0], hi = p[1];
            Q8Head head = heads[u];
            head.d *= factor;
            const int xs[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int r = 0; r < R; r++) {
                Unit unit;
                Q::expand(raw[r], min(row + r, last) * UNITS + u, unit);
                acc[r] += dot<TY>(unit, xs, head);
            }
        }
    }
}

template <int TG, int TU, int FF> DEVICE void gate_up(const MoeArgs& a, const Expert& gate, const Expert& up, u32 e, float (*act)[32]) {
    constexpr int R = 4;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u64 t = blockIdx.z, first = (u64)e * FF, row = blockIdx.x * 32 + warp * R;
    float g[R] = {}, u[R] = {};
    if (row < FF) {
        const i8* codes = a.codes + t * N;
        const Q8Head* heads = a.heads + t * (N / 32);
        const float* h = a.h + t * N;
        rows_dot<TG, N, R>(gate, first + row, first + FF - 1, codes, heads, h, 0, 1, 1.0f, g);
        rows_dot<TU, N, R>(up, first + row, first + FF - 1, codes, heads, h, 0, 1, 1.0f, u);
    }
    const float gate_scale = gate.scale ? gate.scale[e] : 1.0f, up_scale = up.scale ? up.scale[e] : 1.0f;
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float gr = warp_sum(g[r]) * gate_scale, ur = warp_sum(u[r]) * up_scale;
        if (lane == 0) act[0][warp * R + r] = row + r < FF ? silu(gr) * ur : 0.0f;
    }
    __syncthreads();
    if (warp != 0) return;
    const u64 at = (t * (N_USED + 1) + blockIdx.y) * FF_STRIDE;
    const int i = blockIdx.x * 32 + lane;
    a.act[at + i] = act[0][lane];
    quantise_unit(act[0][lane], a.act_codes + at, a.act_heads + at / 32, i);
}

// Grid (FF_STRIDE / 32, N_USED + (N_FF_SHARED > 0), n_tokens): 32 outputs of one expert.
KERNEL __launch_bounds__(256) moe_gate_up(const MoeArgs a) {
    __shared__ float act[1][32];
#if N_FF_SHARED > 0
    if (blockIdx.y == N_USED) {
        if (blockIdx.x * 32 < N_FF_SHARED) gate_up<TYPE_GATE_S, TYPE_UP_S, N_FF_SHARED>(a, a.gate_s, a.up_s, 0, act);
        return;
    }
#endif
    if (blockIdx.x * 32 < N_FF) gate_up<TYPE_GATE, TYPE_UP, N_FF>(a, a.gate, a.up, a.ids[blockIdx.z * N_USED + blockIdx.y], act);
}

#define DOWN_ROWS 2
#define DOWN_WARPS 4

// Grid (ceil(N / DOWN_ROWS), n_tokens): the warps of a block share the experts of its rows.
KERNEL __launch_bounds__(DOWN_WARPS * WARP) moe_down(const MoeArgs a) {
    __shared__ float shared[DOWN_WARPS][DOWN_ROWS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u64 t = blockIdx.y, row = (u64)blockIdx.x * DOWN_ROWS;
    float acc[DOWN_ROWS] = {};
    for (int j = warp; j < N_USED + (N_FF_SHARED > 0); j += DOWN_WARPS) {
        const u64 at = (t * (N_USED + 1) + j) * FF_STRIDE;
        const float weight = a.weights[t * (N_USED + 1) + j];
#if N_FF_SHARED > 0
        if (j == N_USED) {
            const float factor = weight * (a.down_s.scale ? a.down_s.scale[0] : 1.0f);
            rows_dot<TYPE_DOWN_S, N_FF_SHARED, DOWN_ROWS>(a.down_s, row, N - 1, a.act_codes + at, a.act_heads + at / 32, a.act + at,
                                                          0, 1, factor, acc);
            continue;
        }
#endif
        const u32 e = a.ids[t * N_USED + j];
        const float factor = weight * (a.down.scale ? a.down.scale[e] : 1.0f);
        rows_dot<TYPE_DOWN, N_FF, DOWN_ROWS>(a.down, (u64)e * N + row, (u64)e * N + N - 1, a.act_codes + at, a.act_heads + at / 32,
                                             a.act + at, 0, 1, factor, acc);
    }
#pragma unroll
    for (int r = 0; r < DOWN_ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0) shared[warp][r] = sum;
    }
    __syncthreads();
    if (threadIdx.x < DOWN_ROWS && row + threadIdx.x < N) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < DOWN_WARPS; w++) sum += shared[w][threadIdx.x];
        a.x[t * N + row + threadIdx.x] += sum;
    }
}
