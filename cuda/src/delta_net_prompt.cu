// The gated delta rule over whole prompts, in chunks of C tokens (WY form: Yang et al. 2024, "Gated Delta Networks",
// and "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"). With G the inclusive sums of g in
// a chunk:
//     A_ij = beta_i (k_i . k_j) exp(G_i - G_j) for j < i,  T = (I + A)^-1,
//     U = T diag(beta) V,  W = T diag(beta exp(G)) K,  P_ij = (q_i . k_j) exp(G_i - G_j) for j <= i,
//     N = U - W M,  O = diag(exp(G)) Q M + P N,  M' = exp(G_C) M + (diag(exp(G_C - G)) K)^T N.
// delta_conv: convolution, SiLU, L2 norm. delta_chunk: U, W, P and G of all chunks at once. delta_scan: the
// chunks of a sequence in order. delta_conv_state: the inputs that the next step's convolution needs.
// Several sequences of different lengths run in one launch; chunks start anew at each.
// All products are f32 grade (three tf32 products on sm_80 and later, plain f32 before).
//
// Set by the compiler: HEAD_DIM (S), N_K_HEADS, N_V_HEADS, CONV_K, HEAD_TILED (V head n uses K head n % N_K_HEADS, else
// n / R).
#include "common.cuh"
#include "matrix.cuh"

// Tokens of a chunk, and blocks of delta_chunk that a multiprocessor holds at a time.
#if __CUDA_ARCH__ >= 800
#define C 64
#define CHUNK_BLOCKS 2
#else
#define C 32
#define CHUNK_BLOCKS 1
#endif
#define S HEAD_DIM
// Threads of delta_chunk and delta_scan.
#define THREADS 256
// Widths of tiles in shared memory: S rounded up, the surplus zero.
#define SP (S <= 16 ? 16 : S <= 32 ? 32 : S <= 64 ? 64 : 128)
static_assert(S <= 128, "delta-net heads are at most 128 wide here");
#define N_CHANNELS ((2 * N_K_HEADS + N_V_HEADS) * S)

// C tokens or fewer of one sequence.
struct Chunk {
    int token;      // row of the first token in the batch
    int n;          // tokens
    int sequence;   // index of its sequence
    int offset;     // tokens of the sequence before this chunk
};

// A run of tokens of one slot.
struct Sequence {
    u32 slot, position, first_row, n_tokens;
};

struct DeltaPromptArgs {
    const Chunk* chunks;
    const Sequence* sequences;
    const int* first_chunk;  // [n_sequences]: index of the first chunk of each
    const float* u;          // [n_tokens, N_CHANNELS] f32: q, k, v before the convolution
    const float* alpha;      // [n_tokens, N_V_HEADS] f32
    const float* beta;       // [n_tokens, N_V_HEADS] f32
    const float* conv_w;     // [N_CHANNELS, CONV_K] f32
    const float* ssm_a;      // [N_V_HEADS] f32
    const float* ssm_dt;     // [N_V_HEADS] f32
    float* ring;             // [n_slots, CONV_K, N_CHANNELS] f32: input of position p at entry p % CONV_K
    float* state;            // [n_slots, N_V_HEADS, S (value), S (key)] f32; counts as zero at position 0
    float* qk;               // [n_tokens, 2 N_K_HEADS, S] f32: q (scaled), then k
    float* v;                // [n_tokens, N_V_HEADS, S] f32
    float* uw;               // [n_chunks, N_V_HEADS, 2, C, S] f32: U, then W
    float* p;                // [n_chunks, N_V_HEADS, C, C] f32
    float* g;                // [n_chunks, N_V_HEADS, C] f32: G
    float* o;                // [n_tokens, N_V_HEADS, S] f32
    float eps;
    u32 pad;
};
static_assert(sizeof(DeltaPromptArgs) == DELTA_PROMPT_ARGS, "DeltaPromptArgs differs from prompt.rs");

DEVICE int k_head(int v_head) {
    return HEAD_TILED ? v_head % N_K_HEADS : v_head / (N_V_HEADS / N_K_HEADS);
}

