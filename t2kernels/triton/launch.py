"""The operators of `t2kernels.ops` on the Triton kernels: the same arguments, factors as row-major matrices.

What is rounded: bfloat16 activations meet bfloat16, int8 and fp8 factors as they are, and float16 ones as the sum of
two bfloat16 values, which is exact; the float16 components that lead 8-bit storage are rounded to one. The scaled
projection is rounded to bfloat16. With float16 activations it could pass 65504, so it stays float32 and is multiplied
as tf32, which holds every float16 and bfloat16 factor exactly; so is float16 with bfloat16. float32 activations or
factors are multiplied in float32 (ieee). `bf16_products` rounds activations to bfloat16 where the factors are bfloat16.

Ids in `slots` are not read here, since the host would have to wait for them: the kernels make a row NaN whose slot is
not a row of `scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from t2kernels.packing import BLOCK, EIGHT_BITS
from t2kernels.triton import kernels, tuning
from t2kernels.triton.tuning import Launch, Tile, multiprocessors, tile_for

HALVES = (torch.bfloat16, torch.float16)


class _Launched(NamedTuple):
    """A launch that was made, to be made again: `run(*arguments, *constants)`."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]

    def again(self, changed: Mapping[str, Any]) -> None:
        """The same launch with other tensors of the same shapes, strides, dtypes and alignments, by parameter name."""
        arguments = list(self.arguments)
        for name, value in changed.items():
            arguments[PARAMETERS[name]] = value
        self.run(*arguments, *self.constants)


PARAMETERS = {name: index for index, name in enumerate(kernels.product.arg_names)}


