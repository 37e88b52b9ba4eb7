// Sorts the bytes of a block, as the file has it, into the planes of layout.rs: a unit of 32 elements at a time;
// every byte is moved once.
#pragma once
#include "quant.cuh"

// Blocks lie in global or in shared memory.
DEVICE u32 byte_of(const u8* p) { return *p; }
DEVICE void copy(u8* to, const u8* from, int n) {
    for (int i = 0; i < n; i++) to[i] = from[i];
}

// Codes of unit k, element i (0 to 31), from the file's block.
template <int TY> DEVICE u32 code(const u8* b, int k, int i) {
    if constexpr (TY == Q4_K || TY == Q5_K) {
        const u8* q = b + (TY == Q4_K ? 16 : 48) + 32 * (k / 2);
        u32 c = k % 2 ? byte_of(q + i) >> 4 : byte_of(q + i) & 15;
        if (TY == Q5_K) c |= (byte_of(b + 16 + i) >> k & 1) << 4;
        return c;
    } else if constexpr (TY == Q6_K) {
        const int n = k / 4, s = k % 4;
        const u32 low = byte_of(b + 64 * n + 32 * (s % 2) + i);
        return (s < 2 ? low & 15 : low >> 4) | (byte_of(b + 128 + 32 * n + i) >> (2 * s) & 3) << 4;
    } else if constexpr (TY == Q2_K || TY == Q3_K) {
        const int n = k / 4, s = k % 4;
        u32 c = byte_of(b + (TY == Q2_K ? 16 : 32) + 32 * n + i) >> (2 * s) & 3;
        if (TY == Q3_K) c |= (byte_of(b + i) >> (4 * n + s) & 1) << 2;
        return c;
    } else if constexpr (TY == Q5_0 || TY == Q5_1) {
        const u8* q = b + (TY == Q5_0 ? 2 : 4);
        const u32 low = byte_of(q + 4 + i % 16);
        return (i < 16 ? low & 15 : low >> 4) | (byte_of(q + i / 8) >> (i % 8) & 1) << 4;
    } else {
        return 0;
    }
}

// Packs codes of a unit: low four bits, two bits from SHIFT, one bit from SHIFT.
template <int TY> DEVICE void pack_low4(const u8* b, int k, u8* to) {
    for (int j = 0; j < 16; j++) to[j] = (u8)((code<TY>(b, k, j) & 15) | (code<TY>(b, k, j + 16) & 15) << 4);
}
template <int TY, int SHIFT> DEVICE void pack_low2(const u8* b, int k, u8* to) {
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 4; i++) {
            u32 v = 0;
            for (int w = 0; w < 4; w++) v |= (code<TY>(b, k, 16 * h + 4 * w + i) >> SHIFT & 3) << (2 * w);
            to[4 * h + i] = (u8)v;
        }
}
template <int TY, int SHIFT> DEVICE void pack_high1(const u8* b, int k, u8* to) {
    for (int i = 0; i < 4; i++) {
        u32 v = 0;
        for (int w = 0; w < 8; w++) v |= (code<TY>(b, k, 4 * w + i) >> SHIFT & 1) << w;
        to[i] = (u8)v;
    }
}

// Header of Q4_K and Q5_K: d, dmin, then the packed scales and minima of scale_min in quant.cuh.
DEVICE void pack_scale_min(const u8* b, u8* to) {
    copy(to, b, 4);
    const u8* s = b + 4;
    u32 nibbles = 0;
    for (int k = 0; k < 8; k++) {
        const u32 sc = k < 4 ? byte_of(s + k) & 63 : (byte_of(s + k + 4) & 15) | (byte_of(s + k - 4) >> 6) << 4;
        const u32 mn = k < 4 ? byte_of(s + k + 4) & 63 : byte_of(s + k + 4) >> 4 | (byte_of(s + k) >> 6) << 4;
        to[4 + k] = (u8)(sc | (mn & 3) << 6);
        nibbles |= mn >> 2 << (4 * k);
    }
    for (int i = 0; i < 4; i++) to[12 + i] = (u8)(nibbles >> (8 * i));
}

