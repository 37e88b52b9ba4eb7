// Y = X W^T for many rows of X, with W quantised as the file has it: tiles of W are decoded in flight and multiplied on
// the tensor cores (bf16, or f16 where the chip or the weight asks for it; f32 sums).
// gemm_tile: 128 outputs by TILE rows through shared memory, for prompts. gemm_rows: few rows (2 to 64), where reading
// W is the cost: weights go from memory to registers to the matrix unit, the warps of a block split the inputs.
// gemm_int8: as gemm_tile, with codes of weights and 8-bit activations as they are: s32 sums within a unit or half of
// one, f32 sums of these.
// gemm_f32: F32 weights and widths that are not whole units of 32, in plain f32. All take stacks of experts through a
// table of row tiles.
// Set by the compiler: TYPE (a GGUF type id), PAIR (gate and up at once, Y = silu(gate) * up), ROWS (rows of a tile: 8
// to 32 for gemm_rows, 64 or 128 for gemm_tile, 0 for gemm_f32 and gemm_f32_tile, 1 for decode_rows, which only
// decodes), INT8 (gemm_int8: 32, 64 or 128 rows).
#include "unit.cuh"

// `n` rows of X that go through one expert's weights, which lie in its slot; rows [first, first + n) of Y.
struct RowTile {
    u64 slot;
    int expert;
    int first;
    int n;
    int pad;
};

struct GemmArgs {
    u64 w;                   // planes of [n_out, n_in]: of a stack's expert, counted from its slot
    u64 w2;                  // PAIR: up
    u64 n_blocks;            // blocks of one matrix
    const void* x;           // [.., n_in] 16-bit (gemm_f32: f32; gemm_int8: codes)
    const Q8Head* heads;     // gemm_int8: [.., n_in / 32]
    const int* gather;       // row of x for each row of y, or null
    const RowTile* tiles;    // [gridDim.y], or null: one weight, rows [0, n_rows)
    const int* n_tiles;      // [1]: how many of `tiles` count
    void* y;                 // [n_rows, ld_y] f32; PAIR: of y_kind
    const float* scale;      // [1] or [n_experts], or null
    const float* scale2;     // PAIR: of up
    const float* bias;       // [n_out] or null
    int n_rows;
    int n_out;
    int n_in;
    int ld_y;
    int add;                 // y += instead of y =
    int y_kind;              // PAIR: y is f32 (0), f16 (1) or bf16 (2)
};

static_assert(sizeof(GemmArgs) == GEMM_ARGS, "GemmArgs differs from prompt.rs");

[[maybe_unused]] DEVICE bool find_tile(const GemmArgs& a, int height, RowTile& t) {
    if (a.tiles) {
        if ((int)blockIdx.y >= *a.n_tiles) return false;
        t = a.tiles[blockIdx.y];
    } else {
        t.slot = 0;
        t.expert = 0;
        t.first = blockIdx.y * height;
        t.n = min(height, a.n_rows - t.first);
    }
    return true;
}

#if ROWS && !INT8
typedef HalfUnit<TYPE> Source;
#endif

#if INT8 || ROWS >= 64
#define TILE ROWS
#if __CUDA_ARCH__ >= 800
#define STAGES 3
#else
#define STAGES 2
#endif

// Writes the sums of a warp, rows from m0 of the tile by outputs from n0 of the block's, which begin at out0.
template <int MT> DEVICE void store_tile(const GemmArgs& a, const RowTile& tile, const float (&acc)[MT][4][4], int m0, int n0, int out0) {
    const int lane = threadIdx.x & 31;
    const float scale = a.scale ? a.scale[tile.expert] : 1.0f;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = m0 + i * 16 + lane / 4 + h * 8;
            if (r >= tile.n) continue;
            const u64 row = (u64)(tile.first + r) * a.ld_y;
#if PAIR
            const float scale2 = a.scale2 ? a.scale2[tile.expert] : 1.0f;
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int c = out0 + (n0 >> 1) + j * 8 + (lane & 3) * 2 + e;
                    const float v = silu(acc[i][j][h * 2 + e] * scale) * (acc[i][j + 2][h * 2 + e] * scale2);
                    if (c >= a.n_out) continue;
                    if (a.y_kind == 0) ((float*)a.y)[row + c] = v;
                    else ((u16*)a.y)[row + c] = a.y_kind == 1 ? to_half<true>(v) : to_half<false>(v);
                }
