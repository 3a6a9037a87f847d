"""Expert of each request of a batch, drawn in the four ways of Punica's benchmarks."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def draw_experts(kind: str, batch: int) -> Tensor:
    """Expert ids [batch] int64: identical, uniform (over sqrt(batch) experts), zipf (exponent 1.5) or distinct."""
    rng = numpy.random.default_rng(0)
    if kind == "identical":
        return torch.zeros(batch, dtype=torch.int64)
    if kind == "distinct":
        return torch.arange(batch)
    if kind == "uniform":
        return torch.from_numpy(rng.integers(0, round(batch**0.5), batch))
    return torch.from_numpy((rng.zipf(1.5, batch) - 1) % batch)
