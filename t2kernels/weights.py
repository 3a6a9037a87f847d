"""Frozen weights laid out for the machine: `FactoredWeight` (U, Vh), `DenseWeight` (W), `DeltaWeight` (W, U_S, V_S).

All are modules with buffers only, so they move with `.to(device)`, taking the layout that the device's kernels read,
and are saved with their owner. Casting a model to
another dtype leaves them as they are: their storage format was chosen when they were packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_not
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from t2kernels import checks, ops
from t2kernels.backends import device_of, extension, triton_kernels
from t2kernels.packing import (
    BESIDE,
    DENSE_STORAGE_DTYPES,
    EIGHT_BITS,
    GPU_STORAGE_DTYPES,
    INT4,
    LEVELS,
    PANEL,
    STORAGE_DTYPES,
    blocks_dtype,
    lay_out,
    matrix_of,
    quantize,
    quantize_blocks,
)


class _FrozenWeight(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        for name, (n, k) in self._matrices().items() if not self._parameters else ():
            stored = getattr(self, name)
            if not stored.is_meta:
                setattr(self, name, lay_out(stored, n, k))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes matrices that were saved from another kind of device."""
        for name, (n, k) in self._matrices().items():
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor) and stored.dim() != getattr(self, name).dim():
                stored = stored.to(getattr(self, name).device)
                state_dict = {**state_dict, prefix + name: lay_out(stored, n, k)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """The buffers that are stored matrices, and their shapes [n, k]."""
        raise NotImplementedError

    def as_parameters(self) -> None:
        """Makes parameters without gradient of the stored matrices, which is what FSDP divides over processes.

        The weight stays on its device from then on.
        """
        for name in self._matrices():
            stored = self._buffers.pop(name)
            assert stored is not None
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))


def _check_matrix(name: str, matrix: object, shape: str) -> Tensor:
    matrix = checks.check_tensor(name, matrix, shape)
    checks.check_dtype(name, matrix, (torch.float64, *checks.ACTIVATION_DTYPES))
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(f"{name}: expected a non-empty matrix {shape}, got shape {list(matrix.shape)}")
    if matrix.is_meta:
        raise ValueError(f"{name}: expected real data, got a tensor on the meta device")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return matrix.detach()


def _check_storage(dtype: torch.dtype, device: torch.device, on_cpu: tuple[torch.dtype, ...] = STORAGE_DTYPES) -> None:
    if dtype not in (on_cpu if device.type == "cpu" else GPU_STORAGE_DTYPES):
        blocks = "uint8 or int4" if INT4 in on_cpu else "uint8"
        expected = f"float32, bfloat16, float16, int8, on a CPU {blocks}, or on a GPU float8_e4m3fn"
        raise TypeError(f"dtype: expected {expected}; got {dtype} on {device}")


def _dtype_of(stored: Tensor) -> torch.dtype:
    return blocks_dtype(stored) if stored.dtype == torch.uint8 else stored.dtype