#else
            float* y = (float*)a.y + row;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int c = out0 + n0 + j * 8 + (lane & 3) * 2;
                float v[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    v[e] = acc[i][j][h * 2 + e] * scale;
                    if (c + e < a.n_out) {
                        if (a.bias) v[e] += a.bias[c + e];
                        if (a.add) v[e] += y[c + e];
                    }
                }
                if (c + 1 < a.n_out && !(a.ld_y & 1)) *(float2*)(y + c) = make_float2(v[0], v[1]);
                else {
                    if (c < a.n_out) y[c] = v[0];
                    if (c + 1 < a.n_out) y[c + 1] = v[1];
                }
            }
#endif
        }
}
#endif

#if INT8
#define STEP 2
typedef Quant<TYPE> Q;
#define PARTS (Q::TWO ? 2 : 1)
#define SCALES (PARTS * (Q::MIN ? 2 : 1))
// What sums start from: 1.5 * 2^23 as a float, so that the bits of sum + MAGIC are those of the float MAGIC_F + sum.
#define MAGIC 0x4b400000
#define MAGIC_F 12582912.0f

struct Shared {
    uint4 w[2][128 * STEP * 2];             // codes of 128 outputs
    uint4 x[STAGES][TILE * STEP * 2];
    Q8Head heads[STAGES][STEP][TILE];
    float scale[2][STEP][SCALES][128];      // scales, then minima, of each part of a unit
};

// Place of 16 bytes in rows of 64: permuted so that eight rows meet eight banks.
DEVICE int place(int row, int chunk) { return row * (STEP * 2) + (chunk ^ (row >> 1 & 3)); }

DEVICE float sum_of(int magic) { return __int_as_float(magic) - MAGIC_F; }