// Grid (n_chunks, 2 N_K_HEADS + N_V_HEADS), 8 warps; a warp takes C / 8 tokens of one head.
KERNEL __launch_bounds__(256) delta_conv(const DeltaPromptArgs a) {
    constexpr int LANES = (S + 31) / 32, TOKENS = C / 8;
    const int lane = threadIdx.x & 31, head = blockIdx.y;
    const Chunk chunk = a.chunks[blockIdx.x];
    const Sequence run = a.sequences[chunk.sequence];
    const int first = (threadIdx.x >> 5) * TOKENS, last = min(first + TOKENS, chunk.n);
    if (first >= last) return;
    const float* u = a.u + (u64)run.first_row * N_CHANNELS + head * S;
    const float* ring = a.ring + (u64)run.slot * CONV_K * N_CHANNELS + head * S;
    float w[LANES][CONV_K], x[LANES][CONV_K];
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        const int c = lane + 32 * i;
#pragma unroll
        for (int j = 0; j < CONV_K; j++) {
            w[i][j] = c < S ? a.conv_w[(head * S + c) * CONV_K + j] : 0.0f;
            x[i][j] = 0.0f;
            const int t = chunk.offset + first - CONV_K + j;   // x[.][j + 1] after the first shift
            if (j && c < S) {
                if (t >= 0) x[i][j] = u[(u64)t * N_CHANNELS + c];
                else if ((int)run.position + t >= 0) x[i][j] = ring[((int)run.position + t) % CONV_K * N_CHANNELS + c];
            }
        }
    }
    for (int r = first; r < last; r++) {
        float y[LANES], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const int c = lane + 32 * i;
#pragma unroll
            for (int j = 0; j < CONV_K - 1; j++) x[i][j] = x[i][j + 1];
            x[i][CONV_K - 1] = c < S ? u[(u64)(chunk.offset + r) * N_CHANNELS + c] : 0.0f;
            float s = 0.0f;
#pragma unroll
            for (int j = 0; j < CONV_K; j++) s += w[i][j] * x[i][j];
            y[i] = s / (1.0f + __expf(-s));
            sum += y[i] * y[i];
        }
        const u64 token = chunk.token + r;
        float* out = a.v + (token * N_V_HEADS + (head - 2 * N_K_HEADS)) * S;
        float scale = 1.0f;
        if (head < 2 * N_K_HEADS) {
            out = a.qk + (token * 2 * N_K_HEADS + head) * S;
            scale = rsqrtf(warp_sum(sum) + a.eps) * (head < N_K_HEADS ? rsqrtf((float)S) : 1.0f);
        }
#pragma unroll
        for (int i = 0; i < LANES; i++)
            if (lane + 32 * i < S) out[lane + 32 * i] = y[i] * scale;
    }
}

// Grid (n_sequences, ceil(N_CHANNELS / 256)); runs after delta_conv, which reads the old entries.
KERNEL __launch_bounds__(256) delta_conv_state(const DeltaPromptArgs a) {
    const Sequence run = a.sequences[blockIdx.x];
    const int c = blockIdx.y * 256 + threadIdx.x;
    if (c >= N_CHANNELS) return;
    float* ring = a.ring + (u64)run.slot * CONV_K * N_CHANNELS + c;
    for (int t = max(0, (int)run.n_tokens - CONV_K); t < (int)run.n_tokens; t++)
        ring[(run.position + t) % CONV_K * N_CHANNELS] = a.u[(u64)(run.first_row + t) * N_CHANNELS + c];
}

// `rows` rows of S floats, `stride` apart, as a tile of C rows and SP columns with zeros around.
DEVICE void load_tile(float* tile, int ld, const float* src, u64 stride, int rows, int cols, int cols_padded) {
    if (S % 4 == 0 && cols % 4 == 0) {
        const int per_row = cols_padded / 4;
        for (int i = threadIdx.x; i < C * per_row; i += THREADS) {
            const int r = i / per_row, c = i % per_row * 4;
            const bool valid = r < rows && c < cols;
            copy_async_16(tile + r * ld + c, valid ? src + r * stride + c : src, valid);
        }
    } else {
        for (int i = threadIdx.x; i < C * cols_padded; i += THREADS) {
            const int r = i / cols_padded, c = i % cols_padded;
            const bool valid = r < rows && c < cols;
            copy_async_4(tile + r * ld + c, valid ? src + r * stride + c : src, valid);
        }
    }
}

#define LDK (SP + 4)
#define LDA (C + 4)

// In place: the unit lower triangular I + A (A strictly lower, zeros elsewhere) to its inverse, [C x C].
DEVICE void invert_unit_lower(float* m) {
    const int tid = threadIdx.x;
    // Diagonal blocks of 16: a thread solves one column.
    if (tid < C) {
        float* d = m + (tid / 16) * 16 * (LDA + 1);
        const int j = tid % 16;
        float t[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float s = i == j ? 1.0f : 0.0f;
#pragma unroll
            for (int k = 0; k < i; k++) s -= d[i * LDA + k] * t[k];
            t[i] = s;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++) d[i * LDA + j] = t[i];
    }
    __syncthreads();
    // [T11 0; -T22 A21 T11, T22]: pairs of blocks of 16.
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
        float x[C / 32] = {};
#pragma unroll
        for (int pair = 0; pair < C / 32; pair++) {
            const float* t11 = m + pair * 32 * (LDA + 1);
            const float* a21 = t11 + 16 * LDA;
            const float *left = (pass ? a21 + 16 : a21) + tid / 16 * LDA, *right = (pass ? a21 : t11) + tid % 16;
#pragma unroll
            for (int k = 0; k < 16; k++) x[pair] += left[k] * right[k * LDA];
        }
        __syncthreads();
#pragma unroll
        for (int pair = 0; pair < C / 32; pair++)
            m[pair * 32 * (LDA + 1) + (16 + tid / 16) * LDA + tid % 16] = pass ? -x[pair] : x[pair];
        __syncthreads();
    }