class _Product:
    """One launch that multiplies: what its tile and its arithmetic are chosen by.

    Args:
        step: "project", "expand", "pull", or "back" for dx (see `kernels`).
        lefts: for each part of each matrix [rows, k].
        x_dtype: of the operator's activations.
        matrices: each in parts, as many in all: [columns, k], with `transposed` [k, columns]; int8 in words
            (`packing`).
        columns: of each matrix, needed for transposed ones in words.
        bf16_products: that of the operator.
    """

    def __init__(
        self,
        step: str,
        lefts: Sequence[Tensor],
        x_dtype: torch.dtype,
        matrices: Sequence[Sequence[Tensor]],
        transposed: bool = False,
        columns: Sequence[int] = (),
        bf16_products: bool = False,
    ) -> None:
        self.step, self.lefts, self.transposed = step, tuple(lefts), transposed
        self.rows, self.device = lefts[0].shape[0], lefts[0].device
        self.parts = len(matrices[0])
        parts = [part for matrix in matrices for part in matrix]
        self.dtypes = tuple(part.dtype for part in parts)
        self.weights = tuple(_words(part) for part in parts)
        if transposed:
            self.columns = tuple(columns) or tuple(matrix[0].shape[1] for matrix in matrices)
        else:
            self.columns = tuple(matrix[0].shape[0] for matrix in matrices)
        self.k = tuple(left.shape[1] for left in lefts)
        dtypes = set(self.dtypes)
        self.round_to_bf16 = bf16_products and dtypes == {torch.bfloat16}
        self.precision = "ieee" if x_dtype == torch.float32 or torch.float32 in dtypes else "tf32"

    @property
    def exact_halves(self) -> bool:
        """Whether float16 meets bfloat16 as two bfloat16 terms; beside 8-bit parts it is rounded to one."""
        return torch.float16 not in self.dtypes or not any(dtype in EIGHT_BITS for dtype in self.dtypes)

    @property
    def terms(self) -> str:
        """Format of the operands: 16 bits each ("half", from int8 "words"), float16 as two bfloat16 terms ("split"),
        or 32 bits ("wide", from int8 "wide words")."""
        term = torch.bfloat16 if self.round_to_bf16 else self.left_dtype
        others = set(self.dtypes) - {term, *EIGHT_BITS}
        if term in HALVES and (not others or not self.exact_halves):
            return "words" if torch.int8 in self.dtypes else "half"
        if term == torch.bfloat16 and others == {torch.float16}:
            return "split"
        return "wide words" if torch.int8 in self.dtypes else "wide"

    @property
    def left_dtype(self) -> torch.dtype:
        """The widest dtype of the left sides."""
        return max((left.dtype for left in self.lefts), key=lambda dtype: dtype.itemsize)

    def tile(self) -> Tile:
        dtypes = tuple(dict.fromkeys((self.left_dtype, *self.dtypes)))
        return tile_for(Launch(self.step, self.rows, self.columns, self.k, self.terms, dtypes), self.device)

    def _step(self, dtype: torch.dtype, tile: Tile) -> int:
        """Terms of one step along k."""
        if self.transposed:
            return tile.block_k
        if dtype == torch.int8:
            return max(BLOCK, tile.block_k)
        return min(64, tile.block_k) if dtype == torch.float16 and not self.exact_halves else tile.block_k

    def launch(self, kernel: Any, tile: Tile, arguments: Sequence[Any], **constants: Any) -> _Launched:
        """Runs a kernel of `kernels` on tiles of this product."""
        tiles = triton.cdiv(self.rows, tile.block_m) * sum(triton.cdiv(n, tile.block_n) for n in self.columns)
        programs = min(tiles, multiprocessors(self.device)) if tile.persistent else tiles
        constants |= {
            "ROUND_TO_BF16": self.round_to_bf16,
            "PRECISION": self.precision,
            "EXACT_HALVES": self.exact_halves,
            "EVEN_K": all(k % self._step(dtype, tile) == 0 for k, dtype in zip(self.k, self.dtypes, strict=True)),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "FLATTEN": tile.persistent and len(self.weights) == 1,
            "HOIST": self.terms != "split",
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        if constants.get("OVERLAP"):
            options["launch_pdl"] = True
        compiled = kernel[(programs,)](*arguments, **constants, **options)
        rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        again = (kernel if compiled is None else compiled)[(programs, 1, 1)]  # None: the interpreter
        return _Launched(again, tuple(arguments), rest)

    def into(
        self,
        y: Sequence[Tensor],
        *,
        scales: Sequence[Tensor] | None = None,
        slots: Tensor | None = None,
        column_scales: Sequence[Tensor] | None = None,
        biases: Sequence[Tensor] | None = None,
        t: Sequence[Tensor] | None = None,
    ) -> _Launched:
        """y[i] = (lefts matrices[i]^T) * scales[i][slots] * column_scales[i] + biases[i]; t[i] is the bare product.

        Without scales, column_scales belong to the first parts.

        scales, slots, column_scales, biases, t: None is none of them. The rows of y[i] and of t[i] may be windows.
        """
        count = len(self.columns)
        nothing, zeros = self.lefts[:count], (0,) * count  # for operands that the kernel does not read
        tile = self.tile()
        return self.launch(
            kernels.product,
            tile,
            (
                self.lefts,
                tuple(left.stride(0) for left in self.lefts),
                self.weights,
                self.k,
                tuple(scales or nothing),
                tuple(scale.stride(0) for scale in scales) if scales else zeros,
                nothing[0] if slots is None else slots,
                min(scale.shape[0] for scale in scales) if scales else 0,
                1 if slots is None else self.rows // slots.shape[0],
                tuple(column_scales or nothing),
                tuple(biases or nothing),
                tuple(t or nothing),
                t[0].stride(0) if t else 0,
                tuple(y),
                tuple(each.stride(0) for each in y),
                self.rows,
                self.columns,
            ),
            COUNT=count,
            PARTS=self.parts,
            TRANSPOSED=self.transposed,
            HAS_SCALES=scales is not None,
            HAS_COLUMN_SCALE=column_scales is not None,
            HAS_BIAS=biases is not None,
            HAS_T=t is not None,
            WEIGHTS_FIRST=tile.weights_first and not self.transposed,
            PREFETCH=0 if self.transposed else tile.prefetch,
            OVERLAP=tile.overlap,
        )


def _words(part: Tensor) -> Tensor:
    """A stored matrix as the kernels take it: int8 in int32 words of four."""
    return part.view(torch.int32).flatten(1) if part.dtype == torch.int8 else part


def _lengths(parts: Sequence[Tensor], k: int) -> list[int]:
    """Number of the k terms in each part: the last takes the rest, since words are padded."""
    first = [part.shape[1] for part in parts[:-1]]
    return [*first, k - sum(first)]


def _scaled_dtype(x: torch.dtype, weights: Sequence[Tensor], bf16_products: bool) -> torch.dtype:
    """Dtype of the scaled projection between the two products."""
    dtypes = {w.dtype for w in weights}
    if torch.float32 not in dtypes and (x == torch.bfloat16 or (bf16_products and dtypes == {torch.bfloat16})):
        return torch.bfloat16
    return torch.float32


def _rows(x: Tensor) -> Tensor:
    """x [..., features] as [rows, features] with contiguous features."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _windows(joined: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Column windows of [rows, sum of widths], one after the other."""
    return list(joined.split(list(widths), dim=1))


def _contiguous(factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor if factor.is_contiguous() else factor.contiguous() for factor in factors]


def _by_layer(factors: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    return [factors[first : first + parts] for first in range(0, len(factors), parts)]


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
    bases: Sequence[Tensor] = (),
    base_scales: Sequence[Tensor] = (),
) -> list[Tensor]:
    """`torch.ops.t2kernels.factored_linear_group`: two launches for all layers."""
    return run_group(
        {}, x, u, vh, component_scales, scales, slots, biases, out_features, bf16_products, bases, base_scales
    )


class _Group:
    """The two launches of layers that share their input, prepared by their first call.

    The host cost of a launch is choosing its tile, its constants and its compiled code: 100 us for q, k and v.
    They depend on shapes, dtypes and alignments alone, so calls of one kind find them ready (`run_group`).
    """

    def __init__(
        self,
        u: Sequence[Tensor],
        vh: Sequence[Tensor],
        component_scales: Sequence[Tensor],
        out_features: Sequence[int],
        bf16_products: bool,
        bases: Sequence[Tensor],
        base_scales: Sequence[Tensor],
    ) -> None:
        self.u, self.vh, self.bf16_products = _contiguous(u), _contiguous(vh), bf16_products
        self.bases, self.base_scales = _contiguous(bases), base_scales
        self.component_scales, self.out_features = component_scales, out_features
        self.parts = len(u) // len(out_features)
        self.widths = [part.shape[0] for part in vh]  # components of each part
        self.ranks = [sum(own) for own in _by_layer(self.widths, self.parts)]
        self.project: _Launched | None = None
        self.expand: _Launched | None = None
        self.zeros: dict[int, Tensor] = {}  # for layers without a bias beside others that have one

    def by_part(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The windows of each layer's tensor [..., rank] that belong to its parts."""
        if self.parts == 1:
            return list(tensors)
        widths = _by_layer(self.widths, self.parts)
        return [part for each, own in zip(tensors, widths, strict=True) for part in each.split(list(own), dim=-1)]

    def empty(self, x: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Buffers for the outputs and the scaled projection."""
        count = rows.shape[0]
        s = rows.new_empty(count, sum(self.ranks), dtype=_scaled_dtype(x.dtype, self.u, self.bf16_products))
        return [x.new_empty(count, features) for features in self.out_features], s

    def lefts(self, rows: Tensor, s: Tensor) -> list[Tensor]:
        """What meets the parts of the second products: x where they are bases, the scaled projection elsewhere."""
        parts = list(s.split(self.widths, dim=1))
        if not self.bases:
            return parts
        return [left for own in _by_layer(parts, self.parts) for left in (rows, *own)]

    def given(self, biases: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
        """One bias per layer, or none; an empty one is zeros."""
        if not any(bias.numel() for bias in biases):
            return []
        for i, bias in enumerate(biases):
            if not bias.numel() and i not in self.zeros:
                self.zeros[i] = bias.new_zeros(ys[i].shape[1])
        return [bias if bias.numel() else self.zeros[i] for i, bias in enumerate(biases)]

    def first(self, x: Tensor, scales: Sequence[Tensor], slots: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
        rows = _rows(x)
        ys, s = self.empty(x, rows)
        if rows.shape[0]:
            project = _Product(
                "project",
                [rows] * len(self.vh),
                x.dtype,
                [[part] for part in self.vh],
                bf16_products=self.bf16_products,
            )
            self.project = project.into(
                list(s.split(self.widths, dim=1)),
                scales=self.by_part(scales),
                slots=slots,
                column_scales=self.by_part(self.component_scales) if self.component_scales else None,
            )
            matrices = _by_layer(self.u, self.parts)
            if self.bases:
                matrices = [(base, *own) for base, own in zip(self.bases, matrices, strict=True)]
            expand = _Product("expand", self.lefts(rows, s), x.dtype, matrices, bf16_products=self.bf16_products)
            self.expand = expand.into(ys, column_scales=self.base_scales or None, biases=self.given(biases, ys) or None)
        return [y.reshape(*x.shape[:-1], y.shape[1]) for y in ys]

    def again(self, x: Tensor, scales: Sequence[Tensor], slots: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
        """`first` for another call of the same kind."""
        assert self.project is not None and self.expand is not None
        rows = _rows(x)
        ys, s = self.empty(x, rows)
        xs, parts = (rows,) * len(self.vh), tuple(s.split(self.widths, dim=1))
        lefts = tuple(self.lefts(rows, s))
        unread = {"biases": xs, "t": xs}
        if not self.component_scales:
            unread["column_scales"] = xs
        self.project.again({"a": xs, "scales": tuple(self.by_part(scales)), "slots": slots, "y": parts, **unread})
        nothing = lefts[: len(ys)]
        unread = dict.fromkeys(("scales", "t") if self.base_scales else ("scales", "column_scales", "t"), nothing)
        given = tuple(self.given(biases, ys)) or nothing
        self.expand.again({"a": lefts, "slots": lefts[0], "biases": given, "y": tuple(ys), **unread})
        return [y.reshape(*x.shape[:-1], y.shape[1]) for y in ys] if x.dim() != 2 else ys


KINDS = 64  # of calls that a group keeps launches for


def run_group(
    prepared: dict[Any, _Group],
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
    """`factored_linear_group` for callers that keep `prepared`, empty at first, beside these factors."""
    if not u:
        return [
            dense_linear(
                x,
                base,
                base_scales[i] if base_scales else None,
                biases[i] if biases and biases[i].numel() else None,
                out_features[i],
                bf16_products,
            )
            for i, base in enumerate(bases)
        ]
    kind = (
        x.shape,
        x.stride(),
        x.dtype,
        x.data_ptr() % 16,
        slots.shape[0],
        slots.data_ptr() % 16,
        tuning.generation(),
        tuple((scale.data_ptr() % 16, scale.stride(0), scale.shape[0]) for scale in scales),
        tuple((bias.data_ptr() % 16, bias.shape, bias.dtype) for bias in biases),
    )
    group = prepared.get(kind)
    if group is not None:
        return group.again(x, scales, slots, biases)
    group = _Group(u, vh, component_scales, out_features, bf16_products, bases, base_scales)
    ys = group.first(x, scales, slots, biases)
    if group.project is not None:
        if len(prepared) >= KINDS:
            prepared.clear()
        prepared[kind] = group
    return ys


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
    """`torch.ops.t2kernels.factored_linear`."""
    rows, u, vh = _rows(x), _contiguous(u), _contiguous(vh)
    rank = scales.shape[1]
    y, t = x.new_empty(rows.shape[0], out_features), rows.new_empty(rows.shape[0], rank, dtype=torch.float32)
    if rows.shape[0]:
        s = rows.new_empty(rows.shape[0], rank, dtype=_scaled_dtype(x.dtype, u, bf16_products))
        _Product("project", [rows] * len(vh), x.dtype, [[part] for part in vh], bf16_products=bf16_products).into(
            _by_part(s, vh),
            scales=_by_part(scales, vh),
            slots=slots,
            column_scales=None if component_scale is None else _by_part(component_scale, vh),
            t=_by_part(t, vh),
        )
        bases = [] if base is None else _contiguous([base])
        lefts = [*[rows] * len(bases), *_by_part(s, vh)]
        _Product("expand", lefts, x.dtype, [[*bases, *u]], bf16_products=bf16_products).into(
            [y],
            column_scales=None if base_scale is None else [base_scale],
            biases=None if bias is None else [bias],
        )
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
    bf16_products: bool,
    base: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.t2kernels.factored_linear_backward`."""
    g, u, vh = _rows(grad_y), _contiguous(u), _contiguous(vh)
    rows, rank = g.shape[0], scales.shape[1]
    dscales = scales.new_zeros(scales.shape[0] if need_dscales else 0, rank)
    dx = g.new_empty(rows, in_features) if need_dx else g.new_empty(0)
    if rows and (need_dx or need_dscales):
        d = g.new_empty(rows, rank, dtype=_scaled_dtype(g.dtype, u, bf16_products)) if need_dx else None
        _pull(g, t, u, component_scale, scales, slots, d, dscales if need_dscales else None, bf16_products)
        if d is not None:
            bases = [] if base is None else _contiguous([base])
            lefts = [*[_row_scaled(g, base_scale)] * len(bases), *_by_part(d, vh)]
            _Product(
                "back",
                lefts,
                g.dtype,
                [[*bases, *vh]],
                transposed=True,
                columns=[in_features],
                bf16_products=bf16_products,
            ).into([dx])
    return dx.reshape(*grad_y.shape[:-1], in_features) if need_dx else dx, dscales


def _row_scaled(g: Tensor, row_scale: Tensor | None) -> Tensor:
    """The gradient of the bare product with a matrix whose rows have scales."""
    return g if row_scale is None else g.float() * row_scale


def _pull(
    g: Tensor,
    t: Tensor,
    u: Sequence[Tensor],
    component_scale: Tensor | None,
    scales: Tensor,
    slots: Tensor,
    d: Tensor | None,
    dscales: Tensor | None,
    bf16_products: bool,
) -> None:
    """d = (g U) * scale * component_scale, and dscales from t * (g U); a launch for each part of U, and `gather`."""
    rows, rank, rows_per_slot = g.shape[0], scales.shape[1], g.shape[0] // slots.shape[0]
    products = [
        _Product("pull", [g], g.dtype, [[part]], transposed=True, columns=[columns], bf16_products=bf16_products)
        for part, columns in zip(u, _lengths(u, rank), strict=True)
    ]
    tile = max(products, key=lambda product: product.columns[0]).tile()
    sums, span = t, 0
    if dscales is not None:
        span = min(slots.shape[0], (tile.block_m - 1) // rows_per_slot + 2)
        sums = t.new_empty(triton.cdiv(rows, tile.block_m), span, rank)
    first = 0
    for product in products:
        own = slice(first, first + product.columns[0])
        product.launch(
            kernels.pull,
            tile,
            (
                g,
                g.stride(0),
                product.weights[0],
                scales[:, own],
                scales.stride(0),
                slots,
                scales.shape[0],
                rows_per_slot,
                g if component_scale is None else component_scale[own],
                t[:, own],
                t.stride(0),
                (t if d is None else d)[:, own],
                0 if d is None else d.stride(0),
                sums[..., own],
                rank,
                span,
                rows,
                product.columns[0],
                product.k[0],
            ),
            HAS_COLUMN_SCALE=component_scale is not None,
            NEED_D=d is not None,
            NEED_SUMS=dscales is not None,
        )
        first = own.stop
    if dscales is not None:
        block_n = 128
        kernels.gather[(dscales.shape[0], triton.cdiv(rank, block_n))](
            sums, slots, dscales, slots.shape[0], rows_per_slot, span, rank, BLOCK_M=tile.block_m, BLOCK_N=block_n
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
        _Product("expand", [rows], x.dtype, [_contiguous([weight])], bf16_products=bf16_products).into(
            [y],
            column_scales=None if row_scale is None else [row_scale],
            biases=None if bias is None else [bias],
        )
    return y.reshape(*x.shape[:-1], out_features)


def dense_linear_backward(
    grad_y: Tensor, weight: Tensor, row_scale: Tensor | None, in_features: int, bf16_products: bool
) -> Tensor:
    """`torch.ops.t2kernels.dense_linear_backward`."""
    g = _rows(grad_y)
    dx = g.new_empty(g.shape[0], in_features)
    if g.shape[0]:
        _Product(
            "expand",
            [_row_scaled(g, row_scale)],
            g.dtype,
            [_contiguous([weight])],
            transposed=True,
            columns=[in_features],
            bf16_products=bf16_products,
        ).into([dx])
    return dx.reshape(*grad_y.shape[:-1], in_features)
