#!/usr/bin/env bash
# Rehearses benchmarks.gpu.run without a GPU, with the software of the GPU machine: builds the extension, collects the
# GPU tests, compiles every launch that the stage "tiles" times for sm_90 into a Triton cache that can be taken along, and
# walks through the stages in tiny sizes. Takes VENV (made if there is none; needs python3.12) and OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-build/gpu-venv}
OUT=${OUT:-build/rehearsal}
if [ ! -x "$VENV/bin/python" ]; then
  command -v python3.12 >/dev/null || { echo "rehearse.sh: expected python3.12 on the search path, or VENV" >&2; exit 1; }
  python3.12 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 peft accelerate pytest pytest-xdist \
    pytest-timeout pybind11 ninja matplotlib 'numpy<2.4' setuptools wheel tqdm safetensors
fi
mkdir -p "$OUT"
"$VENV/bin/python" setup.py build_ext --inplace >"$OUT/build.txt" 2>&1
"$VENV/bin/python" -m benchmarks.gpu.run --out "$OUT" --smoke \
  --stages environment,correct+tests,kernels,end_to_end,rl_step,peft
# Triton notes the paths of its cache: unpack it at the same path, as TRITON_CACHE_DIR, on the machine with the GPU.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/t2-triton}
"$VENV/bin/python" -m benchmarks.gpu.tile_search --compile --jobs "$(nproc)"
(cd "$TRITON_CACHE_DIR" && find . -name '*.json' -o -name '*.cubin') | tar -cJf "$OUT/triton-cache.tar.xz" -C "$TRITON_CACHE_DIR" -T -
echo "rehearsed: $OUT/triton-cache.tar.xz, $OUT/tables.md"
