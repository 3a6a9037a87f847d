"""Supports: the components of each matrix that an expert may change. At all others its z is 1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from t2.experts.expert import Expert
from t2.experts.layout import Layout


def top_components(scores: Tensor, layout: Layout, count: int) -> Tensor:
    """Positions [K] int64 in z of the `count` highest scores of each matrix, in increasing order.

    A matrix of a lower rank has all of its components in it; of equal scores the first ones are taken.

    Args:
        scores: [R], finite; for instance the size of a gradient, or of sigma (z - 1).
        count: components of a matrix, at least 1.

    Raises:
        ValueError: another shape or count, or scores that are not finite.
    """
    if tuple(scores.shape) != (layout.R,):
        raise ValueError(f"scores: expected shape [{layout.R}], got {list(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite numbers, got NaN or infinite ones")
    if type(count) is not int or count < 1:
        raise ValueError(f"count: expected an integer >= 1, got {count!r}")
    chosen = [
        start + own.sort(descending=True, stable=True).indices[:count].sort().values
        for start, own in zip(layout.offsets, scores.cpu().split(list(layout.ranks)), strict=True)
    ]
    return torch.cat(chosen)


def support_of(experts: Iterable[Expert]) -> Tensor:
    """Positions [K] int64 in z where any of these experts of one layout differs from the base, in increasing order.

    Raises:
        ValueError: no experts, or of several layouts.
    """
    given = list(experts)
    if not given:
        raise ValueError("experts: expected at least one, got none")
    for other in given[1:]:
        given[0].layout.check_same(other.layout, "experts", same_base=False)
    return (torch.stack([expert.z for expert in given]) != 1).any(0).nonzero()[:, 0]
