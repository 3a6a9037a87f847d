#!/usr/bin/env bash
# Builds the extension and runs the kernels' tests for several versions of Python and torch, each in an environment of
# its own, and notes each result in benchmarks/results/versions.json.
#
#     tests/versions.sh PYTHON... -- TORCH...      e.g. tests/versions.sh python3.11 python3.12 -- 2.11.0 2.13.0
#
# Downloads some gigabytes for each version of torch that comes with CUDA.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$PWD/benchmarks/results/versions.json
pythons=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do pythons+=("$1"); shift; done
shift || { echo "usage: tests/versions.sh PYTHON... -- TORCH..." >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

note() { # python torch result tests
  python3 - "$results" "$@" <<'PY'
import json, sys
from pathlib import Path
path, python, torch, result, tests = Path(sys.argv[1]), *sys.argv[2:]
rows = json.loads(path.read_text()) if path.exists() else []
rows = [row for row in rows if (row["python"], row["torch"]) != (python, torch)]
rows.append({"python": python, "torch": torch, "result": result, "tests": tests})
path.write_text(json.dumps(sorted(rows, key=lambda row: (row["python"], row["torch"])), indent=1) + "\n")
PY
}

attempt() { # one step, unless an earlier one has failed
  local what=$1
  shift
  [ "$result" = passed ] || return 0
  "$@" >"$work/log" 2>&1 || result="$what: $(tail -n 1 "$work/log")"
}

for torch in "$@"; do
  for python in "${pythons[@]}"; do
    result=passed tests=""
    rm -rf "$work/venv" "$work/project"
    mkdir "$work/project"
    git ls-files -z | xargs -0 cp --parents -t "$work/project"
    attempt "no environment" "$python" -m venv "$work/venv"
    bin=$work/venv/bin
    attempt "not installed" "$bin/pip" install --quiet --disable-pip-version-check "torch==$torch" "setuptools>=77" wheel ninja pybind11 numpy pytest
    cd "$work/project"
    attempt "not built" "$bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
    attempt "failed" "$bin/python" -m pytest --quiet tests/t2kernels --ignore tests/t2kernels/triton
    cd - >/dev/null
    [ "$result" = passed ] && tests=$(tail -n 1 "$work/log") || failed=1
    version=$("$python" -c 'import platform; print(platform.python_version())')
    echo "Python $version, torch $torch: $result $tests"
    [ "$result" = passed ] || grep -E "^(FAILED|ERROR)|error:" "$work/log" | head -n 20
    note "$version" "$torch" "$result" "$tests"
  done
done
exit $failed
