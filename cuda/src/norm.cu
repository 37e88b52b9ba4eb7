// What stands between products for single tokens: RMS norm of rows with their int8 form, quantising alone, and the
// rows of the embedding. Moves each row in once and out once.
// Set by the compiler: N (width of a row), TYPE (embed: type of the table).
#include "quant.cuh"

// One token of a batch.
struct Row {
    u32 slot, position, sequence, token;
};

struct NormArgs {
    const float* x;       // [.., N]
    const float* weight;  // [N], or null: other forms only
    const u32* gather;    // row of x for each row, or null
    float* out;           // [n_rows, N], or null
    i8* codes;            // [n_rows, N], or null
    Q8Head* heads;        // [n_rows, N / 32]
    u16* halves;          // [n_rows, N] 16-bit, or null
    u32* begun;           // host: gets `block`, or null
    float eps;
    u32 block;            // of the model, which begins here
};
static_assert(sizeof(NormArgs) == NORM_ARGS, "NormArgs differs from norm.rs");

// Elements of a load, and threads: as norm_threads in ops.rs.
#define VECTOR (N % 32 == 0)
#define THREADS (VECTOR ? N / 4 < 1024 ? (N / 4 + 31) / 32 * 32 : 1024 : N < 1024 ? (N + 31) / 32 * 32 : 1024)

// Grid (n_rows).
KERNEL __launch_bounds__(THREADS) norm_rows(const NormArgs a) {
    __shared__ float scratch[33];
    const u64 row = blockIdx.x;
    let_next_start();
#if VECTOR
    constexpr int PER_THREAD = (N / 4 + THREADS - 1) / THREADS;
    float4 v[PER_THREAD], w[PER_THREAD];
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * THREADS + threadIdx.x;
        w[j] = a.weight && i < N / 4 ? reinterpret_cast<const float4*>(a.weight)[i] : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    }
    wait_for_inputs();
    if (a.begun && row == 0 && threadIdx.x == 0) *a.begun = a.block;
    const float* x = a.x + (a.gather ? (u64)a.gather[row] : row) * N;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * THREADS + threadIdx.x;
        v[j] = i < N / 4 ? reinterpret_cast<const float4*>(x)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
    }
    float scale = 1.0f;
    if (a.weight) scale = rsqrtf(block_sum(sum, scratch) / (float)N + a.eps);
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * THREADS + threadIdx.x;
        const float4 y = make_float4(v[j].x * scale * w[j].x, v[j].y * scale * w[j].y, v[j].z * scale * w[j].z, v[j].w * scale * w[j].w);
        // Lanes beyond the row take part in the exchange of the others' units, and write nothing.
        if (i / WARP * WARP >= N / 4) break;
        if (a.out && i < N / 4) reinterpret_cast<float4*>(a.out + row * N)[i] = y;
        if (a.halves && i < N / 4)
            reinterpret_cast<uint2*>(a.halves + row * N)[i] = make_uint2(pack2<HALF_IS_F16>(y.x, y.y), pack2<HALF_IS_F16>(y.z, y.w));
        if (a.codes) quantise_four(y, a.codes + row * N, a.heads + row * (N / 32), 4 * (u64)i, i < N / 4);
    }
#else
    wait_for_inputs();
    if (a.begun && row == 0 && threadIdx.x == 0) *a.begun = a.block;
    const float* x = a.x + (a.gather ? (u64)a.gather[row] : row) * N;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < N; i += THREADS) sum += x[i] * x[i];
    float scale = 1.0f;
    if (a.weight) scale = rsqrtf(block_sum(sum, scratch) / (float)N + a.eps);
    for (int i = threadIdx.x; i < N; i += THREADS)
        if (a.out) a.out[row * N + i] = x[i] * scale * (a.weight ? a.weight[i] : 1.0f);
#endif
}

struct EmbedArgs {
    const u8* weight;     // planes of [n_vocab, N]
    const Row* rows;      // [n_rows]
    float* x;             // [n_rows, N]
    u64 n_blocks;
    u64* started;         // when this kernel, the first of a step, began
    u32* begun;           // host: gets `block`
    u32 block, pad;
};
static_assert(sizeof(EmbedArgs) == EMBED_ARGS, "EmbedArgs differs from norm.rs");

#ifdef TYPE
// Grid (ceil(N / 256), n_rows).
KERNEL embed(const EmbedArgs a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0 && blockIdx.y == 0) {
        *a.started = nanoseconds();
        *a.begun = a.block;
    }
    if (i < N) a.x[(u64)blockIdx.y * N + i] = value<TYPE>(a.weight, a.n_blocks, (u64)a.rows[blockIdx.y].token * N + i);
}
#endif
