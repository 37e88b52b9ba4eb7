// Mixture of experts for single tokens. moe_route: norm, router, softmax, the n_used largest and their weights, the
// shared expert's gate; moe_gate_up: silu(gate) * up of all chosen experts and the shared one in one grid; moe_down:
// their weighted sum onto the residual stream. Reads the chosen experts' weights once. moe_foresee: what the router
// would choose now.
// Set by the compiler: N (width), N_EXPERTS, N_USED, N_FF, N_FF_SHARED (0: none), TYPE_GATE, TYPE_UP, TYPE_DOWN and the
// same of the shared expert (TYPE_GATE_S ...).
#include "rows.cuh"

struct Expert {
    u64 weight;            // planes of [n_out, n_in]: of a routed expert counted from its slot
    const float* scale;    // [n_experts], or null
    u64 n_blocks;          // of one expert
};

struct MoeArgs {
    const float* norm;     // [N]
    u32* begun;            // host: gets `block`
    float* h;              // [n_tokens, N], or null: no expert takes floats
    i8* codes;             // [n_tokens, N], or null: no expert takes codes
    Q8Head* heads;
    const float* router;   // [N_EXPERTS, N]
    const float* gate_shared;  // [N], or null
    const u64* table;      // [N_EXPERTS]: address of each expert's slot, 0: not on this GPU
    Expert gate, up, down, gate_s, up_s, down_s;
    float* logits;         // [n_tokens, N_EXPERTS + 1]
    u32* done;             // [n_tokens]: blocks of the router that have finished; zero before and after
    u32* ids;              // [n_tokens, N_USED]
    u64* slots;            // [n_tokens, N_USED]: their entries of the table
    float* weights;        // [n_tokens, N_USED + 1]; the last is the shared expert's
    u32* units;            // [n_tokens, N_USED + 1, FF_STRIDE / 32]: blocks that have finished a unit; likewise
    float* act;            // [n_tokens, N_USED + 1, FF_STRIDE]
    i8* act_codes;         // the same, for quantised down matrices
    Q8Head* act_heads;     // [n_tokens, N_USED + 1, FF_STRIDE / 32]
    float* x;              // [n_tokens, N]
    float eps;
    u32 block;             // of the model, which begins here
};
static_assert(sizeof(MoeArgs) == MOE_ARGS, "MoeArgs differs from moe.rs");

#define ROUTE_ROWS 2
#define ROUTE_THREADS (ROUTE_ROWS * 64)
#define ROUTE_BLOCKS ((N_EXPERTS + ROUTE_ROWS) / ROUTE_ROWS)
#define PER_LANE ((N_EXPERTS + WARP - 1) / WARP)
#define FF_MAX (N_FF > N_FF_SHARED ? N_FF : N_FF_SHARED)
#define FF_STRIDE ((FF_MAX + 31) / 32 * 32)

// RMS norm of token `t` by one block, in the forms that the experts take.
DEVICE void norm_row(const MoeArgs& a, u64 t) {
    __shared__ float scratch[33];
    const float* x = a.x + t * N;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < N; i += ROUTE_THREADS) sum += x[i] * x[i];
    const float scale = rsqrtf(block_sum(sum, scratch) / (float)N + a.eps);
    if (a.h)
        for (int i = threadIdx.x; i < N; i += ROUTE_THREADS) a.h[t * N + i] = x[i] * scale * a.norm[i];
#if N % 32 == 0
    if (!a.codes) return;
#pragma unroll
    for (int first = 0; first < N / 4; first += ROUTE_THREADS) {
        // Lanes beyond the row take part in the exchange of the others' units, and write nothing.
        const int i = first + threadIdx.x, at = min(i, N / 4 - 1);
        const float4 v = reinterpret_cast<const float4*>(x)[at], w = reinterpret_cast<const float4*>(a.norm)[at];
        const float4 y = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        quantise_four(y, a.codes + t * N, a.heads + t * (N / 32), 4 * (u64)i, i < N / 4);
    }
#endif
}

// A float as a number that orders as it does, NaN before all others; none is 0.
DEVICE u32 ordered(float f) {
    const u32 u = __float_as_uint(f);
    return f != f ? 1 : u & 0x80000000u ? ~u : u | 0x80000000u;
}

// What a lane of the block that has chosen knows: the expert that comes `lane`-th, its slot and its weight (lane
// N_USED: the weight of the shared expert).
struct Choice {
    int id;
    u64 slot;
    float weight;
};

