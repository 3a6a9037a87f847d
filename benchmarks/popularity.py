"""Which expert each request of a batch wants, in the four ways of Punica's benchmarks."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def popular(kind: str, batch: int) -> Tensor:
    """Expert of each request, as Punica draws them: identical, uniform, zipf (1.5) or distinct."""
    rng = numpy.random.default_rng(0)
    if kind == "identical":
        return torch.zeros(batch, dtype=torch.int64)
    if kind == "distinct":
        return torch.arange(batch)
    if kind == "uniform":  # as many experts as the square root of the batch
        return torch.from_numpy(rng.integers(0, round(batch**0.5), batch))
    return torch.from_numpy((rng.zipf(1.5, batch) - 1) % batch)
