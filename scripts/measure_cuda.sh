#!/usr/bin/env bash
# Measures whole models on GPU 0 and prints the rows that docs/performance.md is made of:
#   scripts/measure_cuda.sh FOLDER [whole|depth|load|both|cpu ...]
# Without names everything. Synthetic models of the released shapes are made in FOLDER where they are not there yet (68 GB
# for all; a RAM disk suits). TANDEM names a program that is built already.
set -euo pipefail
folder=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
stages=${*:-whole depth load both cpu}
tandem=${TANDEM:-target/release/tandem}
[ -n "${TANDEM:-}" ] || cargo build --release --locked

make_model() { # PRESET QUANT [OPTION ...]
    local out="$folder/$1-$2${3:+-skewed}.gguf"
    [ -e "$out" ] || (cd scripts/reference && python3 -m oracle.make_gguf --preset "$1" --quant "$2" "${@:3}" --out "$out.new" \
        >&2 && mv "$out.new" "$out")
}
wanted() { [[ " $stages " == *" $1 "* ]]; }
bench() { # MODEL-QUANT [OPTION ...]
    echo "### $*"
    "$tandem" bench "$folder/$1.gguf" --log info "${@:2}" 2>&1 || echo "failed: $?"
    echo
}

models="qwen3.5-0.8b qwen3.5-4b qwen3.5-9b qwen3.5-27b qwen3.5-35b-a3b"
for model in $models; do make_model "$model" Q4_K_M & done
if wanted both; then make_model qwen3.5-35b-a3b Q4_K_M --set router_skew=1 & fi
wait

"$tandem" probe --refresh
if wanted whole; then
    for model in $models; do bench "$model-Q4_K_M" -p 2048,8192 -n 128 -r 3; done
fi
if wanted depth; then bench qwen3.5-9b-Q4_K_M -p 0 -n 64 -d 16384 -r 3; fi
if wanted load; then
    for model in qwen3.5-9b qwen3.5-27b; do bench "$model-Q4_K_M" -p 0 -n 8 -r 1; done
fi
if wanted both; then
    bench qwen3.5-27b-Q4_K_M --vram 12G --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-27b-Q4_K_M --vram 16G --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-35b-a3b-Q4_K_M --place 'blk.*.moe=cuda0:0%' --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-35b-a3b-Q4_K_M --vram 12G --threads 16 -p 512 -n 128 -r 3
    bench qwen3.5-35b-a3b-Q4_K_M-skewed --vram 12G --threads 16 -p 512 -n 128 -r 3
fi
if wanted cpu; then
    for model in qwen3.5-0.8b qwen3.5-4b qwen3.5-35b-a3b; do bench "$model-Q4_K_M" --vram 0 --threads 16 -p 512 -n 64 -r 3; done
fi
