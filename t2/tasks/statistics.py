"""Intervals and paired tests for scores of the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95% (z = 1.96) confidence (E. B. Wilson, 1927)."""
    if count < 1:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The exact two-sided p-value of McNemar's test on scores of the same problems.

    How likely a split at least as uneven as this is, of the problems that one answers better than the other, if either
    were as likely to: p = min(1, 2 P(X <= min(better, worse))), X ~ Binomial(better + worse, 1/2).
    """
    better, worse = better_worse(first, second)
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def better_worse(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """On how many of the same problems the second has the higher score, and on how many the lower one."""
    pairs = list(zip(first, second, strict=True))
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
