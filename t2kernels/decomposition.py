"""The thin SVD of a weight: W = U diag(s) Vh."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALGORITHM = "gram-eigh-float64"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS = 2048  # of a weight that are in float64 at a time
SAFE_RATIO = 1e-4  # s_min / s_max down to which the columns of A V / s are orthonormal far below float32 eps


class Factors(NamedTuple):
    """Thin SVD, all float32 and contiguous: u [out, r], s [r] descending, vh [r, in], r = min(out, in)."""

    u: Tensor
    s: Tensor
    vh: Tensor


def decompose(weight: Tensor) -> Factors:
    """Thin SVD of `weight` [out, in] (float32, bfloat16, float16 or float64; any strides), on its device.

    Deterministic signs: the entry of largest magnitude in each column of u is positive.

    Algorithm: eigenvectors V of the Gram matrix of the smaller side in float64, then B = A V, whose column
    norms are s and whose normalised columns are the other factor. By construction B V^T = A, so the
    reconstruction is exact up to rounding; what squaring costs is orthogonality, eps64 (s_max / s_min)^2.
    Where that could reach float32 rounding (s_min / s_max < 1e-4: rank-deficient or ill-conditioned) B = Q R
    by Householder QR, largest columns first, replaces the normalisation: Q is orthonormal whatever the rank,
    and the part of R above its diagonal is at most about sqrt(eps64) s_max = 1e-8 s_max, below the rounding
    of the float32 result, so s = |diag R| and no input is unsafe.

    Above the weight and the result it holds one float64 copy of the larger factor and two of the smaller.

    It is the fastest of five candidates at this accuracy, though float32 gesdd is quicker on some square
    matrices at 20 to 80 times the error. Milliseconds on 2 cores (`benchmarks/decompose_algorithms.py`):

        matrix               this   float64 gesdd   float32 gesdd
        SmolLM2  576 x 576     44              50        30
        SmolLM2  192 x 576    3.9             8.4       6.0
        SmolLM2 1536 x 576     50             105        59
        SmolLM2 576 x 1536     50             122        79
        random 1024 x 4096    343            1462       968
        random 4096 x 4096  12033           20842     10494
        error                4e-8            4e-8   1e-6 to 3e-6

    QR before float64 gesdd takes 1.5 to 2.1 times as long as this, and a float32 eigh refined once in float64 is slower
    and loses accuracy (error up to 6e-4).

    Raises:
        TypeError: `weight` is not a tensor, or not of a float dtype.
        ValueError: `weight` is not 2-D, is empty, on the meta device, not finite, or beyond float32.
    """
    check_weight(weight)
    out_features, in_features = weight.shape
    a = weight.detach() if out_features >= in_features else weight.detach().T
    gram = _gram_lower(a)
    norm = float(gram.diagonal().sum().sqrt())
    if not norm <= torch.finfo(torch.float32).max:
        count = int((~weight.isfinite()).sum())
        raise ValueError(
            f"weight has {count} NaN or infinite values of {weight.numel()}, norm {norm:.1e}; "
            "expected finite values with a norm inside float32"
        )
    v = torch.linalg.eigh(gram)[1].flip(1)
    del gram
    b = _times(a, v)
    s = b.norm(dim=0)
    if s.min() > SAFE_RATIO * s.max():
        b /= s
    else:
        b, r = torch.linalg.qr(b)
        s = r.diagonal().abs()
        b *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    s, order = s.sort(descending=True)
    v = v.float()
    b = b.float()
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        b, v = b[:, order], v[:, order]
    u, vt = (b, v) if out_features >= in_features else (v, b)
    highest, lowest = u.amax(0), u.amin(0)
    signs = torch.where(highest < -lowest, -1.0, 1.0)
    return Factors(u.mul_(signs).contiguous(), s.float(), vt.mul_(signs).T.contiguous())


def _times(a: Tensor, v: Tensor) -> Tensor:
    """A V in float64, A widened a block of rows at a time."""
    product = torch.empty(a.shape, dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[0], ROWS):
        torch.mm(a[start : start + ROWS].double(), v, out=product[start : start + ROWS])
    return product


def _gram_lower(a: Tensor, block: int = 256) -> Tensor:
    """A^T A of A [m, n] in float64 at half the work of a full product: the lower triangle, which `eigh` reads."""
    n = a.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=a.device)
    for rows in a.split(ROWS):
        rows = rows.double()
        for start in range(0, n, block):
            gram[start:, start : start + block] += rows[:, start:].T @ rows[:, start : start + block]
    return gram


def check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is {type(weight).__name__}, expected a torch.Tensor")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight is {weight.dtype}, expected one of {', '.join(map(str, FLOAT_DTYPES))}")
    if weight.layout != torch.strided or weight.is_meta:
        raise ValueError(f"weight is {weight.layout} on {weight.device}, expected a dense tensor with data")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in] with out, in >= 1")
