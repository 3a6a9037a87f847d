"""The layers that an `SVFModel` puts in place of a model's linear layers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from t2.model.routing import Route, Router
from t2.model.tensor_parallel import Division
from t2.weights.quantized import QuantizedBase, is_quantized
from t2.weights.targets import Linear, as_stored, weight_matrix
from t2kernels import DeltaWeight, DenseWeight, FactoredWeight
from t2kernels.weights import FactoredGroup


class RoutedLinear(nn.Module):
    """A decomposed linear layer: each row runs with the scales its route gives it.

    `scales` [slots, r], in the delta form [slots, k], is the layer's view of the slot table: a buffer, so that compiled
    code takes it for a weight.

    Args:
        index: of the matrix in the layout.
        name: of the module.
        weight: the factors, or W and the components of the support.
        module: the linear layer that this one stands for. Its weight is emptied; what is left of it has the dtype that
            the layer would have, casts of the model included. A quantised layer stays whole; in the delta form it is
            the weight's base, and adds its own bias.
        router: of the model.
        division: how the layer is divided over processes; `weight` is this one's part.
    """

    scales: Tensor

    def __init__(
        self,
        index: int,
        name: str,
        weight: FactoredWeight | DeltaWeight,
        module: nn.Module,
        router: Router,
        division: Division | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.name = name
        self.weight = weight
        whole = weight if division is None else division
        self.in_features, self.out_features, self.division = whole.in_features, whole.out_features, division
        self.keeps_module = is_quantized(module)
        within = isinstance(weight, DeltaWeight) and isinstance(weight.base, QuantizedBase)
        self.bias: Any = None if within else _frozen(getattr(module, "bias", None))
        self.router = router
        self.shared_input: SharedInput | None = None
        self.place = 0  # among the layers of one shared input
        self.register_buffer("scales", weight.s.unsqueeze(0), persistent=False)
        self.__dict__["module"] = module  # not a submodule: its parameters are this one's
        self.train(module.training)
        share_hooks(module, self)
        if self.keeps_module:
            return
        assert isinstance(module, Linear)
        if weight_matrix(module).is_meta:
            empty = module.weight.new_empty(0, device=weight.s.device)
            module.weight = nn.Parameter(empty, requires_grad=module.weight.requires_grad)
        else:
            module.weight.data = module.weight.new_empty(0)

    def restored(self, weight: Tensor | None) -> nn.Module:
        """The layer this one stands for, with its weight [out, in] again, in the dtype and on the device of now.

        weight: of a quantised layer None where it is to be as it was; else the result is a plain layer.
        """
        if self.keeps_module:
            quantized: nn.Module = self.__dict__["module"]
            return (quantized if weight is None else plain_linear(weight, quantized)).train(self.training)
        module: Linear = self.__dict__["module"]
        assert weight is not None
        empty = module.weight
        module.weight.data = as_stored(module, weight).to(empty.device, empty.dtype)
        return module.train(self.training)

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
        if self.keeps_module:
            return self
        module: Linear = self.__dict__["module"]
        module.weight.data, module.bias = fn(module.weight.data), self.bias
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: factors and slots are shared with other layers."""
        raise TypeError(
            "a wrapped model can be neither copied nor pickled: SVFModel.merged_copy(expert) gives a plain copy, "
            "unload() the base model back"
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true here while another thread compiles
            slots = self.router.traced_slots()
            if slots is None or self.division is not None:
                return self._outside_graph(x)
            return self._traced(x, slots)
        return self._eager(x)

    def _traced(self, x: Tensor, slots: Tensor) -> Tensor:
        requests = slots.shape[0]
        if x.shape[0] % requests if requests else x.shape[0]:
            raise ValueError(
                f"experts: expected one entry per request, got {requests} entries for {x.shape[0]} rows in the first "
                "dimension of a layer's input, which has to be that of the batch"
            )
        if self.shared_input is not None and not torch.is_grad_enabled():
            y = self.shared_input.traced(self, x, slots)
            if y is not None:
                return y
        return self.weight.linear_unchecked(x, self.scales, slots, self.bias)

    def _eager(self, x: Tensor) -> Tensor:
        route = self.router.current
        route.was_read = True
        route.check(x.shape[0], self.name)
        if self.shared_input is not None:
            y = self.shared_input.linear(self, x, route)
            if y is not None:
                return y
        return self.alone(x, route)

    _outside_graph = torch.compiler.disable(
        _eager,
        reason="t2: the layer is divided over processes, or the route has gradients, a plan, or an expert in training",
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
        scales = None if route.is_base and isinstance(self.weight, DeltaWeight) else route.scales_of(self)
        if self.division is not None:
            return self.division.linear(self._product, x, scales, slots, self.bias)
        return self._product(x, scales, slots, self.bias)

    def _product(self, x: Tensor, scales: Tensor | None, slots: Tensor, bias: Tensor | None) -> Tensor:
        """The weight's product, without `scales` that of the delta form's base."""
        if scales is None:
            assert isinstance(self.weight, DeltaWeight)
            return self.weight.base_unchecked(x, bias)
        return self.weight.linear_unchecked(x, scales, slots, bias)

    @property
    def own_bias(self) -> Tensor | None:
        """The bias of the part that this process computes."""
        bias: Tensor | None = self.bias
        return bias if self.division is None else self.division.own_bias(bias)


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
        biases = [m.own_bias for m in self.members]
        if route.is_base and isinstance(member.weight, DeltaWeight):
            own, *others = self._group.base_unchecked(x, route.slots, biases)
        else:
            kept = route.is_plain and not torch.compiler.is_compiling()  # torch.export looks for a layer's own buffers
            scales = self._scales if kept else [route.scales_of(m) for m in self.members]
            own, *others = self._group.linear_unchecked(x, scales, route.slots, biases)
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
    """The number of writes to x so far; -1 for inference tensors, which do not count them."""
    return -1 if x.is_inference() else x._version


class Packed:
    """A linear layer beside the targets on the same kernels: `pack` turns a layer into one, `unpack` back again.

    It stays the module it was, with its own weight, which other modules may share, replace or write to; products run
    on a packed copy of that, which is made anew when the weight has changed. A weight that is trained is used itself.
    """

    packed: DenseWeight
    weight: Any
    bias: Any

    def keep(self, packed: DenseWeight) -> None:
        """Takes a packed copy of the weight as it is now."""
        packed._non_persistent_buffers_set.update(packed._buffers)  # the weight itself is saved
        self.packed, self._state = packed, _state(self.weight)

    def refresh(self) -> None:
        """Packs the weight again if it has been replaced or written to."""
        if _state(self.weight) != self._state:
            weight, old = weight_matrix(cast(Linear, self)), self.packed
            self.keep(DenseWeight.pack(weight, dtype=old.dtype, bf16_products=old.bf16_products))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.refresh()
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._state = _state(self.weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        if not torch.compiler.is_dynamo_compiling():  # compiled code relies on SVFModel, which refreshes before a call
            self.refresh()
        return self.packed.linear_unchecked(x, self.bias)


class PackedLinear(Packed, nn.Linear):
    """An nn.Linear on the package's kernels."""


class PackedConv1D(Packed, Conv1D):
    """A Conv1D on the package's kernels."""


def pack(layer: Linear, dtype: torch.dtype, bf16_products: bool) -> None:
    """Lets a layer run on the package's kernels, its weight stored as `dtype`."""
    kind: Any = PackedLinear if isinstance(layer, nn.Linear) else PackedConv1D
    packed = DenseWeight.pack(weight_matrix(layer), dtype=dtype, bf16_products=bf16_products)
    layer.__class__ = kind
    cast(Packed, layer).keep(packed)


def unpack(layer: nn.Module) -> None:
    """Undoes `pack`; nothing happens to other layers."""
    if isinstance(layer, Packed):
        del layer.packed, layer._state
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else Conv1D  # type: ignore[assignment]


def _state(weight: Tensor) -> tuple[object, ...]:
    """Changes when a weight is replaced, moved, cast or written to."""
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device, weight.shape


def plain_linear(weight: Tensor, layer: nn.Module) -> nn.Linear:
    """An nn.Linear with this weight [out, in] and a layer's bias."""
    bias = getattr(layer, "bias", None)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain


def _frozen(bias: Any) -> nn.Parameter | None:
    """A bias as a parameter; quantised layers may have it as a buffer."""
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Lets `other` run the hooks that were registered on `module`, now and later."""
    for name, hooks in module.__dict__.items():
        if name.startswith(("_forward_", "_backward_")) and "hooks" in name:
            other.__dict__[name] = hooks
