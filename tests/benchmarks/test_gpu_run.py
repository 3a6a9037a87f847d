"""The program that measures on GPUs, in tiny sizes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.common.tables import ROOT, read_results
from benchmarks.gpu import run
from benchmarks.gpu.harness import Results
from benchmarks.gpu.report import report

PROGRAM = [sys.executable, "-m", "benchmarks.gpu.run"]


def test_walks_through_its_stages_and_goes_on_where_it_stopped(tmp_path):
    words = [*PROGRAM, "--out", tmp_path, "--smoke", "--stages", "environment,correct+sanitizer,kernels"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    path = tmp_path / "results.json"
    data = json.loads(path.read_text())
    assert {name for name in data if name.startswith("stage")} == {
        f"stage | {name}" for name in ("environment", "correct", "sanitizer", "kernels")
    }
    assert all(found["right"] for name, found in data.items() if name.startswith("correct"))
    assert "## down" in (tmp_path / "tables.md").read_text() and "== kernels" in (tmp_path / "log.txt").read_text()

    kept, failed = "down | decode 1 | ours bfloat16", "down | decode 1 | ours int8"
    data[kept], data[failed] = {"seconds": 42.0}, {"error": "out of luck"}
    path.write_text(json.dumps(data))
    assert subprocess.run(words, capture_output=True, cwd=ROOT).returncode == 0
    again = json.loads(path.read_text())
    assert again[kept] == {"seconds": 42.0} and again[failed]["seconds"] < 42


def test_a_stage_past_its_time_is_killed_and_a_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(run.STAGES, "sleeps", run.Stage("sleeps", 1))
    monkeypatch.setitem(run.STAGES, "fails", run.Stage("fails", 60))

    class Sleeps:
        @staticmethod
        def measure(results, device, smoke):
            results.put("begun", 1)
            time.sleep(60)

    class Fails:
        @staticmethod
        def measure(results, device, smoke):
            raise ValueError("not today")

    monkeypatch.setitem(sys.modules, "benchmarks.gpu.sleeps", Sleeps)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.fails", Fails)
    begin = time.monotonic()
    assert run.side_by_side(["sleeps", "fails"], tmp_path, True, 100.0) == {"sleeps": "timeout", "fails": "failed"}
    assert time.monotonic() - begin < 30
    assert json.loads((tmp_path / "results.json").read_text())["begun"] == 1
    assert "not today" in (tmp_path / "log.txt").read_text()


def test_errors_are_stored_and_measured_again(tmp_path):
    results = Results(tmp_path / "results.json")
    assert results.once("a", lambda: 1 / 0)["error"].startswith("ZeroDivisionError")
    assert Results(results.path).once("a", lambda: 3) == 3
    assert Results(results.path).once("a", lambda: 4) == 3


def test_tables_of_a_real_run():
    text = report(read_results("gpu-h200.json"))
    assert "# NVIDIA H200" in text and "17 of 17 checks against float64 right" in text and "## gate, up" in text


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_says_that_torch_has_no_cuda(tmp_path):
    done = subprocess.run([*PROGRAM, "--out", tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "expected a torch built with CUDA" in done.stderr


def test_an_unknown_stage_is_named(tmp_path):
    words = [*PROGRAM, "--out", tmp_path, "--stages", "kernels,nothing"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "got nothing" in done.stderr
