#!/bin/sh
# Runs the tests of the reader and of the CPU kernels under AddressSanitizer and valgrind, on Linux x86-64:
#   scripts/sanitize.sh [address|valgrind]
# AddressSanitizer is an unstable option of rustc; RUSTC_BOOTSTRAP lets the stable toolchain of the project have it.
# valgrind hides AVX-512 from programs: the kernels it sees are AVX2 and portable. It is slow: long tests are left out.
set -eu
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-gnu

address() {
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_leaks=0
    # handle_sigbus=0: the reader answers SIGBUS itself.
    export ASAN_OPTIONS="$ASAN_OPTIONS:handle_sigbus=0"
    cargo test --release --target $target --target-dir target/address -p tandem-spec -p tandem-cpu --lib
    cargo test --release --target $target --target-dir target/address -p tandem --lib -- gguf model
    cargo test --release --target $target --target-dir target/address -p tandem --test tests -- suite::files corpus models mutations
}

valgrind_() {
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=no"
    # A target of its own name, so that only test programs run in valgrind and not build scripts.
    cargo test --release --target $target -p tandem --test tests -- suite::files corpus::every_crafted models::fused
    cargo test --release --target $target -p tandem-cpu --lib -- --skip bench
}

case ${1:-all} in
    address) address ;;
    valgrind) valgrind_ ;;
    all) address; valgrind_ ;;
    *) echo "usage: scripts/sanitize.sh [address|valgrind]" >&2; exit 2 ;;
esac
