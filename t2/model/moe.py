"""Mixtures of experts: the three-dimensional weights of transformers' experts, matrix by matrix.

transformers keeps the routed experts of a block in one module with weights [experts, out, in] (`gate_up_proj`,
`down_proj`), the same attributes for all families (`transformers.integrations.moe`). Before a model is wrapped, such a
module is taken apart into `nn.Linear` layers that hold views of these weights, gate and up apart, whose ranks are
lower; so they are decomposed, merged and given back like any other layer. "Expert" here is the model's own; an SVF
expert still belongs to a request, and each token of it brings its slot along to whatever experts the router sends it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from t2.model.layers import RoutedLinear
from t2.model.routing import Route, Router
from t2.weights.quantized import PLAIN
from t2.weights.targets import is_meant
from t2kernels.backends import extension
from t2kernels.weights import KeptGroup, grouped_linear

ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
"""What transformers' `use_experts_implementation` says of a module."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds a block's experts as transformers does, with plain weights on one device."""
    if not all(hasattr(module, name) for name in ATTRIBUTES) or getattr(module, "_is_expert_parallel", False):
        return False
    weights = [getattr(module, name, None) for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")]
    return all(
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.dim() == 3
        and weight.shape[0] == module.num_experts
        and weight.dtype in PLAIN
        and not weight.is_meta
        for weight in weights
    )


class UnfusedExperts(nn.Module):
    """A block's experts as linear layers: `gate`, `up` and `down`, lists with one for each expert.

    Tokens are sorted by expert once. On a CPU without gradients all experts' gate and up products are one call of the
    extension, and so are their down products; else one call an expert.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.__dict__["module"] = module  # not a submodule: its weights are those of the layers
        self.experts: int = module.num_experts  # type: ignore[assignment]
        inner: Any = module.gate_up_proj if module.has_gate else module.up_proj
        biases = None
        if module.has_bias:
            biases = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        if module.has_gate:
            both = inner.shape[2 if module.is_transposed else 1]
            for part, rows in zip(("gate", "up"), self._halves(both), strict=True):
                setattr(self, part, self._layers(inner, biases, rows))
        else:
            self.up = self._layers(inner, biases, slice(None))
        self.down = self._layers(module.down_proj, module.down_proj_bias if module.has_bias else None, slice(None))
        self.kept: dict[str, tuple[list[Tensor], list[KeptGroup]]] = {}
        for own, child in module.named_children():  # the activation, a norm
            self.add_module(own, child)
        self._empty()
        self.train(module.training)

    def _halves(self, rows: int) -> tuple[slice, slice]:
        """The rows of gate and of up among those of both."""
        if self.__dict__["module"].is_concatenated:
            return slice(0, rows // 2), slice(rows // 2, None)
        return slice(0, None, 2), slice(1, None, 2)

    def _layers(self, weight: Any, bias: Any, rows: slice) -> nn.ModuleList:
        transposed: bool = self.__dict__["module"].is_transposed
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
        inner = {"gate_up_proj" if module.has_gate else "up_proj": ("gate", "up") if module.has_gate else ("up",)}
        for name, parts in {**inner, "down_proj": ("down",)}.items():
            layers = [list(getattr(self, part)) for part in parts]
            matrices = [self._joined([part[e].weight.data for part in layers]) for e in range(self.experts)]
            whole = torch.stack([matrix.T for matrix in matrices] if module.is_transposed else matrices)
            getattr(module, name).data = whole.contiguous()
            if module.has_bias:
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
        twin = UnfusedExperts.__new__(UnfusedExperts)
        nn.Module.__init__(twin)
        twin.__dict__["module"] = copy.deepcopy(module, memo)
        twin.name, twin.experts, twin.kept, twin.training = self.name, self.experts, {}, self.training
        for part in ("gate", "up", "down"):
            if hasattr(self, part):
                setattr(twin, part, nn.ModuleList(copy.deepcopy(layer, memo) for layer in getattr(self, part)))
        return twin.fused()

    # Forward

    @torch.compiler.disable(reason="t2: tokens are sorted by expert, and their numbers are not known to a graph")
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs [tokens, hidden] of the experts that tokens [tokens, hidden] are sent to, weighted and added.

        Args:
            top_k_index: int64 [tokens, k]; numbers beyond the experts' are nobody.
            top_k_weights: [tokens, k].
        """
        module: Any = self.__dict__["module"]
        tokens, k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.experts)[: self.experts]
        ends = counts.cumsum(0).tolist()
        offsets, sent = [0, *ends], order[: ends[-1]]
        rows = sent // k
        x = hidden_states[rows]
        inner = [self.gate, self.up] if module.has_gate else [self.up]
        call = _Call(self, offsets, rows, tokens)
        y = call.products("inner", inner, x)
        if module.has_gate:
            if not module.is_concatenated:
                y = y.unflatten(-1, (2, y.shape[-1] // 2)).transpose(-1, -2).flatten(-2)
            y = module._apply_gate(y)
        else:
            y = module.act_fn(y)
        y = call.products("down", [self.down], y)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[sent].unsqueeze(-1)
        parts = y.new_zeros(tokens * k, y.shape[-1]).index_copy(0, sent, y)
        return parts.view(tokens, k, y.shape[-1]).sum(1).to(hidden_states.dtype)


class _Call:
    """The products of one call: tokens in the order of their experts, each with the slot of its request."""

    def __init__(self, experts: UnfusedExperts, offsets: list[int], rows: Tensor, tokens: int) -> None:
        self.experts, self.offsets = experts, offsets
        first = experts.down[0]
        self.route: Route | None = None
        routers = {layer.router for layer in experts.down.children() if isinstance(layer, RoutedLinear)}
        routers |= {layer.router for layer in experts.up.children() if isinstance(layer, RoutedLinear)}
        if not routers:
            return
        (router,) = routers
        assert isinstance(router, Router) and first is not None
        self.route = router.current
        self.route.was_read = True
        self.route.check(tokens, experts.name)
        slots = self.route.kept_slots if torch.is_grad_enabled() else self.route.slots
        self.slots = slots[rows // max(1, tokens // max(1, self.route.requests))]

    def products(self, kind: str, parts: list[Any], x: Tensor) -> Tensor:
        """W x of every token's expert, those of all parts side by side."""
        groups = self._kept(kind, parts, x)
        if groups is not None:
            return grouped_linear(groups, x, self.slots, self.offsets)
        outputs = []
        for expert in range(self.experts.experts):
            first, last = self.offsets[expert : expert + 2]
            if first < last:
                outputs.append(torch.cat([self._product(part[expert], x[first:last], first) for part in parts], -1))
        return torch.cat(outputs) if outputs else x.new_zeros(0, sum(part[0].out_features for part in parts))

    def _product(self, layer: nn.Module, x: Tensor, first: int) -> Tensor:
        route = self.route
        if not isinstance(layer, RoutedLinear) or route is None:
            y: Tensor = layer(x)
            return y
        slots = self.slots[first : first + x.shape[0]]
        if (form := route.forms.get(layer.index)) is not None:
            return form(x, slots, layer.bias)
        return layer.weight.linear_unchecked(x, route.scales_of(layer), slots, layer.bias)

    def _kept(self, kind: str, parts: list[Any], x: Tensor) -> list[KeptGroup] | None:
        """The groups of all experts where one call can run them: on the CPU, slots of the table, no gradient."""
        route = self.route
        if route is None or not route.is_plain or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        layers = [[part[expert] for part in parts] for expert in range(self.experts.experts)]
        if extension is None or not all(isinstance(layer, RoutedLinear) for own in layers for layer in own):
            return None
        made_of, groups = self.experts.kept.get(kind, ([], []))
        now = [layers[0][0].scales, layers[-1][-1].scales]
        if len(made_of) != 2 or any(a is not b for a, b in zip(made_of, now, strict=True)):
            weights = [[layer.weight for layer in own] for own in layers]
            if any(len({weight.kind for weight in own}) > 1 for own in weights):
                return None
            groups = [
                KeptGroup(own, [layer.scales for layer in all_of], [layer.bias for layer in all_of])
                for own, all_of in zip(weights, layers, strict=True)
            ]
            self.experts.kept[kind] = (now, groups)
        return groups


def unfuse(model: nn.Module, target_modules: Any) -> list[str]:
    """Takes apart the experts that `target_modules` means, in place; returns their names."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error:
            return []  # `select_targets` says so
    done = []
    for name, module in list(model.named_modules()):
        meant = any(is_meant(f"{name}.{part}.0", target_modules) for part in ("gate", "up", "down"))
        if name and meant and is_fused(module):
            model.set_submodule(name, UnfusedExperts(name, module))
            done.append(name)
    return done


def fuse(model: nn.Module) -> None:
    """Undoes `unfuse`: layers are plain again."""
    for name, experts in list(_unfused(model)):
        model.set_submodule(name, experts.fused())


def parents_of(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The experts that linear layers are of, by the layers' names: (name, module)."""
    return {
        f"{name}.{own}": (name, experts)
        for name, experts in _unfused(model)
        for own, layer in experts.named_modules()
        if own.count(".") == 1
    }


def _unfused(model: nn.Module) -> Iterator[tuple[str, UnfusedExperts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, UnfusedExperts))
