"""The operators of `t2kernels.ops` on the Triton kernels: the same arguments, factors as row-major matrices.

What is rounded: bfloat16 activations meet bfloat16, int8 and fp8 factors as they are, and so does the scaled
projection, rounded to bfloat16. In float16 the projection could pass 65504, so it stays float32 and is multiplied as
tf32, which holds every float16 and bfloat16 factor exactly; so is float16 with bfloat16. float32 activations or factors
are multiplied in float32 (ieee). `bf16_products` rounds activations to bfloat16 where the factors are bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from t2kernels.packing import EIGHT_BITS
from t2kernels.triton import kernels
from t2kernels.triton.tuning import Launch, Tile, multiprocessors, tile_for

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Arithmetic:
    """How one launch multiplies: terms of 16 bits or not, what float32 terms become, whether x is rounded first."""

    half: bool
    precision: str
    round_to_bf16: bool


def _arithmetic(left: torch.dtype, x: torch.dtype, weights: Sequence[Tensor], bf16_products: bool) -> _Arithmetic:
    """left: the dtype of the product's left side; x: of the call's activations."""
    dtypes = {w.dtype for w in weights}
    round_to_bf16 = bf16_products and dtypes == {torch.bfloat16}
    term = torch.bfloat16 if round_to_bf16 else left
    exact = x == torch.float32 or torch.float32 in dtypes
    half = term in HALVES and all(dtype in (term, *EIGHT_BITS) for dtype in dtypes)
    return _Arithmetic(half, "ieee" if exact else "tf32", round_to_bf16)


def _scaled_dtype(x: torch.dtype, weights: Sequence[Tensor], bf16_products: bool) -> torch.dtype:
    """What the scaled projection is kept as between the two products."""
    dtypes = {w.dtype for w in weights}
    if torch.float32 not in dtypes and (x == torch.bfloat16 or (bf16_products and dtypes == {torch.bfloat16})):
        return torch.bfloat16
    return torch.float32


def _rows(x: Tensor) -> Tensor:
    """x [..., features] as [rows, features] with contiguous features."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(
    name: str,
    left: Tensor,
    weights: Sequence[Tensor],
    columns: Sequence[int],
    k: Sequence[int],
    arithmetic: _Arithmetic,
    arguments: Sequence[Any],
    **constants: Any,
) -> None:
    _run(name, _tile(name, left, weights, columns, k, arithmetic), left, columns, k, arithmetic, arguments, **constants)


def _tile(
    name: str,
    left: Tensor,
    weights: Sequence[Tensor],
    columns: Sequence[int],
    k: Sequence[int],
    arithmetic: _Arithmetic,
) -> Tile:
    dtypes = tuple(dict.fromkeys((left.dtype, *(w.dtype for w in weights))))
    return tile_for(Launch(name, left.shape[0], tuple(columns), tuple(k), arithmetic.half, dtypes), left.device)


