"""Eager torch definitions of every operator: what the kernels are checked against, and what runs where none is built.

The functions accept float64 and are differentiable by plain autograd unless they say otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels.packing import unpack_panels


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


def _float_matrix(factor: Tensor, n: int) -> Tensor:
    matrix = factor if factor.dim() == 2 else unpack_panels(factor, n)
    return matrix.double() if matrix.dtype == torch.float64 else matrix.float()


def _row_scales(scales: Tensor, slots: Tensor, rows: int, component_scale: Tensor | None) -> Tensor:
    if slots.numel() and not (int(slots.min()) >= 0 and int(slots.max()) < scales.shape[0]):
        raise RuntimeError(f"slots: expected 0 <= id < {scales.shape[0]}, the rows of scales; got {slots.tolist()}")
    repeats = rows // max(slots.numel(), 1)
    row_scales = scales[slots].repeat_interleave(repeats, dim=0)
    return row_scales if component_scale is None else row_scales * component_scale


def factored_linear(
    x: Tensor,
    u: Tensor,
    vh: Tensor,
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Reference of `torch.ops.t2kernels.factored_linear`; see `t2kernels.ops` for the meaning of the arguments."""
    rows = x.reshape(-1, x.shape[-1])
    t = rows.float() @ _float_matrix(vh, scales.shape[1]).T
    scaled = t * _row_scales(scales, slots, rows.shape[0], component_scale)
    y = scaled @ _float_matrix(u, out_features).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features), t


def factored_linear_backward(
    grad_y: Tensor,
    t: Tensor,
    u: Tensor,
    vh: Tensor,
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    in_features: int,
    need_dx: bool,
    need_dscales: bool,
) -> tuple[Tensor, Tensor]:
    """Reference of `torch.ops.t2kernels.factored_linear_backward`."""
    g = grad_y.reshape(-1, grad_y.shape[-1]).float()
    rank = scales.shape[1]
    h = g @ _float_matrix(u, grad_y.shape[-1])
    dscales = scales.new_zeros(scales.shape[0] if need_dscales else 0, rank)
    if need_dscales:
        th = t * h if component_scale is None else t * h * component_scale
        dscales.index_add_(0, slots.repeat_interleave(g.shape[0] // max(slots.numel(), 1)), th)
    if not need_dx:
        return grad_y.new_empty(0), dscales
    dt = h * _row_scales(scales, slots, g.shape[0], component_scale)
    dx = dt @ _float_matrix(vh, rank)
    return dx.to(grad_y.dtype).reshape(*grad_y.shape[:-1], in_features), dscales


def dense_linear(x: Tensor, weight: Tensor, row_scale: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    """Reference of `torch.ops.t2kernels.dense_linear`."""
    y = x.float() @ _float_matrix(weight, out_features).T
    if row_scale is not None:
        y = y * row_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def dense_linear_backward(grad_y: Tensor, weight: Tensor, row_scale: Tensor | None, in_features: int) -> Tensor:
    """Reference of `torch.ops.t2kernels.dense_linear_backward`."""
    g = grad_y.float()
    if row_scale is not None:
        g = g * row_scale
    return (g @ _float_matrix(weight, grad_y.shape[-1])).to(grad_y.dtype)
