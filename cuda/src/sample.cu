// Choosing the next token on the device: the largest logit of each row, ties to the lower id; the rows of the next
// decode step are brought forward in place. Reads each logit once.
#include "common.cuh"

struct Row {
    u32 slot, position, sequence, token;
};

struct Sequence {
    u32 slot, position, first_row, n_tokens;
};

struct ArgmaxArgs {
    const float* logits;   // [n_rows, n_vocab]
    u64* best;             // [n_rows]: largest key so far; zero before and after
    u32* done;             // [n_rows]: blocks that have finished; zero before and after
    Row* rows;             // [n_rows]: token and position of the next step
    Sequence* sequences;   // [n_rows]
    u32* chosen;           // [n_rows]
    u32 n_vocab;
    u32 pad;
};
static_assert(sizeof(ArgmaxArgs) == ARGMAX_ARGS, "ArgmaxArgs differs from sample.rs");

// Orders like (logit, lower id first); NaN below everything.
DEVICE u64 rank(float x, u32 id) {
    const u32 u = __float_as_uint(x);
    const u32 ordered = x != x ? 0u : u & 0x80000000u ? ~u : u | 0x80000000u;
    return (u64)ordered << 32 | (0xffffffffu - id);
}

// Grid (n_blocks, n_rows).
KERNEL __launch_bounds__(256) argmax(const ArgmaxArgs a) {
    __shared__ u64 warps[8];
    const u32 row = blockIdx.y;
    const float* logits = a.logits + (u64)row * a.n_vocab;
    u64 best = 0;
    wait_for_inputs();
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < a.n_vocab; i += gridDim.x * 256) best = max(best, rank(logits[i], i));
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) best = max(best, __shfl_xor_sync(FULL, best, o));
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 0; w < 8; w++) best = max(best, warps[w]);
    atomicMax(a.best + row, best);
    __threadfence();
    if (atomicAdd(a.done + row, 1u) != gridDim.x - 1) return;
    __threadfence();
    const u32 token = 0xffffffffu - (u32)atomicExch(a.best + row, 0ull);
    a.done[row] = 0;
    a.chosen[row] = token;
    a.rows[row].token = token;
    a.rows[row].position += 1;
    a.sequences[row].position += 1;
}
