#!/bin/sh
# Runs the golden models, the samplers and the blocks on GPU 0 under compute-sanitizer (part of the CUDA toolkit):
#   scripts/sanitize_cuda.sh [memcheck|racecheck|initcheck|synccheck ...]
# Without arguments memcheck, then racecheck. TESTS and CUDA_TESTS name test programs of tandem and tandem-cuda that are
# built already; racecheck looks at shared memory only and slows kernels down a lot.
set -eu
cd "$(dirname "$0")/.."
built() {
    cargo test --release --no-run --message-format=json -p "$1" --test tests |
        sed -n 's/.*"executable":"\([^"]*\/deps\/tests-[^"]*\)".*/\1/p' | tail -n 1
}
tests=${TESTS:-$(built tandem)}
cuda_tests=${CUDA_TESTS:-$(built tandem-cuda)}
for tool in ${@:-memcheck racecheck}; do
    check="compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20"
    echo "$tool: golden models"
    # racecheck takes milliseconds a kernel: not for 200 tokens of every model one or seven at a time.
    if [ "$tool" = racecheck ]; then golden="--exact suite::golden_cuda::cuda_gives_the_golden_logits_in_chunks"; else golden=golden_cuda; fi
    $check "$tests" --test-threads 1 $golden
    echo "$tool: samplers"
    $check "$cuda_tests" --test-threads 1 sample::unusable sample::a_token
    echo "$tool: blocks"
    $check "$cuda_tests" --test-threads 1 blocks::
done
