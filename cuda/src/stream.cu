// Sorts panels that the CPU has packed (tandem_spec::panel) into the planes of layout.rs, of float types into rows. A
// block of threads takes PANEL_ROWS rows by COLUMNS blocks through shared memory: reads and writes device memory in
// runs.
// Set by the compiler: TYPE, BLOCK_BYTES, PANEL_ROWS, COLUMNS; FIELDS of a block in packed order and N_FIELDS; PLANES,
// bytes per block of each plane, and N_PLANES.
#include "planes.cuh"

// A field of a packed block: where it lies in the file's block, its bytes, the bytes of its unit.
struct Field {
    int offset, len, unit;
};
DEVICE constexpr Field field(int i) {
    constexpr Field all[] = {FIELDS};
    return all[i];
}
DEVICE constexpr int plane(int i) {
    constexpr int all[] = {PLANES};
    return all[i];
}

#define THREADS 256
// Rows lie one bank apart, so that the rows of a unit are written without conflicts.
#define ROW_BYTES ((COLUMNS * BLOCK_BYTES + 127) / 128 * 128 + 4)
#define TILE_BLOCKS (PANEL_ROWS * COLUMNS)

struct UnpackArgs {
    const u8* source;    // where panel 0 of the first matrix would lie, were the chunk as long
    u8* weight;          // planes of the first matrix
    u64 source_stride;   // bytes from a matrix to the next, packed
    u64 weight_stride;   // and in planes
    u32 n_rows;          // of a matrix
    u32 n_columns;       // blocks of a row
    u32 n_panels;        // of a matrix
    u32 first;           // panel of the chunk's start, counted over all matrices
};
static_assert(sizeof(UnpackArgs) == UNPACK_ARGS, "UnpackArgs differs from stream.rs");

// Undoes the interleaving of field I, which begins at byte AT * PANEL_ROWS of each packed block: `n` blocks of each
// row at `source` to `tile` [PANEL_ROWS, ROW_BYTES].
template <int I, int AT> DEVICE void gather(const u8* source, u8* tile, int n) {
    if constexpr (I < N_FIELDS) {
        constexpr Field F = field(I);
        constexpr int WORDS = F.len * PANEL_ROWS / 4;
        for (int i = threadIdx.x; i < n * WORDS; i += THREADS) {
            const int c = i / WORDS, w = i % WORDS;
            const u8* from = source + (u64)c * (BLOCK_BYTES * PANEL_ROWS) + AT * PANEL_ROWS + 4 * w;
            const u32 word = __ldg(reinterpret_cast<const u32*>(from));
            if constexpr (F.unit == 4 && F.offset % 4 == 0 && BLOCK_BYTES % 4 == 0) {
                u8* to = tile + w % PANEL_ROWS * ROW_BYTES + c * BLOCK_BYTES + F.offset + w / PANEL_ROWS * 4;
                *reinterpret_cast<u32*>(to) = word;
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = 4 * w + j, row = at / F.unit % PANEL_ROWS;
                    const int byte = at / (F.unit * PANEL_ROWS) * F.unit + at % F.unit;
                    tile[row * ROW_BYTES + c * BLOCK_BYTES + F.offset + byte] = (u8)(word >> (8 * j));
                }
            }
        }
        gather<I + 1, AT + F.len>(source, tile, n);
    }
}

template <typename T> DEVICE void copy_rows(u8* to, const u8* from, u64 to_stride, int from_stride, int bytes, int rows) {
    const int n = bytes / (int)sizeof(T);
    for (int i = threadIdx.x; i < rows * n; i += THREADS) {
        const int row = i / n, at = i % n * (int)sizeof(T);
        *reinterpret_cast<T*>(to + row * to_stride + at) = *reinterpret_cast<const T*>(from + row * from_stride + at);
    }
}

// Copies plane I and those that follow, which begin AT bytes per block behind the start of `planes` (of a tile) and
// `weight` (of a matrix of n_total blocks): `n` blocks of each of `rows` rows, from block `first` of the matrix on.
template <int I, int AT> DEVICE void scatter(const u8* planes, u8* weight, u64 n_total, u64 first, u64 n_columns, int n, int rows) {
    if constexpr (I < N_PLANES) {
        constexpr int BYTES = plane(I);
        const u8* from = planes + AT * TILE_BLOCKS;
        u8* to = weight + AT * n_total + first * BYTES;
        const u64 together = (u64)to | n_columns * BYTES | (u64)(n * BYTES);
        if (together % 16 == 0 && COLUMNS * BYTES % 16 == 0) copy_rows<uint4>(to, from, n_columns * BYTES, COLUMNS * BYTES, n * BYTES, rows);
        else if (together % 4 == 0 && COLUMNS * BYTES % 4 == 0) copy_rows<u32>(to, from, n_columns * BYTES, COLUMNS * BYTES, n * BYTES, rows);
        else copy_rows<u8>(to, from, n_columns * BYTES, COLUMNS * BYTES, n * BYTES, rows);
        scatter<I + 1, AT + BYTES>(planes, weight, n_total, first, n_columns, n, rows);
    }
}

// Grid (panels, ceil(n_columns / COLUMNS)): PANEL_ROWS rows by COLUMNS blocks, through shared memory.
KERNEL __launch_bounds__(THREADS) unpack(const UnpackArgs a) {
    extern __shared__ __align__(16) u8 shared[];
    u8 *planes = shared, *tile = shared + TILE_BLOCKS * BLOCK_BYTES;
    const u32 panel = a.first + blockIdx.x, matrix = panel / a.n_panels, row = panel % a.n_panels * PANEL_ROWS;
    const u32 column = blockIdx.y * COLUMNS;
    const int n = min(COLUMNS, a.n_columns - column), rows = min(PANEL_ROWS, a.n_rows - row);
    const u64 panel_bytes = (u64)a.n_columns * (BLOCK_BYTES * PANEL_ROWS);
    const u8* source = a.source + matrix * a.source_stride + panel % a.n_panels * panel_bytes;
    gather<0, 0>(source + (u64)column * (BLOCK_BYTES * PANEL_ROWS), tile, n);
    __syncthreads();
    if constexpr (is_float(TYPE)) {
        for (int i = threadIdx.x; i < PANEL_ROWS * n; i += THREADS)
            copy(planes + (i / n * COLUMNS + i % n) * BLOCK_BYTES, tile + i / n * ROW_BYTES + i % n * BLOCK_BYTES, BLOCK_BYTES);
    } else {
        constexpr int UNITS = Quant<is_float(TYPE) ? Q4_0 : TYPE>::BLOCK / 32;
        for (int i = threadIdx.x; i < PANEL_ROWS * n * UNITS; i += THREADS) {
            const int block = i / UNITS, r = block / n, c = block % n;
            relayout_unit<TYPE>(tile + r * ROW_BYTES + c * BLOCK_BYTES, i % UNITS, planes, TILE_BLOCKS, r * COLUMNS + c);
        }
    }
    __syncthreads();
    u8* weight = a.weight + matrix * a.weight_stride;
    scatter<0, 0>(planes, weight, (u64)a.n_rows * a.n_columns, (u64)row * a.n_columns + column, a.n_columns, n, rows);
}
