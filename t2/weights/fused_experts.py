"""Mixtures of experts: the three-dimensional weights of transformers' experts as layers.

transformers keeps the routed experts of a block in one module with weights [experts, out, in] (`gate_up_proj`,
`down_proj`), with the same attributes for all families (`transformers.integrations.moe`). Taken apart it is `nn.Linear`
layers that hold views of these weights, gate and up apart, whose ranks are lower together than that of both in one. So
they are decomposed, merged and given back like any other layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from t2.weights.quantized import PLAIN
from t2.weights.targets import is_meant


@dataclass(frozen=True)
class ExpertsForm:
    """How a module holds a block's experts: what transformers' `use_experts_implementation` says of it.

    takes_all: whether its input has a copy of all tokens for each expert, those that are not its own as zeros, and no
        indices: as in Llama 4.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    takes_all: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsForm | None:
        """None for modules that hold none, or in another way."""
        if type(module).__name__ == "Llama4TextExperts":
            return cls(int(module.num_experts), True, False, True, True, False, takes_all=True)  # type: ignore[arg-type]
        said = {each.name: getattr(module, each.name, None) for each in fields(cls) if each.name != "takes_all"}
        if None in said.values() or getattr(module, "_is_expert_parallel", False):
            return None
        return cls(**said)  # type: ignore[arg-type]


def is_fused(module: nn.Module, *, on_meta: bool = False) -> bool:
    """Whether a module holds a block's experts as transformers does, with plain weights in memory, or on meta."""
    form = ExpertsForm.of(module)
    if form is None:
        return False
    weights = [getattr(module, name, None) for name in ("gate_up_proj" if form.has_gate else "up_proj", "down_proj")]
    return all(
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.dim() == 3
        and weight.shape[0] == form.num_experts
        and weight.dtype in PLAIN
        and weight.is_meta == on_meta
        for weight in weights
    )


