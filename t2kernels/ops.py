"""The operators as torch sees them: schemas, meta kernels, gradients, and the reference for devices without kernels.

`factored_linear(x, u, vh, component_scale, scales, slots, bias, out_features, bf16_products, base, base_scale)
-> (y, t)`

    t = x Vh^T                                                   (float32, saved for the backward pass)
    y[b] = (t[b] * scales[slots[b // n]] * component_scale) U^T + bias      with n = rows of x / len(slots)

and with base, the delta form, x[b] (base_scale * base)^T beside the rest: both products in one sum. Where all scales
are 0 that is `dense_linear`'s, bit for bit.

x [..., in] float32, bfloat16 or float16; u and vh lists of one or two parts along the rank, each a matrix [out, r] and
[r, in] or its panels (`t2kernels.packing`; the first of two parts has a multiple of 16 components); component_scale [r]
float32 or None (the product of both factors' int8 scales); base [out, in], a matrix or its panels, with base_scale
[out] float32 where it has 8 bits, or None; scales [slots, r] float32, any row stride; slots [S] int64
with S dividing the rows of x; bias [out] or None.

What the products round: nothing but the storage, with three exceptions. Where x is bfloat16, or bf16_products is true,
x and the scaled t are rounded to bfloat16 before they meet bfloat16 factors, if the processor has that dot product; in
the backward pass the gradient of y and the scaled h are.
Before they meet int8 factors they are rounded to 16-bit integers, with a float32 scale for every 512 terms of a row.
The output is rounded to the dtype of x. Sums are float32, or exact.

`factored_linear_group` is the same for several layers that share x and slots, in one call and without t or gradients:
u and vh hold the parts of all layers one after the other; component_scales, biases, bases and base_scales are empty or
have one entry per layer (a bias without elements is none). `factored_linear_group_flat` is that with all lists in one,
in the order of these arguments, for programs of AOTInductor, whose executor takes no empty lists; on a CPU only.

Gradients (with g = dL/dy, h = g U):

    dscales[slot] = sum over its rows of t * h * component_scale
    dx = (h * scale * component_scale) Vh + (g * base_scale) base

Neither x nor anything of W's size is kept or built. U, Vh and base are frozen: they get no gradient. A
gradient of a gradient is refused; forward mode (jvp) and torch.func run on the definitions in plain torch,
`t2kernels.reference`.

`decode_attention` is what else reads memory in a decode step; `t2kernels.decode_attention` says what it computes. It
has no gradient.

A slot that is not a row of scales is an error on the CPU. GPU kernels make its rows of y NaN, and its rows of dx,
without reading anything for it, and leave it out of dscales: an error would make the host wait.

On NVIDIA and AMD GPUs the operators run on the Triton kernels (`t2kernels.triton.launch` says what those round), but
for `decode_attention`, which torch has kernels for there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from t2kernels import reference
from t2kernels.backends import device_of, extension, triton_kernels, warn_reference
from t2kernels.packing import PANEL

_library = torch.library.Library("t2kernels", "DEF")
_library.define(
    "factored_linear(Tensor x, Tensor[] u, Tensor[] vh, Tensor? component_scale, Tensor scales, Tensor slots, "
    "Tensor? bias, SymInt out_features, bool bf16_products, Tensor? base, Tensor? base_scale) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "factored_linear_group(Tensor x, Tensor[] u, Tensor[] vh, Tensor[] component_scales, Tensor[] scales, "
    "Tensor slots, Tensor[] biases, SymInt[] out_features, bool bf16_products, Tensor[] bases, "
    "Tensor[] base_scales) -> Tensor[]"
)
_library.define(
    "factored_linear_group_flat(Tensor x, Tensor slots, Tensor[] tensors, int[] counts, SymInt[] out_features, "
    "bool bf16_products) -> Tensor[]"
)
_library.define("keep_group(Tensor[] tensors, int[] counts, int[] out_features, bool bf16_products) -> int")
_library.define("kept_group_linear(Tensor x, Tensor slots, int group, SymInt out_features) -> Tensor")
_library.define(
    "kept_groups_linear(Tensor x, Tensor slots, int[] offsets, int[] groups, SymInt out_features) -> Tensor"
)
_library.define(
    "factored_linear_backward(Tensor grad_y, Tensor t, Tensor[] u, Tensor[] vh, Tensor? component_scale, "
    "Tensor scales, Tensor slots, SymInt in_features, bool need_dx, bool need_dscales, bool bf16_products, "
    "Tensor? base, Tensor? base_scale) -> (Tensor, Tensor)"
)
_library.define(
    "dense_linear(Tensor x, Tensor weight, Tensor? row_scale, Tensor? bias, SymInt out_features, "
    "bool bf16_products) -> Tensor"
)
_library.define(
    "dense_linear_backward(Tensor grad_y, Tensor weight, Tensor? row_scale, SymInt in_features, bool bf16_products) "
    "-> Tensor"
)
_library.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? allowed, float scale, "
    "Tensor? key_rows=None, Tensor? key_ranges=None) -> Tensor"
)


def _is_empty(arguments: Any) -> bool:
    """Whether a dimension of a tensor is 0."""
    return any(
        _is_empty(each) if isinstance(each, list) else each is not None and 0 in each.shape for each in arguments
    )


def _register(name: str) -> None:
    def on_reference(*args: Any) -> Any:
        warn_reference(args[0].device.type)
        return getattr(reference, name)(*args)

    def on_gpu(*args: Any) -> Any:
        run = getattr(triton_kernels(), name, None)
        if run is None:
            return on_reference(*args)
        if _is_empty(args[:5]):
            return getattr(reference, name)(*args)  # nothing to launch
        with device_of(args[0]):
            return run(*args)

    if extension is None:
        _library.impl(name, on_reference, "CPU")
    for key in ("XPU", "MPS"):
        _library.impl(name, on_reference, key)
    _library.impl(name, on_gpu, "CUDA")


for _name in (
    "factored_linear",
    "factored_linear_group",
    "factored_linear_backward",
    "dense_linear",
    "dense_linear_backward",
    "decode_attention",
):
    _register(_name)


@torch.library.register_fake("t2kernels::factored_linear")
def _(x, u, vh, component_scale, scales, slots, bias, out_features, bf16_products, base=None, base_scale=None):  # type: ignore[no-untyped-def]
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], out_features), scales.new_empty(rows, scales.shape[1])


@torch.library.register_fake("t2kernels::factored_linear_group")
def _(x, u, vh, component_scales, scales, slots, biases, out_features, bf16_products, bases=(), base_scales=()):  # type: ignore[no-untyped-def]
    return [x.new_empty(*x.shape[:-1], features) for features in out_features]


@torch.library.register_fake("t2kernels::kept_group_linear")
def _(x, slots, group, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("t2kernels::kept_groups_linear")
def _(x, slots, offsets, groups, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("t2kernels::factored_linear_group_flat")
def _(x, slots, tensors, counts, out_features, bf16_products):  # type: ignore[no-untyped-def]
    return [x.new_empty(*x.shape[:-1], features) for features in out_features]


@torch.library.register_fake("t2kernels::factored_linear_backward")
def _(  # type: ignore[no-untyped-def]
    grad_y,
    t,
    u,
    vh,
    component_scale,
    scales,
    slots,
    in_features,
    need_dx,
    need_dscales,
    bf16_products,
    base=None,
    base_scale=None,
):
    dx = grad_y.new_empty(*grad_y.shape[:-1], in_features) if need_dx else grad_y.new_empty(0)
    return dx, scales.new_empty(scales.shape[0] if need_dscales else 0, scales.shape[1])


@torch.library.register_fake("t2kernels::dense_linear")
def _(x, weight, row_scale, bias, out_features, bf16_products):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("t2kernels::dense_linear_backward")
def _(grad_y, weight, row_scale, in_features, bf16_products):  # type: ignore[no-untyped-def]
    return grad_y.new_empty(*grad_y.shape[:-1], in_features)


@torch.library.register_fake("t2kernels::decode_attention")
def _(query, key, value, allowed, scale, key_rows=None, key_ranges=None):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


class _Once(torch.autograd.Function):
    """A gradient that can't be differentiated itself: an error says so, where autograd alone would take it for 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *causes: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "t2kernels: a gradient of these operators can't be differentiated a second time; compute this part with "
            "t2kernels.reference, which is plain torch"
        )