// The 16 six-bit scales of Q3_K: eight bytes of low nibbles, eight nibbles of high pairs.
DEVICE void pack_q3_scales(const u8* s, u8* to) {
    u32 low[16], high[16];
    for (int k = 0; k < 16; k++) {
        low[k] = k < 8 ? byte_of(s + k) & 15 : byte_of(s + k - 8) >> 4;
        high[k] = byte_of(s + 8 + k % 4) >> (2 * (k / 4)) & 3;
    }
    for (int u = 0; u < 8; u++) to[u] = (u8)(low[2 * u] | low[2 * u + 1] << 4);
    for (int i = 0; i < 4; i++) {
        u32 v = 0;
        for (int j = 0; j < 2; j++) v |= (high[4 * i + 2 * j] | high[4 * i + 2 * j + 1] << 2) << (4 * j);
        to[8 + i] = (u8)v;
    }
}

template <int TY> DEVICE void relayout_unit(const u8* b, int k, u8* w, u64 n, u64 block) {
    constexpr int UNITS = Quant<TY>::BLOCK / 32;
    const u64 unit = block * UNITS + k;
    if constexpr (TY == Q4_0 || TY == IQ4_NL) {
        copy(w + unit * 16, b + 2, 16);
        copy(w + n * 16 + unit * 2, b, 2);
    } else if constexpr (TY == MXFP4) {
        copy(w + unit * 16, b + 1, 16);
        copy(w + n * 16 + unit, b, 1);
    } else if constexpr (TY == Q4_1) {
        copy(w + unit * 16, b + 4, 16);
        copy(w + n * 16 + unit * 4, b, 4);
    } else if constexpr (TY == Q5_0 || TY == Q5_1) {
        constexpr int HEAD = TY == Q5_0 ? 2 : 4;
        copy(w + unit * 16, b + HEAD + 4, 16);
        pack_high1<TY, 4>(b, k, w + n * 16 + unit * 4);
        copy(w + n * 20 + unit * HEAD, b, HEAD);
    } else if constexpr (TY == Q8_0) {
        copy(w + unit * 16, b + 2, 16);
        copy(w + (n + unit) * 16, b + 18, 16);
        copy(w + n * 32 + unit * 2, b, 2);
    } else if constexpr (TY == Q2_K) {
        pack_low2<TY, 0>(b, k, w + unit * 8);
        copy(w + n * 64 + unit * 2, b + 2 * k, 2);
        if (k == 0) copy(w + n * 80 + block * 4, b + 80, 4);
    } else if constexpr (TY == Q3_K) {
        pack_low2<TY, 0>(b, k, w + unit * 8);
        pack_high1<TY, 2>(b, k, w + n * 64 + unit * 4);
        if (k == 0) {
            pack_q3_scales(b + 96, w + n * 96 + block * 12);
            copy(w + n * 108 + block * 2, b + 108, 2);
        }
    } else if constexpr (TY == Q4_K) {
        pack_low4<TY>(b, k, w + unit * 16);
        if (k == 0) pack_scale_min(b, w + n * 128 + block * 16);
    } else if constexpr (TY == Q5_K) {
        pack_low4<TY>(b, k, w + unit * 16);
        pack_high1<TY, 4>(b, k, w + n * 128 + unit * 4);
        if (k == 0) pack_scale_min(b, w + n * 160 + block * 16);
    } else if constexpr (TY == Q6_K) {
        pack_low4<TY>(b, k, w + unit * 16);
        pack_low2<TY, 4>(b, k, w + n * 128 + unit * 8);
        copy(w + n * 192 + unit * 2, b + 192 + 2 * k, 2);
        if (k == 0) copy(w + n * 208 + block * 2, b + 208, 2);
    } else if constexpr (TY == IQ4_XS) {
        copy(w + unit * 16, b + 8 + 16 * k, 16);
        if (k == 0) copy(w + n * 128 + block * 8, b, 8);
    }
}
