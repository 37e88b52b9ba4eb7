// Y = W X^T for a few tokens (2 to TOKENS) on the tensor cores: the bytes of W are what it should cost, each read once.
// A warp takes 16 rows of a tile of 128, 8 units of columns at a time: a lane's units go from memory to registers,
// become 16-bit numbers there and are operands of the matrix unit as they lie, since the order of the columns inside a
// group of four units is permuted alike for W and X. Activations come as 16-bit numbers, through shared memory. Blocks
// take equal shares of the steps of all tiles, one after the other; where several share a tile, the last to finish adds
// their sums in order. `few`: up to four matrices that share the input in one grid; `few_swiglu`: silu(gate) * up, as
// 16-bit for the next product. Refuses float weights.
// Set by the compiler: TOKENS (8, 16 or 32), PAIR (few_swiglu), TYPE0 to TYPE3 (the types that segments name; -1:
// none).
#include "unit.cuh"

#define WARPS 8
#define THREADS (WARPS * WARP)
// Rows of a tile.
#define TILE (WARPS * 16)
// Groups of eight tokens.
#define NT (TOKENS / 8)
// Units of a step.
#define STEP 8
// Units of activations that are in shared memory at a time, twice: 16 KB each.
#define CHUNK (256 / TOKENS)

struct Segment {
    const u8* weight;     // planes of [n_rows, n_units * 32]
    float* out;           // [n_tokens, n_rows]
    const float* scale;   // [1] or null
    const float* bias;    // [n_rows] or null
    u64 n_blocks;         // quantisation blocks of the tensor
    u32 n_rows;
    u32 first_block;      // tile
    u32 add;              // out += instead of out =
    u32 kind;             // which of TYPE0 to TYPE3
};

struct FewArgs {
    Segment segment[4];
    const uint4* x;       // [n_tokens, n_units * 4], 8 numbers each
    u16* halves_out;      // few_swiglu: [n_tokens, n_rows], or null: f32 to segment[0].out
    float4* sums;         // [gridDim.x, 2, NT, THREADS]: of a block's first tile and of its last
    u32* done;            // [n_tiles]: steps that are done; zero before and after
    u32 n_tokens;
    u32 n_units;          // of a row
    u32 n_tiles;
    u32 share;            // steps of a block
};
static_assert(sizeof(FewArgs) == FEW_ARGS, "FewArgs differs from few.rs");

struct Shared {
    uint4 x[2][TOKENS * CHUNK * 4];        // [token, unit, 4 pieces of 8 numbers], pieces permuted
    bool is_last;
};
static_assert(sizeof(Shared) <= 48 << 10, "as much as a block has everywhere");

// A block's part of a tile.
struct Part {
    u32 tile;
    int first, last;      // steps
};

// Eight lanes that read a piece of two tokens and four units meet different banks.
DEVICE int place(int token, int unit, int piece) { return (token * CHUNK + unit) * 4 + (piece ^ (unit & 3) ^ (token & 1)); }

// Copies units [first, first + CHUNK) of all tokens to `to`, four pieces a thread; what is not there becomes zero, what
// lies behind `end` is left.
DEVICE void load_tokens(const FewArgs& a, uint4* to, int first, int end) {
    constexpr int TOKENS_APART = TOKENS / 4;
    static_assert(TOKENS * CHUNK == THREADS && TOKENS_APART % 2 == 0, "four pieces a thread, of tokens that are placed alike");
    const int t = threadIdx.x / (CHUNK * 4), u = threadIdx.x / 4 % CHUNK, p = threadIdx.x % 4;
    if (first + u < end) {
        const uint4* from = a.x + ((u64)t * a.n_units + first + u) * 4 + p;
        to += place(t, u, p);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool valid = t + i * TOKENS_APART < a.n_tokens && first + u < a.n_units;
            copy_async_16(to + i * TOKENS_APART * CHUNK * 4, valid ? from + (u64)(i * TOKENS_APART) * a.n_units * 4 : a.x, valid);
        }
    }
    copy_async_commit();
}

#if __CUDA_ARCH__ >= 800
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#endif

