// The gated delta rule, token after token: causal convolution, SiLU, L2 norms, gates, state update, gated norm and
// the form of the result that the output product takes in one kernel. The state (S x S floats a head) is read and
// written once per launch and kept in registers in between. One block per V head and sequence; four lanes share a row
// (value index) of the state. Refuses heads wider than 128.
// Set by the compiler: S, N_K_HEADS, N_V_HEADS, TAPS, TILED (V head n uses K head n % N_K_HEADS, else n / R).
#include "common.cuh"
static_assert(S <= 128, "delta-net heads are at most 128 wide");

#define N_CHANNELS ((2 * N_K_HEADS + N_V_HEADS) * S)
#define N_VALUE (N_V_HEADS * S)

// A run of tokens of one slot.
struct Sequence {
    u32 slot, position, first_row, n_tokens;
};

struct DeltaArgs {
    const Sequence* sequences;
    const float* u;        // [n_tokens, N_CHANNELS]: q, k, v before the convolution
    const float* z;        // [n_tokens, N_VALUE]
    const float* beta;     // [n_tokens, N_V_HEADS]
    const float* alpha;    // [n_tokens, N_V_HEADS]
    const float* conv;     // [N_CHANNELS, TAPS]
    const float* dt;       // [N_V_HEADS]
    const float* a;        // [N_V_HEADS]
    const float* norm;     // [S]
    float* ring;           // [n_slots, TAPS, N_CHANNELS]: input of position p at entry p % TAPS
    float* state;          // [n_slots, N_V_HEADS, S (value), S (key)]
    float* out;            // [n_tokens, N_VALUE], or null
    i8* codes;             // [n_tokens, N_VALUE], or null
    Q8Head* heads;         // [n_tokens, N_VALUE / 32]
    u16* halves;           // [n_tokens, N_VALUE] 16-bit, or null
    float eps;
    u32 pad;
};
static_assert(sizeof(DeltaArgs) == DELTA_ARGS, "DeltaArgs differs from delta_net.rs");

// Input of `channel` `back` tokens before token t of the run; zero before position 0.
DEVICE float input(const DeltaArgs& a, const Sequence& s, int t, int back, int channel) {
    if (back <= t) return a.u[(u64)(s.first_row + t - back) * N_CHANNELS + channel];
    const int position = (int)s.position + t - back;
    if (position < 0) return 0.0f;
    return a.ring[((u64)s.slot * TAPS + position % TAPS) * N_CHANNELS + channel];
}

#define THREADS 512
#define VECTOR (S % 16 == 0)
// Keys of a row that one of its four lanes holds.
#define KEYS ((S + 3) / 4)

// Key index j of lane part p.
DEVICE int key(int p, int j) { return VECTOR ? (j / 4) * 16 + p * 4 + j % 4 : j * 4 + p; }

