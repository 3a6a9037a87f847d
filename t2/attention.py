"""The parts of a decode step besides products, through the hooks that transformers has for them.

`take_over` lets the attention modules of a model run one new token a row on `t2kernels.decode_attention`. The model's
configuration goes on to say "sdpa": families decide by that name what they compute, so it has to stay true. What the
kernel does not do runs on the function that "sdpa" stood for before. `GrowingLayer` is a cache layer that writes new
keys and values behind the old ones instead of copying all of them for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from t2kernels import ops
from t2kernels.backends import extension
from t2kernels.checks import ACTIVATION_DTYPES

MARK = "_t2_decodes"
"""Attribute of the modules whose attention was taken over."""

_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_OTHERS = ("softcap", *(inspect.signature(sdpa_attention_forward).parameters.keys() - _ARGUMENTS))
"""Options of "sdpa" that change its result, of which the kernel has none."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [rows, heads, tokens, head_dim] -> [rows, tokens, heads, head_dim]."""
    if hasattr(module, MARK) and _decodes(query, key, value, attention_mask, dropout, kwargs):
        allowed = None if attention_mask is None else attention_mask[:, 0, 0]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ops.decode_attention(query, key, value, allowed, scale), None
    return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


_sdpa: Any = AttentionInterface()["sdpa"]


def _decodes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether this is what the kernel does: one token a row, a mask of keys at most, no gradient; and it is built."""
    rows, heads, tokens, head_dim = query.shape
    return (
        tokens == 1
        and extension is not None
        and query.device.type == "cpu"
        and query.dtype in ACTIVATION_DTYPES
        and head_dim % 16 == 0
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and key.shape[0] == rows
        and key.shape[-1] == head_dim
        and heads % key.shape[1] == 0
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (rows, 1, 1, key.shape[2])))
        and dropout == 0.0
        and not options.get("output_attentions")
        and all(options.get(name) is None for name in _OTHERS)
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )


def take_over(modules: Iterable[nn.Module]) -> None:
    """Lets these modules' "sdpa" attention, where that is what they use, run decode steps on the kernel."""
    AttentionInterface.register("sdpa", attention)
    for module in modules:
        setattr(module, MARK, True)


def give_back(model: nn.Module) -> None:
    """Undoes `take_over` for all of a model."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)


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
