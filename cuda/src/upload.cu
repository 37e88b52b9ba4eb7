// Sorts blocks of a file's tensor into the planes of layout.rs. One thread per unit of 32 elements; moves every
// byte once in and once out. Refuses float types: their layout is the file's.
#include "planes.cuh"

struct RelayoutArgs {
    const u8* source;  // [n_blocks * block bytes], as in the file
    u8* weight;        // start of the tensor on the device
    u64 group;         // blocks of one matrix of the stack, which has planes of its own
    u64 stride;        // bytes from one matrix to the next
    u64 first;         // block of the tensor at which `source` starts
    u64 n_blocks;
};
static_assert(sizeof(RelayoutArgs) == RELAYOUT_ARGS, "RelayoutArgs differs from upload.rs");

template <int TY> DEVICE void relayout_all(const RelayoutArgs& a) {
    constexpr int UNITS = Quant<TY>::BLOCK / 32;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n_blocks * UNITS) return;
    const u64 block = i / UNITS, at = a.first + block, matrix = at / a.group;
    u8* to = a.weight + matrix * a.stride;
    relayout_unit<TY>(a.source + block * BLOCK_BYTES, (int)(i % UNITS), to, a.group, at - matrix * a.group);
}

KERNEL relayout(const RelayoutArgs a) { relayout_all<TYPE>(a); }

// Every element as a float, for tests: one thread each.
struct DecodeArgs {
    const u8* weight;
    float* out;    // [n]
    u64 n_total;   // blocks
    u64 n;         // elements
};
static_assert(sizeof(DecodeArgs) == DECODE_ARGS, "DecodeArgs differs from upload.rs");

KERNEL decode(const DecodeArgs a) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.n) a.out[i] = value<TYPE>(a.weight, a.n_total, i);
}
