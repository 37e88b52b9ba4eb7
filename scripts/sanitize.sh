#!/bin/sh
# Runs the tests of the reader and of the CPU kernels under AddressSanitizer and valgrind, on Linux x86-64:
#   scripts/sanitize.sh [address|valgrind]
# AddressSanitizer is an unstable option of rustc; RUSTC_BOOTSTRAP lets the stable toolchain of the project have it.
# valgrind hides AVX-512 from programs: the kernels it sees are AVX2 and portable, and it is too slow for the mutations.
set -eu
cd "$(dirname "$0")/.."

# Of the blocks, the narrow ones have every kernel, layout and tail.
narrow="--skip released_widths --skip chunks_and_snapshots"

# In a subshell: the flags must not reach the other run. With a target, build scripts and macros are not instrumented.
address() (
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address"
    # handle_sigbus=0: the reader answers SIGBUS itself.
    export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0
    run="cargo test --release --target x86_64-unknown-linux-gnu --target-dir target/address"
    $run -p tandem-spec -p tandem-cpu --lib --test blocks -- $narrow
    $run -p tandem --lib -- gguf model
    $run -p tandem --test tests -- suite::files corpus models mutations
)

# The runner is for test programs: build scripts run without it.
valgrind_() (
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=no --fair-sched=yes"
    cargo test --release -p tandem-cpu --lib --test blocks -- $narrow
    cargo test --release -p tandem --test tests -- suite::files corpus::every_crafted models::fused
)

case ${1:-all} in
    address) address ;;
    valgrind) valgrind_ ;;
    # Not joined by &&, which would switch `set -e` off inside of the first.
    all) address; valgrind_ ;;
    *) echo "usage: scripts/sanitize.sh [address|valgrind]" >&2; exit 2 ;;
esac
