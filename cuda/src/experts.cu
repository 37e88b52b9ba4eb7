// Changes entries of tables of experts, between two steps.
#include "common.cuh"

#define N_ENTRIES 32

struct SetArgs {
    u64 at[N_ENTRIES];    // addresses of entries
    u64 value[N_ENTRIES];
    u64 n;
};
static_assert(sizeof(SetArgs) == SET_ARGS, "SetArgs differs from experts.rs");

KERNEL __launch_bounds__(N_ENTRIES) set_entries(const SetArgs a) {
    if (threadIdx.x < a.n) *reinterpret_cast<u64*>(a.at[threadIdx.x]) = a.value[threadIdx.x];
}
