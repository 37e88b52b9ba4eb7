// What a GPU does, with nothing of a model in it: reading, 16-bit products, kernels of a graph, hand-offs to the host.
#include "matrix.cuh"

struct ProbeArgs {
    uint4* data;          // [n] words of 16 bytes
    u64 n;
    float* out;           // [n_floats], at least 1
    float4* to_host;      // [n_floats] in mapped host memory
    const float4* from_host;
    u32* asked;           // mapped host memory, a cache line each: the round that the GPU has sent,
    const u32* answered;  // and the one that the host has answered
    u32 n_rounds;
    u32 n_floats;         // a multiple of 4
};
static_assert(sizeof(ProbeArgs) == PROBE_ARGS, "ProbeArgs differs from probe.rs");

// Fills the words with 16-bit numbers of both signs between 1 and 2: products of constants draw less power, and run
// faster, than those of a model.
KERNEL __launch_bounds__(512) noise(const ProbeArgs a) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += (u64)gridDim.x * blockDim.x) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 x = (u32)i * 4 + j;
            x = (x ^ x >> 16) * 0x7feb352du;
            x = (x ^ x >> 15) * 0x846ca68bu;
            w[j] = ((x ^ x >> 16) & 0x807f807fu) | 0x3f803f80u;
        }
        a.data[i] = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// Reads every word once, four loads in flight per thread, as the matrix-vector kernels do.
KERNEL __launch_bounds__(512) read_words(const ProbeArgs a) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    u32 all = 0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = i + j * step < a.n ? load_weights(a.data + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 4; j++) all |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (all == 0x5eed5eedu) a.out[0] = 1.0f;
}

// Products of fragments that stay in registers: n_rounds times eight of [16 x 16] by [16 x 8] per warp.
KERNEL __launch_bounds__(256) products(const ProbeArgs a) {
    const u32 x = 0x3c003c00u | threadIdx.x;
    const u32 w[4] = {x, x ^ 1, x ^ 2, x ^ 3};
    float d[8][4] = {};
    for (u32 i = 0; i < a.n_rounds; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) mma_16816<HALF_IS_F16>(d[j], w, x ^ j, x ^ 8);
    float all = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) all += d[j][0] + d[j][1] + d[j][2] + d[j][3];
    if (all == 1.0f) a.out[0] = all;
}

// A kernel of a step with next to nothing in it.
KERNEL tick(const ProbeArgs a) {
    let_next_start();
    wait_for_inputs();
    if (threadIdx.x == 0) a.out[0] += 1.0f;
}

// n_rounds times: n_floats to the host with a flag, and back with another. Gives up after a second without an answer.
KERNEL __launch_bounds__(1024) hand_off(const ProbeArgs a) {
    __shared__ u32 lost;
    if (threadIdx.x == 0) lost = 0;
    float4* out = reinterpret_cast<float4*>(a.out);
    for (u32 round = 1; round <= a.n_rounds; round++) {
        for (u32 i = threadIdx.x; i < a.n_floats / 4; i += blockDim.x) a.to_host[i] = out[i];
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(a.asked), "r"(round) : "memory");
            u64 start, now;
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
            for (u32 seen = 0; seen != round;) {
                asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.answered) : "memory");
                asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
                if (now - start > 1000000000ull) {
                    lost = 1;
                    break;
                }
            }
        }
        __syncthreads();
        if (lost) return;
        for (u32 i = threadIdx.x; i < a.n_floats / 4; i += blockDim.x) out[i] = __ldcv(a.from_host + i);
        __syncthreads();
    }
}
