"""Attention of one decode step with its cache, and of a prompt: our kernel against sdpa in transformers.

python -m pytest benchmarks/kernels/attention.py --benchmark-json=benchmarks/results/cpu-attention.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common.interleave import CACHE_BYTES, in_turns
from t2.model.attention import attention, take_over
from t2.model.kv_cache import GrowingLayer

HEADS = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # query heads, key heads, head_dim


def module_of(model: str) -> nn.Module:
    heads, key_heads, _ = HEADS[model]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True  # type: ignore[assignment]
    take_over([module])
    return module


class Step:
    """Decode step of one token a row after `length` cached ones, left-padded by 5."""

    def __init__(self, model: str, batch: int, length: int) -> None:
        heads, key_heads, head_dim = HEADS[model]
        g = torch.Generator().manual_seed(0)
        self.module = module_of(model)
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


class Prompt:
    """A causal prompt of one row."""

    def __init__(self, model: str, length: int) -> None:
        heads, key_heads, head_dim = HEADS[model]
        g = torch.Generator().manual_seed(0)
        self.module = module_of(model)
        self.query = torch.randn(1, length, heads, head_dim, generator=g).bfloat16().transpose(1, 2)
        self.key, self.value = (torch.randn(1, key_heads, length, head_dim, generator=g).bfloat16() for _ in range(2))

    def run(self, function: Any) -> Tensor:
        scale = self.query.shape[-1] ** -0.5
        y: Tensor = function(self.module, self.query, self.key, self.value, None, scaling=scale)[0]
        return y


@pytest.mark.parametrize("length", (64, 512, 4000))
@pytest.mark.parametrize("model", HEADS)
def test_prompt(benchmark: Any, model: str, length: int) -> None:
    prompt = Prompt(model, length)
    functions = {"ours": attention, "transformers sdpa": sdpa_attention_forward}
    paths = {name: lambda function=function: prompt.run(function) for name, function in functions.items()}
    heads, _, head_dim = HEADS[model]
    fmas = length * (length + 1) * heads * head_dim  # half of the scores, and half of the values
    in_turns(benchmark, paths, shape=model, batch=1, length=length, layers=1, fmas=fmas)


def test_paths_agree() -> None:
    """The timed paths compute the same result."""
    prompt = Prompt("SmolLM2", 33)
    torch.testing.assert_close(prompt.run(attention), prompt.run(sdpa_attention_forward), atol=2e-2, rtol=2e-2)
    step = Step("SmolLM2", 3, 20)
    ours, theirs = (
        step.run(attention, step.cache(GrowingLayer)),
        step.run(sdpa_attention_forward, step.cache(DynamicLayer)),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
