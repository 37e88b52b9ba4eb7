// Hand-overs between the GPU and the CPU workers inside a step: activations go to host memory and a flag follows
// them; the way back waits for the workers' flag, within bounds, and adds what they computed to the residual stream, or
// takes their residual stream instead. Host memory is read and written past the caches.
#include "common.cuh"

struct GiveArgs {
    const float* x;       // [n], residual stream
    float* to;            // [n], host
    const u32* ids;       // [n_choices], or null
    const float* weights; // [n_choices + n_choices / n_used]: the last of each token is the shared expert's
    const u64* table;     // [n_experts]: where the experts lie on this GPU, 0: nowhere
    u32* ids_to;          // [n_choices], host
    float* weights_to;    // [n_choices], host
    u32* count;           // hand-overs so far
    u32* arrived;         // blocks that have finished; zero before and after
    const u32* failed;    // not zero: the workers did not answer, and what they read is left alone
    u32* ready;           // host: as `count`, when everything is there
    u64* stamps;          // host: [n_stamps, STAMPS] nanoseconds, by hand-over
    u64* started;         // nanoseconds at which the step began, or null where another kernel was first
    u64 n;
    u32 n_choices, n_used, stride, pad;
};
static_assert(sizeof(GiveArgs) == GIVE_ARGS, "GiveArgs differs from handoff.rs");

struct TakeArgs {
    float* x;             // [n]
    const float* from;    // [n], host
    const u32* count;
    const u32* done;      // host: hand-overs that the workers have answered, or ABORTED
    u32* fault;           // host: set where the workers did not answer in time
    u32* failed;          // the same, for the kernels that follow
    u64* stamps;
    u64 n;
    u64 bound_ns;
    u32 add, pad;
};
static_assert(sizeof(TakeArgs) == TAKE_ARGS, "TakeArgs differs from handoff.rs");

#define ABORTED 0xffffffffu
#define N_STAMPS 1024u
// Times of a hand-over, as in handoff.rs: the input is complete; it is given; the wait begins; it ends; all is taken.
enum Stamp { BEGUN, GIVEN, WAITS, GOES_ON, TAKEN, STAMPS };

DEVICE u64* stamps_of(u64* stamps, u32 count) { return stamps + count % N_STAMPS * STAMPS; }

DEVICE u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

DEVICE u32 load_flag(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

DEVICE float4 load_host(const float4* p) {
    float4 v;
    asm volatile("ld.global.cv.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

// Grid (blocks): copies, then the last block raises the flag.
KERNEL __launch_bounds__(256) give(const GiveArgs a) {
    let_next_start();
    wait_for_inputs();
    if (*a.failed) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        const u64 begun = now();
        if (a.started) *a.started = begun;
        stamps_of(a.stamps, *a.count + 1)[BEGUN] = begun; // the count stands still until this block has arrived
    }
    const u64 step = (u64)gridDim.x * 256, first = (u64)blockIdx.x * 256 + threadIdx.x;
    for (u64 i = first; i < a.n / 4; i += step) reinterpret_cast<float4*>(a.to)[i] = reinterpret_cast<const float4*>(a.x)[i];
    for (u64 i = a.n / 4 * 4 + first; i < a.n; i += step) a.to[i] = a.x[i];
    for (u64 i = first; i < a.n_choices; i += step) {
        const u32 id = a.ids[i], token = i / a.n_used;
        a.ids_to[i] = a.table[id] ? id | ELSEWHERE : id;
        a.weights_to[i] = a.weights[(u64)token * a.stride + i % a.n_used];
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1) {
        if (atomicAdd(a.arrived, 1u) != gridDim.x - 1) return;
        *a.arrived = 0;
        __threadfence_system();
    }
    const u32 count = *a.count + 1;
    *a.count = count;
    stamps_of(a.stamps, count)[GIVEN] = now();
    store_flag(a.ready, count);
}

// Grid (blocks): each waits for itself, and adds (or takes) its part.
KERNEL __launch_bounds__(256) take(const TakeArgs a) {
    __shared__ bool answered;
    let_next_start();
    wait_for_inputs();
    const u32 count = *a.count;
    if (*reinterpret_cast<volatile u32*>(a.failed)) return;
    if (threadIdx.x == 0) {
        const u64 start = now();
        u32 done = load_flag(a.done);
        answered = true;
        while (done == ABORTED || (int)(done - count) < 0) {
            if (done == ABORTED || now() - start > a.bound_ns) {
                store_flag(a.fault, 1u);
                *a.failed = 1;
                answered = false;
                break;
            }
            done = load_flag(a.done);
        }
        if (blockIdx.x == 0) {
            stamps_of(a.stamps, count)[WAITS] = start;
            stamps_of(a.stamps, count)[GOES_ON] = now();
        }
    }
    __syncthreads();
    if (!answered) return;
    const u64 step = (u64)gridDim.x * 256, first = (u64)blockIdx.x * 256 + threadIdx.x;
    float4* x = reinterpret_cast<float4*>(a.x);
    // Each load is a trip to host memory: all of a token's are under way together.
    constexpr int TOGETHER = 8;
    for (u64 begin = first; begin < a.n / 4; begin += TOGETHER * step) {
        float4 of[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++)
            if (begin + j * step < a.n / 4) of[j] = load_host(reinterpret_cast<const float4*>(a.from) + begin + j * step);
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const u64 i = begin + j * step;
            if (i >= a.n / 4) break;
            float4 v = of[j];
            if (a.add) {
                const float4 old = x[i];
                v.x += old.x;
                v.y += old.y;
                v.z += old.z;
                v.w += old.w;
            }
            x[i] = v;
        }
    }
    for (u64 i = a.n / 4 * 4 + first; i < a.n; i += step) {
        const float v = *reinterpret_cast<const volatile float*>(a.from + i);
        a.x[i] = a.add ? a.x[i] + v : v;
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) stamps_of(a.stamps, count)[TAKEN] = now();
}
