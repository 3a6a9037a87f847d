"""One layer in the delta form: what a support's components cost on top of the dense product.

python -m pytest benchmarks/kernels/delta.py --benchmark-json=benchmarks/results/cpu-delta.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.interleave import cold, in_turns
from benchmarks.kernels.linear import SHAPES, SQUARE, Layer
from t2kernels import DeltaWeight, DenseWeight
from t2kernels.packing import INT4

COMPONENTS = (64, 256)
NAMES = (SQUARE, "Llama-3-8B k, v", "Llama-3-8B gate, up", "Llama-3-8B down")
EXPERTS = 64


def delta(layer: Layer, weight: Tensor, k: int, dtype: torch.dtype, x: Tensor, ids: Tensor) -> Callable[[], Any]:
    """W beside k components, with a different expert in every row up to `EXPERTS`."""
    first = DeltaWeight.pack(weight, layer.u[:, :k], layer.s[:k], layer.vh[:k], dtype=dtype)

    def copy(i: int) -> DeltaWeight:
        return first if i == 0 else DeltaWeight.pack(weight, layer.u[:, :k], layer.s[:k], layer.vh[:k], dtype=dtype)

    scales = 0.02 * torch.randn(EXPERTS, k, generator=torch.Generator().manual_seed(2))
    return cold(copy, first.nbytes, lambda w: w.linear_unchecked(x, scales, ids))


def dense(weight: Tensor, dtype: torch.dtype, x: Tensor) -> Callable[[], Any]:
    first = DenseWeight.pack(weight, dtype=dtype)
    return cold(
        lambda i: first if i == 0 else DenseWeight.pack(weight, dtype=dtype),
        first.nbytes,
        lambda w: w.linear_unchecked(x),
    )


@pytest.mark.parametrize("batch", (1, 8, 64, 256))
@pytest.mark.parametrize("name", NAMES)
def test_delta(benchmark: Any, name: str, batch: int) -> None:
    """bfloat16 activations; the dense product on our kernels and torch's, and the factored form, beside it."""
    layer = Layer(name)
    weight = (layer.u * layer.s) @ layer.vh
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, layer.in_features, generator=generator).bfloat16()
    ids = torch.arange(batch) % EXPERTS
    table = layer.s * (1 + 0.02 * torch.randn(EXPERTS, layer.rank, generator=generator))
    paths = {}
    for dtype in (torch.bfloat16, torch.int8, INT4):
        kind = str(dtype).removeprefix("torch.")
        paths[f"dense {kind}"] = dense(weight, dtype, x)
        for k in COMPONENTS:
            paths[f"delta {kind}, {k}"] = delta(layer, weight, k, dtype, x, ids)
    paths["factored bfloat16"] = layer.ours(torch.bfloat16, x, table, ids)
    paths["torch dense bfloat16"] = layer.torch_dense(x)
    in_turns(benchmark, paths, min_rounds=9, shape=name, batch=batch, size=SHAPES[name])


def test_paths_agree() -> None:
    """The delta form computes what the factored one does."""
    layer = Layer("SmolLM2 down")
    u, s, vh = torch.linalg.svd((layer.u * layer.s) @ layer.vh, full_matrices=False)
    weight, k = (u * s) @ vh, 64
    x, ids = torch.randn(4, layer.in_features), torch.tensor([0, 3, 1, 1])
    z = torch.ones(4, len(s))
    z[1:, :k] += 0.1 * torch.randn(3, k)
    ours = DeltaWeight.pack(weight, u[:, :k], s[:k], vh[:k]).linear(x, s[:k] * (z[:, :k] - 1), ids)
    torch.testing.assert_close(ours, ((x @ vh.T) * (s * z)[ids]) @ u.T, atol=1e-3, rtol=1e-3)
