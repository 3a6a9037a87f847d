"""Timing on a GPU, its file of results and random layers, shared by the stages of `benchmarks.gpu.run`."""

from __future__ import annotations

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2kernels import FactoredWeight
from t2kernels.files import write_text

Call = Callable[[], Any]
GROUPS = {  # layers that share their input: (in, outs)
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Llama-3-8B. The layer "o" is also the 4096 x 4096 matrix of the tables."""
SMOKE_GROUPS = {"q, k, v": (128, (128, 64, 64)), "down": (96, (64,))}


class Results:
    """Measurements by name in one JSON file, written whole after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Stored measurement, made now if there is none or an error; an error is stored as {"error": text}."""
        found = self.data.get(name)
        if found is None or (isinstance(found, dict) and "error" in found):
            try:
                found = measure()
            except Exception as error:  # other libraries fail in their own ways
                tail = "".join(traceback.format_exception(error)[-3:])
                found = {"error": f"{type(error).__name__}: {error}"[:600], "traceback": tail[-1200:]}
            self.put(name, found)
        return found

    def put(self, name: str, value: Any) -> None:
        self.data[name] = value
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")
        print(f"{name}: {_line(value)}", flush=True)


def _line(value: Any) -> str:
    if isinstance(value, dict) and "seconds" in value:
        seconds, least = value["seconds"], value["min"] if "min" in value else value["seconds"]
        return f"{seconds * 1e6:.2f} us (min {least * 1e6:.2f})"
    return str(value)[:300]


class Clock:
    """Seconds of a call, in turns over copies of its weights that together exceed the L2 cache."""

    def __init__(self, device: torch.device, seconds: float = 0.02) -> None:
        self.device, self.seconds = device, seconds
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0

    def copies(self, weight_bytes: int) -> int:
        return max(1, min(16, math.ceil(2 * self.cache_bytes / max(weight_bytes, 1)) + 1))

    def __call__(self, calls: Sequence[Call], graph: bool = True) -> dict[str, Any]:
        """{"seconds": median of one call, "min", "graph": whether replayed as a CUDA graph}.

        graph: False for calls that synchronise with the host: a failed capture would spoil the process.
        """
        if self.device.type != "cuda":
            start = time.perf_counter()
            for call in calls:
                call()
            seconds = (time.perf_counter() - start) / len(calls)
            return {"seconds": seconds, "min": seconds, "graph": False}
        for call in (*calls, *calls):
            call()
        torch.cuda.synchronize()

        def eager() -> None:
            for call in calls:
                call()

        once = eager
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                eager()
            once = captured.replay
            once()
        one = self._timed(once, 2)
        repeats = max(2, min(500, int(self.seconds / 5 / one)))
        found = [self._timed(once, repeats) / len(calls) for _ in range(7)]
        return {"seconds": statistics.median(found), "min": min(found), "graph": graph}

    @staticmethod
    def _timed(run: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


class Layers:
    """Random bfloat16 factors of one group of layers that share their input."""

    def __init__(self, inputs: int, outs: Sequence[int], clock: Clock) -> None:
        self.inputs, self.outs, self.clock, self.device = inputs, tuple(outs), clock, clock.device
        self.factors = [
            (self._normal(out, min(out, inputs)), self._normal(min(out, inputs), inputs)) for out in self.outs
        ]
        self.ranks = [u.shape[1] for u, _ in self.factors]
        self.entries = sum(u.numel() + vh.numel() for u, vh in self.factors)
        self.dense_entries = sum(out * inputs for out in outs)
        self.fixed_scales: list[Tensor] = []
        self._packed: dict[torch.dtype, list[list[FactoredWeight]]] = {}

    def _normal(self, *size: int) -> Tensor:
        return (torch.randn(*size, device=self.device) * size[-1] ** -0.5).bfloat16()

    def scales(self, experts: int) -> list[Tensor]:
        """Window [experts, rank] of one table for each layer."""
        table = 1 + 0.1 * torch.randn(experts, sum(self.ranks), device=self.device)
        return list(table.split(self.ranks, dim=1))

    def x(self, rows: int) -> Tensor:
        return torch.randn(rows, self.inputs, device=self.device).bfloat16()

    def packed(self, storage: torch.dtype) -> list[list[FactoredWeight]]:
        """Copies of the packed group, as many as the clock takes in turns."""
        if storage not in self._packed:
            self._packed = {}
            count = self.clock.copies(self.entries * storage.itemsize)
            self._packed[storage] = [[pack(u, vh, storage) for u, vh in self.factors] for _ in range(count)]
        return self._packed[storage]

    def rotate(self, weight_bytes: int, make: Callable[[], Call]) -> list[Call]:
        return [make() for _ in range(self.clock.copies(weight_bytes))]


def pack(u: Tensor, vh: Tensor, storage: torch.dtype) -> FactoredWeight:
    """A factored weight with storage of its own and sigma = 1."""
    return FactoredWeight.pack(u.clone(), torch.ones(u.shape[1], device=u.device), vh.clone(), dtype=storage)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