// Grid (ceil(n_out / (PAIR ? 64 : 128)), row tiles), 256 threads, sizeof(Shared) bytes of shared memory.
KERNEL __launch_bounds__(256, 1) gemm_int8(const GemmArgs a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& sh = *(Shared*)memory;
    static_assert(sizeof(Shared) <= INT8_SHARED, "Shared differs from prompt.rs");
    RowTile tile;
    if (!find_tile(a, TILE, tile)) return;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int units = a.n_in / 32, steps = (units + STEP - 1) / STEP;

    // A thread expands one unit of one row of W a step. PAIR: per 32 rows, 16 of gate, then the same 16 of up.
    const int wr = tid >> 1, half = tid & 1;
    const int out0 = blockIdx.x * (PAIR ? 64 : 128);
    const int out = min(out0 + (PAIR ? (wr >> 5) * 16 + (wr & 15) : wr), a.n_out - 1);
    const u8* source = (const u8*)(tile.slot + (PAIR && (wr & 16) ? a.w2 : a.w));
    const u64 unit0 = (u64)out * units + half;
    Q::Raw raw;
    auto load_w = [&](int step) {
        if (step * STEP + half < units) raw = Q::load(source, a.n_blocks, unit0 + step * STEP);
    };
    auto store_w = [&](int step) {
        Unit u = {};
        if (step * STEP + half < units) {
            Q::expand(raw, unit0 + step * STEP, u);
            if (Q::OFFSET != 0)
#pragma unroll
                for (int i = 0; i < 8; i++) u.q[i] = ((u.q[i] | 0x80808080u) - Q::OFFSET * 0x01010101u) ^ 0x80808080u;
        }
        uint4* to = sh.w[step & 1];
        to[place(wr, half * 2)] = make_uint4(u.q[0], u.q[1], u.q[2], u.q[3]);
        to[place(wr, half * 2 + 1)] = make_uint4(u.q[4], u.q[5], u.q[6], u.q[7]);
        float(&scale)[SCALES][128] = sh.scale[step & 1][half];
        scale[0][wr] = u.s0;
        if (Q::TWO) scale[1][wr] = u.s1;
        if (Q::MIN) scale[PARTS][wr] = u.m0;
        if (Q::MIN && Q::TWO) scale[SCALES - 1][wr] = u.m1;
    };
    constexpr int X_COPIES = (TILE * STEP * 2 + 255) / 256;
    auto row_of = [&](int r) -> u64 {
        const int row = tile.first + (r < tile.n ? r : 0);
        return a.gather ? a.gather[row] : row;
    };
    const u8* x_row[X_COPIES];
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) x_row[i] = (const u8*)a.x + row_of((tid + i * 256) / (STEP * 2)) * a.n_in;
    const Q8Head* head_row = a.heads + row_of(tid / STEP) * units;
    auto load_x = [&](int step) {
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < X_COPIES; i++) {
                const int r = (tid + i * 256) / (STEP * 2), chunk = tid % (STEP * 2), k = step * STEP * 32 + chunk * 16;
                const bool valid = r < tile.n && k < a.n_in;
                if (r < TILE) copy_async_16(&sh.x[step % STAGES][place(r, chunk)], x_row[i] + (valid ? k : 0), valid);
            }
            const int r = tid / STEP, unit = step * STEP + tid % STEP;
            const bool valid = r < tile.n && unit < units;
            if (r < TILE) copy_async_8(&sh.heads[step % STAGES][tid % STEP][r], head_row + (valid ? unit : 0), valid);
        }
        copy_async_commit();
    };

    constexpr int MT = TILE / 32;           // 16-row tiles of a warp; 2 x 4 warps
    const int m0 = (warp & 1) * MT * 16, n0 = (warp >> 1) * 32;
    float acc[MT][4][4] = {};

    for (int s = 0; s < STAGES - 1; s++) load_x(s);
    load_w(0);
    store_w(0);
    load_w(1);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load_x(step + STAGES - 1);
        if (step + 1 < steps) store_w(step + 1);
        load_w(step + 2);
        const u32 wa = smem_address(sh.w[step & 1]), xa = smem_address(sh.x[step % STAGES]);
#pragma unroll 1
        for (int u = 0; u < STEP; u++) {
            const Q8Head* heads = sh.heads[step % STAGES][u];
            u32 fb[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
                ldmatrix_x4(fb[j], wa + 16 * place(n0 + j * 16 + (lane & 7) + ((lane >> 4) << 3), u * 2 + ((lane >> 3) & 1)));
#pragma unroll
            for (int i = 0; i < MT; i++) {
                u32 fa[4];
                ldmatrix_x4(fa, xa + 16 * place(m0 + i * 16 + (lane & 15), u * 2 + (lane >> 4)));
                float d[2], sum[2][PARTS];      // of rows lane / 4 and that plus 8
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int2 head = *(const int2*)&heads[m0 + i * 16 + lane / 4 + h * 8];
                    d[h] = __int_as_float(head.x);
                    if constexpr (Q::MIN && Q::TWO) {
                        sum[h][0] = d[h] * sum_of(__dp2a_lo(head.y, 0x0001, MAGIC));
                        sum[h][1] = d[h] * sum_of(__dp2a_lo(head.y, 0x0100, MAGIC));
                    } else if constexpr (Q::MIN) {
                        sum[h][0] = d[h] * sum_of(__dp2a_lo(head.y, 0x0101, MAGIC));
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32* b = &fb[j >> 1][(j & 1) * 2];
                    float2 scale[SCALES];       // of outputs 2 (lane % 4) and the next
#pragma unroll
                    for (int k = 0; k < SCALES; k++) scale[k] = *(const float2*)&sh.scale[step & 1][u][k][n0 + j * 8 + (lane & 3) * 2];
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        if constexpr (Q::MIN) {
                            const float2 m = scale[PARTS + p];
#pragma unroll
                            for (int e = 0; e < 4; e++) acc[i][j][e] = fmaf(-(e & 1 ? m.y : m.x), sum[e >> 1][p], acc[i][j][e]);
                        }
                        int c[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
                        if constexpr (Q::TWO) mma_i8_16816(c, fa[2 * p], fa[2 * p + 1], b[p]);
                        else mma_i8_16832(c, fa, b[0], b[1]);
                        const float2 s = scale[p];
#pragma unroll
                        for (int e = 0; e < 4; e++) acc[i][j][e] = fmaf(sum_of(c[e]), (e & 1 ? s.y : s.x) * d[e >> 1], acc[i][j][e]);
                    }
                }
            }
        }
    }
    store_tile<MT>(a, tile, acc, m0, n0, out0);
}

