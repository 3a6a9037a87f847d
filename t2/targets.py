"""Which linear layers of a model are decomposed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def weight_matrix(linear: Linear) -> Tensor:
    """The weight as a matrix [out, in] (a view; GPT-2's Conv1D stores its transpose)."""
    return linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T


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


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every nn.Linear and Conv1D of the model by name, but for its output embedding (lm_head).

    Of a model that reads images these are the layers of its language model: what comes before, the vision tower and
    what connects it, sees patches of images, not requests that could each have an expert.

    Subclasses are left out: they are layers with a meaning of their own (quantised weights, weights that their
    parent reads directly).
    """
    head = output_embedding(model)
    return {
        name: module
        for name, module in language_modules(model).items()
        if name and isinstance(module, Linear) and type(module) in (nn.Linear, Conv1D) and module is not head
    }


def select_targets(
    model: nn.Module, target_modules: str | Sequence[str], *, on_meta: bool = False
) -> dict[str, Linear]:
    """The layers that `target_modules` names (see `SVFConfig`), in module order.

    `on_meta`: whether their weights are on the meta device and come from elsewhere (`t2.streaming`).

    Raises ValueError where nothing, or a suffix of the list, matches; and for layers that can't be replaced: on the
    meta device unless `on_meta`, or with a weight that another module shares.
    """
    layers = linear_layers(model)
    chosen = _match(layers, target_modules)
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}".lstrip("."))
    devices = set()
    for name, layer in chosen.items():
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
        if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"model: expected float32, bfloat16 or float16 weights, got {layer.weight.dtype} in {name}")
        devices.add(layer.weight.device)
    if len(devices) > 1:
        raise ValueError(f"model: expected all target weights on one device, got {sorted(map(str, devices))}")
    return chosen


def _match(layers: dict[str, Linear], target_modules: str | Sequence[str]) -> dict[str, Linear]:
    if not layers:
        raise ValueError("model: expected a module that holds at least one nn.Linear or Conv1D layer, got none")
    examples = sorted({name.rpartition(".")[2] for name in layers})
    if isinstance(target_modules, str):
        pattern = {
            "all-linear": ".*",
            "attention": r"(.*\.)?[^.]*(attn|attention)[^.]*\..*",
            "mlp": r"(.*\.)?[^.]*(mlp|feed_forward|ffn)[^.]*\..*",
        }.get(target_modules, target_modules)
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"target_modules: expected a regular expression, got {pattern!r}: {error}") from error
        chosen = {name: layer for name, layer in layers.items() if regex.fullmatch(name)}
    else:
        suffixes = list(target_modules)
        if not suffixes or not all(isinstance(suffix, str) and suffix for suffix in suffixes):
            raise ValueError(f"target_modules: expected a pattern or a list of module suffixes, got {target_modules!r}")
        hits = {
            suffix: {name for name in layers if name == suffix or name.endswith(f".{suffix}")} for suffix in suffixes
        }
        for suffix, names in hits.items():
            if not names:
                raise ValueError(f"target_modules: expected suffixes of this model's layers {examples}, got {suffix!r}")
        matched = set().union(*hits.values())
        chosen = {name: layer for name, layer in layers.items() if name in matched}
    if not chosen:
        raise ValueError(
            f"target_modules: expected a pattern that matches some of this model's layers (…{examples}), "
            f"got {target_modules!r}, which matches none"
        )
    return chosen


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
        and module.weight.is_meta == on_meta
        and module.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
