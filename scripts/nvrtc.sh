#!/bin/sh
# Fetches NVIDIA's run-time compiler from PyPI into a folder, for machines without a CUDA toolkit:
#   scripts/nvrtc.sh FOLDER [12|13]
# Then set TANDEM_CUDA_LIBS=FOLDER. The kernels need no CUDA headers.
set -eu
folder=${1:?usage: scripts/nvrtc.sh FOLDER [12|13]}
case ${2:-13} in
    13) package=nvidia-cuda-nvrtc ;;
    12) package=nvidia-cuda-nvrtc-cu12 ;;
    *) echo "CUDA ${2} is not supported: 12 or 13" >&2; exit 2 ;;
esac
python3 -m pip install --quiet --no-deps --upgrade --target "$folder" "$package"
find "$folder" -name 'libnvrtc.so*'
