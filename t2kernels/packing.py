"""Storage of frozen matrices: panels of 16 output columns on the CPU, plain rows elsewhere; quantisation to 8 bits.

The CPU kernels read a matrix [n, k] as `panels`: the 16 values that meet x[k] lie together, and a panel is one
sequential stream. float32 and float16 panels are [ceil(n / 16), k, 16]; bfloat16 and int8 ones
[ceil(n / 16), ceil(k / 2), 16, 2], two terms of a column side by side, as dot-product instructions take them. Columns
past n and a term past k hold zeros.

GPUs read the row-major matrix, but for int8, which they read in words of four terms: [n, ceil(k / 256), 256] where the
four bytes of word j of a block hold its terms j, 64 + j, 128 + j and 192 + j (zeros past k). So a tensor core's operand
of 64 consecutive terms is one byte of 64 words: unpacking moves nothing between threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
GPU_STORAGE_DTYPES = (*STORAGE_DTYPES, torch.float8_e4m3fn)
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Formats with a scale per line, and their largest value."""

BLOCK = 256  # terms of a row whose bytes are interleaved on a GPU
PLANES = 4  # terms in a word
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


def lay_out(stored: Tensor, n: int, k: int) -> Tensor:
    """A stored matrix [n, k], panels or plain, as the kernels of its device read it."""
    if stored.device.type == "cpu":
        return stored if _is_panels(stored) else pack_panels(matrix_of(stored, n, k))
    if stored.dtype == torch.int8:
        return stored if stored.dim() == 3 else interleave(matrix_of(stored, n, k))
    return matrix_of(stored, n, k).contiguous()


def _is_panels(stored: Tensor) -> bool:
    return stored.dim() == (4 if stored.dtype in _PAIRED else 3)


def interleave(matrix: Tensor) -> Tensor:
    """int8 matrix [n, k] -> [n, ceil(k / 256), 256], the words of a GPU."""
    n, k = matrix.shape
    blocks = F.pad(matrix, (0, -k % BLOCK)).view(n, -1, PLANES, BLOCK // PLANES)
    return blocks.transpose(2, 3).reshape(n, -1, BLOCK)


def matrix_of(stored: Tensor, n: int, k: int) -> Tensor:
    """The stored matrix [n, k], whatever its layout."""
    if stored.dim() == 2:
        return stored
    if stored.dtype == torch.int8 and stored.dim() == 3:
        return stored.view(n, -1, BLOCK // PLANES, PLANES).transpose(2, 3).reshape(n, -1)[:, :k]
    return unpack_panels(stored, n, k)


def unpack_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """Panels -> matrix [n, k]."""
    if panels.dim() == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n, :k]


def quantize(matrix: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric int8 or float8_e4m3fn with one float32 scale per index along `dim`: matrix ~ stored * scale.

    Returns (stored matrix, scale [matrix.shape[dim]]). An all-zero line gets scale 0.
    """
    matrix, largest = matrix.float(), EIGHT_BITS[dtype]
    scale = matrix.abs().amax(dim=1 - dim) / largest
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1 - dim)
    steps = (matrix / step).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scale