class UnfusedExperts(nn.Module):
    """A block's experts as linear layers: `gate`, `up` and `down`, lists with one for each expert."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.__dict__["module"] = module  # not a submodule: its weights are those of the layers
        form = ExpertsForm.of(module)
        assert form is not None
        self.form, self.experts = form, form.num_experts
        inner: Any = module.gate_up_proj if self.form.has_gate else module.up_proj
        biases = None
        if self.form.has_bias:
            biases = module.gate_up_proj_bias if self.form.has_gate else module.up_proj_bias
        if self.form.has_gate:
            both = inner.shape[2 if self.form.is_transposed else 1]
            for part, rows in zip(("gate", "up"), self._halves(both), strict=True):
                setattr(self, part, self._layers(inner, biases, rows))
        else:
            self.up = self._layers(inner, biases, slice(None))
        self.down = self._layers(module.down_proj, module.down_proj_bias if self.form.has_bias else None, slice(None))
        for own, child in module.named_children():  # the activation, a norm
            self.add_module(own, child)
        self._empty()
        self.train(module.training)

    def source(self, own: str) -> tuple[str, int, int, slice]:
        """Where the weight of a layer, such as "gate.3", comes from: the module's tensor, part, expert, and rows."""
        gates: Any = self.gate if self.form.has_gate else None
        part, expert = own.split(".")
        if part == "down" or gates is None:
            return f"{part}_proj", 0, int(expert), slice(None)
        place = ("gate", "up").index(part)
        return "gate_up_proj", place, int(expert), self._halves(2 * gates[0].out_features)[place]

    def _halves(self, rows: int) -> tuple[slice, slice]:
        """The rows of gate and of up among those of both."""
        if self.form.is_concatenated:
            return slice(0, rows // 2), slice(rows // 2, None)
        return slice(0, None, 2), slice(1, None, 2)

    def _layers(self, weight: Any, bias: Any, rows: slice) -> nn.ModuleList:
        transposed = self.form.is_transposed
        layers = nn.ModuleList()
        for expert in range(self.experts):
            matrix = (weight.data[expert].T if transposed else weight.data[expert])[rows]
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.data[expert][rows].contiguous(), requires_grad=bias.requires_grad)
            layers.append(layer)
        return layers

    def _empty(self) -> None:
        """From here on the layers' views are all that keeps the weights."""
        module = self.__dict__["module"]
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            for parameter in (getattr(module, name, None), getattr(module, f"{name}_bias", None)):
                if isinstance(parameter, nn.Parameter):
                    parameter.data = parameter.data.new_empty(0)

    def fused(self) -> nn.Module:
        """The module that this one was made of, with the weights of the layers as they are now, which are plain."""
        module: Any = self.__dict__["module"]
        inner = {"gate_up_proj" if self.form.has_gate else "up_proj": ("gate", "up") if self.form.has_gate else ("up",)}
        for name, parts in {**inner, "down_proj": ("down",)}.items():
            layers = [list(getattr(self, part)) for part in parts]
            matrices = [self._joined([part[e].weight.data for part in layers]) for e in range(self.experts)]
            whole = torch.stack([matrix.T for matrix in matrices] if self.form.is_transposed else matrices)
            old = getattr(module, name)
            if old.is_meta:
                setattr(module, name, nn.Parameter(whole.contiguous(), requires_grad=old.requires_grad))
            else:
                old.data = whole.contiguous()
            if self.form.has_bias:
                own = [self._joined([part[e].bias.data for part in layers]) for e in range(self.experts)]
                getattr(module, f"{name}_bias").data = torch.stack(own)
        whole_module: nn.Module = module.train(self.training)
        return whole_module

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Rows of gate and up in the order of the module's own weight."""
        if len(parts) == 1:
            return parts[0]
        gate, up = parts
        both = gate.new_empty(2 * gate.shape[0], *gate.shape[1:])
        for rows, part in zip(self._halves(both.shape[0]), (gate, up), strict=True):
            both[rows] = part
        return both

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy is the fused module: what is copied is a plain model, its layers merged."""
        module: Any = self.__dict__["module"]
        twin = type(self).__new__(type(self))
        nn.Module.__init__(twin)
        twin.__dict__["module"] = copy.deepcopy(module, memo)
        twin.name, twin.form, twin.experts, twin.training = self.name, self.form, self.experts, self.training
        for part in ("gate", "up", "down"):
            if hasattr(self, part):
                setattr(twin, part, nn.ModuleList(copy.deepcopy(layer, memo) for layer in getattr(self, part)))
        return twin.fused()


def unfuse(
    model: nn.Module,
    target_modules: str | Sequence[str],
    kind: type[UnfusedExperts] = UnfusedExperts,
    *,
    on_meta: bool = False,
) -> list[str]:
    """Takes apart the experts that `target_modules` means, in place; returns their names."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error:
            return []  # `select_targets` says so
    done = []
    for name, module in list(model.named_modules()):
        form = ExpertsForm.of(module)
        if not name or form is None or not is_fused(module, on_meta=on_meta):
            continue
        layers = (f"{name}.{part}.{i}" for part in ("gate", "up", "down") for i in range(form.num_experts))
        if any(is_meant(layer, target_modules) for layer in layers):
            model.set_submodule(name, kind(name, module))
            done.append(name)
    return done


def fuse(model: nn.Module) -> None:
    """Undoes `unfuse`: layers are plain again."""
    for name, experts in list(_unfused(model)):
        model.set_submodule(name, experts.fused())


def parents_of(model: nn.Module) -> dict[str, tuple[str, UnfusedExperts]]:
    """The experts that linear layers are of, by the layers' names: (name, module)."""
    return {
        f"{name}.{own}": (name, experts)
        for name, experts in _unfused(model)
        for own, layer in experts.named_modules()
        if own.count(".") == 1
    }


def _unfused(model: nn.Module) -> Iterator[tuple[str, UnfusedExperts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, UnfusedExperts))