def _once(gradient: Tensor, *causes: Tensor) -> Tensor:
    """The gradient, tied to the tensors that it depends on where a graph of it is made (create_graph=True)."""
    if not torch.is_grad_enabled() or not any(cause.requires_grad for cause in causes):
        return gradient
    tied: Tensor = _Once.apply(gradient, *causes)
    return tied


def _sum_of_rows(gradient: Tensor) -> Tensor:
    rows = gradient.reshape(math.prod(gradient.shape[:-1]), gradient.shape[-1])
    return rows.sum(0, dtype=torch.float32)


def _factored_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, vh, component_scale, scales, slots, bias, _, ctx.bf16_products, base, base_scale = inputs
    ctx.set_materialize_grads(False)
    ctx.parts = len(u)
    ctx.save_for_backward(output[1], component_scale, scales, slots, base, base_scale, *u, *vh)
    ctx.in_features, ctx.shape, ctx.dtype = x.shape[-1], x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


@torch.no_grad()
def _through_t(grad_t: Tensor, vh: list[Tensor], in_features: int) -> Tensor:
    """dx of t = x Vh^T, float32 [rows, in]. Nothing in the package uses it; t is an output like any other."""
    dx, first = grad_t.new_zeros(grad_t.shape[0], in_features), 0
    for i, part in enumerate(vh):
        own = part.shape[0] * (1 if part.dim() == 2 else PANEL) if i + 1 < len(vh) else grad_t.shape[1] - first
        dx += dense_linear_backward(grad_t[:, first : first + own].contiguous(), part, None, in_features, False)
        first += own
    return dx