// Grid (N_V_HEADS, n_sequences).
KERNEL __launch_bounds__(THREADS) delta_step(const DeltaArgs a) {
    __shared__ __align__(16) float q[128], k[128], v[128], scratch[33];
    const int n = blockIdx.x, tid = threadIdx.x, lane = tid % WARP;
    let_next_start();
    // What no kernel writes is loaded before the wait, what follows the barriers right after it.
    const int kind = tid / 128, i = tid % 128;
    const bool mine = kind < 3 && i < S;
    const float decay_rate = a.a[n], decay_bias = a.dt[n], norm = tid < S ? a.norm[tid] : 0.0f;
    wait_for_inputs();
    const Sequence s = a.sequences[blockIdx.y];
    const int k_head = TILED ? n % N_K_HEADS : n / (N_V_HEADS / N_K_HEADS);
    const int row = tid / 4, part = tid % 4;
    float* state = a.state + (((u64)s.slot * N_V_HEADS + n) * S + row) * S;
    const int channel = mine ? (kind == 0 ? k_head : kind == 1 ? N_K_HEADS + k_head : 2 * N_K_HEADS + n) * S + i : 0;
    float taps[TAPS];
#pragma unroll
    for (int j = 0; j < TAPS; j++) taps[j] = a.conv[channel * TAPS + j];
    float m[KEYS];
    if (row < S && s.position > 0) {
#pragma unroll
        for (int j = 0; j < KEYS; j += VECTOR ? 4 : 1) {
            if constexpr (VECTOR) {
                const float4 f = *reinterpret_cast<const float4*>(state + key(part, j));
                m[j] = f.x; m[j + 1] = f.y; m[j + 2] = f.z; m[j + 3] = f.w;
            } else {
                m[j] = key(part, j) < S ? state[key(part, j)] : 0.0f;
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < KEYS; j++) m[j] = 0.0f;
    }
    for (int t = 0; t < (int)s.n_tokens; t++) {
        const u64 token = s.first_row + t;
        const float z = tid < S ? a.z[token * N_VALUE + n * S + tid] : 0.0f;
        const float beta = sigmoid(a.beta[token * N_V_HEADS + n]);
        const float decay = __expf(decay_rate * softplus(a.alpha[token * N_V_HEADS + n] + decay_bias));
        // 3 S channels: q, k, v.
        float c = 0.0f;
        if (mine) {
            const float current = input(a, s, t, 0, channel);
            c = taps[TAPS - 1] * current;
#pragma unroll
            for (int j = 1; j < TAPS; j++) c += taps[TAPS - 1 - j] * input(a, s, t, j, channel);
            c = silu(c);
            // Longer runs leave this to delta_ring: other blocks may still read the entries.
            if (s.n_tokens == 1)
                a.ring[((u64)s.slot * TAPS + s.position % TAPS) * N_CHANNELS + channel] = current;
        }
        const float square = warp_sum(mine && kind < 2 ? c * c : 0.0f);
        if (lane == 0) scratch[tid / WARP] = square;
        __syncthreads();
        if (mine) {
            if (kind == 2) v[i] = c;
            else {
                const float* p = scratch + kind * 4;
                const float unit = rsqrtf(p[0] + p[1] + p[2] + p[3] + a.eps);
                if (kind == 0) q[i] = c * unit * rsqrtf((float)S);
                else k[i] = c * unit;
            }
        }
        __syncthreads();
        // Both reads in one pass: M^T k, and M^T q corrected by d (k . q).
        float mk = 0.0f, mq = 0.0f, kq = 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS; j++) {
            const int i = key(part, j);
            const bool in = VECTOR || i < S;
            const float ki = in ? k[i] : 0.0f, qi = in ? q[i] : 0.0f;
            m[j] *= decay;
            mk += m[j] * ki;
            mq += m[j] * qi;
            kq += ki * qi;
        }
#pragma unroll
        for (int o = 1; o < 4; o <<= 1) {
            mk += __shfl_xor_sync(FULL, mk, o);
            mq += __shfl_xor_sync(FULL, mq, o);
            kq += __shfl_xor_sync(FULL, kq, o);
        }
        const float d = row < S ? beta * (v[row] - mk) : 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS; j++) {
            const int i = key(part, j);
            m[j] += (VECTOR || i < S ? k[i] : 0.0f) * d;
        }
        const float o = mq + d * kq;
        // Every row's o is in its four lanes; v is free now and carries it to the lane of its index.
        __syncthreads();
        if (part == 0 && row < S) v[row] = o;
        __syncthreads();
        const float oi = tid < S ? v[tid] : 0.0f;
        const float sum = block_sum(oi * oi, scratch);
        if (tid / WARP * WARP < S) {
            const u64 at = token * N_VALUE + n * S + tid;
            const float y = tid < S ? oi * rsqrtf(sum / (float)S + a.eps) * norm * silu(z) : 0.0f;
            if (a.out && tid < S) a.out[at] = y;
            if (a.halves && tid < S) a.halves[at] = to_half<HALF_IS_F16>(y);
            if (a.codes) quantise_unit(y, a.codes + token * N_VALUE, a.heads + token * (N_VALUE / 32), n * S + tid);
        }
        __syncthreads();
    }
    if (row < S) {
#pragma unroll
        for (int j = 0; j < KEYS; j += VECTOR ? 4 : 1) {
            if constexpr (VECTOR) store_four(state + key(part, j), m[j], m[j + 1], m[j + 2], m[j + 3]);
            else if (key(part, j) < S) state[key(part, j)] = m[j];
        }
    }
}

// The ring after runs of several tokens. Grid (ceil(N_CHANNELS / 256), n_sequences).
KERNEL delta_ring(const DeltaArgs a) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_inputs();
    const Sequence s = a.sequences[blockIdx.y];
    if (channel >= N_CHANNELS || s.n_tokens == 1) return;
    for (int t = max(0, (int)s.n_tokens - TAPS); t < (int)s.n_tokens; t++)
        a.ring[((u64)s.slot * TAPS + (s.position + t) % TAPS) * N_CHANNELS + channel] =
            a.u[(u64)(s.first_row + t) * N_CHANNELS + channel];
}
