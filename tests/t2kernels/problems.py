"""Random SVF problems, shared by the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STORAGE = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8]
DENSE_STORAGE = [*STORAGE, torch.int4]
ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# out, rank, in: ragged, one, smaller and larger than a panel, more than one slice of the reduction
SHAPES = [(1, 1, 1), (7, 1, 5), (1, 7, 577), (16, 16, 32), (17, 15, 33), (577, 577, 1031), (1031, 577, 577)]
BATCHES = [0, 1, 2, 3, 5, 6, 7, 12, 13, 33, 257, 300]


@dataclass
class Problem:
    x: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor
    z: Tensor  # [E, r]
    ids: Tensor
    bias: Tensor

    @property
    def scales(self) -> Tensor:
        return self.s * self.z


def problem(shape, batch, experts=5, seed=0, dtype=torch.float32) -> Problem:
    out, rank, inputs = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g)

    return Problem(
        x=normal(batch, inputs).to(dtype),
        u=(normal(out, rank) / rank**0.5).to(dtype),
        s=torch.rand(rank, generator=g) + 0.5,
        vh=(normal(rank, inputs) / inputs**0.5).to(dtype),
        z=1 + 0.3 * normal(experts, rank),
        ids=torch.randint(0, experts, (batch,), generator=g),
        bias=normal(out).to(dtype),
    )


# Rounding of the result to the activations' dtype, plus fp32 accumulation over at most ~2,000 terms. int8 factors meet
# activations of 16 bits, relative to the largest of 512, and blocks those of 8 bits, relative to the largest of 32.
def tolerance(dtype, storage=None):
    rounding = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    return max(rounding, {torch.int8: 1e-4, torch.uint8: 2e-2, torch.int4: 2e-2}.get(storage, 0))
