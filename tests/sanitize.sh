#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with each set of CPU kernels that this
# processor runs. The extension is built into a folder of its own.
#
#     tests/sanitize.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$work"
cd "$work"
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1" LDFLAGS="-fsanitize=address,undefined"
"$python" setup.py --quiet build_ext --inplace >build.log 2>&1 || { tail -n 20 build.log; exit 1; }
unset CFLAGS LDFLAGS
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$work
sets=$("$python" -c 'from t2kernels import _C; print(*(isa for isa in _C.compiled_isas() if _C.supported(isa)))')
for isa in $sets; do
  echo "== $isa"
  T2KERNELS_CPU=$isa "$python" -m pytest --quiet -p no:cacheprovider tests/t2kernels --ignore tests/t2kernels/triton \
    --ignore tests/t2kernels/test_torch_integration.py --ignore tests/t2kernels/test_planner.py "$@"
done
