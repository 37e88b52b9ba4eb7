#!/usr/bin/env bash
# The table of kernels of one prompt batch or one decode step on GPU 0: time, bytes that device memory moves and share of
# its rate, as Nsight Compute (part of the CUDA toolkit) counts them:
#   scripts/profile_cuda.sh MODEL prompt TOKENS | step [DEPTH]
# Kernels run one at a time under the profiler: in a step they overlap, so that the sum is more than the step takes. The
# profiler keeps what kernels overwrite: a model of few layers (make_gguf with --set n_layer=4) takes seconds, a large
# one minutes. TANDEM names a program that is built already.
set -euo pipefail
model=$(realpath "$1")
cd "$(dirname "$0")/.."
tandem=${TANDEM:-target/release/tandem}
[ -n "${TANDEM:-}" ] || cargo build --release --locked
case $2 in
prompt) bench=(-p "$3" -n 0 -r 1 --batch "$3") from=1 ;;
step) bench=(-p 0 -n 2 -d "${3:-0}" -r 1) from=2 ;;
*) echo "$2: neither prompt nor step" >&2 && exit 2 ;;
esac
metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Not what loads and probes. `from`: how often the model's first kernel comes before the part that is shown.
kernels='embed|norm|gem|few|delta|attention|moe|expert|swiglu|round|decode_rows|choose|give|take|nvjet|cutlass|cublas|splitK'
ncu --csv --page raw --metrics "$metrics" --clock-control none --cache-control none --launch-count "${LAUNCHES:-2500}" \
    --kernel-name-base function --kernel-name "regex:$kernels" "$tandem" bench "$model" "${bench[@]}" >"$log" 2>&1 || { tail -n 20 "$log" >&2 && exit 1; }
python3 - "$log" "$from" <<'PYTHON'
import csv, sys

lines = [line for line in open(sys.argv[1], errors="replace") if line.startswith('"')]
rows = list(csv.DictReader(lines))
units, rows = rows[0], rows[1:]
scale = {"ns": 1e-3, "us": 1, "ms": 1e3, "nsecond": 1e-3, "usecond": 1, "msecond": 1e3, "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3, "%": 1}
value = lambda row, name: float(row[name].replace(",", "")) * scale[units[name]]
names = ["gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"]
starts = [i for i, row in enumerate(rows) if row["Kernel Name"].startswith("embed")]
first = starts[int(sys.argv[2])]
last = next((i for i in starts if i > first), len(rows))
groups = {}
for row in rows[first:last]:
    groups.setdefault((row["Kernel Name"].split("(")[0][:40], row["Grid Size"]), []).append([value(row, n) for n in names])
total = sum(v[0] for g in groups.values() for v in g)
print(f"{sum(map(len, groups.values()))} kernels, {total:.0f} us one by one")
print("| kernel | grid | number | us each | share of the time | MB each | of memory's rate |")
print("| --- | --- | --- | --- | --- | --- | --- |")
for (name, grid), g in sorted(groups.items(), key=lambda item: -sum(v[0] for v in item[1])):
    us, mb, memory = (sum(v[i] for v in g) / len(g) for i in range(3))
    print(f"| `{name}` | {grid} | {len(g)} | {us:.1f} | {us * len(g) / total:.1%} | {mb:.2f} | {memory:.0f} % |")
PYTHON
