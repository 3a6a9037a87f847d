"""Intervals and paired tests for scores of the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (E. B. Wilson, 1927) of a mean score; 95% confidence for z = 1.96.

    Scores may be graded, such as VQA's, which `scipy.stats` has no interval for. For scores of 0 and 1 it
    equals `scipy.stats.binomtest(right, count).proportion_ci(method="wilson")`.
    """
    if count < 1:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p-value of McNemar's test on scores of the same examples: a binomial test of better and worse."""
    from scipy.stats import binomtest

    better, worse = better_worse(first, second)
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def better_worse(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """Number of examples on which the second score is higher, and number on which it is lower."""
    pairs = list(zip(first, second, strict=True))
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
