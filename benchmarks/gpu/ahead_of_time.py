"""Compiles every launch that the stage "tiles" times, in as many processes as there are cores."""

from __future__ import annotations

import os

import torch

from benchmarks.gpu.common import Results


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    if smoke:
        results.put("compile", {"skipped": "minutes without many cores"})
        return
    from benchmarks.gpu.tiles import compile_all

    compile_all(max(2, (os.cpu_count() or 2) - 2))
