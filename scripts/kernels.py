"""A table of kernels from Nsight Compute's raw CSV on standard input: launches, microseconds, bytes of device memory and
their share of ROOF (GB/s, the first argument; 4200 without one)."""

import csv
import sys

roof = float(sys.argv[1]) if len(sys.argv) > 1 else 4200.0
lines = [line for line in sys.stdin if line.startswith('"')]
rows = list(csv.DictReader(lines))
SCALE = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3,
         "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
units = rows.pop(0) if rows else {}
kernels = {}
for row in rows:
    name = row["Kernel Name"].split("(")[0]
    value = lambda metric: float(row[metric].replace(",", "")) * SCALE[units[metric]]
    us, megabytes = value("gpu__time_duration.sum"), value("dram__bytes.sum")
    kernels.setdefault((name, row["Grid Size"]), []).append((us, megabytes))
print("| kernel | grid | launches | us | MB | share |\n| --- | --- | --- | --- | --- | --- |")
for (name, grid), found in sorted(kernels.items(), key=lambda k: -sum(us for us, _ in k[1])):
    us = sum(us for us, _ in found) / len(found)
    megabytes = sum(mb for _, mb in found) / len(found)
    print(f"| `{name}` | {grid} | {len(found)} | {us:.1f} | {megabytes:.2f} | {megabytes / us * 1e3 / roof:.0%} |")