// By ROUTE_BLOCKS blocks, two warps per expert; true in the first warp of the last of them to finish, which has chosen
// for token `t`. The norm is inside: logit = scale * sum of router * norm * x.
DEVICE bool route(const MoeArgs& a, u64 t, Choice& choice) {
    __shared__ bool last;
    __shared__ float p[N_EXPERTS], halves[ROUTE_ROWS][2], squares[2];
    __shared__ u64 table[N_EXPERTS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, half = warp % 2, e = blockIdx.x * ROUTE_ROWS + warp / 2;
    // The table is no input of the step, and would have to come from memory when the experts are chosen.
    if (blockIdx.x == 0 && t == 0)
        for (int i = threadIdx.x * 16; i < N_EXPERTS; i += ROUTE_THREADS * 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(a.table + i));
    float* logits = a.logits + t * (N_EXPERTS + 1);
    const float* w = e < N_EXPERTS ? a.router + (u64)e * N : e == N_EXPERTS ? a.gate_shared : nullptr;
    const float* x = a.x + t * N;
    float sum = 0.0f, square = 0.0f;
#if N % 4 == 0 && N <= 8192
    // Weights are there before the inputs are.
    constexpr int LOADS = (N / 4 + 2 * WARP - 1) / (2 * WARP);
    float4 weights[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++) {
        const int i = (2 * j + half) * WARP + lane;
        const bool here = w && i < N / 4;
        const float4 of_w = here ? reinterpret_cast<const float4*>(w)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 of_norm = here ? reinterpret_cast<const float4*>(a.norm)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        weights[j] = make_float4(of_w.x * of_norm.x, of_w.y * of_norm.y, of_w.z * of_norm.z, of_w.w * of_norm.w);
    }
    wait_for_inputs();
#pragma unroll
    for (int j = 0; j < LOADS; j++) {
        const int i = (2 * j + half) * WARP + lane;
        const float4 v = i < N / 4 ? reinterpret_cast<const float4*>(x)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sum += weights[j].x * v.x + weights[j].y * v.y + weights[j].z * v.z + weights[j].w * v.w;
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#else
    wait_for_inputs();
    for (int i = half * WARP + lane; i < N; i += 2 * WARP) {
        if (w) sum += w[i] * a.norm[i] * x[i];
        square += x[i] * x[i];
    }
#endif
    sum = warp_sum(sum);
    square = warp_sum(square);
    if (lane == 0) {
        halves[warp / 2][half] = sum;
        if (warp < 2) squares[half] = square;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const float scale = rsqrtf((squares[0] + squares[1]) / (float)N + a.eps);
#pragma unroll
        for (int i = 0; i < ROUTE_ROWS; i++)
            if (e + i <= N_EXPERTS) __stcg(logits + e + i, scale * (halves[i][0] + halves[i][1]));
        __threadfence();
        last = atomicAdd(a.done + t, 1u) == ROUTE_BLOCKS - 1;
    }
    __syncthreads();
    if (!last) return false;
    __threadfence();
    // All loads first: one wait for the cache.
    constexpr int PER_THREAD = (N_EXPERTS + ROUTE_THREADS - 1) / ROUTE_THREADS;
    float of_p[PER_THREAD];
    u64 of_table[PER_THREAD];
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = min(j * ROUTE_THREADS + (int)threadIdx.x, N_EXPERTS - 1);
        of_p[j] = __ldcg(logits + i);
        of_table[j] = __ldcg(a.table + i);
    }
    const float gate = a.gate_shared ? __ldcg(logits + N_EXPERTS) : INFINITE;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = min(j * ROUTE_THREADS + (int)threadIdx.x, N_EXPERTS - 1);
        p[i] = of_p[j];
        table[i] = of_table[j];
    }
    __syncthreads();
    if (warp != 0) return false;
    if (lane == 0) a.done[t] = 0;
    // Softmax of the chosen logits equals that of all, renormalised; the clamp of the sum needs the full one.
    float best = -INFINITE, total = 0.0f;
    for (int i = lane; i < N_EXPERTS; i += WARP) best = fmaxf(best, p[i]);
    best = warp_max(best);
    for (int i = lane; i < N_EXPERTS; i += WARP) total += __expf(p[i] - best);
    total = warp_sum(total);
    u32 left[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) left[j] = j * WARP + lane < N_EXPERTS ? ordered(p[j * WARP + lane]) : 0;
    int id = 0;
#pragma unroll 1
    for (int k = 0; k < N_USED; k++) {
        // Largest logit, ties to the lower index, NaN last; what was chosen is 0, so that no expert is chosen twice.
        u32 top = 0;
        int at = 0;
#pragma unroll
        for (int j = PER_LANE - 1; j >= 0; j--)
            if (left[j] >= top) {
                top = left[j];
                at = j * WARP + lane;
            }
        const u32 most = warp_max(top);
        at = (int)~warp_max(top == most ? ~(u32)at : 0u);
        if (lane == k) id = min(at, N_EXPERTS - 1);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            if (at == j * WARP + lane) left[j] = 0;
    }
    const float mine = lane < N_USED ? __expf(p[id] - best) / total : 0.0f, chosen_sum = warp_sum(mine);
    static_assert(N_USED < WARP, "one lane per chosen expert");
    choice.id = id;
    choice.slot = table[id];
    choice.weight = lane < N_USED ? mine / fmaxf(chosen_sum, 0.00006103515625f) : sigmoid(gate);
    return true;
}

