"""Key-value caches: the one that `generate` would make, and one whose layers grow in place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room for more; `keys` and `values` are views of what is filled.

    A new token is written behind the old ones. Where transformers replaced the views (beams reordered, rows selected)
    or the buffers are full, new ones take the contents over, a half larger.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        key_buffer, self.keys = _append(self._buffers[0], self.keys, key_states)
        value_buffer, self.values = _append(self._buffers[1], self.values, value_states)
        self._buffers = key_buffer, value_buffer
        return self.keys, self.values


def _append(buffer: Tensor | None, filled: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer [rows, heads, room, head_dim] with `new` behind `filled`, and the view of what is filled now."""
    old = filled.shape[-2] if filled.numel() else 0
    length = old + new.shape[-2]
    if buffer is None or buffer.data_ptr() != filled.data_ptr() or length > buffer.shape[-2]:
        buffer = new.new_empty(*new.shape[:-2], length + max(64, length // 2), new.shape[-1])
        if old:
            buffer[..., :old, :] = filled
    buffer[..., old:length, :] = new
    return buffer, buffer[..., :length, :]


def new_cache(model: nn.Module) -> DynamicCache | None:
    """The cache that `generate` would make for this model, if all it holds is keys and values; None otherwise."""
    if (
        not isinstance(model, PreTrainedModel)
        or model.config.is_encoder_decoder
        or "past_key_values" not in inspect.signature(model.forward).parameters
        or not getattr(model, "_supports_default_dynamic_cache", lambda: False)()
    ):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return cache if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) else None


def growing_cache(model: nn.Module) -> DynamicCache | None:
    """`new_cache` with layers that grow in place where they keep everything; None also off the CPU."""
    cache = new_cache(model)
    if cache is None or model.device.type != "cpu":
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
