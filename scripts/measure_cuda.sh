#!/usr/bin/env bash
# Measures whole models on GPU 0 and prints the rows that docs/performance.md is made of:
#   scripts/measure_cuda.sh FOLDER [whole|depth|load|both|cpu|kernels ...]
# Without names everything but `kernels`. Synthetic models of the released shapes are made in FOLDER where they are not
# there yet (43 GB for all; a RAM disk suits). TANDEM and DECODE name programs that are built already; `kernels` needs
# Nsight Compute.
set -euo pipefail
folder=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
stages=${*:-whole depth load both cpu}
tandem=${TANDEM:-target/release/tandem}
[ -n "${TANDEM:-}" ] || cargo build --release --locked

make_model() { # PRESET QUANT [OPTION ...]
    local out="$folder/$1-$2.gguf"
    [ -e "$out" ] || (cd scripts/reference && python3 -m oracle.make_gguf --preset "$1" --quant "$2" "${@:3}" --out "$out.new" \
        >&2 && mv "$out.new" "$out")
}
wanted() { [[ " $stages " == *" $1 "* ]]; }
bench() { # MODEL [OPTION ...]
    echo "### $*"
    "$tandem" bench "$folder/$1-Q4_K_M.gguf" --log info "${@:2}" 2>&1 || echo "failed: $?"
    echo
}

models="qwen3.5-0.8b qwen3.5-4b qwen3.5-9b qwen3.5-27b qwen3.5-35b-a3b"
for model in $models; do make_model "$model" Q4_K_M & done
wait

"$tandem" probe --refresh
if wanted whole; then
    for model in $models; do bench "$model" -p 2048,8192 -n 128 -r 3; done
fi
if wanted depth; then bench qwen3.5-9b -p 0 -n 64 -d 16384 -r 3; fi
if wanted load; then
    for model in qwen3.5-9b qwen3.5-27b; do bench "$model" -p 0 -n 8 -r 1; done
fi
if wanted both; then
    bench qwen3.5-27b --vram 12G --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-27b --vram 16G --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-35b-a3b --place 'blk.*.moe=cuda0:0%' --threads 16 -p 2048,8192 -n 64 -r 3
    bench qwen3.5-35b-a3b --vram 12G --threads 16 -p 2048,8192 -n 64 -r 3
fi
if wanted cpu; then
    for model in qwen3.5-0.8b qwen3.5-4b qwen3.5-35b-a3b; do bench "$model" --vram 0 --threads 16 -p 512 -n 64 -r 3; done
fi
if wanted kernels; then
    for model in 9B 35B-A3B; do
        echo "### kernels of a decode step of the $model"
        ncu --csv --page raw --graph-profiling node --clock-control none --cache-control none --kill yes \
            --launch-skip 1000 --launch-count 400 --metrics gpu__time_duration.sum,dram__bytes.sum \
            "${DECODE:-decode}" "$model" 1 2>/dev/null | python3 scripts/kernels.py
    done
fi
