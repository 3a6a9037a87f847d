"""The machine that a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import t2kernels


def machine() -> dict[str, Any]:
    """The processor, versions and kernels that a measurement was made with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": t2kernels.build_info(),
    }
