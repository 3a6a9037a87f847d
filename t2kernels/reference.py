"""Eager torch definitions of every operator: what the kernels are checked against, and what runs where none is built.

The functions accept float64 and are differentiable by plain autograd unless they say otherwise. They round nothing
between the storage of the factors and the output: `bf16_products` only allows rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2kernels.packing import PANEL, matrix_of


def svf_linear_ref(
    x: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    z: Tensor,
    bias: Tensor | None = None,
    expert_ids: Tensor | None = None,
) -> Tensor:
    """y = ((x Vh^T) * (s * z)) U^T + bias, the SVF linear of arXiv 2501.06252, section 3.1; any one float dtype.

    Shapes: x [..., in], u [out, r], s [r], vh [r, in], z [r] or [E, r] with expert_ids [x.shape[0]].
    """
    scale = s * z
    if expert_ids is not None:
        scale = scale[expert_ids].reshape(x.shape[0], *[1] * (x.dim() - 2), s.shape[0])
    y = ((x @ vh.T) * scale) @ u.T
    return y if bias is None else y + bias


def _rows(x: Tensor) -> Tensor:
    """[rows, features], also of a tensor without features."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _float_matrix(factor: Tensor, n: int, k: int) -> Tensor:
    matrix = matrix_of(factor, n, k)
    return matrix.double() if matrix.dtype == torch.float64 else matrix.float()


def _float_factors(
    u: Sequence[Tensor], vh: Sequence[Tensor], out_features: int, rank: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """The parts of u and vh put together: [out, r] and [r, in]."""
    ranks, left = [], rank
    for part in vh[:-1]:
        ranks.append(part.shape[0] * (1 if part.dim() == 2 else PANEL))
        left -= ranks[-1]
    ranks.append(left)
    return (
        torch.cat([_float_matrix(part, out_features, r) for part, r in zip(u, ranks, strict=True)], 1),
        torch.cat([_float_matrix(part, r, in_features) for part, r in zip(vh, ranks, strict=True)], 0),
    )


def _float_base(base: Tensor, base_scale: Tensor | None, out_features: int, in_features: int) -> Tensor:
    matrix = _float_matrix(base, out_features, in_features)
    return matrix if base_scale is None else matrix * base_scale.unsqueeze(1)


def _row_scales(scales: Tensor, slots: Tensor, rows: int, component_scale: Tensor | None) -> Tensor:
    if slots.numel() and not (int(slots.min()) >= 0 and int(slots.max()) < scales.shape[0]):
        raise RuntimeError(f"slots: expected 0 <= id < {scales.shape[0]}, the rows of scales; got {slots.tolist()}")
    repeats = rows // max(slots.numel(), 1)
    row_scales = scales[slots].repeat_interleave(repeats, dim=0)
    return row_scales if component_scale is None else row_scales * component_scale


def factored_linear(
    x: Tensor,
    u: Sequence[Tensor],
    vh: Sequence[Tensor],
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    out_features: int,
    bf16_products: bool,
    base: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `torch.ops.t2kernels.factored_linear`; see `t2kernels.ops` for the meaning of the arguments."""
    rows = _rows(x)
    full_u, full_vh = _float_factors(u, vh, out_features, scales.shape[1], x.shape[-1])
    t = rows.float() @ full_vh.T
    scaled = t * _row_scales(scales, slots, rows.shape[0], component_scale)
    y = scaled @ full_u.T
    if base is not None:
        y = y + rows.float() @ _float_base(base, base_scale, out_features, x.shape[-1]).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features), t


def factored_linear_group(
    x: Tensor,
    u: Sequence[Tensor],
    vh: Sequence[Tensor],
    component_scales: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
    biases: Sequence[Tensor],
    out_features: Sequence[int],
    bf16_products: bool,
    bases: Sequence[Tensor] = (),
    base_scales: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Reference of `torch.ops.t2kernels.factored_linear_group`."""
    parts = len(u) // len(scales)
    ys = []
    for i, features in enumerate(out_features):
        own = slice(i * parts, (i + 1) * parts)
        component = component_scales[i] if component_scales else None
        bias = biases[i] if biases and biases[i].numel() else None
        base, base_scale = bases[i] if bases else None, base_scales[i] if base_scales else None
        y, _ = factored_linear(
            x, u[own], vh[own], component, scales[i], slots, bias, features, bf16_products, base, base_scale
        )
        ys.append(y)
    return ys


def factored_linear_backward(
    grad_y: Tensor,
    t: Tensor,
    u: Sequence[Tensor],
    vh: Sequence[Tensor],
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    in_features: int,
    need_dx: bool,
    need_dscales: bool,
    bf16_products: bool,
    base: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `torch.ops.t2kernels.factored_linear_backward`."""
    g = _rows(grad_y).float()
    rank = scales.shape[1]
    full_u, full_vh = _float_factors(u, vh, grad_y.shape[-1], rank, in_features)
    h = g @ full_u
    dscales = scales.new_zeros(scales.shape[0] if need_dscales else 0, rank)
    if need_dscales:
        th = t * h if component_scale is None else t * h * component_scale
        dscales.index_add_(0, slots.repeat_interleave(g.shape[0] // max(slots.numel(), 1)), th)
    if not need_dx:
        return grad_y.new_empty(0), dscales
    dt = h * _row_scales(scales, slots, g.shape[0], component_scale)
    dx = dt @ full_vh
    if base is not None:
        dx = dx + g @ _float_base(base, base_scale, grad_y.shape[-1], in_features)
    return dx.to(grad_y.dtype).reshape(*grad_y.shape[:-1], in_features), dscales


def dense_linear(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bf16_products: bool,
) -> Tensor:
    """Reference of `torch.ops.t2kernels.dense_linear`."""
    y = x.float() @ _float_matrix(weight, out_features, x.shape[-1]).T
    if row_scale is not None:
        y = y * row_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def dense_linear_backward(
    grad_y: Tensor, weight: Tensor, row_scale: Tensor | None, in_features: int, bf16_products: bool
) -> Tensor:
    """Reference of `torch.ops.t2kernels.dense_linear_backward`."""
    g = grad_y.float()
    if row_scale is not None:
        g = g * row_scale
    return (g @ _float_matrix(weight, grad_y.shape[-1], in_features)).to(grad_y.dtype)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scale: float,
    key_rows: Tensor | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """Reference of `torch.ops.t2kernels.decode_attention`; float64 stays float64."""
    if key_ranges is not None:
        keys = torch.arange(key.shape[2], device=key.device)
        inside = (keys >= key_ranges[:, :1]) & (keys < key_ranges[:, 1:])
        allowed = inside if allowed is None else allowed & inside
    if key_rows is not None:
        key, value = key[key_rows], value[key_rows]
    rows, heads, _, head_dim = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.reshape(rows, key.shape[1], -1, head_dim).to(wide)
    scores = grouped @ key.to(wide).transpose(-1, -2) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, None, :], -torch.inf)
    p = scores.softmax(-1)
    if allowed is not None:
        p = p.masked_fill(~allowed.any(-1)[:, None, None, None], 0.0)
    return (p @ value.to(wide)).reshape(rows, 1, heads, head_dim).to(query.dtype)
