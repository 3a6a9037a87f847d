"""One factored layer with a different expert per row, against torch on the same products (pytest-benchmark).

    python -m pytest benchmarks/bench_linear.py --benchmark-json=benchmarks/results/cpu-linear.json

Groups are shape x batch; within a group: our kernels per storage format, torch eager on the factored form, and torch
on the dense W (which has no experts at all).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from t2kernels import FactoredWeight

SHAPES = {  # out, in
    "SmolLM2 q/o": (576, 576),
    "SmolLM2 k/v": (192, 576),
    "SmolLM2 gate/up": (1536, 576),
    "SmolLM2 down": (576, 1536),
    "Llama-3-8B q/o": (4096, 4096),
    "Llama-3-8B k/v": (1024, 4096),
}
BATCHES = (1, 4, 8, 16, 32, 64, 256)
PATHS = (
    "ours float32",
    "ours bfloat16",
    "ours float16",
    "ours int8",
    "ours bfloat16, one expert",
    "torch factored",
    "torch dense",
)


@pytest.fixture(scope="module", params=SHAPES)
def layer(request):
    out, inputs = SHAPES[request.param]
    rank = min(out, inputs)
    g = torch.Generator().manual_seed(0)
    u, vh = torch.randn(out, rank, generator=g) / rank**0.5, torch.randn(rank, inputs, generator=g) / inputs**0.5
    s = torch.rand(rank, generator=g) + 0.5
    packed = {
        f"ours {name}": FactoredWeight.pack(u, s, vh, dtype=getattr(torch, name))
        for name in ("float32", "bfloat16", "float16", "int8")
    }
    return request.param, u, s, vh, packed


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear(benchmark, layer, batch, path):
    name, u, s, vh, packed = layer
    benchmark.group = f"{name}, batch {batch}"
    x, scales, ids = torch.randn(batch, vh.shape[1]), s * (1 + 0.1 * torch.randn(batch, len(s))), torch.arange(batch)
    if path == "torch factored":
        run = lambda: ((x @ vh.T) * scales[ids]) @ u.T  # noqa: E731
    elif path == "torch dense":
        weight = (u * s) @ vh
        run = lambda: F.linear(x, weight)  # noqa: E731
    else:
        path, _, same = path.partition(", ")
        ids = torch.zeros_like(ids) if same else ids
        weight = packed[path]
        run = lambda: weight.linear(x, scales, ids)  # noqa: E731
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
