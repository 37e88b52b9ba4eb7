// Types and primitives shared by all kernels. Needs no header of the CUDA toolkit.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define WARP 32
#define FULL 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)

DEVICE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

DEVICE float bf16_to_float(u16 b) { return __uint_as_float((u32)b << 16); }

// Round to nearest even; NaN stays NaN.
DEVICE u16 float_to_bf16(float f) {
    u32 u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u16)((u >> 16) | 0x40);
    return (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#if __CUDA_ARCH__ >= 800
#define HALF_IS_F16 false
#else
// Without bf16 instructions every 16-bit operand is an f16.
#define HALF_IS_F16 true
#endif

template <bool AS_F16> DEVICE float half_to_f32(u16 h) { return AS_F16 ? half_to_float(h) : bf16_to_float(h); }

// Two floats as a pair of 16-bit numbers, `a` in the low half, rounded to nearest even.
template <bool AS_F16> DEVICE u32 pack2(float a, float b) {
    u32 r;
#if __CUDA_ARCH__ >= 800
    if (AS_F16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
#else
    u16 lo, hi;
    if (AS_F16) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(lo) : "f"(a));
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(hi) : "f"(b));
    } else {
        u32 x = __float_as_uint(a), y = __float_as_uint(b);
        lo = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
        hi = (y + 0x7fff + ((y >> 16) & 1)) >> 16;
    }
    r = (u32)hi << 16 | lo;
#endif
    return r;
}

template <bool AS_F16> DEVICE u16 to_half(float a) { return (u16)pack2<AS_F16>(a, 0.0f); }

// Launches of a step overlap where the chip can: a kernel lets the next one start, and that one waits here before it
// touches anything but weights. Kernels without these calls run one after the other.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Time of the device, which advances in steps of up to a microsecond.
DEVICE u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Weights are read once: past the L1, marked to leave the L2 first.
DEVICE uint4 load_weights(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

DEVICE uint2 load_weights(const uint2* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

DEVICE u32 load_weights(const u32* p) {
    u32 v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// 16 bytes in one instruction: the compiler makes four of an assignment of a float4 that it has to put together.
DEVICE void store_four(float* p, float x, float y, float z, float w) {
    asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

DEVICE u32 warp_max(u32 v) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL, v);
#else
#pragma unroll
    for (int o = WARP / 2; o > 0; o >>= 1) v = max(v, __shfl_xor_sync(FULL, v, o));
    return v;
#endif
}

// Sum over all threads of the block, returned to all. `scratch`: 33 floats in shared memory.
DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warps = (blockDim.x + WARP - 1) / WARP;
    __syncthreads();
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = warp_sum(lane < n_warps ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[32] = v;
    }
    __syncthreads();
    return scratch[32];
}

// Short code rather than the last bit: kernels that run once for a token are bound by their instruction misses.
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
DEVICE float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + __logf(1.0f + __expf(-fabsf(x))); }

// Scale and sums of 32 int8 activations: x = d * code; `sums` are those of the codes of each half.
struct Q8Head {
    float d;
    i16 sum0, sum1;
};

// 1 / d, or 0 where d is nothing.
DEVICE float inverse_scale(float d) { return d > 1e-30f ? __fdividef(1.0f, d) : 0.0f; }

// Eight lanes quantise 32 consecutive activations, elements i .. i + 3 (i a multiple of 4) in this lane; a
// lane without a unit takes part and stores nothing.
DEVICE void quantise_four(float4 v, i8* codes, Q8Head* heads, u64 i, bool store) {
    float d = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) d = fmaxf(d, __shfl_xor_sync(FULL, d, o));
    d *= 1.0f / 127.0f;
    const float r = inverse_scale(d);
    const int x = __float2int_rn(v.x * r), y = __float2int_rn(v.y * r), z = __float2int_rn(v.z * r), w = __float2int_rn(v.w * r);
    if (store) *reinterpret_cast<u32*>(codes + i) = (x & 255) | (y & 255) << 8 | (z & 255) << 16 | (u32)w << 24;
    int sum = x + y + z + w;
    sum += __shfl_xor_sync(FULL, sum, 1);
    sum += __shfl_xor_sync(FULL, sum, 2);
    const int other = __shfl_xor_sync(FULL, sum, 4);
    if (store && threadIdx.x % 8 == 0) {
        Q8Head head;
        head.d = d;
        head.sum0 = (i16)sum;
        head.sum1 = (i16)other;
        heads[i / 32] = head;
    }
}

// A warp quantises 32 consecutive activations, element `i` in this lane: codes and head of unit i / 32.
DEVICE void quantise_unit(float v, i8* codes, Q8Head* heads, u64 i) {
    const float d = warp_max(fabsf(v)) * (1.0f / 127.0f);
    const int code = __float2int_rn(v * inverse_scale(d));
    codes[i] = (i8)code;
    int sum = code;
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) sum += __shfl_xor_sync(FULL, sum, o);
    const int other = __shfl_xor_sync(FULL, sum, 16);
    if (threadIdx.x % WARP == 0) {
        Q8Head head;
        head.d = d;
        head.sum0 = (i16)sum;
        head.sum1 = (i16)other;
        heads[i / 32] = head;
    }
}

// Marks a chosen expert that the CPU workers leave to this GPU.
#define ELSEWHERE 0x80000000u

// Writes a flag in host memory: whoever sees it sees what was written before.
DEVICE void store_flag(u32* p, u32 v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
