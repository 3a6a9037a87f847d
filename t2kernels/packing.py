"""Storage of frozen matrices: panels of 16 output columns on the CPU, plain rows elsewhere; 8 and 4 bits.

The CPU kernels read a matrix [n, k] as `panels`: the 16 values that meet x[k] lie together, and a panel is one
sequential stream. float32 and float16 panels are [ceil(n / 16), k, 16]; bfloat16 and int8 ones
[ceil(n / 16), ceil(k / 2), 16, 2], two terms of a column side by side, as dot-product instructions take them. Columns
past n and a term past k hold zeros.

Matrices in blocks are for the CPU. Every 32 terms of a row have a scale and a minimum in float16: w = scale * code +
minimum, with codes of 4 bits ("int4": 5 bits a weight in all, as in GGUF's Q4_1) or 8 ("uint8": 9 bits). Panels are
bytes, [ceil(n / 16), ceil(k / 32), 320 or 576]: 16 scales, 16 minima, then the codes as csrc/cpu/formats.h says.

GPUs read the row-major matrix, but for int8, which they read in words of four terms: [n, ceil(k / 256), 256] where the
four bytes of word j of a block hold its terms j, 64 + j, 128 + j and 192 + j (zeros past k). So a tensor core's operand
of 64 consecutive terms is one byte of 64 words: unpacking moves nothing between threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # which torch's stubs lack
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
DENSE_STORAGE_DTYPES = (*STORAGE_DTYPES, INT4)
"""Storage of W on a CPU. Factors are not stored in 4 bits; docs/cpu.md says why."""
GPU_STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
BESIDE = {torch.float8_e4m3fn: torch.bfloat16, INT4: torch.uint8}
"""Storage of a support's components beside W in these formats; beside others it is that of W."""
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Formats with a scale per line, and their largest value."""

BLOCK_TERMS = 32  # of a row with one scale and minimum
BLOCK_BYTES = {INT4: 320, torch.uint8: 576}  # of 16 rows
LEVELS = {INT4: 15, torch.uint8: 255}
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
    if stored.dtype == torch.uint8:
        if stored.device.type != "cpu":
            raise ValueError(f"weight: expected a CPU, as {stored.device} has no kernels for matrices in blocks")
        return stored
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
    if stored.dtype == torch.uint8:
        return _matrix_of_blocks(stored, n, k)
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


def quantize_blocks(matrix: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A matrix [n, k] in blocks, and the power of two [n] float32 that each row was divided by, or `scale`.

    Of 4 bits, every block of 32 terms takes the scale and the minimum that leave the smallest squared error, of those
    that its range gives and a few least squares fits to finer and coarser steps. Weights that came from Q4_1 are kept
    as they are.
    """
    matrix = matrix.float()
    if scale is None:  # float16 has its full precision from 2^-14 to 2^16: rows begin near the upper end
        scale = torch.exp2(matrix.abs().amax(1).clamp(min=2.0**-100).log2().ceil() - 14)
    rows = 16 * PANEL  # at a time
    parts = zip(matrix.split(rows), scale.split(rows), strict=True)
    return torch.cat([_blocks(part / own.unsqueeze(1), dtype) for part, own in parts]), scale


def _blocks(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    levels, (n, k) = LEVELS[dtype], matrix.shape
    blocks = F.pad(matrix, (0, -k % BLOCK_TERMS)).unflatten(1, (-1, BLOCK_TERMS))
    real = F.pad(torch.ones(k, dtype=torch.bool), (0, -k % BLOCK_TERMS)).view(-1, BLOCK_TERMS)
    low = blocks.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    span = blocks.masked_fill(~real, -torch.inf).amax(-1, keepdim=True) - low
    best: tuple[Tensor, ...] = ()
    for steps in (levels, 13.8, 14.2, 14.6, 15.4, 15.8, 16.2) if dtype == INT4 else (levels,):
        scale, minimum = span / levels, low
        if best:
            scale, minimum = _fit(blocks, _codes(steps * (blocks - low) / span.clamp(min=2.0**-100), levels), real)
        scale, minimum = scale.half().float(), minimum.half().float()
        codes = _codes((blocks - minimum) / scale.clamp(min=2.0**-100), levels)
        error = ((scale * codes + minimum - blocks) * real).square().sum(-1, keepdim=True)
        found = error, scale, minimum, codes
        best = tuple(torch.where(error < best[0], *pair) for pair in zip(found, best, strict=True)) if best else found
    _, scale, minimum, codes = best
    count = -(-n // PANEL)
    pad = (0, 0, 0, 0, 0, count * PANEL - n)
    heads = F.pad(torch.cat([scale, minimum], -1).half(), pad)  # [rows, blocks, 2]
    heads = heads.view(count, PANEL, -1, 2).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)
    quads = (
        F.pad((codes * real).to(torch.uint8), pad).view(count, PANEL, -1, BLOCK_TERMS // 4, 4).permute(0, 2, 3, 1, 4)
    )
    if dtype == INT4:
        quads = quads[:, :, ::2] | quads[:, :, 1::2] << 4
    return torch.cat([heads, quads.flatten(2)], -1)


def _codes(steps: Tensor, levels: int) -> Tensor:
    return steps.round().clamp(0, levels)


def _fit(blocks: Tensor, codes: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the least squares fit scale * code + minimum to each block."""
    count = real.sum(-1, keepdim=True)
    codes, values = codes * real, blocks * real
    mean_code, mean = codes.sum(-1, keepdim=True) / count, values.sum(-1, keepdim=True) / count
    spread = (codes.square().sum(-1, keepdim=True) - count * mean_code.square()).clamp(min=2.0**-100)
    scale = (((codes * values).sum(-1, keepdim=True) - count * mean_code * mean) / spread).clamp(min=0)
    return scale, mean - scale * mean_code


def blocks_dtype(blocks: Tensor) -> torch.dtype:
    """int4 or uint8: what a matrix in blocks was stored as."""
    return INT4 if blocks.shape[-1] == BLOCK_BYTES[INT4] else torch.uint8


def _matrix_of_blocks(blocks: Tensor, n: int, k: int) -> Tensor:
    """Without the scales of its rows; float32."""
    count, along, _ = blocks.shape
    heads = blocks[:, :, : 4 * PANEL].contiguous().view(torch.float16).float().view(count, along, 2, PANEL)
    quads = blocks[:, :, 4 * PANEL :].reshape(count, along, -1, PANEL, 4)
    if blocks_dtype(blocks) == INT4:
        quads = torch.stack([quads & 15, quads >> 4], 3).flatten(2, 3)
    codes = quads.permute(0, 3, 1, 2, 4).reshape(count, PANEL, along, BLOCK_TERMS).float()
    scale, minimum = (heads[:, :, i].transpose(1, 2).unsqueeze(-1) for i in (0, 1))
    return (scale * codes + minimum).reshape(count * PANEL, -1)[:n, :k]
