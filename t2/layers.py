"""The layers that an `SVFModel` puts in place of a model's linear layers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2.routing import Route, Router
from t2.targets import Linear, weight_matrix
from t2kernels import DenseWeight, FactoredWeight
from t2kernels.weights import FactoredGroup


class RoutedLinear(nn.Module):
    """A decomposed linear layer: each row runs with the scales its route gives it.

    `scales` [slots, r] is the layer's view of the slot table: a buffer, so that compiled code takes it for a weight.
    """

    scales: Tensor

    def __init__(self, index: int, weight: FactoredWeight, bias: Tensor | None, router: Router) -> None:
        super().__init__()
        self.index = index
        self.weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bias = bias
        self.router = router
        self.shared_input: SharedInput | None = None
        self.place = 0  # among the layers of one shared input
        self.register_buffer("scales", weight.s.unsqueeze(0), persistent=False)

    def set_scales(self, scales: Tensor) -> None:
        """Takes another view of the slot table."""
        self.scales = scales
        if self.shared_input is not None:
            self.shared_input.set_scales()

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        scales = self._buffers.pop("scales")  # the table's to move
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["scales"] = scales
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true here while another thread compiles
            slots = self.router.traced_slots()
            return self._outside_graph(x) if slots is None else self._traced(x, slots)
        return self._eager(x)

    def _traced(self, x: Tensor, slots: Tensor) -> Tensor:
        requests = slots.shape[0]
        if x.shape[0] % requests if requests else x.shape[0]:
            raise ValueError(f"experts: expected one entry per request, got {requests} entries for {x.shape[0]} rows")
        if self.shared_input is not None and not torch.is_grad_enabled():
            y = self.shared_input.traced(self, x, slots)
            if y is not None:
                return y
        return self.weight.linear_unchecked(x, self.scales, slots, self.bias)

    def _eager(self, x: Tensor) -> Tensor:
        route = self.router.of_layer(self.index)
        route.check(x.shape[0])
        if self.shared_input is not None:
            y = self.shared_input.linear(self, x, route)
            if y is not None:
                return y
        return self.alone(x, route)

    _outside_graph = torch.compiler.disable(
        _eager, reason="t2: this call's route has gradients, a plan, or an expert in training"
    )

    def alone(self, x: Tensor, route: Route) -> Tensor:
        """The layer's product under a route, in the form that the route's plan gives it."""
        slots = route.slots
        if torch.is_grad_enabled() and x.requires_grad and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            slots = route.kept_slots
        if route.forms:
            form = route.forms.get(self.index)
            if form is not None:
                return form(x, slots, self.bias)
        scales = self.scales if route.windows is None else route.windows[self.index]
        return self.weight.linear_unchecked(x, scales, slots, self.bias)


class SharedInput:
    """Layers that are called one after the other with the same tensor, as q, k and v are: the first call does all.

    The outputs of the others wait until those are called with that very tensor. A first layer whose companions got
    another input finds their outputs unused at its next call and from then on everyone works alone, so a wrong guess
    costs one call. Inference only: with gradients each works alone.

    Outputs wait per thread, and for the tensor unchanged under the same route. In compiled code they wait in the
    router's `OutputsLeft`, where the tensor alone counts: nothing but a write to it between the calls of q and k, which
    a graph does not show, would go unnoticed.
    """

    def __init__(self, members: Sequence[RoutedLinear]) -> None:
        self.members = list(members)
        self._group = FactoredGroup([m.weight for m in members])
        self._waiting = threading.local()
        self._useful = True
        for place, member in enumerate(self.members):
            member.place, member.shared_input = place, self
        self.set_scales()

    def set_scales(self) -> None:
        """Takes the members' views of the slot table, and their biases."""
        self._scales = [m.scales for m in self.members]

    def linear(self, member: RoutedLinear, x: Tensor, route: Route) -> Tensor | None:
        """The member's output, or None if it has to work alone."""
        if not self._useful or route.forms or (torch.is_grad_enabled() and (x.requires_grad or route.requires_grad)):
            return None
        waiting = self._waiting.__dict__
        if member.place:
            if waiting.get("x") is not x or waiting["route"] is not route or waiting["version"] != _version(x):
                return None
            y: Tensor | None = waiting["outputs"].pop(member.place, None)
            if not waiting["outputs"]:
                waiting.clear()
            return y
        if waiting:
            self._useful = False
            waiting.clear()
            return None
        windows = route.windows
        scales = self._scales if windows is None else [windows[m.index] for m in self.members]
        own, *others = self._group.linear_unchecked(x, scales, route.slots, [m.bias for m in self.members])
        waiting.update(x=x, route=route, version=_version(x), outputs=dict(enumerate(others, 1)))
        return own

    def traced(self, member: RoutedLinear, x: Tensor, slots: Tensor) -> Tensor | None:
        """`linear` for compiled code, which leaves `OutputsLeft` as empty as it was."""
        left = member.router.outputs_left
        if member.place:
            if left.group is not self or left.x is not x or left.outputs is None:
                return None
            y = left.outputs[member.place]
            if member.place == len(self.members) - 1:
                left.clear()
            return y
        if left.group is not None:
            left.group._useful = False
            left.clear()
        if not self._useful:
            return None
        members = self.members
        ys = self._group.linear_unchecked(x, [m.scales for m in members], slots, [m.bias for m in members])
        left.group, left.x, left.outputs = self, x, ys
        return ys[0]


def _version(x: Tensor) -> int:
    """How often x was written to; inference tensors do not count."""
    return -1 if x.is_inference() else x._version


class PackedLinear(nn.Module):
    """A linear layer that is not decomposed, on the same kernels: the output embedding, or one beside the targets.

    `weight` and `bias` are those of the layer it stands for, which others may read.
    """

    def __init__(self, packed: DenseWeight, layer: Linear) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.bias = layer.bias
        self.__dict__["_layer"] = layer  # not a submodule: its weight is another's, or not in use

    @property
    def weight(self) -> Tensor:
        return weight_matrix(self.__dict__["_layer"])

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.linear_unchecked(x, self.bias)