// Grid (ROUTE_BLOCKS + 1, n_tokens): one block more writes the norm for the experts.
KERNEL __launch_bounds__(ROUTE_THREADS) moe_route(const MoeArgs a) {
    const u64 t = blockIdx.y;
    const int lane = threadIdx.x;
    let_next_start();
    if (blockIdx.x == ROUTE_BLOCKS) {
        wait_for_inputs();
        if (t == 0 && lane == 0) *a.begun = a.block;
        norm_row(a, t);
        return;
    }
    Choice choice;
    if (!route(a, t, choice)) return;
    if (lane < N_USED) {
        a.ids[t * N_USED + lane] = choice.id;
        a.slots[t * N_USED + lane] = choice.slot;
    }
    if (lane <= N_USED) a.weights[t * (N_USED + 1) + lane] = choice.weight;
}

struct ForeseeArgs {
    MoeArgs moe;           // of the next mixture
    u32* foreseen;         // host: number of the hand-over that this is about, then its experts [N_USED]
    const u32* count;      // hand-overs so far
};
static_assert(sizeof(ForeseeArgs) == FORESEE_ARGS, "ForeseeArgs differs from moe.rs");

// Grid (ROUTE_BLOCKS): the residual stream changes little from block to block, and what the next mixture would choose
// now is most of what it will choose. The CPU workers, for whom this is, read the weights while they wait.
KERNEL __launch_bounds__(ROUTE_THREADS) moe_foresee(const ForeseeArgs a) {
    let_next_start();
    Choice choice;
    if (!route(a.moe, 0, choice)) return;
    if (threadIdx.x < N_USED) a.foreseen[1 + threadIdx.x] = choice.slot ? choice.id | ELSEWHERE : choice.id;
    __threadfence_system();
    __syncwarp();
    if (threadIdx.x == 0) store_flag(a.foreseen, *a.count + 1);
}

#define KSPLIT (N >= 4096 ? 4 : N >= 2048 ? 2 : 1)
#define GROUPS (4 / KSPLIT)
#define ROWS 2
#define OUTPUTS (GROUPS * ROWS)

// `slot`: where the expert lies, or 0 for the shared one.
template <int TG, int TU, int FF> DEVICE void gate_up(const MoeArgs& a, const Expert& gate, const Expert& up, u64 slot, u32 e, bool quantised) {
    __shared__ float shared[4][2][ROWS];
    __shared__ bool last;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = warp % KSPLIT;
    const u64 t = blockIdx.z, row = blockIdx.x * OUTPUTS + warp / KSPLIT * ROWS;
    Rows<TG, N, ROWS, KSPLIT> g;
    Rows<TU, N, ROWS, KSPLIT> u;
    g.start((const u8*)(slot + gate.weight), gate.n_blocks, row, FF - 1, part);
    u.start((const u8*)(slot + up.weight), up.n_blocks, row, FF - 1, part);
    const Activations in = {a.codes + t * N, a.heads + t * (N / 32), a.h + t * N};
    float acc[ROWS][1] = {};
    g.finish(in, 1, acc);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r][0]);
        if (lane == 0) shared[warp][0][r] = sum;
        acc[r][0] = 0.0f;
    }
    u.finish(in, 1, acc);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r][0]);
        if (lane == 0) shared[warp][1][r] = sum;
    }
    __syncthreads();
    const u64 at = (t * (N_USED + 1) + blockIdx.y) * FF_STRIDE;
    const u32 unit = blockIdx.x * OUTPUTS / 32;
    if (part == 0 && lane < ROWS) {
        float gr = 0.0f, ur = 0.0f;
#pragma unroll
        for (int p = 0; p < KSPLIT; p++) {
            gr += shared[warp + p][0][lane];
            ur += shared[warp + p][1][lane];
        }
        if (gate.scale) gr *= gate.scale[e];
        if (up.scale) ur *= up.scale[e];
        __stcg(a.act + at + row + lane, row + lane < FF ? silu(gr) * ur : 0.0f);
    }
    if (!quantised) return;
    __threadfence();
    __syncthreads();
    u32* done = a.units + at / 32 + unit;
    if (threadIdx.x == 0) last = atomicAdd(done, 1u) == 32 / OUTPUTS - 1;
    __syncthreads();
    if (!last || warp != 0) return;
    __threadfence();
    if (lane == 0) *done = 0;
    quantise_unit(__ldcg(a.act + at + unit * 32 + lane), a.act_codes + at, a.act_heads + at / 32, unit * 32 + lane);
}

