"""The tiles of the tuning tables as machine code for their chips; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOL = [sys.executable, "-m", "benchmarks.gpu.triton_compile"]


def compiled(out, *options):
    """Launches that the tool compiled, in a process of its own, since the kernels here are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [*TOOL, "--out", out, *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())["launches"]


def test_decode_tiles_compile_without_spills_to_tensor_core_code(tmp_path):
    launches = compiled(tmp_path / "some.json", "--some")
    assert {each["chip"] for each in launches} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(each["spilled_bytes"] == 0 for each in launches)


@pytest.mark.slow
def test_every_tile_compiles_to_tensor_core_code(tmp_path):
    launches = compiled(tmp_path / "all.json")
    assert {each["step"] for each in launches} == {"project", "expand", "pull", "back"}
    assert {each["factors"] for each in launches} == {"bfloat16", "int8", "int8, float16 head", "float16", "float32"}
    prefill = [each for each in launches if each["chip"] == "sm_90" and each["tile"].startswith("128 x 256")]
    assert prefill and all("HGMMA" in each["tensor_core"] for each in prefill)