def _cast(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    cast = matrix.to(dtype)
    if dtype == torch.float16 and bool(cast.isinf().any()):
        raise ValueError(f"{name}: expected values that float16 can hold (up to 65504), got {matrix.abs().max():.4g}")
    return cast


def float16_rank(rank: int) -> int:
    """Leading components that int8 storage keeps in float16: about 1/32 of them, whole panels; none below rank 64."""
    return PANEL * -(-rank // (32 * PANEL)) if rank >= 64 else 0


class _Operands(NamedTuple):
    """The lists that the operators take: the parts of one layer, or of several one after the other."""

    u: list[Tensor]
    vh: list[Tensor]
    component_scales: list[Tensor]  # one per layer, or none
    out_features: list[int]
    bases: list[Tensor]  # one per layer, or none; and their scales
    base_scales: list[Tensor]
    prepared: dict[Any, Any]  # launches of a GPU that calls of a kind find ready

    def without_factors(self) -> _Operands:
        """The bases alone."""
        return _Operands([], [], [], self.out_features, self.bases, self.base_scales, {})


class _WithOperands(nn.Module):
    """Keeps the operators' lists between calls: looking buffers up by name takes a microsecond."""

    _kept_operands: _Operands | None = None
    _keeps_operands = True  # FSDP exchanges parameters before each call: lists of them are made anew

    def _make_operands(self) -> _Operands:
        raise NotImplementedError

    def _operands(self) -> _Operands:
        """torch.compile is shown the buffers themselves: anything else it would copy before each replay of a graph."""
        if not self._keeps_operands or torch.compiler.is_compiling():
            return self._make_operands()
        if self._kept_operands is None:
            self._kept_operands = self._make_operands()
        return self._kept_operands

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept_operands = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._kept_operands = None
        super()._load_from_state_dict(*args)


class FactoredWeight(_WithOperands, _FrozenWeight):
    """The frozen factors of W = U diag(s) Vh, packed. Make one with `FactoredWeight.pack`.

    `s` [r] float32 is the base scale: the row to use for the base model, and what an expert's z multiplies.
    """

    s: Tensor
    component_scale: Tensor | None

    def __init__(
        self,
        u: Sequence[Tensor],
        s: Tensor,
        vh: Sequence[Tensor],
        component_scale: Tensor | None,
        out_features: int,
        in_features: int,
        bf16_products: bool = False,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.rank = s.shape[0]
        self.bf16_products = bf16_products
        self.parts = len(u)
        for part, (u_part, vh_part) in enumerate(zip(u, vh, strict=True)):
            self.register_buffer(f"u{part}", u_part)
            self.register_buffer(f"vh{part}", vh_part)
        self.register_buffer("s", s)
        self.register_buffer("component_scale", component_scale)

    @property
    def part_ranks(self) -> list[int]:
        """Components of each part."""
        head = float16_rank(self.rank) if self.parts == 2 else 0
        return [head, self.rank - head][-self.parts :]

    def _matrices(self) -> dict[str, tuple[int, int]]:
        shapes: dict[str, tuple[int, int]] = {}
        for part, rank in enumerate(self.part_ranks):
            shapes |= {f"u{part}": (self.out_features, rank), f"vh{part}": (rank, self.in_features)}
        return shapes

    def _make_operands(self) -> _Operands:
        u = [getattr(self, f"u{part}") for part in range(self.parts)]
        vh = [getattr(self, f"vh{part}") for part in range(self.parts)]
        scales = [] if self.component_scale is None else [self.component_scale]
        return _Operands(u, vh, scales, [self.out_features], [], [], {})

    def as_parameters(self) -> None:
        super().as_parameters()
        self._keeps_operands, self._kept_operands = False, None

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for weights that `linear_group` takes together."""
        return self.in_features, self.dtype, self.parts, self.bf16_products

    @property
    def u(self) -> list[Tensor]:
        """Panels of the parts of U: leading components first."""
        return self._operands().u

    @property
    def vh(self) -> list[Tensor]:
        """Panels of the parts of Vh: leading components first."""
        return self._operands().vh

    @classmethod
    def pack(
        cls,
        u: Tensor,
        s: Tensor,
        vh: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        bf16_products: bool = False,
        float16_head: bool = True,
    ) -> FactoredWeight:
        """Packs factors for this machine's kernels.

        int8 keeps one float32 scale per component and factor: a component's column of U and row of Vh have unit
        norm, so each is quantised against its own largest entry, and both scales fold into the per-component scale
        that the product applies anyway. The first `float16_rank(r)` components, which decompositions order by singular
        value, stay in float16, since their rounding is what models notice most.

        Args:
            u: [out, r], s: [r], vh: [r, in]: float tensors with finite values.
            dtype: storage of u and vh: float32, bfloat16, float16, int8, on a CPU uint8, 8 bits with a scale and a
                minimum for every 32 terms, or on a GPU float8_e4m3fn, with int8's scales.
            bf16_products: lets float32 and float16 activations be rounded to bfloat16 before they meet bfloat16
                factors, where the processor has that dot product (twice the multiply-adds of float32).
            float16_head: whether int8 keeps leading components in float16.
        """
        u = _check_matrix("u", u, "[out, r]")
        _check_storage(dtype, u.device)
        vh = _check_matrix("vh", vh, "[r, in]")
        s = checks.check_tensor("s", s, "[r]").detach()
        if vh.shape[0] != u.shape[1]:
            raise ValueError(f"vh: expected shape [{u.shape[1]}, in] (the rank of u), got {list(vh.shape)}")
        checks.check_shape("s", s, (u.shape[1],), "rank")
        if not s.is_floating_point() or not bool(torch.isfinite(s).all()):
            raise ValueError(
                f"s: expected finite float values, got dtype {s.dtype}, finite: {bool(s.isfinite().all())}"
            )
        for name, value in (("s", s), ("vh", vh)):
            checks.check_device(name, value, u, "u")
        component_scale = None
        if dtype in EIGHT_BITS:
            head = float16_rank(len(s)) if float16_head else 0
            u_tail, u_scale = quantize(u[:, head:], 1, dtype)
            vh_tail, vh_scale = quantize(vh[head:], 0, dtype)
            component_scale = torch.cat([u_scale.new_ones(head), u_scale * vh_scale])
            u_parts, vh_parts = [u_tail], [vh_tail]
            if head:
                u_parts.insert(0, _cast("u", u[:, :head], torch.float16))
                vh_parts.insert(0, _cast("vh", vh[:head], torch.float16))
        elif dtype in LEVELS:
            vh_blocks, component_scale = quantize_blocks(vh, dtype)
            whole = torch.exp2(u.float().abs().max().clamp(min=2.0**-100).log2().ceil() - 14).cpu()
            u_blocks, _ = quantize_blocks(u, dtype, whole.expand(len(u)))
            u_parts, vh_parts, component_scale = [u_blocks], [vh_blocks], component_scale * whole
        else:
            u_parts, vh_parts = [_cast("u", u, dtype)], [_cast("vh", vh, dtype)]
        return cls(
            [part if part.dim() == 3 else lay_out(part, *part.shape) for part in u_parts],
            s.float().clone(),
            [part if part.dim() == 3 else lay_out(part, *part.shape) for part in vh_parts],
            component_scale,
            u.shape[0],
            vh.shape[1],
            bf16_products,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the factors; of int8, that of all but the leading components."""
        return _dtype_of(self.u[-1])

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(u [out, r], s [r], vh [r, in]) in float32, as stored: u and vh with their rounding.

        An int8 scale belongs to a component; it is returned with u."""
        parts = list(zip(self.u, self.vh, self.part_ranks, strict=True))
        u = torch.cat([matrix_of(u, self.out_features, rank).float() for u, _, rank in parts], 1)
        vh = torch.cat([matrix_of(vh, rank, self.in_features).float() for _, vh, rank in parts], 0)
        if self.component_scale is not None:
            u = u * self.component_scale
        return u, self.s.clone(), vh

    def linear(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
        """y[b] = (x[b] Vh^T * scales[slots[b]]) U^T + bias, one row of scales per leading row of x.

        Args:
            x: [B, ..., in], float32, bfloat16 or float16.
            scales: [slots, r] float32, rows sigma * z; any row stride, so a column window of a wider table will do.
            slots: int64 [B].
            bias: [out] or None.

        Returns:
            [B, ..., out], the dtype of x. A row's bits do not depend on the rest of the batch.
        """
        self.check(x, scales, slots, bias)
        return self.linear_unchecked(x, scales, slots, bias)

    def check(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None) -> None:
        """Raises unless these are arguments of `linear`."""
        _check_linear(self, x, scales, slots, bias)

    def linear_unchecked(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for callers that have made their arguments themselves; slots may be any divisor of x's rows."""
        if not torch.is_grad_enabled():
            return _run_group(self._operands(), x, (scales,), slots, (bias,), self.bf16_products)[0]
        operands = self._operands()
        return ops.call(
            ops.factored_linear,
            x,
            operands.u,
            operands.vh,
            self.component_scale,
            scales,
            slots,
            bias,
            self.out_features,
            self.bf16_products,
            None,
            None,
        )[0]

    def extra_repr(self) -> str:
        return f"in={self.in_features}, rank={self.rank}, out={self.out_features}, dtype={self.dtype}"


def _check_linear(
    weight: FactoredWeight | DeltaWeight, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None
) -> None:
    x = checks.check_activations(x, weight.in_features)
    checks.check_device("x", x, weight.s, "the packed weight")
    scales = checks.check_tensor("scales", scales, f"[slots, {weight.rank}]")
    checks.check_dtype("scales", scales, (torch.float32,))
    if scales.dim() != 2 or scales.shape[1] != weight.rank:
        raise ValueError(f"scales: expected shape [slots, {weight.rank}] (rank), got {list(scales.shape)}")
    checks.check_device("scales", scales, x, "x")
    checks.check_ids("slots", slots, x, scales.shape[0])
    checks.check_bias(bias, x, weight.out_features)


def linear_group(
    weights: Sequence[FactoredWeight | DeltaWeight],
    x: Tensor,
    scales: Sequence[Tensor],
    slots: Tensor,
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`[w.linear(x, s, slots, b) for w, s, b in zip(weights, scales, biases)]`, the same bits, in one call.

    For layers that share their input, as q, k and v do: x is packed once, and threads meet twice instead of once per
    product. Not differentiable; a ValueError says so where a gradient would be asked for.

    Args:
        weights: layers of one form, storage format and in_features.
        x: [B, ..., in], float32, bfloat16 or float16.
        scales: for each layer [slots, r] float32.
        slots: int64 [B].
        biases: for each layer [out] or None; None is no biases.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(scales) != len(weights) or len(biases) != len(weights):
        raise ValueError(
            f"weights: expected at least one and as many scales and biases, got {len(weights)} weights, "
            f"{len(scales)} scales, {len(biases)} biases"
        )
    first = weights[0]
    for weight, scale, bias in zip(weights, scales, biases, strict=True):
        if weight.kind != first.kind:
            raise ValueError(f"weights: expected layers of one kind and input, got {first} and {weight}")
        weight.check(x, scale, slots, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, bias)):
            raise ValueError("x, scales, biases: expected tensors that need no gradient; call the layers one by one")
    return FactoredGroup(weights).linear_unchecked(x, scales, slots, biases)


class FactoredGroup:
    """Layers of one kind that share their input, as `linear_group` takes them, for callers that call them often."""

    def __init__(self, weights: Sequence[FactoredWeight | DeltaWeight]) -> None:
        self.weights = list(weights)
        self._made_of: list[_Operands] = []
        self._kept = _joined([])
        self._kept_base: _Operands | None = None
        self._nothing: list[Tensor] = []

    def linear_unchecked(
        self, x: Tensor, scales: Sequence[Tensor], slots: Tensor, biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The same as `linear_group`, arguments unchecked; slots may be any divisor of x's rows."""
        return _run_group(self._operands(), x, scales, slots, biases, self.weights[0].bf16_products)

    def base_unchecked(self, x: Tensor, slots: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """The products with the bases of `DeltaWeight`s alone: the bits that scales of 0 give."""
        operands = self._operands()
        if self._kept_base is None or self._kept_base.bases is not operands.bases:
            self._kept_base = operands.without_factors()
            self._nothing = [weight.s.new_empty(1, 0) for weight in self.weights]
        first_slot = slots.new_zeros(1)
        return _run_group(self._kept_base, x, self._nothing, first_slot, biases, self.weights[0].bf16_products)

    def _operands(self) -> _Operands:
        operands = [weight._operands() for weight in self.weights]
        if torch.compiler.is_compiling():
            return _joined(operands)
        if not self._made_of or any(map(is_not, operands, self._made_of)):
            self._kept, self._made_of = _joined(operands), operands
        return self._kept


class KeptGroup:
    """A group on the CPU whose scales and biases stay where they are: a call hands over x and slots alone.

    The outputs lie side by side in one tensor. Scales may be written to between calls.

    Args:
        weights: layers of one form, storage format and in_features, as `linear_group` takes them.
        scales: for each layer [slots, r] float32, contiguous rows.
        biases: for each layer [out] or None.
    """

    def __init__(
        self,
        weights: Sequence[FactoredWeight | DeltaWeight],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        if extension is None:
            raise RuntimeError("weights: expected the C++ extension, got an installation without it")
        operands = _joined([weight._operands() for weight in weights])
        self.out_features = sum(operands.out_features)
        given = [weights[0].s.new_empty(0) if bias is None else bias.detach() for bias in biases]
        tensors, counts = _flat(operands, scales, given)
        self._number: int = ops.keep_group(tensors, counts, operands.out_features, weights[0].bf16_products)
        weakref.finalize(self, extension.release_group, self._number)

    def linear_unchecked(self, x: Tensor, slots: Tensor) -> Tensor:
        """The outputs [..., sum of out] of all layers, as `linear_group` gives them; not differentiable."""
        y: Tensor = ops.kept_group_linear(x, slots, self._number, self.out_features)
        return y


def grouped_linear(groups: Sequence[KeptGroup], x: Tensor, slots: Tensor, offsets: Sequence[int]) -> Tensor:
    """Stretches of rows, each through a group of its own, in one call: the experts of a mixture, tokens in their order.

    Args:
        groups: of equally wide outputs, on the CPU.
        x: [rows, in]; the rows offsets[i] to offsets[i + 1] go through groups[i].
        slots: [rows] int64, the row of scales of each row.
        offsets: one more than groups, from 0 to rows.

    Returns:
        [rows, out], as `KeptGroup.linear_unchecked` gives each stretch; not differentiable.
    """
    widths = {group.out_features for group in groups}
    if len(widths) != 1:
        raise ValueError(f"groups: expected groups of equally wide outputs, got {sorted(widths)}")
    y: Tensor = ops.kept_groups_linear(x, slots, list(offsets), [group._number for group in groups], *widths)
    return y


def _joined(operands: Sequence[_Operands]) -> _Operands:
    """The operands of several layers one after the other."""
    return _Operands(
        [part for each in operands for part in each.u],
        [part for each in operands for part in each.vh],
        [scale for each in operands for scale in each.component_scales],
        [features for each in operands for features in each.out_features],
        [base for each in operands for base in each.bases],
        [scale for each in operands for scale in each.base_scales],
        {},
    )


def _flat(operands: _Operands, scales: Sequence[Tensor], biases: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors of a group in one list, and the lengths of the lists that it joins."""
    u, vh, component_scales, _, bases, base_scales, _ = operands
    lists = (u, vh, component_scales, list(scales), biases, bases, base_scales)
    return [t for each in lists for t in each], [len(each) for each in lists]


def _run_group(
    operands: _Operands,
    x: Tensor,
    scales: Sequence[Tensor],
    slots: Tensor,
    biases: Sequence[Tensor | None],
    bf16_products: bool,
) -> list[Tensor]:
    given: list[Tensor] = []
    if any(bias is not None for bias in biases):
        given = [x.new_empty(0) if bias is None else bias for bias in biases]
    if x.is_cuda and not torch.compiler.is_compiling() and type(x) is Tensor and not is_in_torch_dispatch_mode():
        kernels = triton_kernels()
        if kernels is not None:
            u, vh, component_scales, out_features, bases, base_scales, prepared = operands
            with device_of(x):
                ys: list[Tensor] = kernels.run_group(
                    prepared,
                    x,
                    u,
                    vh,
                    component_scales,
                    scales,
                    slots,
                    given,
                    out_features,
                    bf16_products,
                    bases,
                    base_scales,
                )
            return ys
    if torch.compiler.is_exporting() and x.device.type == "cpu" and extension is not None:
        tensors, counts = _flat(operands, scales, given)
        return ops.factored_linear_group_flat(x, slots, tensors, counts, operands.out_features, bf16_products)
    return ops.call(
        ops.factored_linear_group,
        x,
        operands.u,
        operands.vh,
        operands.component_scales,
        scales,
        slots,
        given,
        operands.out_features,
        bf16_products,
        operands.bases,
        operands.base_scales,
    )


class DenseWeight(_FrozenWeight):
    """A frozen dense matrix W [out, in], packed, under the same numerics contract. Make one with `DenseWeight.pack`."""

    weight: Tensor
    row_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        row_scale: Tensor | None,
        out_features: int,
        in_features: int,
        bf16_products: bool = False,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.bf16_products = bf16_products
        self.register_buffer("weight", weight)
        self.register_buffer("row_scale", row_scale)

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype = torch.float32, *, bf16_products: bool = False) -> DenseWeight:
        """Packs a matrix [out, in].

        As float32, bfloat16, float16, int8 with one float32 scale per output row, or on a CPU uint8 or int4: 8 or 4
        bits with a scale and a minimum for every 32 terms of a row (`t2kernels.packing.quantize_blocks`).

        `bf16_products` as in `FactoredWeight.pack`.
        """
        weight = _check_matrix("weight", weight, "[out, in]")
        _check_storage(dtype, weight.device, DENSE_STORAGE_DTYPES)
        if dtype in LEVELS:
            return cls(*quantize_blocks(weight, dtype), weight.shape[0], weight.shape[1], bf16_products)
        row_scale = None
        if dtype in EIGHT_BITS:
            weight, row_scale = quantize(weight, 0, dtype)
        stored = lay_out(_cast("weight", weight, dtype), *weight.shape)
        return cls(stored, row_scale, weight.shape[0], weight.shape[1], bf16_products)

    def _matrices(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.out_features, self.in_features)}

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the matrix."""
        return _dtype_of(self.weight)

    def matrix(self) -> Tensor:
        """W [out, in] in float32, as stored."""
        matrix = matrix_of(self.weight, self.out_features, self.in_features).float()
        return matrix if self.row_scale is None else matrix * self.row_scale.unsqueeze(1)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + bias. x: [..., in] float32, bfloat16 or float16; returns [..., out] in x's dtype."""
        x = checks.check_activations(x, self.in_features)
        checks.check_device("x", x, self.weight, "the packed weight")
        checks.check_bias(bias, x, self.out_features)
        return self.linear_unchecked(x, bias)

    def linear_unchecked(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for callers that have made their arguments themselves."""
        return ops.call(ops.dense_linear, x, self.weight, self.row_scale, bias, self.out_features, self.bf16_products)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, dtype={self.dtype}"


class DeltaWeight(_WithOperands):
    """W beside a support's components of W = U diag(s) Vh, packed: the delta form. Make one with `DeltaWeight.pack`.

    A row's product is W x + U_S ((V_S x) * scale), where an expert's scale is s_S (z_S - 1) and the base's is 0. All
    experts share the pair U_S, V_S, and the base is W itself, bit for bit. `s` [k] float32 is s_S.

    `base` is a `DenseWeight`, or any module that computes W x + b: it keeps its own kernels and storage, and the
    correction is added to its output.
    """

    def __init__(self, base: DenseWeight | nn.Module, change: FactoredWeight) -> None:
        super().__init__()
        self.base, self.change = base, change
        self.in_features, self.out_features, self.rank = change.in_features, change.out_features, change.rank
        self.bf16_products = change.bf16_products

    @classmethod
    def pack(
        cls,
        base: Tensor | nn.Module,
        u: Tensor,
        s: Tensor,
        vh: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        bf16_products: bool = False,
    ) -> DeltaWeight:
        """Packs W and the components of a support.

        Args:
            base: W [out, in], or a module that computes W x + b.
            u: [out, k], s: [k], vh: [k, in] of the support's k >= 1 components.
            dtype: storage of W and of the components, these as bfloat16 where W is float8 and uint8 where it is int4;
                of the components alone where a module keeps W.
            bf16_products: as in `FactoredWeight.pack`.
        """
        if isinstance(base, Tensor):
            _check_storage(dtype, base.device, DENSE_STORAGE_DTYPES)
        stored = BESIDE.get(dtype, dtype)
        change = FactoredWeight.pack(u, s, vh, dtype=stored, bf16_products=bf16_products, float16_head=False)
        if isinstance(base, Tensor):
            checks.check_shape("base", base, (change.out_features, change.in_features), "out of u, in of vh")
            checks.check_device("base", base, u, "u")
            base = DenseWeight.pack(base, dtype=dtype, bf16_products=bf16_products)
        elif not isinstance(base, nn.Module):
            raise TypeError(f"base: expected a tensor [out, in] or a torch.nn.Module, got {type(base).__name__}")
        return cls(base, change)

    @property
    def s(self) -> Tensor:
        """The singular values [k] of the support."""
        return self.change.s

    @property
    def dtype(self) -> torch.dtype:
        """Storage of W; of the components where a module keeps W."""
        return self.base.dtype if isinstance(self.base, DenseWeight) else self.change.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of W and the components, scales included."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for weights that `linear_group` takes together; a module's is its own."""
        if not isinstance(self.base, DenseWeight):
            return (self,)
        return self.in_features, self.dtype, self.change.dtype, self.bf16_products, "delta"

    def as_parameters(self) -> None:
        """As of the weights in it; a module that keeps W stays as it is."""
        self.change.as_parameters()
        if isinstance(self.base, DenseWeight):
            self.base.as_parameters()
        self._keeps_operands, self._kept_operands = False, None

    def _make_operands(self) -> _Operands:
        base = self.base
        assert isinstance(base, DenseWeight)
        base_scales = [] if base.row_scale is None else [base.row_scale]
        return self.change._operands()._replace(bases=[base.weight], base_scales=base_scales, prepared={})

    def linear(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
        """y[b] = W x[b] + U_S ((V_S x[b]) * scales[slots[b]]) + bias, one row of scales per leading row of x.

        Arguments and result as in `FactoredWeight.linear`, with scales [slots, k].
        """
        self.check(x, scales, slots, bias)
        return self.linear_unchecked(x, scales, slots, bias)

    def check(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None) -> None:
        """Raises unless these are arguments of `linear`."""
        _check_linear(self, x, scales, slots, bias)

    def linear_unchecked(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for callers that have made their arguments themselves; slots may be any divisor of x's rows."""
        if not isinstance(self.base, DenseWeight):
            return self.base_unchecked(x, bias) + self.change.linear_unchecked(x, scales, slots)
        operands = self._operands()
        if not torch.is_grad_enabled():
            return _run_group(operands, x, (scales,), slots, (bias,), self.bf16_products)[0]
        y: Tensor = ops.call(
            ops.factored_linear,
            x,
            operands.u,
            operands.vh,
            self.change.component_scale,
            scales,
            slots,
            bias,
            self.out_features,
            self.bf16_products,
            self.base.weight,
            self.base.row_scale,
        )[0]
        return y

    def base_unchecked(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias: the bits that scales of 0 give."""
        if isinstance(self.base, DenseWeight):
            return self.base.linear_unchecked(x, bias)
        y: Tensor = self.base(x)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"in={self.in_features}, components={self.rank}, out={self.out_features}"
