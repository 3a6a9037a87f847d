"""Padding, shared prefixes and batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import DynamicSlidingWindowLayer


def length_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of rows of like length, as many at a time as the budget holds with their padding; one row always fits."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= token_budget:
            end += 1
        yield order[start:end]
        start = end


WORTH_SHARING = 8
"""Tokens that prompts must have in common for a pass of their own."""


def pad(rows: Sequence[Tensor], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """The rows [length] as one matrix [rows, longest], and its mask (int64, 1 where a row has something)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def shared_prefix(prompts: Sequence[Tensor], cache: DynamicCache | None) -> int:
    """Number of tokens at the start of all prompts to read once for all; at least one token of each is left.

    0 where a layer keeps a window alone: it counts places, and behind a shared prefix padding takes some.
    """
    if len(prompts) < 2 or cache is None or any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return 0
    length = min(len(prompt) for prompt in prompts) - 1
    starts = torch.stack([prompt[:length] for prompt in prompts])
    same = int((starts == starts[0]).all(0).long().cumprod(0).sum())
    return same if same >= WORTH_SHARING else 0
