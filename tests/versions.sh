#!/usr/bin/env bash
# Builds the extension and runs the kernels' tests for several versions of Python and torch, each in an environment of
# its own, and writes benchmarks/results/versions.json.
#
#     tests/versions.sh PYTHON... -- TORCH...      e.g. tests/versions.sh python3.11 python3.12 -- 2.11.0 2.13.0
#
# Downloads some gigabytes for each version of torch that comes with CUDA.
set -uo pipefail
cd "$(dirname "$0")/.."
pythons=() torches=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do pythons+=("$1"); shift; done
shift || { echo "usage: tests/versions.sh PYTHON... -- TORCH..." >&2; exit 2; }
torches=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/project"
git ls-files -z | xargs -0 cp --parents -t "$work/project"
rows=()
failed=0
for python in "${pythons[@]}"; do
  for torch in "${torches[@]}"; do
    venv="$work/venv"
    rm -rf "$venv"
    find "$work/project" -name '*.so' -delete
    rm -rf "$work/project/build"
    result=passed
    "$python" -m venv "$venv" &&
      "$venv/bin/pip" install --quiet --disable-pip-version-check "torch==$torch" setuptools wheel ninja pybind11 numpy pytest >"$work/log" 2>&1 ||
      result="not installed: $(tail -n 1 "$work/log")"
    if [ "$result" = passed ]; then
      (cd "$work/project" && "$venv/bin/pip" install --quiet --no-build-isolation --no-deps --editable .) >"$work/log" 2>&1 ||
        result="not built: $(tail -n 1 "$work/log")"
    fi
    counts=""
    if [ "$result" = passed ]; then
      (cd "$work/project" && "$venv/bin/python" -m pytest --quiet tests/t2kernels --ignore tests/t2kernels/triton) >"$work/log" 2>&1 ||
        result=failed
      counts=$(tail -n 1 "$work/log")
    fi
    [ "$result" = passed ] || failed=1
    version=$("$python" -c 'import platform; print(platform.python_version())')
    echo "Python $version, torch $torch: $result $counts"
    rows+=("$(printf '{"python": "%s", "torch": "%s", "result": "%s", "tests": "%s"}' "$version" "$torch" "${result//\"/}" "${counts//\"/}")")
  done
done
(IFS=,; echo "[${rows[*]}]") | python3 -m json.tool --indent 1 >benchmarks/results/versions.json
exit $failed
