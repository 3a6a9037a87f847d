"""Frozen weights laid out for the machine: `FactoredWeight` (U, Vh) and `DenseWeight` (W).

Both are modules with buffers only, so they move with `.to(device)` and are saved with their owner. Casting a model to
another dtype leaves them as they are: their storage format was chosen when they were packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from t2kernels import checks, ops
from t2kernels.packing import STORAGE_DTYPES, pack_panels, quantize_int8, unpack_panels


class _FrozenWeight(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


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


def _check_storage(dtype: torch.dtype) -> None:
    if dtype not in STORAGE_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or int8, got {dtype}")


class FactoredWeight(_FrozenWeight):
    """The frozen factors of W = U diag(s) Vh, packed. Make one with `FactoredWeight.pack`.

    `s` [r] float32 is the base scale: the row to use for the base model, and what an expert's z multiplies.
    """

    u: Tensor
    vh: Tensor
    s: Tensor
    component_scale: Tensor | None

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor, component_scale: Tensor | None, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = vh.shape[1]
        self.rank = s.shape[0]
        self.register_buffer("u", u)
        self.register_buffer("s", s)
        self.register_buffer("vh", vh)
        self.register_buffer("component_scale", component_scale)

    @classmethod
    def pack(cls, u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype = torch.float32) -> FactoredWeight:
        """Packs factors for this machine's kernels.

        int8 keeps one float32 scale per component and factor: a component's column of U and row of Vh have unit
        norm, so each is quantised against its own largest entry, and both scales fold into the per-component scale
        that the product applies anyway.

        Args:
            u: [out, r], s: [r], vh: [r, in]: float tensors with finite values.
            dtype: storage of u and vh: float32, bfloat16, float16 or int8.
        """
        _check_storage(dtype)
        u = _check_matrix("u", u, "[out, r]")
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
        if dtype == torch.int8:
            u, u_scale = quantize_int8(u, dim=1)
            vh, vh_scale = quantize_int8(vh, dim=0)
            component_scale = u_scale * vh_scale
        return cls(
            pack_panels(u.to(dtype)),
            s.float().clone(),
            pack_panels(vh.to(dtype)),
            component_scale,
            u.shape[0],
        )

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the factors."""
        return self.u.dtype

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(u [out, r], s [r], vh [r, in]) in float32, as stored: u and vh with their rounding.

        An int8 scale belongs to a component; it is returned with u."""
        u = unpack_panels(self.u, self.out_features).float()
        if self.component_scale is not None:
            u = u * self.component_scale
        return u, self.s.clone(), unpack_panels(self.vh, self.rank).float()

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
        x = checks.check_activations(x, self.in_features)
        checks.check_device("x", x, self.u, "the packed weight")
        scales = checks.check_tensor("scales", scales, f"[slots, {self.rank}]")
        checks.check_dtype("scales", scales, (torch.float32,))
        if scales.dim() != 2 or scales.shape[1] != self.rank:
            raise ValueError(f"scales: expected shape [slots, {self.rank}] (rank), got {list(scales.shape)}")
        checks.check_device("scales", scales, x, "x")
        checks.check_ids("slots", slots, x, scales.shape[0])
        checks.check_bias(bias, x, self.out_features)
        return self.linear_unchecked(x, scales, slots, bias)

    def linear_unchecked(self, x: Tensor, scales: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for callers that have made their arguments themselves; slots may be any divisor of x's rows."""
        return ops.factored_linear(x, self.u, self.vh, self.component_scale, scales, slots, bias, self.out_features)[0]

    def extra_repr(self) -> str:
        return f"in={self.in_features}, rank={self.rank}, out={self.out_features}, dtype={self.dtype}"


class DenseWeight(_FrozenWeight):
    """A frozen dense matrix W [out, in], packed, under the same numerics contract. Make one with `DenseWeight.pack`."""

    weight: Tensor
    row_scale: Tensor | None

    def __init__(self, weight: Tensor, row_scale: Tensor | None, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = weight.shape[1]
        self.register_buffer("weight", weight)
        self.register_buffer("row_scale", row_scale)

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> DenseWeight:
        """Packs a matrix [out, in] as float32, bfloat16, float16, or int8 with one float32 scale per output row."""
        _check_storage(dtype)
        weight = _check_matrix("weight", weight, "[out, in]")
        row_scale = None
        if dtype == torch.int8:
            weight, row_scale = quantize_int8(weight, dim=0)
        return cls(pack_panels(weight.to(dtype)), row_scale, weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the matrix."""
        return self.weight.dtype

    def matrix(self) -> Tensor:
        """W [out, in] in float32, as stored."""
        matrix = unpack_panels(self.weight, self.out_features).float()
        return matrix if self.row_scale is None else matrix * self.row_scale.unsqueeze(1)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + bias. x: [..., in] float32, bfloat16 or float16; returns [..., out] in x's dtype."""
        x = checks.check_activations(x, self.in_features)
        checks.check_device("x", x, self.weight, "the packed weight")
        checks.check_bias(bias, x, self.out_features)
        return ops.dense_linear(x, self.weight, self.row_scale, bias, self.out_features)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, dtype={self.dtype}"
