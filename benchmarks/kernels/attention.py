"""Attention of one decode step with its cache: our kernel against sdpa in transformers.

python -m pytest benchmarks/kernels/attention.py --benchmark-json=benchmarks/results/cpu-attention.json
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common.interleave import CACHE_BYTES, in_turns
from t2.model.attention import attention
from t2.model.kv_cache import GrowingLayer

HEADS = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # query heads, key heads, head_dim


class Step:
    """Decode step of one token a row after `length` cached ones, left-padded by 5."""

    def __init__(self, model: str, batch: int, length: int) -> None:
        heads, key_heads, head_dim = HEADS[model]
        g = torch.Generator().manual_seed(0)
        self.module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
        self.query = torch.randn(batch, heads, 1, head_dim, generator=g)
        self.new = torch.randn(batch, key_heads, 1, head_dim, generator=g)
        self.kept = torch.randn(batch, key_heads, length, head_dim, generator=g)
        self.mask = torch.ones(batch, 1, 1, length + 1, dtype=torch.bool)
        self.mask[..., : min(5, length)] = False

    def cache(self, kind: type[DynamicLayer]) -> DynamicLayer:
        layer = kind()
        layer.update(self.kept, self.kept.clone())
        return layer

    def run(self, function: Any, layer: DynamicLayer) -> Tensor:
        key, value = layer.update(self.new, self.new)
        y: Tensor = function(self.module, self.query, key, value, self.mask, scaling=self.query.shape[-1] ** -0.5)[0]
        layer.crop(-1)
        return y


@pytest.mark.parametrize("length", (64, 512))
@pytest.mark.parametrize("batch", (1, 32))
@pytest.mark.parametrize("model", HEADS)
def test_decode(benchmark: Any, model: str, batch: int, length: int) -> None:
    """Up to 32 layers in a row, as many as fit 1 GiB."""
    step = Step(model, batch, length)
    kept_bytes = 2 * step.kept.numel() * 4
    layers = min(32, max(1, 8 * CACHE_BYTES // kept_bytes))

    def path(kind: type[DynamicLayer], function: Any) -> Callable[[], None]:
        caches = [step.cache(kind) for _ in range(layers)]

        def run() -> None:
            for layer in caches:
                step.run(function, layer)

        return run

    paths = {"ours": path(GrowingLayer, attention), "transformers sdpa": path(DynamicLayer, sdpa_attention_forward)}
    in_turns(benchmark, paths, shape=model, batch=batch, length=length, layers=layers, bytes=kept_bytes * layers)


def test_paths_agree() -> None:
    """Both timed paths compute the same result."""
    step = Step("SmolLM2", 3, 20)
    ours, theirs = (
        step.run(attention, step.cache(GrowingLayer)),
        step.run(sdpa_attention_forward, step.cache(DynamicLayer)),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
