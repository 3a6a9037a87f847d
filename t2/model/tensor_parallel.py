"""Layers divided over processes that all run the same batch: rows of U or columns of Vh in each, as vLLM does it.

transformers' `tp_plan` of the model says which layers of a block hand their share of the activations on ("colwise",
then "rowwise": two sums over the processes a block and pass). Every other layer takes whole activations and returns
whole ones. In the factored form Vh of the former and U of the latter are whole in each process; in the delta form it is
these parts of the support's few components, and W is divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from t2.weights.targets import PATTERNS

COLUMNS, ROWS, GATHER, SPLIT = "colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"
"""Styles, by their names in transformers: of W^T, so that "colwise" divides rows of W and of U."""
_WHOLE = {COLUMNS: GATHER, ROWS: SPLIT}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Division:
    """How one layer is divided. Sizes are whole; shares are equal, the last ones filled up with zeros.

    style: one of the names above.
    """

    style: str
    out_features: int
    in_features: int
    mesh: DeviceMesh

    @property
    def by_rows(self) -> bool:
        """Whether rows of W and U are divided, not columns of W and Vh."""
        return self.style in (COLUMNS, GATHER)

    @property
    def hands_on(self) -> bool:
        """Whether other layers read this process' outputs as they are: without gradients nothing is exchanged."""
        return self.style == COLUMNS

    def rows_of(self, matrix: Tensor) -> Tensor:
        """This process' rows of W or U."""
        return self._share(matrix, 0) if self.by_rows else matrix

    def columns_of(self, matrix: Tensor) -> Tensor:
        """This process' columns of W or Vh."""
        return matrix if self.by_rows else self._share(matrix, 1)

    def _share(self, tensor: Tensor, dim: int) -> Tensor:
        """A contiguous share of one dimension."""
        size = -(-tensor.shape[dim] // self.mesh.size())
        start = min(size * self.mesh.get_local_rank(), tensor.shape[dim])
        share = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
        missing = size - share.shape[dim]
        if missing:
            filled = [0, 0] * (tensor.dim() - dim)
            filled[2 * (tensor.dim() - dim) - 1] = missing
            share = F.pad(share, filled)
        return share.contiguous()

    def linear(
        self,
        product: Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor],
        x: Tensor,
        scales: Tensor | None,
        slots: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer's product: `product` of (x, scales, slots, bias) is this process' part of it."""
        if scales is not None and _learns(scales):
            scales = _Whole.apply(scales, self)
        if self.style == SPLIT:
            x = _Split.apply(x, self)
        elif self.by_rows and _learns(x):
            x = _Whole.apply(x, self)
        if self.by_rows:
            y = product(x, scales, slots, self.own_bias(bias))
            return y if self.style == COLUMNS else _Gather.apply(y, self)
        y = _Sum.apply(product(x, scales, slots, None), self)
        return y if bias is None else y + bias

    def own_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias that this process' part of the product gets."""
        return None if bias is None or not self.by_rows else self._share(bias, 0)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def gathered(self, tensor: Tensor, size: int) -> Tensor:
        """The processes' parts of the last dimension, one after the other: `size` numbers."""
        parts = [torch.empty_like(tensor) for _ in range(self.mesh.size())]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, -1)[..., :size]

    def split(self, tensor: Tensor) -> Tensor:
        """This process' part of the last dimension."""
        return self._share(tensor, tensor.dim() - 1)


def _learns(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


class _Whole(torch.autograd.Function):
    """A tensor that is whole in every process, each of which uses it for a part: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, division: Division) -> Tensor:
        ctx.division = division
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.division.summed(gradient.clone()), None


class _Sum(torch.autograd.Function):
    """The sum of the processes' parts, which each of them goes on with."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, division: Division) -> Tensor:
        return division.summed(y.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """The outputs of all processes' rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, division: Division) -> Tensor:
        ctx.division = division
        return division.gathered(y, division.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.division.split(gradient), None


class _Split(torch.autograd.Function):
    """The inputs of this process' columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, division: Division) -> Tensor:
        ctx.division = division
        return division.split(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.division.gathered(gradient, ctx.division.in_features), None


def divisions(model: nn.Module, shapes: Mapping[str, tuple[int, int]], mesh: DeviceMesh) -> dict[str, Division]:
    """How the target layers of a model are divided; `shapes` has their [out, in] by name.

    The plan counts for the layers of a module only where it can be kept for all of them: where each is a target, the
    sizes can be divided, and heads of attention stay whole.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    parts = (name for parts in (model.named_modules(), model.named_parameters()) for name, _ in parts)
    styles = {name: plan.get(_NUMBER.sub("*", name)) for name in parts}
    harmless = (None, GATHER, SPLIT, "replicated_with_grad_allreduce")  # what is divided here takes and gives the whole
    broken = {_parent(name) for name, style in styles.items() if style not in harmless and name not in shapes}
    for name, (rows, columns) in shapes.items():
        size = rows if styles[name] == COLUMNS else columns
        if styles[name] in _WHOLE and size % (mesh.size() * _unit(model, name)):
            broken.add(_parent(name))
    found = {}
    for name, (rows, columns) in shapes.items():
        style = styles[name]
        if style not in (COLUMNS, ROWS, GATHER, SPLIT):
            style = GATHER
        elif _parent(name) in broken:
            style = _WHOLE.get(style, style)
        found[name] = Division(style, rows, columns, mesh)
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _unit(model: nn.Module, name: str) -> int:
    """The size of what has to stay whole in a layer's features: a head of attention."""
    if not re.fullmatch(PATTERNS["attention"], name):
        return 1
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    own = getattr(model.get_submodule(_parent(name)), "head_dim", None) or getattr(text, "head_dim", None)
    return int(own or text.hidden_size // text.num_attention_heads)  # type: ignore[union-attr]
