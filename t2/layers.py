"""The layers that an `SVFModel` puts in place of a model's linear layers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2.routing import Route, Router
from t2.targets import Linear, weight_matrix
from t2kernels import DenseWeight, FactoredWeight
from t2kernels.weights import FactoredGroup


class RoutedLinear(nn.Module):
    """A decomposed linear layer: each row runs with the scales its route gives it."""

    def __init__(self, index: int, weight: FactoredWeight, bias: Tensor | None, router: Router) -> None:
        super().__init__()
        self.index = index
        self.weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bias = bias
        self.router = router
        self.shared_input: SharedInput | None = None

    def forward(self, x: Tensor) -> Tensor:
        route = self.router.of_layer(self.index)
        route.check(x.shape[0])
        if self.shared_input is not None and not torch.compiler.is_compiling():
            y = self.shared_input.linear(self, x, route)
            if y is not None:
                return y
        return self.alone(x, route)

    def alone(self, x: Tensor, route: Route) -> Tensor:
        """The layer's product under a route, in the form that the route's plan gives it."""
        form = route.forms.get(self.index)
        if form is not None:
            return form(x, route.slots, self.bias)
        return self.weight.linear_unchecked(x, route.windows[self.index], route.slots, self.bias)


class SharedInput:
    """Layers that are called one after the other with the same tensor, as q, k and v are: the first call does all.

    The outputs of the others wait, per thread, until those are called with that very tensor, unchanged, under the
    same route. A first layer whose companions got another input finds their outputs unused at its next call and from
    then on everyone works alone, so a wrong guess costs one call. Inference only: with gradients each works alone.
    """

    def __init__(self, members: Sequence[RoutedLinear]) -> None:
        self.members = list(members)
        self._group = FactoredGroup([m.weight for m in members])
        self._waiting = threading.local()
        self._useful = True

    def linear(self, member: RoutedLinear, x: Tensor, route: Route) -> Tensor | None:
        """The member's output, or None if it has to work alone."""
        if not self._useful or route.forms or (torch.is_grad_enabled() and (x.requires_grad or route.requires_grad)):
            return None
        waiting = self._waiting.__dict__
        if member is not self.members[0]:
            if waiting.get("x") is not x or waiting["route"] is not route or waiting["version"] != _version(x):
                return None
            y: Tensor | None = waiting["outputs"].pop(member.index, None)
            if not waiting["outputs"]:
                waiting.clear()
            return y
        if waiting:
            self._useful = False
            waiting.clear()
            return None
        windows = [route.windows[m.index] for m in self.members]
        own, *others = self._group.linear_unchecked(x, windows, route.slots, [m.bias for m in self.members])
        outputs = {m.index: y for m, y in zip(self.members[1:], others, strict=True)}
        waiting.update(x=x, route=route, version=_version(x), outputs=outputs)
        return own


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
