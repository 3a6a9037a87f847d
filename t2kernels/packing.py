"""Storage of frozen matrices: panels of 16 output columns, and int8 quantisation.

The CPU kernels read a matrix [n, k] as `panels`: the 16 values that meet x[k] lie together, and a panel is one
sequential stream. float32 and float16 panels are [ceil(n / 16), k, 16]; bfloat16 and int8 ones
[ceil(n / 16), ceil(k / 2), 16, 2], two terms of a column side by side, as dot-product instructions take them. Columns
past n and a term past k hold zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


_PAIRED = (torch.bfloat16, torch.int8)


def pack_panels(matrix: Tensor) -> Tensor:
    """Matrix [n, k] -> contiguous panels of the same dtype."""
    if matrix.dtype in _PAIRED:
        panels = _pack_single(F.pad(matrix, (0, matrix.shape[1] % 2)))
        return panels.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    return _pack_single(matrix)


def _pack_single(matrix: Tensor) -> Tensor:
    n, k = matrix.shape
    count = -(-n // PANEL)
    panels = matrix.new_zeros(count, k, PANEL)
    whole = n // PANEL
    panels[:whole] = matrix[: whole * PANEL].reshape(whole, PANEL, k).transpose(1, 2)
    if whole < count:
        panels[whole, :, : n - whole * PANEL] = matrix[whole * PANEL :].T
    return panels


def unpack_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """Panels -> matrix [n, k]."""
    if panels.dim() == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n, :k]


def quantize_int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one float32 scale per index along `dim`: matrix ~ int8 * scale.

    Returns (int8 matrix, scale [matrix.shape[dim]]). An all-zero line gets scale 0.
    """
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1 - dim) / 127.0
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1 - dim)
    return (matrix / step).round().clamp(-127, 127).to(torch.int8), scale
