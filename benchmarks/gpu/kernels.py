"""Decode, prefill and backward of Llama-3-8B's layers: ours against cuBLAS, plain torch and gathered LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.expert_draws import draw_experts
from benchmarks.gpu.harness import GROUPS, SMOKE_GROUPS, Call, Clock, Layers, Results, name_of, pack
from t2kernels import ops
from t2kernels.weights import FactoredGroup

DECODE = (1, 8, 16, 32, 64)
PREFILL = 2048
EXPERTS = (1, 64, 1024)


def ours(layers: Layers, storage: torch.dtype, rows: int, ids: Tensor, table: int | None = None) -> list[Call]:
    scales, x = layers.scales(table or int(ids.max()) + 1), layers.x(rows)
    nothing = [None] * len(layers.outs)
    groups = [FactoredGroup(weights) for weights in layers.packed(storage)]
    return [lambda g=group: g.linear_unchecked(x, scales, ids, nothing) for group in groups]


def dense(layers: Layers, rows: int) -> list[Call]:
    """One product for the whole group, like engines that merge q, k and v."""
    x = layers.x(rows)

    def make() -> Call:
        weight = torch.randn(sum(layers.outs), layers.inputs, device=layers.device).bfloat16()
        return lambda: F.linear(x, weight)

    return layers.rotate(2 * layers.dense_entries, make)


def two_products(layers: Layers, rows: int) -> list[Call]:
    """cuBLAS on the two products alone, nothing between them: the target of prefill."""
    x = layers.x(rows)

    def make() -> Call:
        factors = [(u.clone(), vh.clone()) for u, vh in layers.factors]
        return lambda: [F.linear(F.linear(x, vh), u) for u, vh in factors]

    return layers.rotate(2 * layers.entries, make)


def torch_factored(layers: Layers, rows: int, ids: Tensor) -> list[Call]:
    scales, x = [s.bfloat16() for s in layers.scales(int(ids.max()) + 1)], layers.x(rows)

    def make() -> Call:
        factors = [(u.clone(), vh.clone()) for u, vh in layers.factors]
        return lambda: [F.linear(F.linear(x, vh) * s[ids], u) for (u, vh), s in zip(factors, scales, strict=True)]

    return layers.rotate(2 * layers.entries, make)


def multi_lora(layers: Layers, rows: int, ids: Tensor, rank: int = 16) -> list[Call]:
    """The dense product and each row's adapter, gathered."""
    from benchmarks.gpu.gathered_lora import add_lora

    x, experts = layers.x(rows), int(ids.max()) + 1

    def make() -> Call:
        weights = [torch.randn(out, layers.inputs, device=layers.device).bfloat16() for out in layers.outs]
        a = [torch.randn(experts, rank, layers.inputs, device=layers.device).bfloat16() for _ in layers.outs]
        b = [torch.randn(experts, out, rank, device=layers.device).bfloat16() for out in layers.outs]
        return lambda: [
            add_lora(F.linear(x, w), x, own_a, own_b, ids) for w, own_a, own_b in zip(weights, a, b, strict=True)
        ]

    return layers.rotate(2 * layers.dense_entries, make)


def backward(layers: Layers, storage: torch.dtype, rows: int) -> list[Call]:
    """Gradients of x and of one expert's scale, all layers of the group."""
    slots = torch.zeros(1, dtype=torch.int64, device=layers.device)
    grads = [torch.randn(rows, out, device=layers.device).bfloat16() for out in layers.outs]
    ts = [torch.randn(rows, rank, device=layers.device) for rank in layers.ranks]
    scales = layers.scales(1)

    def make() -> Call:
        weights = [pack(u, vh, storage) for u, vh in layers.factors]

        def run() -> None:
            for w, g, t, scale in zip(weights, grads, ts, scales, strict=True):
                ops.factored_linear_backward(
                    g, t, w.u, w.vh, w.component_scale, scale, slots, layers.inputs, True, True, False, None, None
                )

        return run

    return layers.rotate(storage.itemsize * layers.entries, make)


