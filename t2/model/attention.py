"""The parts of a forward pass besides products, through the hooks that transformers has for them.

`take_over` lets the attention modules of a model run on `t2kernels.decode_attention`: new tokens of a decode step, and
prompts, whose tokens are then rows that share keys. So a token has the same bits in a decode step, in a prompt and in a
part of one. The model's configuration goes on to say "sdpa": families decide by that name what they compute, so it has
to stay true. What the kernel does not do runs on the function that "sdpa" stood for before.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from t2kernels import ops
from t2kernels.backends import extension
from t2kernels.checks import ACTIVATION_DTYPES

MARK = "_t2_decodes"
"""Attribute of the modules whose attention was taken over."""

_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_OTHERS = ("softcap", *sorted(inspect.signature(sdpa_attention_forward).parameters.keys() - _ARGUMENTS))
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
    shared: Tensor | None = getattr(_here, "key_rows", None)
    mask, ranges = attention_mask, None
    if shared is not None:
        if mask is None or mask.dtype != torch.int64 or mask.shape != (shared.shape[0], 1, 1, 2):
            raise TypeError(f"attention_mask: expected the ranges of shared keys, got those of {type(module).__name__}")
        ranges = mask[:, 0, 0]
        mask = None
    is_causal = shared is None and _is_causal(module, query, mask, kwargs.get("is_causal"))
    if hasattr(module, MARK) and _runs(query, key, value, mask, dropout, kwargs, shared, is_causal):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _by_token(query, key, value, mask, scale, shared, ranges, is_causal), None
    if ranges is not None:
        assert shared is not None
        keys = torch.arange(key.shape[2], device=key.device)
        mask = ((keys >= ranges[:, :1]) & (keys < ranges[:, 1:]))[:, None, None]
        key, value = key[shared], value[shared]
    return _sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, given: bool | None) -> bool:
    """As transformers' "sdpa" decides it."""
    if given is None:
        given = getattr(module, "is_causal", True)
    return bool(given) and query.shape[2] > 1 and mask is None


def _by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    key_rows: Tensor | None,
    ranges: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """The kernel with a row for each token, [rows, tokens, heads, head_dim]."""
    rows, heads, tokens, head_dim = query.shape
    if tokens == 1:
        allowed = None if mask is None else mask[:, 0, 0]
        return ops.decode_attention(query, key, value, allowed, scale, key_rows, ranges)
    each = query.transpose(1, 2).reshape(rows * tokens, heads, 1, head_dim)
    allowed = None if mask is None else mask.expand(rows, 1, tokens, -1).reshape(rows * tokens, -1)
    if is_causal:
        ends = torch.arange(1, tokens + 1).repeat(rows)
        ranges = torch.stack([torch.zeros_like(ends), ends], dim=1)
    own = torch.arange(rows).repeat_interleave(tokens)
    return ops.decode_attention(each, key, value, allowed, scale, own, ranges).view(rows, tokens, heads, head_dim)


_sdpa: Any = AttentionInterface()["sdpa"]
_here = threading.local()


@contextmanager
def shared_keys(key_rows: Tensor) -> Iterator[None]:
    """Within the block, in this thread, rows of one token look at these rows [rows] of what the cache returns.

    So tokens of one request, and of many, are rows of one pass: those of a prompt share the keys of its row. What the
    model takes for a mask are the ranges of keys that the rows look at, int64 [rows, 1, 1, 2]: the first, and the end.
    """
    _here.key_rows = key_rows
    try:
        yield
    finally:
        _here.key_rows = None


def _runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
    key_rows: Tensor | None,
    is_causal: bool,
) -> bool:
    """Whether this is what the kernel does: a mask of tokens and keys at most, no gradient; and it is built."""
    rows, heads, tokens, head_dim = query.shape
    return (
        (key_rows is None or tokens == 1)
        and extension is not None
        and query.device.type == "cpu"
        and query.dtype in ACTIVATION_DTYPES
        and head_dim % 16 == 0
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and (key if key_rows is None else key_rows).shape[0] == rows
        and key.shape[-1] == head_dim
        and heads % key.shape[1] == 0
        and (not is_causal or tokens == key.shape[2])
        and (mask is None or (mask.dtype == torch.bool and mask.shape in _masks(rows, tokens, key.shape[2])))
        and dropout == 0.0
        and not options.get("output_attentions")
        and all(options.get(name) is None for name in _OTHERS)
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )


def _masks(rows: int, tokens: int, length: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of masks that the kernel takes: of each row, or one for all rows of several tokens."""
    own = (rows, 1, tokens, length)
    return (own,) if tokens == 1 else (own, (1, 1, tokens, length))


def take_over(modules: Iterable[nn.Module]) -> None:
    """Lets these modules' "sdpa" attention, where that is what they use, run on the kernel."""
    AttentionInterface.register("sdpa", attention)
    for module in modules:
        setattr(module, MARK, True)


def give_back(model: nn.Module) -> None:
    """Undoes `take_over` for all of a model."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)
