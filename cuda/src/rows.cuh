// A few rows of a matrix against a few tokens: what one lane loads and sums. Loads of the first round are issued by
// `start`, which touches weights only, so that a kernel may call it before its inputs are there.
#pragma once
#include "quant.cuh"

// Activations of a launch: codes [n_tokens, K] with heads [n_tokens, K / 32], or floats [n_tokens, K].
struct Activations {
    const i8* codes;
    const Q8Head* heads;
    const float* x;
};

// R rows from `row` (clamped to `last`) of a matrix of COLS columns; PARTS warps share the columns, this one is `part`.
template <int TY, int COLS, int R, int PARTS, bool FLOATS> struct RowsOf;

// Integer products: units of 32 columns.
template <int TY, int COLS, int R, int PARTS> struct RowsOf<TY, COLS, R, PARTS, false> {
    typedef Quant<TY> Q;
    static constexpr int UNITS = COLS / 32, STEP = PARTS * WARP;
    const u8* weight;
    u64 n_blocks, first[R];
    int u;
    typename Q::Raw raw[R];

    __device__ __forceinline__ void load() {
#pragma unroll
        for (int r = 0; r < R; r++) raw[r] = Q::load(weight, n_blocks, first[r] + u);
    }

    __device__ __forceinline__ void start(const u8* w, u64 n, u64 row, u64 last, int part) {
        weight = w;
        n_blocks = n;
        u = part * WARP + threadIdx.x % WARP;
#pragma unroll
        for (int r = 0; r < R; r++) first[r] = min(row + r, last) * UNITS;
        if (u < UNITS) load();
    }

    template <int T> __device__ __forceinline__ void finish(const Activations& a, int n_tokens, float (&acc)[R][T]) {
        while (u < UNITS) {
            Unit w[R];
#pragma unroll
            for (int r = 0; r < R; r++) Q::expand(raw[r], first[r] + u, w[r]);
            const int at = u;
            u += STEP;
            if (UNITS > STEP && u < UNITS) load();
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (T > 1 && t >= n_tokens) break;
                const int4* p = reinterpret_cast<const int4*>(a.codes + (u64)t * COLS) + 2 * at;
                const int4 lo = p[0], hi = p[1];
                const Q8Head head = a.heads[(u64)t * UNITS + at];
                const int x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
                for (int r = 0; r < R; r++) acc[r][t] += dot<TY>(w[r], x, head);
            }
        }
    }
};

// Float products: 16 bytes of columns, or single ones where a row is not a whole number of them.
template <int TY, int COLS, int R, int PARTS> struct RowsOf<TY, COLS, R, PARTS, true> {
    static constexpr int C = COLS % chunk(TY) == 0 ? chunk(TY) : 1, CHUNKS = COLS / C;
    const u8* weight;
    u64 rows[R];
    int first;

    __device__ __forceinline__ void start(const u8* w, u64, u64 row, u64 last, int part) {
        weight = w;
        first = part * WARP + threadIdx.x % WARP;
#pragma unroll
        for (int r = 0; r < R; r++) rows[r] = min(row + r, last);
    }

    template <int T> __device__ __forceinline__ void finish(const Activations& a, int n_tokens, float (&acc)[R][T]) {
        for (int c = first; c < CHUNKS; c += PARTS * WARP) {
            float w[R][C];
#pragma unroll
            for (int r = 0; r < R; r++) {
                if constexpr (C == 1) {
                    w[r][0] = value<TY>(weight, 0, rows[r] * COLS + c);
                } else {
                    const uint4 v = load_weights(reinterpret_cast<const uint4*>(weight) + rows[r] * CHUNKS + c);
                    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int i = 0; i < C; i++) {
                        if constexpr (TY == F32) w[r][i] = __uint_as_float(words[i]);
                        else if constexpr (TY == BF16) w[r][i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
                        else w[r][i] = i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (T > 1 && t >= n_tokens) break;
                const float* x = a.x + (u64)t * COLS + c * C;
#pragma unroll
                for (int i = 0; i < C; i++) {
                    const float xi = x[i];
#pragma unroll
                    for (int r = 0; r < R; r++) acc[r][t] += w[r][i] * xi;
                }
            }
        }
    }
};

template <int TY, int COLS, int R, int PARTS> using Rows = RowsOf<TY, COLS, R, PARTS, is_float(TY)>;