// A unit as 16-bit numbers, four at a time. Where codes fit the mantissa of 128 + code, two at once: w = s (code -
// CENTRE) + c, with a CENTRE that keeps c small, so that the rounding of s and c errs no more than that of the result.
template <int TY> struct Numbers {
    typedef Quant<TY> Q;
    static constexpr bool PACKED = !HALF_IS_F16 && !Q::SIGNED;
    static constexpr int CENTRE = !Q::MIN ? Q::OFFSET : TY == Q2_K ? 2 : TY == Q5_1 || TY == Q5_K ? 16 : 8;
    Unit unit;
    u32 s[2], c[2];

    DEVICE_METHOD void expand(const typename Q::Raw& raw, u64 u) {
        Q::expand(raw, u, unit);
        if constexpr (PACKED) {
#pragma unroll
            for (int h = 0; h < (Q::TWO ? 2 : 1); h++) {
                const float scale = h ? unit.s1 : unit.s0, constant = Q::MIN ? scale * CENTRE - (h ? unit.m1 : unit.m0) : -0.0f;
                s[h] = pack2<false>(scale, scale);
                c[h] = pack2<false>(constant, constant);
            }
        }
    }

    // Elements 4 w .. 4 w + 3.
    DEVICE_METHOD uint2 four(int w) const {
        const int h = Q::TWO && w >= 4;
#if __CUDA_ARCH__ >= 800
        if constexpr (PACKED) {
            constexpr u32 ONE = 0x3f803f80u, MINUS = 0x10001u * (0xc300u + CENTRE);    // -(128 + CENTRE)
            const u32 lo = fma_bf16x2(__byte_perm(unit.q[w], 0x43434343u, 0x4140), ONE, MINUS);
            const u32 hi = fma_bf16x2(__byte_perm(unit.q[w], 0x43434343u, 0x4342), ONE, MINUS);
            return make_uint2(fma_bf16x2(lo, s[h], c[h]), fma_bf16x2(hi, s[h], c[h]));
        }
#endif
        return four_halves<TY>(unit.q[w], h ? unit.s1 : unit.s0, h ? unit.m1 : unit.m0);
    }
};

// Products of a part of a tile with rows `row` and those of the other warps; true if the block is to write the sums,
// which are then those of the whole tile.
template <int TY> DEVICE bool product(const FewArgs& a, Shared& sh, const Segment& s, const Part& part, const u32 (&row)[2], float (&acc)[NT][4]) {
    typedef Quant<TY> Q;
    const int lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4, n_steps = (a.n_units + STEP - 1) / STEP;
    u32 base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) base[i] = row[i] * (Q::BLOCK == 256 ? a.n_units / 8 : a.n_units);
    // Unit c of half g of a step; the last one of a row stands for those that are not there.
    auto unit_of = [&](int i, int g, int step) -> u64 {
        if constexpr (Q::BLOCK == 256) return (u64)(base[i] + step) << 3 | (u64)(g * 4 + c);
        else return (u64)base[i] + min(step * STEP + g * 4 + c, (int)a.n_units - 1);
    };
    typename Q::Raw raw[2][2];
    auto load = [&](int g, int step) {
#pragma unroll
        for (int i = 0; i < 2; i++) raw[i][g] = Q::load(s.weight, s.n_blocks, unit_of(i, g, step));
    };
    // With many tokens registers are short: the second half's loads wait for the first half's products.
    constexpr bool LATE = TOKENS > (HALF_IS_F16 ? 8 : 16);
    load(0, part.first);
    load(1, part.first);
    // Where this lane's pieces of unit c of a token lie.
    const u8* pieces[4];
#pragma unroll
    for (int p = 0; p < 4; p++) pieces[p] = (const u8*)(sh.x[0] + place(r, c, p));
    wait_for_inputs();
    __syncthreads();
    load_tokens(a, sh.x[0], part.first * STEP, part.last * STEP);
#pragma unroll 1
    for (int step = part.first; step < part.last; step++) {
        const int at = (step - part.first) * STEP % CHUNK, chunk = (step - part.first) * STEP / CHUNK;
        if (at == 0) {
            copy_async_wait<0>();
            __syncthreads();
            if (step + CHUNK / STEP < part.last) load_tokens(a, sh.x[(chunk + 1) % 2], step * STEP + CHUNK, part.last * STEP);
        }
        Numbers<TY> w[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int g = 0; g < 2; g++) w[i][g].expand(raw[i][g], unit_of(i, g, step));
        const bool more = step + 1 < part.last;
        if (more) load(0, step + 1);
        if (more && !LATE) load(1, step + 1);
        const int offset = chunk % 2 * (int)sizeof(sh.x[0]) + at * 64;
#pragma unroll
        for (int g = 0; g < 2; g++) {
            if (LATE && g == 1 && more) load(1, step + 1);
#pragma unroll
            for (int p = 0; p < 4; p++) {
                uint4 x[NT];
#pragma unroll
                for (int j = 0; j < NT; j++) x[j] = *(const uint4*)(pieces[p] + offset + (j * 8 * CHUNK + g * 4) * 64);
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const uint2 w0 = w[0][g].four(2 * p + q), w8 = w[1][g].four(2 * p + q);
                    const u32 rows[4] = {w0.x, w8.x, w0.y, w8.y};
#pragma unroll
                    for (int j = 0; j < NT; j++) mma_16816<HALF_IS_F16>(acc[j], rows, q ? x[j].z : x[j].x, q ? x[j].w : x[j].y);
                }
            }
        }
    }
    if (part.first == 0 && part.last == n_steps) return true;
    // The sums of block k of this tile: those of its first tile come first.
    auto sums_of = [&](u32 k) { return a.sums + ((u64)k * 2 + (k * a.share / n_steps != part.tile)) * NT * THREADS + threadIdx.x; };
