"""Storage of frozen matrices: panels of 16 output columns, and int8 quantisation.

The CPU kernels read a matrix [n, k] as `panels` [ceil(n / 16), k, 16]: the 16 values that meet x[k] lie together, and
a panel is one sequential stream. Columns past n hold zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def pack_panels(matrix: Tensor) -> Tensor:
    """Matrix [n, k] -> contiguous panels [ceil(n / 16), k, 16] of the same dtype."""
    n, k = matrix.shape
    count = -(-n // PANEL)
    panels = matrix.new_zeros(count, k, PANEL)
    whole = n // PANEL
    panels[:whole] = matrix[: whole * PANEL].reshape(whole, PANEL, k).transpose(1, 2)
    if whole < count:
        panels[whole, :, : n - whole * PANEL] = matrix[whole * PANEL :].T
    return panels


def unpack_panels(panels: Tensor, n: int) -> Tensor:
    """Panels [ceil(n / 16), k, 16] -> matrix [n, k]."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n]


def quantize_int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one float32 scale per index along `dim`: matrix ~ int8 * scale.

    Returns (int8 matrix, scale [matrix.shape[dim]]). An all-zero line gets scale 0.
    """
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1 - dim) / 127.0
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1 - dim)
    return (matrix / step).round().clamp(-127, 127).to(torch.int8), scale
