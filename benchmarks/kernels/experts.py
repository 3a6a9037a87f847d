"""One factored layer and many experts: effect of how experts are drawn, and other ways to serve them.

python -m pytest benchmarks/kernels/experts.py --benchmark-json=benchmarks/results/cpu-experts.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common.expert_draws import draw_experts
from benchmarks.common.interleave import in_turns
from benchmarks.kernels.linear import SHAPES, SQUARE, Layer, requests
from t2kernels import FactoredWeight


@pytest.mark.parametrize("batch", (32, 64))
def test_popularity(benchmark: Any, batch: int) -> None:
    """One batch with its experts drawn in four ways; many rounds, since the expected difference is zero."""
    layer = Layer(SQUARE)
    x, scales = requests(layer, batch, batch)
    paths = {}
    weight = FactoredWeight.pack(layer.u, layer.s, layer.vh, dtype=torch.bfloat16)
    for kind in ("distinct", "zipf", "uniform", "identical"):
        ids = draw_experts(kind, batch)
        paths[f"ours bfloat16, {kind}"] = lambda ids=ids: weight.linear_unchecked(x, scales, ids)
    in_turns(benchmark, paths, min_rounds=60, shape=layer.name, batch=batch, size=SHAPES[layer.name])


@pytest.mark.parametrize("kind", ("distinct", "zipf", "uniform", "identical"))
def test_multi_expert(benchmark: Any, kind: str) -> None:
    """32 requests: PEFT's mixed batch, W' rebuilt for each expert of the batch, eigentune where all share one."""
    batch = 32
    layer = Layer(SQUARE)
    x, scales = requests(layer, batch, batch)
    ids = draw_experts(kind, batch)
    paths = {
        "ours bfloat16": layer.ours(torch.bfloat16, x, scales, ids),
        "ours bfloat16, bfloat16 x": layer.ours(torch.bfloat16, x.bfloat16(), scales, ids),
        "ours int8": layer.ours(torch.int8, x, scales, ids),
    }
    paths["PEFT LoRA r=16, mixed"] = peft_lora(layer, x, ids)
    paths["W' rebuilt per expert"] = rebuilt(layer, x, scales, ids)
    if kind == "identical":
        paths["eigentune, full rank"] = eigentune(layer, x, scales)
    in_turns(benchmark, paths, shape=layer.name, batch=batch, size=SHAPES[layer.name], popularity=kind)


def peft_lora(layer: Layer, x: Tensor, ids: Tensor) -> Callable[[], Any]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    weight = (layer.u * layer.s) @ layer.vh
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight.data = weight
    model = get_peft_model(nn.Sequential(linear), config, adapter_name="expert0")
    for i in range(1, int(ids.max()) + 1):
        model.add_adapter(f"expert{i}", config)
    lora: Any = model.get_submodule("base_model.model.0")
    names = [f"expert{int(i)}" for i in ids]
    return lambda: lora(x, adapter_names=names)


def rebuilt(layer: Layer, x: Tensor, scales: Tensor, ids: Tensor) -> Callable[[], Any]:
    """Published method: build W' of each expert, then run its requests."""

    def run() -> Tensor:
        y = x.new_empty(x.shape[0], layer.out_features)
        for expert in ids.unique():
            rows = ids == expert
            y[rows] = x[rows] @ ((layer.u * scales[expert]) @ layer.vh).T
        return y

    return run


def eigentune(layer: Layer, x: Tensor, scales: Tensor) -> Callable[[], Any]:
    from eigentune.config import EigenTuneConfig
    from eigentune.layers import EigenTuneLinear
    from eigentune.svd import Bases

    base = nn.Linear(layer.in_features, layer.out_features, bias=False)
    base.weight.data = (layer.u * layer.s) @ layer.vh
    bases = Bases(layer.u, layer.s, layer.vh, tuple(range(layer.rank)), "")
    adapted = EigenTuneLinear(base, bases, EigenTuneConfig(rank=layer.rank))
    adapted.delta.data = scales[0] - layer.s
    return lambda: adapted(x)


def test_paths_agree() -> None:
    """All timed paths compute the same result."""
    layer = Layer("SmolLM2 down")
    x, scales = requests(layer, 4, 4)
    ids = torch.tensor([0, 3, 1, 1])
    expected = ((x @ layer.vh.T) * scales[ids]) @ layer.u.T
    torch.testing.assert_close(rebuilt(layer, x, scales, ids)(), expected, atol=1e-4, rtol=1e-4)
    one = ((x @ layer.vh.T) * scales[0]) @ layer.u.T
    torch.testing.assert_close(eigentune(layer, x, scales)().detach(), one, atol=1e-4, rtol=1e-4)
