"""`pytest -m gpu` over several processes; its output goes to tests.txt as it comes."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.common.tables import ROOT
from benchmarks.gpu.harness import Results


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    words = [sys.executable, "-m", "pytest", "tests/t2kernels/test_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    if smoke:
        words.append("--collect-only")
    else:
        words += ["-n", str(min(12, os.cpu_count() or 1)), "--timeout", "100", "--durations", "15", "--tb", "short"]
    path = results.path.with_name("tests.txt")
    with path.open("w") as output:
        done = subprocess.run(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    text = path.read_text()
    print(text[-6000:], flush=True)
    results.put("tests", {"status": done.returncode, "summary": text.strip().splitlines()[-1:]})
    raise SystemExit(done.returncode)
