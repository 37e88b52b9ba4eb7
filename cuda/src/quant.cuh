// Weights in the device layout of layout.rs, 32 consecutive elements (a unit) at a time: int8 codes and
// scales for integer dot products, or floats. `unit` counts from the start of the tensor.
#pragma once
#include "common.cuh"

enum Type {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12,
    Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39
};

// The codes of a unit as dp4a takes them, and what turns them into values:
// x[e] = s[e / 16] * (q[e] - OFFSET) - m[e / 16]; q as bytes, q[w] holding elements 4 w .. 4 w + 3.
struct Unit {
    u32 q[8];
    float s0, s1, m0, m1;
};

DEVICE void low4(uint4 c, u32 (&q)[8]) {
    const u32 v[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        q[w] = v[w] & 0x0f0f0f0fu;
        q[w + 4] = (v[w] >> 4) & 0x0f0f0f0fu;
    }
}

DEVICE void low2(uint2 c, u32 (&q)[8]) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
        q[w] = (c.x >> (2 * w)) & 0x03030303u;
        q[w + 4] = (c.y >> (2 * w)) & 0x03030303u;
    }
}

template <int SHIFT> DEVICE void or_high1(u32 h, u32 (&q)[8]) {
#pragma unroll
    for (int w = 0; w < 8; w++) q[w] |= ((h >> w) & 0x01010101u) << SHIFT;
}

// Bytes of a 16-entry table, selected by the nibbles of `c` (four low ones, then four high ones).
DEVICE void look_up(uint4 c, u32 t0, u32 t1, u32 t2, u32 t3, u32 (&q)[8]) {
    const u32 v[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        // prmt takes selectors from consecutive nibbles: outputs are elements in the order lo0 hi0 lo1 hi1 | ...
        const u32 select = v[w] & 0x77777777u, upper = (v[w] & 0x88888888u) >> 3;
        const u32 a0 = __byte_perm(t0, t1, select), a1 = __byte_perm(t2, t3, select);
        const u32 b0 = __byte_perm(t0, t1, select >> 16), b1 = __byte_perm(t2, t3, select >> 16);
        // A selector of 4 + i takes byte i of the second operand where the nibble is 8 or more.
        const u32 pick = 0x3210u | (upper << 2);
        const u32 a = __byte_perm(a0, a1, pick), b = __byte_perm(b0, b1, pick >> 16 | 0x3210u);
        q[w] = __byte_perm(a, b, 0x6420);
        q[w + 4] = __byte_perm(a, b, 0x7531);
    }
}

DEVICE const u16& as_u16(const u8* p) { return *reinterpret_cast<const u16*>(p); }
DEVICE float half_at(const u8* p) { return half_to_float(__ldg(reinterpret_cast<const u16*>(p))); }
DEVICE float low_half(u32 v) { return half_to_float((u16)v); }
DEVICE float high_half(u32 v) { return half_to_float((u16)(v >> 16)); }
template <typename T> DEVICE T weights_at(const u8* p) { return load_weights(reinterpret_cast<const T*>(p)); }

// Per type: what one lane loads for one unit (`Raw`), the loads (`load`), and the expansion (`expand`).
// TWO: the halves of a unit have scales of their own. MIN: there are minima. SIGNED: codes are signed bytes. n: blocks
// of the tensor.
template <int TY> struct Quant;

#define NIBBLE_IQ4 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u
#define NIBBLE_MXFP4 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu

template <> struct Quant<Q4_0> {
    static constexpr int OFFSET = 8, BLOCK = 32;
    static constexpr bool TWO = false, MIN = false, SIGNED = false;
    struct Raw { uint4 c; u16 d; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), __ldg(&as_u16(p + n * 16 + u * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) { low4(r.c, o.q); o.s0 = half_to_float(r.d); }
};

template <> struct Quant<IQ4_NL> : Quant<Q4_0> {
    static constexpr int OFFSET = 0;
    static constexpr bool SIGNED = true;
    DEVICE void expand(const Raw& r, u64, Unit& o) { look_up(r.c, NIBBLE_IQ4, o.q); o.s0 = half_to_float(r.d); }
};

template <> struct Quant<MXFP4> {
    static constexpr int OFFSET = 0, BLOCK = 32;
    static constexpr bool TWO = false, MIN = false, SIGNED = true;
    struct Raw { uint4 c; u8 e; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) { return {weights_at<uint4>(p + u * 16), __ldg(p + n * 16 + u)}; }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        look_up(r.c, NIBBLE_MXFP4, o.q);
        // 2^(e - 128): below the normal floats for e < 2.
        o.s0 = __uint_as_float(r.e < 2 ? 0x00200000u << r.e : (u32)(r.e - 1) << 23);
    }
};

