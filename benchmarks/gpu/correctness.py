"""Correctness of every path against float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harness import Results, name_of
from t2kernels import DenseWeight, FactoredWeight, linear_group
from t2kernels.packing import GPU_STORAGE_DTYPES, STORAGE_DTYPES

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest relative error ||y - reference|| / ||reference|| by dtype of the activations."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, infinite where actual has NaN."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


class Problem:
    """Random layer, activations and gradients of one shape."""

    def __init__(self, shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device, experts: int = 9):
        out, inputs = shape
        rank = min(out, inputs)
        g = torch.Generator(device).manual_seed(rows)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=g)

        self.u, self.vh = normal(out, rank) / rank**0.5, normal(rank, inputs) / inputs**0.5
        self.x = normal(rows, inputs).to(dtype)
        self.scales = 1 + 0.1 * normal(experts, rank)
        self.ids = torch.randint(0, experts, (rows,), device=device, generator=g)
        self.bias = normal(out).to(dtype)
        self.grad = normal(rows, out).to(dtype)

    def pack(self, storage: torch.dtype) -> FactoredWeight:
        return FactoredWeight.pack(self.u, torch.ones_like(self.scales[0]), self.vh, dtype=storage)

    def reference(self, w: FactoredWeight) -> tuple[Tensor, Tensor, Tensor]:
        """(y, dx, dscales) in float64."""
        u, _, vh = (f.double() for f in w.factors())
        x, scales = self.x.double().requires_grad_(), self.scales.double().requires_grad_()
        y = ((x @ vh.T) * scales[self.ids]) @ u.T + self.bias.double()
        dx, dscales = torch.autograd.grad(y, (x, scales), self.grad.double())
        return y.detach(), dx, dscales


def check(results: Results, name: str, dtype: torch.dtype, errors: Callable[[], Sequence[float]]) -> bool:
    def measure() -> dict[str, Any]:
        found = list(errors())
        return {"relative_errors": found, "limit": LIMIT[dtype], "right": max(found) <= LIMIT[dtype]}

    right = bool(results.once(f"correct | {name}", measure).get("right"))
    if not right:
        print(f"WRONG: {name}", flush=True)
    return right


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    """Raises SystemExit(1) after all checks if one of them was wrong."""
    shape, sizes = ((256, 128), (1, 9)) if smoke else ((4096, 4096), (1, 8, 32, 64, 300))
    storages = STORAGE_DTYPES if device.type == "cpu" else GPU_STORAGE_DTYPES
    right = True
    for dtype, storage in [(torch.bfloat16, s) for s in storages] + [(torch.float32, torch.float32)]:

        def forward(dtype: torch.dtype = dtype, storage: torch.dtype = storage) -> list[float]:
            found = []
            for rows in sizes:
                p = Problem(shape, rows, dtype, device)
                w = p.pack(storage)
                found.append(relative(w.linear(p.x, p.scales, p.ids, p.bias), p.reference(w)[0]))
            return found

        def backward(dtype: torch.dtype = dtype, storage: torch.dtype = storage) -> list[float]:
            p = Problem(shape, sizes[-1], dtype, device)
            w = p.pack(storage)
            x, scales = p.x.requires_grad_(), p.scales.requires_grad_()
            w.linear(x, scales, p.ids, p.bias).backward(p.grad)
            assert x.grad is not None and scales.grad is not None
            _, dx, dscales = p.reference(w)
            return [relative(x.grad, dx), relative(scales.grad, dscales)]

        right &= check(results, f"forward {name_of(dtype)} x {name_of(storage)}", dtype, forward)
        right &= check(results, f"backward {name_of(dtype)} x {name_of(storage)}", dtype, backward)

    def group(storage: torch.dtype, rows: int, run: Callable[..., list[Tensor]]) -> list[float]:
        ps = [Problem((out, shape[1]), rows, torch.bfloat16, device) for out in (shape[0], shape[0] // 4)]
        ws = [p.pack(storage) for p in ps]
        for p in ps[1:]:
            p.x, p.ids = ps[0].x, ps[0].ids
        ys = run(ws, ps)
        return [relative(y, p.reference(w)[0]) for y, p, w in zip(ys, ps, ws, strict=True)]

    def grouped(ws: list[FactoredWeight], ps: list[Problem]) -> list[Tensor]:
        with torch.no_grad():
            return linear_group(ws, ps[0].x, [p.scales for p in ps], ps[0].ids, [p.bias for p in ps])

    def replayed(ws: list[FactoredWeight], ps: list[Problem]) -> list[Tensor]:
        grouped(ws, ps)
        torch.cuda.synchronize()
        x, captured = ps[0].x.clone(), torch.cuda.CUDAGraph()
        biases = [p.bias for p in ps]
        with torch.no_grad(), torch.cuda.graph(captured):
            ys = linear_group(ws, ps[0].x, [p.scales for p in ps], ps[0].ids, biases)
        ps[0].x.copy_(x.flip(0))
        captured.replay()
        torch.cuda.synchronize()
        return ys

    for storage in (torch.bfloat16, torch.int8):
        name = name_of(storage)
        right &= check(results, f"group {name}", torch.bfloat16, lambda s=storage: group(s, sizes[1], grouped))
        if device.type == "cuda":
            right &= check(results, f"graph {name}", torch.bfloat16, lambda s=storage: group(s, sizes[1], replayed))

    def dense() -> list[float]:
        x = torch.randn(sizes[-1], shape[1], device=device).bfloat16()
        w = DenseWeight.pack(torch.randn(*shape, device=device) / shape[1] ** 0.5, dtype=torch.bfloat16)
        return [relative(w.linear(x), x.double() @ w.matrix().double().T)]

    right &= check(results, "dense bfloat16", torch.bfloat16, dense)
    if not right:
        raise SystemExit(1)