#if __CUDA_ARCH__ >= 800
    // The same for the pair of blocks of 32.
    {
        float* a21 = m + 32 * LDA;
        Tile<32, 32, 2, 4> t;
#pragma unroll
        for (int pass = 0; pass < 2; pass++) {
            t.zero();
            t.template multiply<false, false, 32>(pass ? a21 + 32 : a21, LDA, pass ? a21 : m, LDA);
            __syncthreads();
            t.each([&](int i, int j, float& x) { a21[i * LDA + j] = pass ? -x : x; });
            __syncthreads();
        }
    }
#endif
}

// Grid (n_chunks, N_V_HEADS), THREADS threads, dynamic shared memory delta_chunk_shared.
KERNEL __launch_bounds__(THREADS, CHUNK_BLOCKS) delta_chunk(const DeltaPromptArgs a) {
    extern __shared__ __align__(16) float shared[];
    float* k = shared;               // [C][LDK]
    float* q = k + C * LDK;          // [C][LDK]: q, later v
    float* m = q + C * LDK;          // [C][LDA]: A, then T
    float* sum = m + C * LDA;        // [C]: G
    float* beta = sum + C;           // [C]
    const Chunk chunk = a.chunks[blockIdx.x];
    const int head = blockIdx.y, kh = k_head(head), tid = threadIdx.x, lane = tid & 31;
    const u64 item = (u64)blockIdx.x * N_V_HEADS + head;
    const float* qk = a.qk + (u64)chunk.token * 2 * N_K_HEADS * S;
    load_tile(k, LDK, qk + (N_K_HEADS + kh) * S, 2 * N_K_HEADS * S, chunk.n, S, SP);
    load_tile(q, LDK, qk + kh * S, 2 * N_K_HEADS * S, chunk.n, S, SP);
    copy_async_commit();
    if (tid < 32) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < C; i += 32) {
            const int r = i + lane;
            float g = 0.0f, b = 0.0f;
            if (r < chunk.n) {
                const u64 row = (u64)(chunk.token + r) * N_V_HEADS + head;
                const float x = a.alpha[row] + a.ssm_dt[head];
                g = a.ssm_a[head] * (fmaxf(x, 0.0f) + log1pf(__expf(-fabsf(x))));
                b = 1.0f / (1.0f + __expf(-a.beta[row]));
            }
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const float left = __shfl_up_sync(0xffffffffu, g, o);
                if (lane >= o) g += left;
            }
            g += total;
            total = __shfl_sync(0xffffffffu, g, 31);
            sum[r] = g;
            beta[r] = b;
            a.g[item * C + r] = g;
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    {
        Tile<C, C, C / 16, 2> t;
        t.zero();
        t.template multiply<false, true, SP>(k, LDK, k, LDK);
        t.each([&](int i, int j, float& x) { m[i * LDA + j] = j < i ? beta[i] * x * __expf(sum[i] - sum[j]) : 0.0f; });
        t.zero();
        t.template multiply<false, true, SP>(q, LDK, k, LDK);
        float* p = a.p + item * C * C;
        t.each([&](int i, int j, float& x) { p[i * C + j] = j <= i ? x * __expf(sum[i] - sum[j]) : 0.0f; });
    }
    __syncthreads();
    load_tile(q, LDK, a.v + ((u64)chunk.token * N_V_HEADS + head) * S, N_V_HEADS * S, chunk.n, S, SP);
    copy_async_commit();
    invert_unit_lower(m);
    copy_async_wait<0>();
    __syncthreads();
    for (int i = tid; i < C * SP; i += THREADS) {
        const int r = i / SP, c = i % SP;
        q[r * LDK + c] *= beta[r];
        k[r * LDK + c] *= beta[r] * __expf(sum[r]);
    }
    __syncthreads();
    Tile<C, SP, C / 16, 2> t;
    float* uw = a.uw + item * 2 * C * S;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        t.zero();
        t.template multiply<false, false, C>(m, LDA, which ? k : q, LDK);
        t.each([&](int i, int j, float& x) { if (j < S) uw[(which * C + i) * S + j] = x; });
    }
}

// Value columns of a block of delta_scan.
#ifndef SCAN_COLUMNS
#define SCAN_COLUMNS 32
#endif
#define NV SCAN_COLUMNS
#define LDN (NV + 8)
#define LDR ((SP > C ? SP : C) + 4)