template <> struct Quant<Q4_1> {
    static constexpr int OFFSET = 0, BLOCK = 32;
    static constexpr bool TWO = false, MIN = true, SIGNED = false;
    struct Raw { uint4 c; u32 dm; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<u32>(p + n * 16 + u * 4)};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low4(r.c, o.q);
        o.s0 = low_half(r.dm);
        o.m0 = -high_half(r.dm);
    }
};

template <> struct Quant<Q5_0> {
    static constexpr int OFFSET = 16, BLOCK = 32;
    static constexpr bool TWO = false, MIN = false, SIGNED = false;
    struct Raw { uint4 c; u32 h; u16 d; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<u32>(p + n * 16 + u * 4), __ldg(&as_u16(p + n * 20 + u * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low4(r.c, o.q);
        or_high1<4>(r.h, o.q);
        o.s0 = half_to_float(r.d);
    }
};

template <> struct Quant<Q5_1> {
    static constexpr int OFFSET = 0, BLOCK = 32;
    static constexpr bool TWO = false, MIN = true, SIGNED = false;
    struct Raw { uint4 c; u32 h, dm; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<u32>(p + n * 16 + u * 4), weights_at<u32>(p + n * 20 + u * 4)};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low4(r.c, o.q);
        or_high1<4>(r.h, o.q);
        o.s0 = low_half(r.dm);
        o.m0 = -high_half(r.dm);
    }
};

template <> struct Quant<Q8_0> {
    static constexpr int OFFSET = 0, BLOCK = 32;
    static constexpr bool TWO = false, MIN = false, SIGNED = true;
    struct Raw { uint4 a, b; u16 d; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<uint4>(p + (n + u) * 16), __ldg(&as_u16(p + n * 32 + u * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        o.q[0] = r.a.x; o.q[1] = r.a.y; o.q[2] = r.a.z; o.q[3] = r.a.w;
        o.q[4] = r.b.x; o.q[5] = r.b.y; o.q[6] = r.b.z; o.q[7] = r.b.w;
        o.s0 = half_to_float(r.d);
    }
};

template <> struct Quant<Q2_K> {
    static constexpr int OFFSET = 0, BLOCK = 256;
    static constexpr bool TWO = true, MIN = true, SIGNED = false;
    struct Raw { uint2 c; u32 dm; u16 s; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint2>(p + u * 8), weights_at<u32>(p + n * 80 + u / 8 * 4), __ldg(&as_u16(p + n * 64 + u * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low2(r.c, o.q);
        const float d = low_half(r.dm), m = high_half(r.dm);
        o.s0 = d * (float)(r.s & 15);
        o.m0 = m * (float)((r.s >> 4) & 15);
        o.s1 = d * (float)((r.s >> 8) & 15);
        o.m1 = m * (float)(r.s >> 12);
    }
};

template <> struct Quant<Q3_K> {
    static constexpr int OFFSET = 4, BLOCK = 256;
    static constexpr bool TWO = true, MIN = false, SIGNED = false;
    struct Raw { uint2 c; u32 h, s; u16 d; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        const u8* scales = p + n * 96 + u / 8 * 12;
        const int k = u % 8;
        const u32 low = __ldg(scales + k), high = weights_at<u32>(scales + 8) >> (4 * k);
        const u32 s = ((low & 15) | (high & 3) << 4) | ((low >> 4) | (high >> 2 & 3) << 4) << 8;
        return {weights_at<uint2>(p + u * 8), weights_at<u32>(p + n * 64 + u * 4), s, __ldg(&as_u16(p + n * 108 + u / 8 * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low2(r.c, o.q);
        or_high1<2>(r.h, o.q);
        const float d = half_to_float(r.d);
        o.s0 = d * (float)((int)(r.s & 63) - 32);
        o.s1 = d * (float)((int)(r.s >> 8) - 32);
    }
};

// Scale and minimum of sub-block k from the packed header: d and dmin, eight bytes, eight nibbles.
DEVICE void scale_min(uint4 h, int k, Unit& o) {
    const u32 b = (k < 4 ? h.y : h.z) >> (8 * (k & 3)) & 0xffu, high = h.w >> (4 * k) & 15u;
    o.s0 = low_half(h.x) * (float)(b & 63u);
    o.m0 = high_half(h.x) * (float)(b >> 6 | high << 2);
}

template <> struct Quant<Q4_K> {
    static constexpr int OFFSET = 0, BLOCK = 256;
    static constexpr bool TWO = false, MIN = true, SIGNED = false;
    struct Raw { uint4 c, h; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<uint4>(p + n * 128 + u / 8 * 16)};
    }
    DEVICE void expand(const Raw& r, u64 u, Unit& o) {
        low4(r.c, o.q);
        scale_min(r.h, (int)(u % 8), o);
    }
};

template <> struct Quant<Q5_K> {
    static constexpr int OFFSET = 0, BLOCK = 256;
    static constexpr bool TWO = false, MIN = true, SIGNED = false;
    struct Raw { uint4 c, h; u32 b; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<uint4>(p + n * 160 + u / 8 * 16), weights_at<u32>(p + n * 128 + u * 4)};
    }
    DEVICE void expand(const Raw& r, u64 u, Unit& o) {
        low4(r.c, o.q);
        or_high1<4>(r.b, o.q);
        scale_min(r.h, (int)(u % 8), o);
    }
};

template <> struct Quant<Q6_K> {
    static constexpr int OFFSET = 32, BLOCK = 256;
    static constexpr bool TWO = true, MIN = false, SIGNED = false;
    struct Raw { uint4 c; uint2 h; u16 s, d; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<uint2>(p + n * 128 + u * 8), __ldg(&as_u16(p + n * 192 + u * 2)),
                __ldg(&as_u16(p + n * 208 + u / 8 * 2))};
    }
    DEVICE void expand(const Raw& r, u64, Unit& o) {
        low4(r.c, o.q);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            o.q[w] |= ((r.h.x >> (2 * w)) & 0x03030303u) << 4;
            o.q[w + 4] |= ((r.h.y >> (2 * w)) & 0x03030303u) << 4;
        }
        const float d = half_to_float(r.d);
        o.s0 = d * (float)(i8)(r.s & 0xff);
        o.s1 = d * (float)(i8)(r.s >> 8);
    }
};

template <> struct Quant<IQ4_XS> {
    static constexpr int OFFSET = 0, BLOCK = 256;
    static constexpr bool TWO = false, MIN = false, SIGNED = true;
    struct Raw { uint4 c; uint2 h; };
    DEVICE Raw load(const u8* p, u64 n, u64 u) {
        return {weights_at<uint4>(p + u * 16), weights_at<uint2>(p + n * 128 + u / 8 * 8)};
    }
    DEVICE void expand(const Raw& r, u64 u, Unit& o) {
        const int k = u % 8;
        look_up(r.c, NIBBLE_IQ4, o.q);
        const int ls = (int)((r.h.y >> (4 * k) & 15u) | (r.h.x >> (16 + 2 * k) & 3u) << 4);
        o.s0 = low_half(r.h.x) * (float)(ls - 32);
    }
};

DEVICE constexpr bool is_float(int ty) { return ty == F32 || ty == F16 || ty == BF16; }

// Elements that one lane takes at a time: 16 bytes of floats, or a unit.
DEVICE constexpr int chunk(int ty) { return ty == F32 ? 4 : ty == F16 || ty == BF16 ? 8 : 32; }

// Sum over one unit of weight * activation; `a`: 32 int8 codes, `h`: their scale and sums.
template <int TY> DEVICE float dot(const Unit& w, const int (&a)[8], const Q8Head& h) {
    typedef Quant<TY> Q;
    // Unsigned codes below 128 are the same as signed ones.
    int lo = 0, hi = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        lo = __dp4a((int)w.q[i], a[i], lo);
        if (Q::TWO) hi = __dp4a((int)w.q[i + 4], a[i + 4], hi);
        else lo = __dp4a((int)w.q[i + 4], a[i + 4], lo);
    }
    const int sum0 = h.sum0, sum1 = h.sum1;
    float y;
    if (Q::TWO) {
        y = w.s0 * (float)(lo - Q::OFFSET * sum0) + w.s1 * (float)(hi - Q::OFFSET * sum1);
        if (Q::MIN) y -= w.m0 * (float)sum0 + w.m1 * (float)sum1;
    } else {
        y = w.s0 * (float)(lo - Q::OFFSET * (sum0 + sum1));
        if (Q::MIN) y -= w.m0 * (float)(sum0 + sum1);
    }
    return h.d * y;
}

// Element `e` of the tensor as a float.
template <int TY> DEVICE float value(const u8* p, u64 n, u64 e) {
    if constexpr (TY == F32) return reinterpret_cast<const float*>(p)[e];
    else if constexpr (TY == F16) return half_to_float(reinterpret_cast<const u16*>(p)[e]);
    else if constexpr (TY == BF16) return bf16_to_float(reinterpret_cast<const u16*>(p)[e]);
    else {
        typedef Quant<TY> Q;
        const u64 unit = e / 32;
        const int i = e % 32;
        Unit w;
        Q::expand(Q::load(p, n, unit), unit, w);
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) word = j == i / 4 ? w.q[j] : word;
        const int q = (int)(i8)(word >> (8 * (i % 4))) - Q::OFFSET;
        const bool second = Q::TWO && i >= 16;
        const float y = (second ? w.s1 : w.s0) * (float)q;
        return Q::MIN ? y - (second ? w.m1 : w.m0) : y;
    }
}