def torch_backward(layers: Layers, rows: int) -> list[Call]:
    """The same gradients with cuBLAS products."""
    grads = [torch.randn(rows, out, device=layers.device).bfloat16() for out in layers.outs]
    ts = [torch.randn(rows, rank, device=layers.device) for rank in layers.ranks]
    scales = layers.scales(1)

    def make() -> Call:
        factors = [(u.clone(), vh.clone()) for u, vh in layers.factors]

        def run() -> None:
            for (u, vh), g, t, scale in zip(factors, grads, ts, scales, strict=True):
                h = g @ u
                (t * h).sum(0)
                (h * scale[0]).bfloat16() @ vh

        return run

    return layers.rotate(2 * layers.entries, make)


def cases(layers: Layers, smoke: bool) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
    """Every timing of one group of layers: its name, and what makes the calls to time."""
    device, gpu = layers.device, layers.device.type == "cuda"
    storages = [torch.bfloat16, torch.int8]
    decode, prefill, experts = ((1, 3), 40, (1, 3)) if smoke else (DECODE, PREFILL, EXPERTS)
    most = max(decode)
    read = torch.arange(prefill, device=device) * min(prefill // 8, 32) // prefill
    for storage in storages:
        for rows in decode:
            ids = torch.arange(rows, device=device)
            name = name_of(storage)
            yield f"decode {rows} | ours {name}", lambda s=storage, r=rows, i=ids: ours(layers, s, r, i)
        yield f"prefill {prefill} | ours {name_of(storage)}", lambda s=storage: ours(layers, s, prefill, read)
        if storage == torch.bfloat16:
            for kind in ("identical", "uniform", "zipf", "distinct"):
                ids = draw_experts(kind, most).to(device)
                yield f"popularity {most} {kind} | ours bfloat16", lambda i=ids: ours(layers, torch.bfloat16, most, i)
            for count in experts:  # as many in the table, drawn from all of it
                ids = torch.linspace(0, count - 1, most, device=device).round().long()
                yield (
                    f"table of {count} | ours bfloat16",
                    lambda i=ids, c=count: ours(layers, torch.bfloat16, most, i, c),
                )
    layers._packed = {}
    for rows in decode:
        ids = torch.arange(rows, device=device)
        yield f"decode {rows} | dense cuBLAS", lambda r=rows: dense(layers, r)
        yield f"decode {rows} | torch factored", lambda r=rows, i=ids: torch_factored(layers, r, i)
        if gpu:
            yield f"decode {rows} | multi-LoRA gathered", lambda r=rows, i=ids: multi_lora(layers, r, i)
    yield f"prefill {prefill} | dense cuBLAS", lambda: dense(layers, prefill)
    yield f"prefill {prefill} | two cuBLAS products", lambda: two_products(layers, prefill)
    yield f"prefill {prefill} | torch factored", lambda: torch_factored(layers, prefill, read)
    yield f"backward {prefill} | ours bfloat16", lambda: backward(layers, torch.bfloat16, prefill)
    yield f"backward {prefill} | cuBLAS", lambda: torch_backward(layers, prefill)


def ceilings(device: torch.device, clock: Clock, smoke: bool) -> dict[str, Any]:
    """Bytes a second of a copy (read and written) and of a sum (read), and bfloat16 FLOP/s of a large product."""
    size, side = (1 << 14, 64) if smoke else (1 << 29, 8192)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copies = [
        clock([call], graph=False)["seconds"]
        for call in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    ]
    reading = clock([lambda: source.sum()], graph=False)["seconds"]
    product = clock([lambda: a @ b])["seconds"]
    return {"copy": 8 * size / min(copies), "sum": 4 * size / reading, "bfloat16": 2 * side**3 / product}


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    clock = Clock(device, 0.0 if smoke else 0.015)
    results.once("ceilings", lambda: ceilings(device, clock, smoke))
    with torch.inference_mode():
        for group, (inputs, outs) in (SMOKE_GROUPS if smoke else GROUPS).items():
            layers = Layers(inputs, outs, clock)
            results.put(f"bytes | {group}", {"bfloat16": 2 * layers.entries, "dense": 2 * layers.dense_entries})
            for case, make in cases(layers, smoke):
                results.once(f"{group} | {case}", lambda make=make: clock(make()))
            del layers
            if device.type == "cuda":
                torch.cuda.empty_cache()