def _run(
    name: str,
    tile: Tile,
    left: Tensor,
    columns: Sequence[int],
    k: Sequence[int],
    arithmetic: _Arithmetic,
    arguments: Sequence[Any],
    **constants: Any,
) -> None:
    """One launch of a kernel of `kernels`."""
    tiles = triton.cdiv(left.shape[0], tile.block_m) * sum(triton.cdiv(n, tile.block_n) for n in columns)
    programs = min(tiles, multiprocessors(left.device)) if tile.persistent else tiles
    getattr(kernels, name)[(programs,)](
        *arguments,
        **constants,
        ROUND_TO_BF16=arithmetic.round_to_bf16,
        PRECISION=arithmetic.precision,
        EVEN_K=all(each % tile.block_k == 0 for each in k),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        FLATTEN=tile.persistent and len(columns) == 1 and constants.get("PARTS", 1) == 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def _project(
    x: Tensor,
    vh: Sequence[Tensor],
    scales: Sequence[Tensor],
    components: Sequence[Tensor] | None,
    slots: Tensor,
    s: Sequence[Tensor],
    t: Sequence[Tensor] | None,
    bf16_products: bool,
) -> None:
    """s[i] = (x vh[i]^T) * scales[i][slot] * components[i], t[i] = x vh[i]^T; one launch."""
    columns = [w.shape[0] for w in vh]
    _launch(
        "project",
        x,
        vh,
        columns,
        [x.shape[1]],
        _arithmetic(x.dtype, x.dtype, vh, bf16_products),
        (
            x,
            x.stride(0),
            tuple(vh),
            tuple(scales),
            tuple(scale.stride(0) for scale in scales),
            tuple(components or [x] * len(vh)),
            slots,
            x.shape[0] // slots.shape[0],
            tuple(s),
            s[0].stride(0),
            tuple(t or s),
            t[0].stride(0) if t else 0,
            x.shape[0],
            tuple(columns),
            x.shape[1],
        ),
        COUNT=len(vh),
        HAS_COMPONENT=components is not None,
        HAS_T=t is not None,
    )


def _expand(
    s: Sequence[Tensor],
    x_dtype: torch.dtype,
    parts: Sequence[Sequence[Tensor]],
    transposed: bool,
    biases: Sequence[Tensor] | None,
    y: Sequence[Tensor],
    row_scale: Tensor | None = None,
    bf16_products: bool = False,
) -> None:
    """y[i] = s[i] parts[i]^T * row_scale + biases[i], the parts side by side along k; one launch.

    Parts are [columns, k], with `transposed` [k, columns].
    """
    first, second = [p[0] for p in parts], [p[-1] for p in parts]
    along = 0 if transposed else 1
    k0, k1 = [w.shape[along] for w in first], [w.shape[along] for w in second]
    columns = [each.shape[1] for each in y]
    weights = [w for p in parts for w in p]
    _launch(
        "expand",
        s[0],
        weights,
        columns,
        [*k0, *k1],
        _arithmetic(s[0].dtype, x_dtype, weights, bf16_products),
        (
            tuple(s),
            s[0].stride(0),
            tuple(first),
            tuple(k0),
            tuple(second),
            tuple(k1),
            s[0] if row_scale is None else row_scale,
            tuple(biases or y),
            tuple(y),
            y[0].shape[0],
            tuple(columns),
        ),
        COUNT=len(y),
        PARTS=len(parts[0]),
        TRANSPOSED=transposed,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_BIAS=biases is not None,
    )


def _windows(joined: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Column windows of [rows, sum of widths], one after the other."""
    return list(joined.split(list(widths), dim=1))


def _contiguous(factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor if factor.is_contiguous() else factor.contiguous() for factor in factors]


def _by_part(tensor: Tensor, vh: Sequence[Tensor]) -> list[Tensor]:
    """The last dimension of `tensor`, the rank, cut at the parts of vh."""
    return list(tensor.split([part.shape[0] for part in vh], dim=-1))


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
) -> list[Tensor]:
    """`torch.ops.t2kernels.factored_linear_group`: two launches for all layers."""
    rows, u, vh = _rows(x), _contiguous(u), _contiguous(vh)
    ranks, parts = [scale.shape[1] for scale in scales], len(u) // len(scales)
    ys = [x.new_empty(rows.shape[0], features) for features in out_features]
    if rows.shape[0]:
        s = _windows(rows.new_empty(rows.shape[0], sum(ranks), dtype=_scaled_dtype(x.dtype, u, bf16_products)), ranks)
        of_layer = [vh[i * parts : (i + 1) * parts] for i in range(len(scales))]
        components = [
            part for scale, own in zip(component_scales or (), of_layer, strict=False) for part in _by_part(scale, own)
        ]
        _project(
            rows,
            vh,
            [window for scale, own in zip(scales, of_layer, strict=True) for window in _by_part(scale, own)],
            components or None,
            slots,
            [window for each, own in zip(s, of_layer, strict=True) for window in _by_part(each, own)],
            None,
            bf16_products,
        )
        of_layer = [u[i * parts : (i + 1) * parts] for i in range(len(scales))]
        _expand_biased(s, x.dtype, of_layer, biases, ys, bf16_products)
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in ys]


def _expand_biased(
    s: Sequence[Tensor],
    x_dtype: torch.dtype,
    parts: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor],
    ys: Sequence[Tensor],
    bf16_products: bool,
) -> None:
    """`_expand` with biases of which some may be empty, which means none."""
    if biases and not all(bias.numel() for bias in biases):
        biases = [bias if bias.numel() else bias.new_zeros(y.shape[1]) for bias, y in zip(biases, ys, strict=True)]
    _expand(s, x_dtype, parts, False, biases or None, ys, bf16_products=bf16_products)


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
) -> tuple[Tensor, Tensor]:
    """`torch.ops.t2kernels.factored_linear`."""
    rows, u, vh = _rows(x), _contiguous(u), _contiguous(vh)
    rank = scales.shape[1]
    y, t = x.new_empty(rows.shape[0], out_features), rows.new_empty(rows.shape[0], rank, dtype=torch.float32)
    if rows.shape[0]:
        s = rows.new_empty(rows.shape[0], rank, dtype=_scaled_dtype(x.dtype, u, bf16_products))
        _project(
            rows,
            vh,
            _by_part(scales, vh),
            None if component_scale is None else _by_part(component_scale, vh),
            slots,
            _by_part(s, vh),
            _by_part(t, vh),
            bf16_products,
        )
        _expand([s], x.dtype, [u], False, None if bias is None else [bias], [y], bf16_products=bf16_products)
    return y.reshape(*x.shape[:-1], out_features), t


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
) -> tuple[Tensor, Tensor]:
    """`torch.ops.t2kernels.factored_linear_backward`."""
    g, u, vh = _rows(grad_y), _contiguous(u), _contiguous(vh)
    rows, rank = g.shape[0], scales.shape[1]
    dscales = scales.new_zeros(scales.shape[0] if need_dscales else 0, rank)
    dx = g.new_empty(rows, in_features) if need_dx else g.new_empty(0)
    if rows and (need_dx or need_dscales):
        d = g.new_empty(rows, rank, dtype=_scaled_dtype(g.dtype, u, False)) if need_dx else t
        _pull(g, t, u, vh, component_scale, scales, slots, d if need_dx else None, dscales if need_dscales else None)
        if need_dx:
            _expand([d], g.dtype, [vh], True, None, [dx])
    return dx.reshape(*grad_y.shape[:-1], in_features) if need_dx else dx, dscales


def _pull(
    g: Tensor,
    t: Tensor,
    u: Sequence[Tensor],
    vh: Sequence[Tensor],
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    d: Tensor | None,
    dscales: Tensor | None,
) -> None:
    """d = (g U) * scale * component_scale, and dscales from t * (g U); a launch for each part of U, and `gather`."""
    rows, rank, rows_per_slot = g.shape[0], scales.shape[1], g.shape[0] // slots.shape[0]
    launches = []
    for part in u:
        arithmetic = _arithmetic(g.dtype, g.dtype, [part], False)
        launches.append((arithmetic, _tile("pull", g, [part], [part.shape[1]], [part.shape[0]], arithmetic)))
    block_m = launches[0][1].block_m
    sums, span = t, 0
    if dscales is not None:
        span = min(slots.shape[0], (block_m - 1) // rows_per_slot + 2)
        sums = t.new_empty(triton.cdiv(rows, block_m), span, rank)
    first = 0
    for part, (arithmetic, tile) in zip(u, launches, strict=True):
        own = slice(first, first + part.shape[1])
        _run(
            "pull",
            replace(tile, block_m=block_m),
            g,
            [part.shape[1]],
            [part.shape[0]],
            arithmetic,
            (
                g,
                g.stride(0),
                part,
                scales[:, own],
                scales.stride(0),
                g if component_scale is None else component_scale[own],
                slots,
                rows_per_slot,
                t[:, own],
                t.stride(0),
                (t if d is None else d)[:, own],
                0 if d is None else d.stride(0),
                sums[..., own],
                rank,
                span,
                rows,
                part.shape[1],
                part.shape[0],
            ),
            HAS_COMPONENT=component_scale is not None,
            NEED_D=d is not None,
            NEED_SUMS=dscales is not None,
        )
        first += part.shape[1]
    if dscales is not None:
        block_n = 128
        kernels.gather[(dscales.shape[0], triton.cdiv(rank, block_n))](
            sums, slots, dscales, slots.shape[0], rows_per_slot, span, rank, BLOCK_M=block_m, BLOCK_N=block_n
        )


def dense_linear(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bf16_products: bool,
) -> Tensor:
    """`torch.ops.t2kernels.dense_linear`."""
    rows = _rows(x)
    y = x.new_empty(rows.shape[0], out_features)
    if rows.shape[0]:
        biases = None if bias is None else [bias]
        _expand([rows], x.dtype, [_contiguous([weight])], False, biases, [y], row_scale, bf16_products)
    return y.reshape(*x.shape[:-1], out_features)


def dense_linear_backward(grad_y: Tensor, weight: Tensor, row_scale: Tensor | None, in_features: int) -> Tensor:
    """`torch.ops.t2kernels.dense_linear_backward`."""
    g = _rows(grad_y)
    dx = g.new_empty(g.shape[0], in_features)
    if g.shape[0]:
        scaled = g if row_scale is None else g.float() * row_scale
        _expand([scaled], g.dtype, [_contiguous([weight])], True, None, [dx])
    return dx.reshape(*grad_y.shape[:-1], in_features)