#pragma unroll
    for (int j = 0; j < NT; j++) __stcg(sums_of(blockIdx.x) + j * THREADS, make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 mine = part.last - part.first;
        sh.is_last = atomicAdd(a.done + part.tile, mine) + mine == n_steps;
    }
    __syncthreads();
    if (!sh.is_last) return false;
    __threadfence();
    if (threadIdx.x == 0) a.done[part.tile] = 0;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
    // Several blocks at a time: their loads are what is waited for.
    const u32 end = ((part.tile + 1) * n_steps - 1) / a.share;
#pragma unroll 4
    for (u32 k = part.tile * n_steps / a.share; k <= end; k++)
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const float4 v = __ldcg(sums_of(k) + j * THREADS);
            acc[j][0] += v.x;
            acc[j][1] += v.y;
            acc[j][2] += v.z;
            acc[j][3] += v.w;
        }
    return true;
}

// f(part) for every part of a tile that the block has a share in.
template <class F> DEVICE void each_part(const FewArgs& a, F f) {
    const u32 n_steps = (a.n_units + STEP - 1) / STEP, end = min((blockIdx.x + 1) * a.share, a.n_tiles * n_steps);
    for (u32 at = blockIdx.x * a.share; at < end;) {
        const u32 tile = at / n_steps, first = at - tile * n_steps, n = min(end - at, n_steps - first);
        f(Part{tile, (int)first, (int)(first + n)});
        at += n;
    }
}

#if !PAIR
template <int TY> DEVICE void rows_of(const FewArgs& a, Shared& sh, const Segment& s, const Part& part) {
    const int lane = threadIdx.x % WARP, c = lane % 4;
    const u32 first = (part.tile - s.first_block) * TILE + threadIdx.x / WARP * 16 + lane / 4;
    const u32 row[2] = {min(first, s.n_rows - 1), min(first + 8, s.n_rows - 1)};
    float acc[NT][4] = {};
    if (!product<TY>(a, sh, s, part, row, acc)) return;
    const float scale = s.scale ? s.scale[0] : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (first + 8 * i >= s.n_rows) break;
        const float bias = s.bias ? s.bias[row[i]] : 0.0f;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const u32 t = j * 8 + 2 * c + e;
                if (t >= a.n_tokens) continue;
                const float y = acc[j][i * 2 + e] * scale + bias;
                float* out = s.out + (u64)t * s.n_rows + row[i];
                *out = s.add ? *out + y : y;
            }
    }
}

// Grid: as many blocks as shares of the steps of all segments' tiles.
KERNEL __launch_bounds__(THREADS, 2) few(const FewArgs a) {
    __shared__ __align__(16) Shared sh;
    let_next_start();
    each_part(a, [&](const Part& part) {
        int i = 0;
        while (i < 3 && part.tile >= a.segment[i + 1].first_block) i++;
        const Segment& s = a.segment[i];
#if TYPE3 >= 0
        if (s.kind == 3) return rows_of<TYPE3>(a, sh, s, part);
#endif
#if TYPE2 >= 0
        if (s.kind == 2) return rows_of<TYPE2>(a, sh, s, part);
#endif
#if TYPE1 >= 0
        if (s.kind == 1) return rows_of<TYPE1>(a, sh, s, part);
#endif
        rows_of<TYPE0>(a, sh, s, part);
    });
}

#else
// As `few`, in tiles of 64 outputs: half of the warps take rows of gate, half those of up.
KERNEL __launch_bounds__(THREADS, 2) few_swiglu(const FewArgs a) {
    __shared__ __align__(16) Shared sh;
    constexpr int STRIDE = TILE + 1;
    static_assert(TOKENS * STRIDE * sizeof(float) <= sizeof(sh.x), "the results take the place of the activations");
    let_next_start();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    const u32 n_rows = a.segment[0].n_rows;
    each_part(a, [&](const Part& part) {
        const u32 first = part.tile * (TILE / 2), mine = first + warp % (WARPS / 2) * 16 + r;
        const u32 row[2] = {min(mine, n_rows - 1), min(mine + 8, n_rows - 1)};
        const Segment& s = a.segment[warp / (WARPS / 2)];
        float acc[NT][4] = {};
        bool is_whole;
#if TYPE1 >= 0
        if (s.kind == 1) is_whole = product<TYPE1>(a, sh, s, part, row, acc);
        else
#endif
            is_whole = product<TYPE0>(a, sh, s, part, row, acc);
        if (!is_whole) return;
        const float scale = s.scale ? s.scale[0] : 1.0f;
        float* v = (float*)sh.x;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) v[(j * 8 + 2 * c + e % 2) * STRIDE + warp * 16 + r + e / 2 * 8] = acc[j][e] * scale;
        __syncthreads();
        for (int i = threadIdx.x; i < a.n_tokens * (TILE / 2); i += THREADS) {
            const int t = i / (TILE / 2), at = i % (TILE / 2);
            if (first + at >= n_rows) continue;
            const float y = silu(v[t * STRIDE + at]) * v[t * STRIDE + TILE / 2 + at];
            const u64 to = (u64)t * n_rows + first + at;
            if (a.halves_out) a.halves_out[to] = to_half<HALF_IS_F16>(y);
            else a.segment[0].out[to] = y;
        }
    });
}
#endif