def _factored_backward(ctx: Any, grad_y: Tensor | None, grad_t: Tensor | None) -> tuple[Any, ...]:
    dx = dscales = dbias = None
    if grad_y is not None:
        t, component_scale, scales, slots, base, base_scale, *parts = ctx.saved_tensors
        u, vh = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        need_dx, need_dscales, need_dbias = (ctx.needs_input_grad[i] for i in (0, 4, 6))
        if need_dx or need_dscales:
            with torch.no_grad():
                dx, dscales = factored_linear_backward(
                    grad_y,
                    t,
                    u,
                    vh,
                    component_scale,
                    scales,
                    slots,
                    ctx.in_features,
                    need_dx,
                    need_dscales,
                    ctx.bf16_products,
                    base,
                    base_scale,
                )
        if need_dbias:
            dbias = _sum_of_rows(grad_y).to(ctx.bias_dtype)
        dx = _once(dx, grad_y, scales) if need_dx and dx is not None else None
        dscales = _once(dscales, grad_y, t) if need_dscales and dscales is not None else None
    if grad_t is not None and ctx.needs_input_grad[0]:
        vh = ctx.saved_tensors[6 + ctx.parts :]
        through_t = _once(_through_t(grad_t, vh, ctx.in_features).reshape(ctx.shape).to(ctx.dtype), grad_t)
        dx = through_t if dx is None else dx + through_t
    return dx, [None] * ctx.parts, [None] * ctx.parts, None, dscales, None, dbias, None, None, None, None


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, row_scale, bias, _, ctx.bf16_products = inputs
    ctx.save_for_backward(weight, row_scale)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _dense_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        with torch.no_grad():
            dx = dense_linear_backward(grad_y, *ctx.saved_tensors, ctx.in_features, ctx.bf16_products)
        dx = _once(dx, grad_y)
    if ctx.needs_input_grad[3]:
        dbias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, dbias, None, None


torch.library.register_autograd(
    "t2kernels::factored_linear", _factored_backward, setup_context=_factored_setup, lib=_library
)
torch.library.register_autograd("t2kernels::dense_linear", _dense_backward, setup_context=_dense_setup, lib=_library)


factored_linear = torch.ops.t2kernels.factored_linear.default
factored_linear_group = torch.ops.t2kernels.factored_linear_group.default
factored_linear_group_flat = torch.ops.t2kernels.factored_linear_group_flat.default
keep_group = torch.ops.t2kernels.keep_group.default
kept_group_linear = torch.ops.t2kernels.kept_group_linear.default
kept_groups_linear = torch.ops.t2kernels.kept_groups_linear.default
factored_linear_backward = torch.ops.t2kernels.factored_linear_backward.default
dense_linear = torch.ops.t2kernels.dense_linear.default
dense_linear_backward = torch.ops.t2kernels.dense_linear_backward.default
decode_attention = torch.ops.t2kernels.decode_attention.default

_DEFINITIONS: dict[Any, Any] = {
    factored_linear: reference.factored_linear,
    factored_linear_group: reference.factored_linear_group,
    dense_linear: reference.dense_linear,
}


def call(operator: Any, *arguments: Any) -> Any:
    """Runs one of the operators that have gradients, or the group.

    In forward mode, where operators lose tangents without a word, and under the transforms of torch.func, which know
    nothing of them, its definition in plain torch runs instead.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return _DEFINITIONS[operator](*arguments)
    return operator(*arguments)