#elif ROWS >= 64
// Address of 16 bytes in a tile of rows of 64 16-bit numbers; the chunks of a row are permuted so that eight rows meet
// eight banks.
DEVICE u32 swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Grid (ceil(n_out / (PAIR ? 64 : 128)), row tiles), 256 threads, (2 * 128 + STAGES * TILE) * 128 bytes of shared
// memory.
#if PAIR && __CUDA_ARCH__ >= 1000
// Left to itself the compiler stops at 128 registers there and spills.
KERNEL __launch_bounds__(256, 1) gemm_tile(const GemmArgs a) {
#else
KERNEL __launch_bounds__(256) gemm_tile(const GemmArgs a) {
#endif
    extern __shared__ __align__(128) u8 shared[];
    u8* ws = shared;                        // [2][128][64] 16-bit
    u8* xs = shared + 2 * 128 * 128;        // [STAGES][TILE][64] 16-bit
    RowTile tile;
    if (!find_tile(a, TILE, tile)) return;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int units = a.n_in / 32, steps = (units + 1) / 2;

    // A thread decodes one unit of one row of W a step. PAIR: per 32 rows, 16 of gate, then the same 16 of up.
    const int wr = tid >> 1, half = tid & 1;
    const int out0 = blockIdx.x * (PAIR ? 64 : 128);
    const int out = min(out0 + (PAIR ? (wr >> 5) * 16 + (wr & 15) : wr), a.n_out - 1);
    const u8* source = (const u8*)(tile.slot + (PAIR && (wr & 16) ? a.w2 : a.w));
    const u64 unit0 = (u64)out * units + half;
    Source::Raw raw;

    auto load_w = [&](int step) {
        if (step * 2 + half < units) raw = Source::load(source, a.n_blocks, unit0 + step * 2);
    };
    auto store_w = [&](int step) {
        uint4 v[4];
        if (step * 2 + half < units) Source::decode(raw, unit0 + step * 2, v);
        else v[0] = v[1] = v[2] = v[3] = make_uint4(0, 0, 0, 0);
        u8* to = ws + (step & 1) * 128 * 128;
#pragma unroll
        for (int i = 0; i < 4; i++) *(uint4*)(to + swizzled(wr, half * 4 + i)) = v[i];
    };
    constexpr int X_COPIES = TILE * 8 / 256;
    const u16* x_row[X_COPIES];
    bool x_valid[X_COPIES];
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        const int r = (tid + i * 256) >> 3;
        x_valid[i] = r < tile.n;
        const int row = tile.first + (x_valid[i] ? r : 0);
        x_row[i] = (const u16*)a.x + (u64)(a.gather ? a.gather[row] : row) * a.n_in;
    }
    auto load_x = [&](int step) {
        if (step < steps) {
            u8* to = xs + step % STAGES * TILE * 128;
#pragma unroll
            for (int i = 0; i < X_COPIES; i++) {
                const int r = (tid + i * 256) >> 3, chunk = tid & 7, k = step * 64 + chunk * 8;
                const bool valid = x_valid[i] && k < a.n_in;
                copy_async_16(to + swizzled(r, chunk), x_row[i] + (valid ? k : 0), valid);
            }
        }
        copy_async_commit();
    };

    constexpr int MT = TILE / 32;           // 16-row tiles of a warp; 2 x 4 warps
    const int m0 = (warp & 1) * MT * 16, n0 = (warp >> 1) * 32;
    float acc[MT][4][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;

    for (int s = 0; s < STAGES - 1; s++) load_x(s);
    load_w(0);
    store_w(0);
    load_w(1);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load_x(step + STAGES - 1);
        if (step + 1 < steps) store_w(step + 1);
        load_w(step + 2);
        const u32 wa = smem_address(ws + (step & 1) * 128 * 128), xa = smem_address(xs + step % STAGES * TILE * 128);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 fa[MT][4], fb[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
                ldmatrix_x4(fb[j], wa + swizzled(n0 + j * 16 + (lane & 7) + ((lane >> 4) << 3), k * 2 + ((lane >> 3) & 1)));
#pragma unroll
            for (int i = 0; i < MT; i++) ldmatrix_x4(fa[i], xa + swizzled(m0 + i * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_16816<Source::IS_F16>(acc[i][j], fa[i], fb[j >> 1][(j & 1) * 2], fb[j >> 1][(j & 1) * 2 + 1]);
        }
    }

    store_tile<MT>(a, tile, acc, m0, n0, out0);
}

#elif ROWS == 1
struct DecodeRowsArgs {
    const u8* w;             // planes
    u16* out;                // [n_units, 32] 16-bit
    u64 n_blocks;            // blocks of the whole tensor
    u64 first;               // unit of the tensor that comes first
    u64 n_units;
};
static_assert(sizeof(DecodeRowsArgs) == DECODE_ROWS_ARGS, "DecodeRowsArgs differs from prompt.rs");

// Grid (ceil(n_units / 256)), 256 threads. A warp's units pass through shared memory, so that it writes whole lines.
KERNEL __launch_bounds__(256) decode_rows(const DecodeRowsArgs a) {
    __shared__ __align__(16) uint4 staged[8][32][5];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u64 first = (u64)blockIdx.x * 256 + warp * 32, unit = first + lane;
    if (unit < a.n_units) {
        uint4 v[4];
        Source::decode(Source::load(a.w, a.n_blocks, a.first + unit), a.first + unit, v);
#pragma unroll
        for (int i = 0; i < 4; i++) staged[warp][lane][i] = v[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int u = i * 8 + lane / 4;
        if (first + u < a.n_units) ((uint4*)a.out)[(first + u) * 4 + lane % 4] = staged[warp][u][lane % 4];
    }
}

#elif ROWS
// Grid (ceil(n_out / (PAIR ? 16 : 32)), row tiles of ROWS), 256 threads. Every warp takes an eighth of the inputs of 32
// rows of W.
// Inside a group of 128 inputs the order is permuted alike for W and X, so that a lane's 32 weights are consecutive.
KERNEL __launch_bounds__(256, 1) gemm_rows(const GemmArgs a) {
    constexpr int NT = ROWS / 8;
    __shared__ float partial[8][2][NT][4][32];
    RowTile tile;
    if (!find_tile(a, ROWS, tile)) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int r = lane >> 2, c = lane & 3, units = a.n_in / 32, groups = (units + 3) / 4;
    const int out0 = blockIdx.x * (PAIR ? 16 : 32);
    float acc[2][NT][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
    u64 unit0[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            unit0[i][h] = (u64)min(out0 + (PAIR ? 0 : i * 16) + r + h * 8, a.n_out - 1) * units + c;
    const u8* source[2] = {(const u8*)(tile.slot + a.w), (const u8*)(tile.slot + (PAIR ? a.w2 : a.w))};
    const u16* x_row[NT];
    bool x_valid[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        x_valid[j] = j * 8 + r < tile.n;
        const int row = tile.first + (x_valid[j] ? j * 8 + r : 0);
        x_row[j] = (const u16*)a.x + (u64)(a.gather ? a.gather[row] : row) * a.n_in + c * 32;
    }
    Source::Raw raw[2][2];
    auto load = [&](int g) {
        if (g * 4 + c >= units) return;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) raw[i][h] = Source::load(source[i], a.n_blocks, unit0[i][h] + g * 4);
    };
    load(warp);
    for (int g = warp; g < groups; g += 8) {
        const bool valid = g * 4 + c < units;
        uint4 w[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (valid) Source::decode(raw[i][h], unit0[i][h] + g * 4, w[i][h]);
                else w[i][h][0] = w[i][h][1] = w[i][h][2] = w[i][h][3] = make_uint4(0, 0, 0, 0);
            }
        load(g + 8);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint4 x[NT];
#pragma unroll
            for (int j = 0; j < NT; j++)
                x[j] = x_valid[j] && valid ? *(const uint4*)(x_row[j] + g * 128 + q * 8) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 lo[4] = {w[i][0][q].x, w[i][1][q].x, w[i][0][q].y, w[i][1][q].y};
                const u32 hi[4] = {w[i][0][q].z, w[i][1][q].z, w[i][0][q].w, w[i][1][q].w};
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    mma_16816<Source::IS_F16>(acc[i][j], lo, x[j].x, x[j].y);
                    mma_16816<Source::IS_F16>(acc[i][j], hi, x[j].z, x[j].w);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) partial[warp][i][j][e][lane] = acc[i][j][e];
    __syncthreads();
    // Fragment element e of lane l is output l / 4 + 8 (e / 2), row (l % 4) * 2 + e % 2.
    const float scale = a.scale ? a.scale[tile.expert] : 1.0f;
    for (int q = threadIdx.x; q < (PAIR ? 1 : 2) * NT * 128; q += 256) {
        const int o = q % 16, row = q / 16 % ROWS, i = q / (16 * ROWS);
        const int l = (o & 7) * 4 + (row & 7) / 2, e = (o >> 3) * 2 + (row & 1), j = row / 8;
        const int col = out0 + i * 16 + o;
        if (row >= tile.n || col >= a.n_out) continue;
        float v = 0.0f;
#pragma unroll
        for (int p = 0; p < 8; p++) v += partial[p][i][j][e][l];
        v *= scale;
        const u64 at = (u64)(tile.first + row) * a.ld_y + col;
#if PAIR
        float up = 0.0f;
#pragma unroll
        for (int p = 0; p < 8; p++) up += partial[p][1][j][e][l];
        v = silu(v) * (up * (a.scale2 ? a.scale2[tile.expert] : 1.0f));
        ((u16*)a.y)[at] = a.y_kind == 1 ? to_half<true>(v) : to_half<false>(v);
#else
        float* y = (float*)a.y + at;
        if (a.bias) v += a.bias[col];
        *y = a.add ? *y + v : v;
#endif
    }
}

#else
DEVICE float weight_f32(const u8* w, u64 i) {
#if TYPE == 0
    return ((const float*)w)[i];
#elif TYPE == 1
    return half_to_float(((const u16*)w)[i]);
#else
    return bf16_to_float(((const u16*)w)[i]);
#endif
}

// Grid (ceil(n_out / 16), row tiles of 8), 256 threads; a warp makes 2 outputs of 8 rows. x and y are f32.
KERNEL __launch_bounds__(256) gemm_f32(const GemmArgs a) {
    RowTile tile;
    if (!find_tile(a, 8, tile)) return;
    const int lane = threadIdx.x & 31, out = blockIdx.x * 16 + (threadIdx.x >> 5) * 2;
    if (out >= a.n_out) return;
    const u8* w = (const u8*)(tile.slot + a.w);
    const u64 w0 = (u64)out * a.n_in, w1 = out + 1 < a.n_out ? w0 + a.n_in : w0;
    const float* x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = tile.first + min(i, tile.n - 1);
        x[i] = (const float*)a.x + (u64)(a.gather ? a.gather[row] : row) * a.n_in;
    }
    float acc[2][8] = {};
    for (int k = lane; k < a.n_in; k += 32) {
        const float u = weight_f32(w, w0 + k), v = weight_f32(w, w1 + k);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float xi = x[i][k];
            acc[0][i] += u * xi;
            acc[1][i] += v * xi;
        }
    }
    const float scale = a.scale ? a.scale[tile.expert] : 1.0f;
#pragma unroll
    for (int o = 0; o < 2; o++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float v = warp_sum(acc[o][i]) * scale;
            if (lane != i || i >= tile.n || out + o >= a.n_out) continue;
            if (a.bias) v += a.bias[out + o];
            float* y = (float*)a.y + (u64)(tile.first + i) * a.ld_y + out + o;
            *y = a.add ? *y + v : v;
        }
}
#if TYPE == 0
// The same for many rows, through shared memory and in three tf32 products, which are as good as f32. Grid
// (ceil(n_out / 64), row tiles of 64), 256 threads.
KERNEL __launch_bounds__(256) gemm_f32_tile(const GemmArgs a) {
    constexpr int K = 32, LD = K + 4;
    __shared__ __align__(16) float ws[2][64 * LD], xs[2][64 * LD];
    RowTile tile;
    if (!find_tile(a, 64, tile)) return;
    const int out0 = blockIdx.x * 64;
    const float* w = (const float*)(tile.slot + a.w);
    auto load = [&](int step) {
        float *to_w = ws[step & 1], *to_x = xs[step & 1];
        const int k0 = step * K;
        const bool wide = a.n_in % 4 == 0;
        const int width = wide ? 4 : 1, per_row = K / width;
        for (int i = threadIdx.x; i < 64 * per_row && k0 < a.n_in; i += 256) {
            const int r = i / per_row, k = i % per_row * width;
            const bool in_w = out0 + r < a.n_out && k0 + k < a.n_in, in_x = r < tile.n && k0 + k < a.n_in;
            const int row = tile.first + (in_x ? r : 0);
            const float* from_w = w + (in_w ? (u64)(out0 + r) * a.n_in + k0 + k : 0);
            const float* from_x = (const float*)a.x + (in_x ? (u64)(a.gather ? a.gather[row] : row) * a.n_in + k0 + k : 0);
            if (wide) {
                copy_async_16(to_w + r * LD + k, from_w, in_w);
                copy_async_16(to_x + r * LD + k, from_x, in_x);
            } else {
                copy_async_4(to_w + r * LD + k, from_w, in_w);
                copy_async_4(to_x + r * LD + k, from_x, in_x);
            }
        }
        copy_async_commit();
    };
    // Sums of a step are added here, rounded: over many steps the truncation of the units' own sums would show.
    Tile<64, 64, 4, 2> t, part;
    t.zero();
    load(0);
    for (int step = 0; step * K < a.n_in; step++) {
        load(step + 1);
        copy_async_wait<1>();
        __syncthreads();
        part.zero();
        part.template multiply<false, true, K>(xs[step & 1], LD, ws[step & 1], LD);
#pragma unroll
        for (int j = 0; j < t.NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) t.v[0][j][e] += part.v[0][j][e];
        __syncthreads();
    }
    const float scale = a.scale ? a.scale[tile.expert] : 1.0f;
    t.each([&](int r, int c, float& x) {
        if (r >= tile.n || out0 + c >= a.n_out) return;
        float* y = (float*)a.y + (u64)(tile.first + r) * a.ld_y + out0 + c;
        float v = x * scale;
        if (a.bias) v += a.bias[out0 + c];
        *y = a.add ? *y + v : v;
    });
}
#endif
#endif
