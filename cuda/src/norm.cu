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
    const float* weight;  // [N], or null: quantise only
    const u32* gather;    // row of x for each row, or null
    float* out;           // [n_rows, N], or null
    i8* codes;            // [n_rows, N], or null
    Q8Head* heads;        // [n_rows, N / 32]
    float eps;
    u32 pad;
};
static_assert(sizeof(NormArgs) == NORM_ARGS, "NormArgs differs from norm.rs");

// Grid (n_rows). Threads take elements in steps of the block, so that a warp holds whole units.
KERNEL __launch_bounds__(1024) norm_rows(const NormArgs a) {
    __shared__ float scratch[33];
    constexpr int PER_THREAD = (N + 1023) / 1024;
    const u64 row = blockIdx.x;
    float v[PER_THREAD], w[PER_THREAD];
    let_next_start();
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * blockDim.x + threadIdx.x;
        w[j] = a.weight && i < N ? a.weight[i] : 1.0f;
    }
    wait_for_inputs();
    const float* x = a.x + (a.gather ? (u64)a.gather[row] : row) * N;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * blockDim.x + threadIdx.x;
        v[j] = i < N ? x[i] : 0.0f;
        sum += v[j] * v[j];
    }
    float scale = 1.0f;
    if (a.weight) scale = rsqrtf(block_sum(sum, scratch) / (float)N + a.eps);
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        const int i = j * blockDim.x + threadIdx.x;
        // Whole warps leave together: N is a multiple of 32 wherever codes are asked for.
        if (i / WARP * WARP >= N) break;
        const float y = i < N ? v[j] * scale * w[j] : 0.0f;
        if (a.out && i < N) a.out[row * N + i] = y;
        if (a.codes) quantise_unit(y, a.codes + row * N, a.heads + row * (N / 32), i);
    }
}

struct EmbedArgs {
    const u8* weight;     // planes of [n_vocab, N]
    const Row* rows;      // [n_rows]
    float* x;             // [n_rows, N]
    u64 n_blocks;
};
static_assert(sizeof(EmbedArgs) == EMBED_ARGS, "EmbedArgs differs from norm.rs");

#ifdef TYPE
// Grid (ceil(N / 256), n_rows).
KERNEL embed(const EmbedArgs a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) a.x[(u64)blockIdx.y * N + i] = value<TYPE>(a.weight, a.n_blocks, (u64)a.rows[blockIdx.y].token * N + i);
}
#endif