// Grid (ceil(S / NV), N_V_HEADS, n_sequences), THREADS threads, dynamic shared memory delta_scan_shared.
KERNEL __launch_bounds__(THREADS, 1) delta_scan(const DeltaPromptArgs a) {
    extern __shared__ __align__(16) float shared[];
    float* ring[2] = {shared, shared + C * LDR};    // [C][LDR] each: W, Q, P, K in turn
    float* m = shared + 2 * C * LDR;                // [SP][LDN]: the state, key by value
    float* n = m + SP * LDN;                        // [C][LDN]
    float* sum = n + C * LDN;                       // [C]
    const Sequence run = a.sequences[blockIdx.z];
    const int first_chunk = a.first_chunk[blockIdx.z], n_chunks = ((int)run.n_tokens + C - 1) / C;
    const int head = blockIdx.y, kh = k_head(head), tid = threadIdx.x, column = blockIdx.x * NV;
    float* state = a.state + ((u64)run.slot * N_V_HEADS + head) * S * S;

    auto load = [&](int chunk, int what, float* to) {
        if (chunk < n_chunks) {
            const u64 item = (u64)(first_chunk + chunk) * N_V_HEADS + head;
            const int rows = min(C, (int)run.n_tokens - chunk * C);
            const float* qk = a.qk + (u64)(run.first_row + chunk * C) * 2 * N_K_HEADS * S;
            if (what == 0) load_tile(to, LDR, a.uw + (item * 2 + 1) * C * S, S, C, S, SP);
            if (what == 1) load_tile(to, LDR, qk + kh * S, 2 * N_K_HEADS * S, rows, S, SP);
            if (what == 2) load_tile(to, LDR, a.p + item * C * C, C, C, C, C);
            if (what == 3) load_tile(to, LDR, qk + (N_K_HEADS + kh) * S, 2 * N_K_HEADS * S, rows, S, SP);
        }
        copy_async_commit();
    };

    load(0, 0, ring[0]);
    load(0, 1, ring[1]);
    Tile<SP, NV, (SP < 64 ? SP / 16 : 4), 2> mt;
    mt.each([&](int i, int j, float& x) {
        x = run.position && i < S && column + j < S ? state[(column + j) * S + i] : 0.0f;
        m[i * LDN + j] = x;
    });
    for (int c = 0; c < n_chunks; c++) {
        const u64 item = (u64)(first_chunk + c) * N_V_HEADS + head;
        const float* u = a.uw + item * 2 * C * S;
        Tile<C, NV, C / 16, 2> t, start;
        start.each([&](int i, int j, float& x) { x = column + j < S ? u[i * S + column + j] : 0.0f; });
        if (tid < C) sum[tid] = a.g[item * C + tid];
        copy_async_wait<1>();
        __syncthreads();
        t.zero();
        t.template multiply<false, false, SP>(ring[0], LDR, m, LDN);
#pragma unroll
        for (int i = 0; i < t.MT; i++)
#pragma unroll
            for (int j = 0; j < t.NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) t.v[i][j][e] = start.v[i][j][e] - t.v[i][j][e];
        t.each([&](int i, int j, float& x) { n[i * LDN + j] = x; });
        __syncthreads();
        load(c, 2, ring[0]);
        copy_async_wait<1>();
        __syncthreads();
        t.zero();
        t.template multiply<false, false, SP>(ring[1], LDR, m, LDN);
        t.each([&](int i, int, float& x) { x *= __expf(sum[i]); });
        __syncthreads();
        load(c, 3, ring[1]);
        copy_async_wait<1>();
        __syncthreads();
        t.template multiply<false, false, C>(ring[0], LDR, n, LDN);
        const int rows = min(C, (int)run.n_tokens - c * C);
        float* o = a.o + ((u64)(run.first_row + c * C) * N_V_HEADS + head) * S + column;
        t.each([&](int i, int j, float& x) { if (i < rows && column + j < S) o[(u64)i * N_V_HEADS * S + j] = x; });
        __syncthreads();
        load(c + 1, 0, ring[0]);
        const float total = sum[C - 1];
        for (int i = tid; i < C * NV; i += THREADS) n[i / NV * LDN + i % NV] *= __expf(total - sum[i / NV]);
        copy_async_wait<1>();
        __syncthreads();
        const float decay = __expf(total);
        mt.each([&](int, int, float& x) { x *= decay; });
        mt.template multiply<true, false, C>(ring[1], LDR, n, LDN);
        mt.each([&](int i, int j, float& x) { m[i * LDN + j] = x; });
        __syncthreads();
        load(c + 1, 1, ring[1]);
    }
    mt.each([&](int i, int j, float& x) { if (i < S && column + j < S) state[(column + j) * S + i] = x; });
}
