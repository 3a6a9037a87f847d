"""The machine and its software."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

from benchmarks.gpu.harness import Results
from t2kernels import backends


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "backends": backends(),
    }
    try:
        import triton
        from triton.runtime.cache import triton_key

        found |= {"triton": triton.__version__, "triton_key": hash_of(triton_key())}
    except ImportError as error:
        found["triton"] = str(error)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "sms": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.sm", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    results.put("environment", found)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]
