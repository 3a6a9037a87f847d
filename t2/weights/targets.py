"""Target layers: the linear layers of a model that are decomposed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from t2.weights.quantized import (
    PLAIN,
    Dequantized,
    activation_dtype,
    device_of_layer,
    has_another_forward,
    is_quantized,
    why_no_matrix,
)

Linear = nn.Linear | Conv1D
"""Layers with a plain weight. Beside them `select_targets` finds layers that another library quantised."""


def weight_matrix(linear: Linear) -> Tensor:
    """The weight as a matrix [out, in] (a view; GPT-2's Conv1D stores its transpose)."""
    return linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T


def matrices_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor | Dequantized]:
    """The matrices [out, in] of target layers as `decompose_weights` takes them: plain ones as they are."""
    dtype = activation_dtype(model)
    return {
        name: Dequantized(layer, dtype) if is_quantized(layer) else weight_matrix(cast(Linear, layer))
        for name, layer in layers.items()
    }


def as_stored(linear: Linear, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the layout of the layer's weight."""
    return matrix if isinstance(linear, nn.Linear) else matrix.T.contiguous()


def output_embedding(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def language_model(model: nn.Module) -> nn.Module:
    """The language model within one that generates text from images too; any other model is that as a whole."""
    if not isinstance(model, PreTrainedModel) or "image" not in model.input_modalities or not model.can_generate():
        return model
    found: nn.Module = model.get_decoder()
    return found


def language_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the language model, by their full names."""
    inner = language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    return {f"{prefix}.{name}".strip("."): module for name, module in inner.named_modules()}


class Unsuitable(dict[str, str]):
    """Layers that can't be decomposed, and why, by module name."""

    def __str__(self) -> str:
        """One line a reason, with the first names."""
        names: dict[str, list[str]] = {}
        for name, reason in self.items():
            names.setdefault(reason, []).append(name)
        return "; ".join(
            f"{', '.join(each[:3])}{' and others' * (len(each) > 3)}: {why}" for why, each in names.items()
        )


def why_unsuitable(layer: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """The reason why a layer is no y = x W^T + b; None if it is, or if it is nothing like a linear layer.

    Subclasses of nn.Linear count if nothing is in them but a weight and a bias and they compute just that; layers that
    another library quantised if they are linear for activations of `dtype`, where it is given.
    """
    kind = type(layer)
    if dtype is not None and is_quantized(layer):
        return why_no_matrix(layer, dtype)
    weight = layer._parameters.get("weight")
    if kind in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and type(weight.data) is Tensor:
        return f"{kind.__name__} was given a forward that is not x W^T + b" if has_another_forward(layer) else None
    if not isinstance(layer, nn.Linear | Conv1D):
        if isinstance(getattr(layer, "in_features", None), int) and isinstance(
            getattr(layer, "out_features", None), int
        ):
            return f"{kind.__name__} is no nn.Linear; load the model with plain weights (dequantised, adapters merged)"
        return None
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention multiplies by the weight of its out_proj itself"
    shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
    tensors = {name for name, each in (*layer._parameters.items(), *layer._buffers.items()) if each is not None}
    if (
        weight is None
        or type(weight.data) is not Tensor
        or not weight.is_floating_point()
        or (shape is not None and tuple(weight.shape) != shape)
        or not tensors <= {"weight", "bias"}
        or len(list(layer.children()))
    ):
        kind_of_weight = "none" if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        return (
            f"{kind.__name__} is no plain nn.Linear (weight: {kind_of_weight}); load the model with plain float32, "
            "bfloat16 or float16 weights (dequantised, adapters merged, parametrizations removed)"
        )
    if kind.forward is nn.Linear.forward or kind.forward is Conv1D.forward:
        return None
    if weight.is_meta or not _computes_its_matrix(layer):
        return f"{kind.__name__} has a forward of its own that is not x W^T + b"
    return None


@torch.no_grad()
def _computes_its_matrix(layer: nn.Linear | Conv1D) -> bool:
    matrix = weight_matrix(layer)
    x = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    try:
        got = layer(x)
    except Exception:
        return False
    want = nn.functional.linear(x, matrix, layer.bias)
    return isinstance(got, Tensor) and got.shape == want.shape and bool(torch.isclose(got, want, 1e-2, 1e-2).all())


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every plain linear layer (nn.Linear, Conv1D) of the model by name, but for its output embedding (lm_head).

    In a model that reads images these are the layers of its language model: what comes before, the vision tower and
    what connects it, sees patches of images, not requests that could each have an expert.
    """
    return {
        name: module
        for name, module in _candidates(model).items()
        if isinstance(module, Linear) and why_unsuitable(module) is None
    }


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that another library quantised and that computes W x + b, by name, but for the output embedding."""
    dtype = activation_dtype(model)
    return {
        name: module
        for name, module in _candidates(model).items()
        if is_quantized(module) and why_no_matrix(module, dtype) is None
    }


def unsuitable_layers(model: nn.Module) -> Unsuitable:
    """The layers of the model that are like linear ones, but that nothing here can stand in for."""
    dtype = activation_dtype(model)
    reasons = {name: why_unsuitable(module, dtype) for name, module in _candidates(model).items()}
    return Unsuitable({name: reason for name, reason in reasons.items() if reason is not None})


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    head = output_embedding(model)
    return {name: module for name, module in language_modules(model).items() if name and module is not head}


def select_targets(
    model: nn.Module, target_modules: str | Sequence[str], *, on_meta: bool = False
) -> dict[str, nn.Module]:
    """The layers, plain and quantised, that `target_modules` names (see `SVFConfig`), in module order.

    `on_meta`: whether their weights are on the meta device and come from elsewhere (`t2.weights.streaming`).

    Raises ValueError where nothing, or a suffix of the list, matches; and for layers that can't be replaced: on the
    meta device unless `on_meta`, or with a weight that another module shares.
    """
    linear, quantized = linear_layers(model), quantized_layers(model)
    unsuitable = unsuitable_layers(model)
    layers = {name: module for name, module in model.named_modules() if name in linear or name in quantized}
    named = _match([*layers, *unsuitable], target_modules, dense_parameters(model))
    chosen = {name: layer for name, layer in layers.items() if name in named}
    if not chosen:
        raise ValueError(f"target_modules: expected a layer that can be decomposed, got none. {unsuitable}")
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}".lstrip("."))
    devices = set()
    for name, layer in chosen.items():
        if name in quantized:
            devices.add(device_of_layer(layer))
            continue
        assert isinstance(layer, Linear)
        if layer.weight.is_meta != on_meta:
            raise ValueError(
                f"model: expected target weights on the meta device, got {name}.weight in memory"
                if on_meta
                else f"model: expected weights in memory, got {name}.weight on the meta device; load the model first"
            )
        if len(owners[id(layer.weight)]) > 1:
            raise ValueError(
                f"target_modules: expected weights that no other module shares, got {name}, tied with "
                f"{[owner for owner in owners[id(layer.weight)] if owner != f'{name}.weight']}"
            )
        if layer.weight.dtype not in PLAIN:
            raise TypeError(f"model: expected float32, bfloat16 or float16 weights, got {layer.weight.dtype} in {name}")
        devices.add(layer.weight.device)
    if len(devices) > 1:
        raise ValueError(f"model: expected all target weights on one device, got {sorted(map(str, devices))}")
    return chosen


def plain_targets(model: nn.Module, target_modules: str | Sequence[str], *, on_meta: bool = False) -> dict[str, Linear]:
    """`select_targets` for those who need weights in float32, bfloat16 or float16; ValueError for quantised layers."""
    targets = select_targets(model, target_modules, on_meta=on_meta)
    if quantized := [name for name, layer in targets.items() if is_quantized(layer)]:
        raise ValueError(
            f"model: expected plain weights, got layers that are quantised, such as {quantized[0]} "
            f"({type(targets[quantized[0]]).__name__}); load the model dequantised"
        )
    return cast(dict[str, Linear], targets)


PATTERNS = {
    "all-linear": ".*",
    "attention": r"(.*\.)?[^.]*(attn|attention)[^.]*\..*",
    "mlp": r"(.*\.)?([^.]*(mlp|feed_forward|ffn)[^.]*|experts)\..*",
    "experts": r"(.*\.)?experts\..*",
}
"""Names for sets of layers: regular expressions for the whole name of a module."""


def _match(names: Sequence[str], target_modules: str | Sequence[str], dense: Mapping[str, int]) -> set[str]:
    """The names that are meant. `dense`: parameters beside linear layers, for errors."""
    beside = ""
    if dense:
        beside = f"; weights like {next(iter(dense))} (experts, convolutions) are no linear layers and stay dense"
    if not names:
        raise ValueError(
            f"model: expected a module that holds at least one nn.Linear or Conv1D layer, got none{beside}"
        )
    examples = sorted({name.rpartition(".")[2] for name in names})
    if isinstance(target_modules, str):
        pattern = PATTERNS.get(target_modules, target_modules)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"target_modules: expected a regular expression, got {pattern!r}: {error}") from error
    else:
        suffixes = list(target_modules)
        if not suffixes or not all(isinstance(suffix, str) and suffix for suffix in suffixes):
            raise ValueError(f"target_modules: expected a pattern or a list of module suffixes, got {target_modules!r}")
        for suffix in suffixes:
            if not any(is_meant(name, [suffix]) for name in names):
                raise ValueError(f"target_modules: expected suffixes of this model's layers {examples}, got {suffix!r}")
    chosen = {name for name in names if is_meant(name, target_modules)}
    if not chosen:
        raise ValueError(
            f"target_modules: expected a pattern that matches some of this model's layers (…{examples}), "
            f"got {target_modules!r}, which matches none{beside}"
        )
    return chosen


def is_meant(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether `target_modules` names this module."""
    if isinstance(target_modules, str):
        return re.fullmatch(PATTERNS.get(target_modules, target_modules), name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in target_modules)


def dense_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of two or more dimensions, and their sizes, that are neither of linear layers nor of embeddings."""
    beside = (nn.Linear, Conv1D, nn.Embedding)
    return {
        f"{name}.{own}".lstrip("."): parameter.numel()
        for name, module in language_modules(model).items()
        if not isinstance(module, beside) and not is_quantized(module)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and min(parameter.shape[-2:]) > 1
    }


@dataclass(frozen=True)
class Coverage:
    """The share of the weights in a model's blocks that `target_modules` made factors of.

    Weights of blocks are those of two or more dimensions but for embeddings and the output embedding; those of "mlp"
    and "attention" are the ones in modules so named.
    """

    decomposed: int
    dense: Mapping[str, int]  # weights that stay dense, by the end of their names

    @classmethod
    def of(cls, blocks: Mapping[str, int], decomposed: Iterable[str]) -> Coverage:
        """The coverage of a model with `block_weights` blocks."""
        factors, dense = set(decomposed), dict[str, int]()
        for name in blocks.keys() - factors:
            kind = ".".join(part for part in re.sub(r"_?\d+", "", name).split(".")[-3:] if part)
            dense[kind] = dense.get(kind, 0) + blocks[name]
        return cls(sum(blocks.get(name, 0) for name in factors), dense)

    @property
    def share(self) -> float:
        """1 where nothing that was meant stays dense."""
        total = self.decomposed + sum(self.dense.values())
        return self.decomposed / total if total else 1.0

    def __str__(self) -> str:
        text = f"{self.share:.0%} of the blocks' weights decomposed"
        total = max(1, self.decomposed + sum(self.dense.values()))
        largest = sorted(self.dense.items(), key=lambda item: (-item[1], item[0]))[:4]
        return text + ("; left dense: " + ", ".join(f"{name} {size / total:.0%}" for name, size in largest)) * bool(
            largest
        )


def block_weights(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, int]:
    """The sizes of the weights in the blocks of a plain model that `target_modules` means, by module or parameter.

    A list or a regular expression of the user's own counts as "all-linear".
    """
    regex = re.compile(PATTERNS.get(target_modules, ".*") if isinstance(target_modules, str) else ".*")
    unsuitable, modules = unsuitable_layers(model), language_modules(model)
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    sizes |= {name: prod(Dequantized(layer, PLAIN[0]).shape) for name, layer in quantized_layers(model).items()}
    sizes |= {name: sum(p.numel() for p in modules[name].parameters()) for name in unsuitable}
    sizes |= {name: size for name, size in dense_parameters(model).items() if not _within(name, unsuitable)}
    return {name: size for name, size in sizes.items() if regex.fullmatch(name)}


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of sibling layers that models call one after the other with the same tensor, in that order."""


def groups_of_one_input(names: Iterable[str]) -> list[list[str]]:
    """Full names of sibling layers that likely share their input, in the order of their calls."""
    present = set(names)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    groups = []
    for parent in parents:
        for leaves in ONE_INPUT:
            group = [name for leaf in leaves if (name := f"{parent}.{leaf}".lstrip(".")) in present]
            if len(group) > 1:
                groups.append(group)
    return groups


def other_linears(model: nn.Module, *, on_meta: bool = False) -> dict[str, Linear]:
    """The nn.Linear and Conv1D layers that are still in the (language) model, the output embedding among them.

    `on_meta`: those on the meta device instead of those in memory.
    """
    head, within = output_embedding(model), language_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and (name in within or module is head)
        and type(module) in (nn.Linear, Conv1D)
        and type(module.weight.data) is Tensor
        and module.weight.is_meta == on_meta
        and module.weight.dtype in PLAIN
    }
