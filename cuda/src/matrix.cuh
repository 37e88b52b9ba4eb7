// Matrix instructions and asynchronous copies behind one set of names, with the
// older instruction where a chip lacks the newer one. Holds no model shape and no tensor type.
#pragma once

#include "common.cuh"

#define DEVICE_METHOD __device__ __forceinline__

DEVICE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// d += a b with a [16 x 16] and b [16 x 8] of f16 or bf16, fragments as mma.m16n8k16 lays them out.
template <bool AS_F16> DEVICE void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    if (AS_F16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// d += a b with a [16 x 16] and b [16 x 8] of s8.
DEVICE void mma_i8_16816(int (&d)[4], u32 a0, u32 a1, u32 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(d[2]), "+r"(d[3]) : "r"(a1), "r"(b));
#endif
}

// The same with a [16 x 32] and b [32 x 8].
DEVICE void mma_i8_16832(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_i8_16816(d, a[0], a[1], b0);
    mma_i8_16816(d, a[2], a[3], b1);
#endif
}

DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Copies 16 bytes to shared memory, or zeros where `valid` is false (`src` must then still be a mapped address).
DEVICE void copy_async_16(void* dst, const void* src, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4*)dst = valid ? *(const uint4*)src : make_uint4(0, 0, 0, 0);
#endif
}

// The same for 8 bytes.
DEVICE void copy_async_8(void* dst, const void* src, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 8 : 0) : "memory");
#else
    *(uint2*)dst = valid ? *(const uint2*)src : make_uint2(0, 0);
#endif
}

// The same for 4 bytes.
DEVICE void copy_async_4(void* dst, const void* src, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 4 : 0) : "memory");
#else
    *(u32*)dst = valid ? *(const u32*)src : 0;
#endif
}

DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's copy groups are still under way.
template <int N> DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// A float as the sum of two tf32 numbers, up to 2^-21 of it. The matrix unit ignores the low 13 bits of its operands,
// so the small part needs no rounding; conversion instructions have a fraction of the rate of these two.
DEVICE void split_tf32(float x, u32& hi, u32& lo) {
    hi = __float_as_uint(x) & 0xffffe000u;
    lo = __float_as_uint(x - __uint_as_float(hi));
}

DEVICE void mma_1688_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An [M x N] f32 product of matrices in shared memory, spread over WM x WN warps of a block; further warps hold
// nothing. f32 operands are split into two tf32 parts and three products are summed, so the result is as
// good as f32 arithmetic to about 2^-20 relative to |a||b|. The units truncate their sums: keep K short.
template <int M, int N, int WM, int WN> struct Tile {
    static constexpr int MT = M / (16 * WM), NT = N / (8 * WN);
    static_assert(MT * 16 * WM == M && NT * 8 * WN == N, "the warps tile the product");
    float v[MT][NT][4];

    DEVICE int warp() { return threadIdx.x >> 5; }
    DEVICE bool active() { return warp() < WM * WN; }

    DEVICE_METHOD void zero() {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) v[i][j][e] = 0.0f;
    }

    // f(row, column, value&) for every element that this thread holds.
    template <class F> DEVICE_METHOD void each(F f) {
        if (!active()) return;
        const int lane = threadIdx.x & 31, m0 = (warp() / WN) * MT * 16, n0 = (warp() % WN) * NT * 8;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(m0 + i * 16 + lane / 4 + (e >> 1) * 8, n0 + j * 8 + (lane & 3) * 2 + (e & 1), v[i][j][e]);
    }

    // v += a b over K. A_T: a is stored [K][M] instead of [M][K]; B_T: b is stored [N][K] instead of [K][N].
    template <bool A_T, bool B_T, int K> DEVICE_METHOD void multiply(const float* a, int lda, const float* b, int ldb) {
        if (!active()) return;
        const int lane = threadIdx.x & 31, m0 = (warp() / WN) * MT * 16, n0 = (warp() % WN) * NT * 8;
#if __CUDA_ARCH__ >= 800
        const int r = lane / 4, c = lane & 3;
        // The small products have sums of their own: three dependent steps in a row would be waited for.
        float small[MT][NT][4] = {};
#pragma unroll 4
        for (int k = 0; k < K; k += 8) {
            u32 ah[MT][4], al[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int m = m0 + i * 16 + r + (e & 1) * 8, kk = k + c + (e >> 1) * 4;
                    split_tf32(A_T ? a[kk * lda + m] : a[m * lda + kk], ah[i][e], al[i][e]);
                }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                u32 bh[2], bl[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int n = n0 + j * 8 + r, kk = k + c + e * 4;
                    split_tf32(B_T ? b[n * ldb + kk] : b[kk * ldb + n], bh[e], bl[e]);
                }
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_1688_tf32(small[i][j], al[i], bh[0], bh[1]);
                    mma_1688_tf32(v[i][j], ah[i], bh[0], bh[1]);
                    mma_1688_tf32(small[i][j], ah[i], bl[0], bl[1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) v[i][j][e] += small[i][j][e];
#else
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int m = m0 + i * 16 + lane / 4 + (e >> 1) * 8, n = n0 + j * 8 + (lane & 3) * 2 + (e & 1);
                        v[i][j][e] += (A_T ? a[k * lda + m] : a[m * lda + k]) * (B_T ? b[n * ldb + k] : b[k * ldb + n]);
                    }
#endif
    }
};
