"""Nsight Compute counters of the launches of a decode step."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from benchmarks.common.tables import ROOT
from benchmarks.gpu.harness import Results

SCRIPT = """
import torch
from benchmarks.gpu.harness import GROUPS, Clock, Layers
from benchmarks.gpu.kernels import ours
device = torch.device("cuda")
with torch.inference_mode():
    for group in ("o", "gate, up"):
        for storage in (torch.int8, torch.bfloat16):
            layers = Layers(*GROUPS[group], Clock(device))
            call = ours(layers, storage, 32, torch.arange(32, device=device))[0]
            call()
            torch.cuda.synchronize()
"""
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy")


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    tool = shutil.which("ncu")
    if smoke or tool is None:
        results.put("counters", {"skipped": "no GPU" if smoke else "ncu was not found"})
        return
    words = [tool, "--clock-control", "none", "-k", "product"]
    for section in SECTIONS:
        words += ["--section", section]
    done = subprocess.run([*words, sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    path = results.path.with_name("counters.txt")
    path.write_text(done.stdout + done.stderr)
    results.put("counters", {"status": done.returncode, "launches": done.stdout.count("product")})
    raise SystemExit(done.returncode)