// Grid (FF_STRIDE / OUTPUTS, N_USED + (N_FF_SHARED > 0), n_tokens): a few outputs of one expert; the last block of a
// unit of 32 quantises it. Experts that are not on this GPU leave their activations as they were.
KERNEL __launch_bounds__(128) moe_gate_up(const MoeArgs a) {
    let_next_start();
    wait_for_inputs();
#if N_FF_SHARED > 0
    if (blockIdx.y == N_USED) {
        if (blockIdx.x * OUTPUTS < (N_FF_SHARED + 31) / 32 * 32)
            gate_up<TYPE_GATE_S, TYPE_UP_S, N_FF_SHARED>(a, a.gate_s, a.up_s, 0, 0, !is_float(TYPE_DOWN_S));
        return;
    }
#endif
    const u32 choice = blockIdx.z * N_USED + blockIdx.y;
    const u64 slot = a.slots[choice];
    if (slot && blockIdx.x * OUTPUTS < (N_FF + 31) / 32 * 32)
        gate_up<TYPE_GATE, TYPE_UP, N_FF>(a, a.gate, a.up, slot, a.gate.scale || a.up.scale ? a.ids[choice] : 0, !is_float(TYPE_DOWN));
}

#define DOWN_ROWS 2
#define DOWN_WARPS 4

// Rows `row` .. of `n` experts (those of `slots` and `ids`, or the shared one) against their activations, whose units
// the lanes take in one sequence.
template <int TY, int FF> DEVICE void down(const Expert& w, const u64* slots, const u32* ids, int n, u64 row, const float* weights,
                                           const MoeArgs& a, u64 at, float (&acc)[DOWN_ROWS]) {
    constexpr int CHUNKS = is_float(TY) ? FF : FF / 32;
    for (int i = threadIdx.x; i < n * CHUNKS; i += DOWN_WARPS * WARP) {
        const int j = i / CHUNKS, c = i % CHUNKS;
        // Weights and scales of experts that are not here are not read (they need not exist); a branch around the rest
        // would make its loads wait for the slot.
        const u64 slot = slots ? slots[j] : 0;
        const bool here = !slots || slot;
        const u8* weight = (const u8*)(slot + w.weight);
        const float factor = weights[j] * (w.scale && here ? w.scale[ids ? ids[j] : 0] : 1.0f);
        const u64 from = at + (u64)j * FF_STRIDE;
        u64 rows[DOWN_ROWS];
#pragma unroll
        for (int r = 0; r < DOWN_ROWS; r++) rows[r] = min(row + r, (u64)N - 1);
        if constexpr (is_float(TY)) {
            const float x = a.act[from + c] * factor;
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; r++)
                if (here) acc[r] += value<TY>(weight, w.n_blocks, rows[r] * FF + c) * x;
        } else {
            typedef Quant<TY> Q;
            typename Q::Raw raw[DOWN_ROWS] = {};
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; r++)
                if (here) raw[r] = Q::load(weight, w.n_blocks, rows[r] * CHUNKS + c);
            const int4* p = reinterpret_cast<const int4*>(a.act_codes + from) + 2 * c;
            const int4 lo = p[0], hi = p[1];
            Q8Head head = a.act_heads[from / 32 + c];
            head.d *= factor;
            const int x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int r = 0; r < DOWN_ROWS; r++) {
                Unit unit;
                Q::expand(raw[r], rows[r] * CHUNKS + c, unit);
                const float sum = dot<TY>(unit, x, head);
                if (here) acc[r] += sum;
            }
        }
    }
}

// Grid (ceil(N / DOWN_ROWS), n_tokens): the threads of a block share the experts of its rows.
KERNEL __launch_bounds__(DOWN_WARPS * WARP) moe_down(const MoeArgs a) {
    __shared__ float shared[DOWN_WARPS][DOWN_ROWS];
    let_next_start();
    wait_for_inputs();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u64 t = blockIdx.y, row = (u64)blockIdx.x * DOWN_ROWS, at = t * (N_USED + 1) * FF_STRIDE;
    const float* weights = a.weights + t * (N_USED + 1);
    float acc[DOWN_ROWS] = {};
    down<TYPE_DOWN, N_FF>(a.down, a.slots + t * N_USED, a.ids + t * N_USED, N_USED, row, weights, a, at, acc);
#if N_FF_SHARED > 0
    down<TYPE_DOWN_S, N_FF_SHARED>(a.down_s, nullptr, nullptr, 1, row, weights + N_USED, a, at + N_USED * FF_STRIDE, acc);
#endif
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
