"""Linear layers that another library quantised: bitsandbytes, torchao, GPTQ, AWQ, HQQ, compressed-tensors, fp8.

Nothing here knows a library or a format. A layer that multiplies by a matrix W shows it: its outputs for the rows of
the identity are the columns of W, as the layer's own kernels dequantise them. So the matrix that is decomposed is the
one that the model computes with, and a layer that is not linear is found out.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
ROWS_AT_ONCE = 1024
"""Rows of the identity that a layer multiplies together."""
TOLERANCE = 0.1
"""Relative error of a layer's outputs against W x, in their norm: layers may round their inputs to 8 bits."""


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is like a linear one, but its product is not that of a plain weight.

    It holds integers, floats of 8 bits or tensors of a class of their own; or a library gave it another forward, such
    as one that rounds its inputs.
    """
    if not all(type(getattr(layer, name, None)) is int for name in ("in_features", "out_features")):
        return False
    if any(hasattr(child, "in_features") for child in layer.modules() if child is not layer):
        return False  # a wrapper around linear layers, such as an adapter's
    tensors = (*layer.parameters(), *layer.buffers())
    return has_another_forward(layer) or any(
        not tensor.is_floating_point() or tensor.itemsize == 1 or type(tensor.data) is not Tensor for tensor in tensors
    )


def has_another_forward(layer: nn.Module) -> bool:
    """Whether a plain layer was given a forward that computes other numbers; hooks around its own compute the same."""
    weight = layer._parameters.get("weight")
    if "forward" not in layer.__dict__ or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    if weight.is_meta:
        return True  # nobody knows
    inputs: Any = getattr(layer, "in_features", weight.shape[0])  # a Conv1D has its weight as [in, out]
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(3)).to(weight)
    try:
        with torch.no_grad():
            y: Any = layer.forward(x)
            return not torch.equal(y, type(layer).forward(layer, x))
    except Exception:
        return True


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
            y: Any = layer.forward(rows)
    except Exception as error:
        return f"{kind} can't multiply activations of {dtype} here ({type(error).__name__}: {error})"
    if not isinstance(y, Tensor) or y.shape != (4, out_features) or not y.isfinite().all():
        return f"{kind} gives no finite outputs [rows, {out_features}]"
    y = y.float()
    if not _close(y[0] + y[1] - y[3], y[2]):
        return f"{kind} is quantised and computes no W x + b"
    return None


def finish_loading(model: nn.Module) -> None:
    """Calls a model once if its layers can't multiply yet, and a hook waits for its first call to make them ready.

    compressed-tensors unpacks its checkpoints then.
    """
    if not model._forward_pre_hooks:
        return
    dtype = activation_dtype(model)
    if all(why_no_matrix(module, dtype) is None for module in model.modules() if is_quantized(module)):
        return
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)}
    with torch.no_grad(), suppress(Exception):  # what is wrong with its layers is said where they are chosen
        model(**inputs)


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """W [out, in] of a quantised layer y = W x + b, in the dtype of its activations.

    Layers that round their inputs do so to those of the identity too: where a plain weight is closer, W is that.

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
            matrix[:, first : first + count] = layer.forward(rows).T
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, in_features, generator=generator).to(device, dtype)
        x[0] = 0.0
        y = layer.forward(x).float()
    finally:
        if isinstance(bias, Tensor):
            layer.bias = bias
    want = x.float() @ matrix.float().T
    weight = layer._parameters.get("weight")
    if isinstance(weight, Tensor) and weight.shape == matrix.shape and type(weight.data) is Tensor:
        kept = weight.detach().to(device, dtype)
        if weight.dtype in PLAIN and (y - x.float() @ kept.float().T).norm() < (y - want).norm():
            return kept.clone()
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


class QuantizedBase(nn.Module):
    """A quantised layer as the base of the delta form: its product without its hooks, and a gradient that is right.

    Libraries' kernels for inference may leave the gradient of their input out, without a word. So before the first
    backward pass the layer's own is compared with W^T dy: as it is, then in training mode; where neither is right, W is
    dequantised for every backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._backward: Literal["own", "training", "dequantised"] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():  # tensor classes of libraries make tensors that inference mode forbids
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(x.clone() if x.is_inference() else x)
        if not torch.is_grad_enabled() or not x.requires_grad:
            y: Tensor = self.module.forward(x)
            return y
        if self._backward is None:
            self._backward = self._right_backward(x.dtype)
        if self._backward == "dequantised":
            found: Tensor = _WithDequantizedBackward.apply(x, self.module)
            return found
        return self._product(x, training=self._backward == "training")

    def _product(self, x: Tensor, *, training: bool) -> Tensor:
        before = self.module.training
        try:
            self.module.train(training or before)
            y: Tensor = self.module.forward(x)
        finally:
            self.module.train(before)
        return y

    def _right_backward(self, dtype: torch.dtype) -> Literal["own", "training", "dequantised"]:
        in_features, out_features = _features(self.module)
        device, generator = device_of_layer(self.module), torch.Generator().manual_seed(2)
        x = torch.randn(5, in_features, generator=generator).to(device, dtype).requires_grad_()
        dy = torch.randn(5, out_features, generator=generator).to(device, dtype)
        with torch.no_grad():
            want = dy.float() @ dequantized(self.module, dtype).float()
        for way, training in (("own", False), ("training", True)):
            try:
                with warnings.catch_warnings(), torch.enable_grad():
                    warnings.simplefilter("ignore")
                    (dx,) = torch.autograd.grad(self._product(x, training=training), x, dy)
            except Exception:
                continue
            if _close(dx.float(), want):
                return way  # type: ignore[return-value]
        warnings.warn(
            f"{type(self.module).__name__} gives no right gradient of its input: its weights are dequantised for every "
            "backward pass, which takes the time of as many more tokens as the layer has inputs",
            stacklevel=2,
        )
        return "dequantised"


class _WithDequantizedBackward(torch.autograd.Function):
    """The layer's product, with the gradient dy W of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        with torch.no_grad():
            y: Tensor = module.forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ dequantized(ctx.module, ctx.dtype).to(dy.dtype), None


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
    """Takes the marks of a quantised model away where no quantised layer is left: it is saved as a plain one.

    transformers also marks those that it dequantised, and would quantise their weights again in the file.
    """
    if any(is_quantized(module) for module in model.modules()):
        return
    conversions: Any = getattr(model, "_weight_conversions", None) or ()
    steps = [step for conversion in conversions for step in getattr(conversion, "operations", ())]
    quantises = any(type(step).__module__ != "transformers.core_model_loading" for step in steps)
    for name in ("hf_quantizer", "quantization_method", *(["_weight_conversions"] if quantises else [])):
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
