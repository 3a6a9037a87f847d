"""compute-sanitizer's memcheck on a group and a backward pass."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from benchmarks.common.tables import ROOT
from benchmarks.gpu.harness import Results

SCRIPT = """
import torch
from benchmarks.gpu.correctness import Problem
from t2kernels import linear_group
device = torch.device("cuda")
for storage in (torch.bfloat16, torch.int8):
    ps = [Problem((out, 577 + 15), 17, torch.bfloat16, device) for out in (577, 131)]
    ws = [p.pack(storage) for p in ps]
    with torch.no_grad():
        linear_group(ws, ps[0].x, [p.scales for p in ps], ps[0].ids, [p.bias for p in ps])
    p, w = ps[0], ws[0]
    x, scales = p.x.requires_grad_(), p.scales.requires_grad_()
    w.linear(x, scales, p.ids, p.bias).backward(p.grad)
    torch.cuda.synchronize()
print("done")
"""


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    tool = shutil.which("compute-sanitizer")
    if smoke or tool is None:
        results.put("sanitizer", {"skipped": "no GPU" if smoke else "compute-sanitizer was not found"})
        return
    words = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    done = subprocess.run([*words, sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    text = (done.stdout + done.stderr)[-3000:]
    print(text, flush=True)
    results.put("sanitizer", {"status": done.returncode, "output": text[-600:]})
    raise SystemExit(done.returncode)
