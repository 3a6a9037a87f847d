"""The routed experts of a mixture as decomposed layers (`t2.weights.fused_experts`), and their products.

"Expert" here is the model's own. An SVF expert still belongs to a request, and each token of it brings its slot along
to whatever experts the router sends it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2.model.layers import RoutedLinear, share_hooks
from t2.model.routing import Route
from t2.weights.fused_experts import UnfusedExperts
from t2kernels.backends import extension
from t2kernels.weights import KeptGroup, grouped_linear


class RoutedExperts(UnfusedExperts):
    """A block's experts whose tokens have slots.

    Tokens are sorted by expert once. On a CPU without gradients all experts' gate and up products are one call of the
    extension, and so are their down products; else one call an expert.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        share_hooks(module, self)
        self.kept: dict[str, tuple[list[object], list[KeptGroup]]] = {}

    @torch.compiler.disable(reason="t2: tokens are sorted by expert, and their numbers are not known to a graph")
    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Outputs [tokens, hidden] of the experts that tokens [tokens, hidden] are sent to, weighted and added.

        Args:
            hidden_states: of a form that takes all, [experts * tokens, hidden], and so are the outputs.
            top_k_index: int64 [tokens, k]; numbers beyond the experts' are nobody.
            top_k_weights: [tokens, k].
        """
        if torch.compiler.is_exporting():
            raise RuntimeError("a mixture of experts can't be compiled yet: its tokens are sorted by expert")
        if self.form.takes_all:
            return self._all(hidden_states)
        assert top_k_index is not None and top_k_weights is not None
        tokens, k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.experts)[: self.experts]
        ends = counts.cumsum(0).tolist()
        offsets, sent = [0, *ends], order[: ends[-1]]
        rows = sent // k
        y = self._outputs(hidden_states[rows], offsets, rows, tokens)
        y = y * top_k_weights.reshape(-1)[sent].unsqueeze(-1)
        parts = y.new_zeros(tokens * k, y.shape[-1]).index_copy(0, sent, y)
        return parts.view(tokens, k, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _all(self, hidden_states: Tensor) -> Tensor:
        """Tokens for each expert in turn; rows of zeros, which are those of other experts, give zeros."""
        tokens = hidden_states.shape[0] // self.experts
        sent = hidden_states.any(dim=1).nonzero()[:, 0]
        ends = torch.bincount(sent // max(1, tokens), minlength=self.experts).cumsum(0).tolist()
        y = self._outputs(hidden_states[sent], [0, *ends], sent % max(1, tokens), tokens)
        return torch.zeros_like(hidden_states).index_copy(0, sent, y.to(hidden_states.dtype))

    def _outputs(self, x: Tensor, offsets: list[int], rows: Tensor, tokens: int) -> Tensor:
        """The experts' outputs of tokens in the order of their experts; `rows` has their numbers among all."""
        module: Any = self.__dict__["module"]
        inner = [self.gate, self.up] if self.form.has_gate else [self.up]
        call = _Call(self, offsets, rows, tokens)
        y = call.products("inner", inner, x)
        if not self.form.has_gate:
            y = module.act_fn(y)
        elif hasattr(module, "_apply_gate"):
            if not self.form.is_concatenated:
                y = y.unflatten(-1, (2, y.shape[-1] // 2)).transpose(-1, -2).flatten(-2)
            y = module._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            y = up * module.act_fn(gate)
        y = call.products("down", [self.down], y)
        return module.post_expert_norm(y) if self.form.has_post_expert_norm else y


class _Call:
    """The products of one call: tokens in the order of their experts, each with the slot of its request."""

    def __init__(self, experts: RoutedExperts, offsets: list[int], rows: Tensor, tokens: int) -> None:
        self.experts, self.offsets = experts, offsets
        self.route: Route | None = None
        layers = (layer for part in (experts.down, experts.up) for layer in part)
        router = next((layer.router for layer in layers if isinstance(layer, RoutedLinear)), None)
        if router is None:  # not wrapped yet
            return
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
        if route is None or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        if not route.is_plain and (route.forms or not route.is_base):  # the base is the table's slot 0
            return None
        first, last = parts[0][0], parts[-1][-1]
        if extension is None or not isinstance(first, RoutedLinear) or not isinstance(last, RoutedLinear):
            return None
        biases = [layer.bias if layer.bias is None else layer.bias.data for layer in (first, last)]
        now: list[object] = [first.scales, last.scales, first.weight, last.weight]
        now += [bias if bias is None else bias.data_ptr() for bias in biases]  # casts give a parameter other data
        made_of, groups = self.experts.kept.get(kind, ([], []))
        if len(made_of) != len(now) or not all(map(_same, made_of, now)):
            layers = list(zip(*parts, strict=True))
            if not all(isinstance(layer, RoutedLinear) for own in layers for layer in own):
                return None
            if any(len({layer.weight.kind for layer in own}) > 1 for own in layers):
                return None
            groups = [
                KeptGroup(
                    [layer.weight for layer in own], [layer.scales for layer in own], [layer.bias for layer in own]
                )
                for own in layers
            ]
            self.experts.kept[kind] = (now, groups)
        return groups


def _same(before: object, now: object) -> bool:
    return before is now or (isinstance(before, int) and before == now)
