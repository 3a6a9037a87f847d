"""Linear layers that another library quantised: bitsandbytes, torchao, GPTQ, AWQ, HQQ, compressed-tensors, fp8.

Nothing here knows a library or a format. A layer that multiplies by a matrix W shows it: its outputs for the rows of
the identity are the columns of W, as the layer's own kernels dequantise them. So the matrix that is decomposed is the
one that the model computes with, and a layer that is not linear is found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
ROWS_AT_ONCE = 1024
"""Rows of the identity that a layer multiplies together."""
TOLERANCE = 0.1
"""Relative error of a layer's outputs against W x, in their norm: layers may round their inputs to 8 bits."""


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is like a linear one, and holds integers, floats of 8 bits or tensors of a class of their own."""
    if not all(type(getattr(layer, name, None)) is int for name in ("in_features", "out_features")):
        return False
    if any(hasattr(child, "in_features") for child in layer.modules() if child is not layer):
        return False  # a wrapper around linear layers, such as an adapter's
    tensors = (*layer.parameters(), *layer.buffers())
    return any(
        not tensor.is_floating_point() or tensor.itemsize == 1 or type(tensor.data) is not Tensor for tensor in tensors
    )


def why_no_matrix(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """The reason why a quantised layer computes no W x + b for activations of this dtype, or None; by four products."""
    kind = type(layer).__name__
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return f"{kind} is quantised and on the meta device; load the model first"
    in_features, out_features = _features(layer)
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([x[0], x[1], x[0] + x[1], torch.zeros_like(x[0])]).to(device_of_layer(layer), dtype)
    try:
        with torch.no_grad():
            y: Any = layer(rows)
    except Exception as error:
        return f"{kind} can't multiply activations of {dtype} here ({type(error).__name__}: {error})"
    if not isinstance(y, Tensor) or y.shape != (4, out_features) or not y.isfinite().all():
        return f"{kind} gives no finite outputs [rows, {out_features}]"
    y = y.float()
    if not _close(y[0] + y[1] - y[3], y[2]):
        return f"{kind} is quantised and computes no W x + b"
    return None


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """W [out, in] of a quantised layer y = W x + b, in the dtype of its activations.

    Raises:
        ValueError: the layer is not linear, or gives other outputs than W x + b.
    """
    kind, device = type(layer).__name__, device_of_layer(layer)
    in_features, out_features = _features(layer)
    bias: Any = getattr(layer, "bias", None)
    matrix = torch.empty(out_features, in_features, dtype=dtype, device=device)
    try:
        if isinstance(bias, Tensor):
            layer.bias = None  # type: ignore[assignment] # what it adds would round small weights
        for first in range(0, in_features, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, in_features - first)
            rows = torch.zeros(count, in_features, dtype=dtype, device=device)
            rows[:, first : first + count].fill_diagonal_(1.0)
            matrix[:, first : first + count] = layer(rows).T
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, in_features, generator=generator).to(device, dtype)
        x[0] = 0.0
        y = layer(x).float()
    finally:
        if isinstance(bias, Tensor):
            layer.bias = bias
    want = x.float() @ matrix.float().T
    if not bool(matrix.isfinite().all()) or not bool((y[0] == 0).all()) or not _close(y, want):
        raise ValueError(f"expected a layer that computes W x + b, got a {kind} that does not")
    return matrix


@dataclass(frozen=True)
class Dequantized:
    """`dequantized` when it is called: as weights are given that are not to be in memory together."""

    layer: nn.Module
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        in_features, out_features = _features(self.layer)
        return out_features, in_features

    def __call__(self) -> Tensor:
        return dequantized(self.layer, self.dtype)


def device_of_layer(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors."""
    tensors = (*layer.parameters(), *layer.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's activations: that of its input embedding, or of its first plain parameter."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:
        embedding = None
    parameters = [*(embedding.parameters() if isinstance(embedding, nn.Module) else ()), *model.parameters()]
    return next((p.dtype for p in parameters if p.dtype in PLAIN and type(p.data) is Tensor), torch.float32)


def without_quantization(model: nn.Module) -> None:
    """Takes the marks of a quantised model away where no quantised layer is left: it is saved as a plain one."""
    if any(is_quantized(module) for module in model.modules()):
        return
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def _features(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _close(got: Tensor, want: Tensor) -> bool:
    error = (got - want).norm(dim=-1)
    return bool((error <= TOLERANCE * want.norm(dim=-1) + 1e-6).all())
