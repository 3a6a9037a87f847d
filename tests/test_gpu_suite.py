"""The program that measures on GPUs, walked through in tiny sizes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.py"


def suite(*options):
    return subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True)


def test_walks_through_every_path_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "gpu.json"
    run = suite("--smoke", "--out", out)
    assert run.returncode == 0, run.stderr[-2000:]
    measured = json.loads(out.read_text())["measurements"]
    failed = {name: found["error"] for name, found in measured.items() if "error" in found}
    assert not failed
    paths = {name.split(" | ")[2] for name in measured if name.count(" | ") == 2}
    assert {"ours bfloat16", "ours int8", "dense cuBLAS", "torch factored", "PEFT mixed", "eigentune"} <= paths
    table = out.with_suffix(".md").read_text()
    assert "## smoke down" in table and "popularity 3 zipf" in table

    lost, kept = "smoke down | decode 1 | ours int8", "smoke down | decode 1 | ours bfloat16"
    data = json.loads(out.read_text())
    del data["measurements"][lost]
    data["measurements"][kept] = {"seconds": 42.0, "graph": True}
    out.write_text(json.dumps(data))
    assert suite("--smoke", "--out", out).returncode == 0
    again = json.loads(out.read_text())["measurements"]
    assert again[kept] == {"seconds": 42.0, "graph": True} and again[lost]["seconds"] < 42


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu():
    run = suite()
    assert run.returncode == 1 and "expected an NVIDIA GPU" in run.stderr
