// Units of 32 weights as 16-bit floats for the tensor cores: bf16, or f16 for F16 weights and on chips without bf16.
#pragma once
#include "matrix.cuh"
#include "quant.cuh"

// Four weights s (code - offset) - m of type TY, in order. A code becomes the mantissa of 2^7 + code (signed bytes: of
// 2^15 + 128 + code), whose offset goes into the constant term.
template <int TY> DEVICE uint2 four_halves(u32 codes, float s, float m) {
    typedef Quant<TY> Q;
    constexpr u32 MAGIC = Q::SIGNED ? 0x47000000u : 0x43000000u;
    constexpr float OFFSET = Q::SIGNED ? 32768.0f + 128.0f : 128.0f + Q::OFFSET;
    const float c = -OFFSET * s - (Q::MIN ? m : 0.0f);
    const u32 code = Q::SIGNED ? codes ^ 0x80808080u : codes;
    float f[4];
#pragma unroll
    for (int b = 0; b < 4; b++)    // the code goes to byte 2 of MAGIC, or 1
        f[b] = fmaf(__uint_as_float(__byte_perm(code, MAGIC, Q::SIGNED ? 0x7404 | b << 4 : 0x7044 | b << 8)), s, c);
    return make_uint2(pack2<HALF_IS_F16>(f[0], f[1]), pack2<HALF_IS_F16>(f[2], f[3]));
}

// HalfUnit<type>: `load` takes a unit's bytes into registers, `decode` makes its 32 numbers of them, in order.
template <int TY> struct HalfUnit {
    static constexpr bool IS_F16 = HALF_IS_F16;
    typedef typename Quant<TY>::Raw Raw;

    DEVICE Raw load(const u8* w, u64 n_blocks, u64 unit) { return Quant<TY>::load(w, n_blocks, unit); }

    DEVICE void decode(const Raw& raw, u64 unit, uint4 (&out)[4]) {
        typedef Quant<TY> Q;
        Unit u;
        Q::expand(raw, unit, u);
        uint2 four[8];
#pragma unroll
        for (int w = 0; w < 8; w++) four[w] = four_halves<TY>(u.q[w], Q::TWO && w >= 4 ? u.s1 : u.s0, Q::TWO && w >= 4 ? u.m1 : u.m0);
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = make_uint4(four[2 * i].x, four[2 * i].y, four[2 * i + 1].x, four[2 * i + 1].y);
    }
};

struct RawHalves {
    uint4 q[4];
};

DEVICE RawHalves load_halves(const u8* w, u64 unit) {
    RawHalves r;
#pragma unroll
    for (int i = 0; i < 4; i++) r.q[i] = weights_at<uint4>(w + (unit * 4 + i) * 16);
    return r;
}

template <> struct HalfUnit<F16> {
    static constexpr bool IS_F16 = true;
    typedef RawHalves Raw;
    DEVICE Raw load(const u8* w, u64, u64 unit) { return load_halves(w, unit); }
    DEVICE void decode(const Raw& raw, u64, uint4 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = raw.q[i];
    }
};

template <> struct HalfUnit<BF16> {
    static constexpr bool IS_F16 = HALF_IS_F16;
    typedef RawHalves Raw;
    DEVICE Raw load(const u8* w, u64, u64 unit) { return load_halves(w, unit); }
    DEVICE void decode(const Raw& raw, u64, uint4 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 v[4] = {raw.q[i].x, raw.q[i].y, raw.q[i].z, raw.q[i].w};
            u32 h[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                h[j] = IS_F16 ? pack2<true>(__uint_as_float(v[j] << 16), __uint_as_float(v[j] & 0xffff0000u)) : v[j];
            out[i] = make_uint4(h[0], h[1], h[2], h[3]);
        }
    }
};
