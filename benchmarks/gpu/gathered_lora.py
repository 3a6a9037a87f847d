"""Gathered multi-LoRA product in Triton, the way Punica and S-LoRA serve adapters.

y[b] += (x[b] A[id]^T) B[id]^T, each row with its adapter's matrices: traffic grows with the adapters of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 8  # programs that share a row's reduction, as Punica's and vLLM's shrink kernels do


@triton.jit
def _shrink(x, a, ids, t, features, RANK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    adapter = tl.load(ids + row)
    ranks = tl.arange(0, RANK)
    acc = tl.zeros((RANK,), tl.float32)
    for k0 in range(split * BLOCK, features, BLOCK * SPLITS):
        k = k0 + tl.arange(0, BLOCK)
        inside = k < features
        x_tile = tl.load(x + row * features + k, mask=inside, other=0.0).to(tl.float32)
        at = a + (adapter * RANK + ranks)[:, None] * features + k[None, :]
        acc += tl.sum(tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32) * x_tile[None, :], axis=1)
    tl.store(t + (row * SPLITS + split) * RANK + ranks, acc)


@triton.jit
def _expand_add(t, b, ids, y, features, RANK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(ids + row)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks, inside = tl.arange(0, RANK), n < features
    parts = t + (row * SPLITS + tl.arange(0, SPLITS))[:, None] * RANK + ranks[None, :]
    t_row = tl.sum(tl.load(parts), axis=0)
    b_tile = tl.load(b + (adapter * features + n)[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(b_tile.to(tl.float32) * t_row[None, :], axis=1)
    at = y + row * features + n
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + delta).to(y.dtype.element_ty), mask=inside)


def add_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """Adds each row's adapter to y. x [B, in], a [E, rank, in], b [E, out, rank], ids int64 [B], y [B, out]."""
    rank, out = a.shape[1], y.shape[1]
    t = torch.empty(x.shape[0], SPLITS, rank, device=x.device)
    _shrink[(x.shape[0], SPLITS)](x, a, ids, t, x.shape[1], RANK=rank, BLOCK=512, SPLITS=SPLITS)
    _expand_add[(x.shape[0], triton.cdiv(out, 256))](t, b, ids, y, out, RANK=rank, BLOCK=256, SPLITS=SPLITS)
    return y
