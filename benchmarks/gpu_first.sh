#!/usr/bin/env bash
# What nobody has run settles first when a GPU is at hand: one script, every figure as JSON.
#
#   benchmarks/gpu_first.sh STEP... [--device cuda] [--tiny] [--out FOLDER]
#
# STEP is a name of `benchmarks/gpu_first.sh list`, the beginning of some (4 is 4a and 4b), or `all`. A step takes at most
# ten minutes; what of it fails is noted, the rest goes on, and all failures are listed at the end. Figures go to
# <step>.json and what was printed to <step>.log in $OUT, or in benchmarks/results/<device>-<date>/ without one. Commit
# the JSON files and what step 5c writes to kernels/tuned/, failures too.
#
# On an H200 with 16 CPU cores, torch 2.11: step 1b three minutes, 1c and 1d together four, 1e more than four (most of it
# the compiler's), 4a one, 4c half a one, each type of 6 a quarter to half a one; 5c more than one for each operation.
#
# It needs no network: torch, Triton and pytest must be there, what else is missing is installed from WHEELS (a folder,
# default: wheels/). Make it where there is a network, with the Python version of the machine with the GPU:
#
#   pip wheel -w wheels "hydra-core<1.4" "omegaconf<2.4" "pydantic<3" tiktoken filelock rich hypothesis \
#       pytest-xdist pytest-timeout tokenizers safetensors
#   pip wheel -w wheels --no-deps liger-kernel fla-core einops
#
# `--device cpu --tiny` runs all of it in a few minutes at sizes that measure nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
for wheel in "${WHEELS:-wheels}"/*.whl; do # one by one, those that are not there yet: never another torch
    name=$(basename "$wheel" | cut -d- -f1)
    python -m pip show -q "$name" 2>/dev/null || python -m pip install -q --no-index --no-deps "$wheel" ||
        echo "not installed: $wheel" >&2
done
exec python -m benchmarks.gpu_first "$@"
