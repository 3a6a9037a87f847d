"""An expert of one model on another, by the ordered positions of the singular values (arXiv 2501.06252, section 4)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from t2.experts.expert import Expert
from t2.experts.layout import Layout
from t2kernels import Factors

Depth = Literal["relative", "absolute"]
Ranks = Literal["leading", "relative"]
Unmatched = Literal["error", "base"]

ATTENTION = r"(?:self_attn|self_attention|attention|attn)"
SAME_KIND = {
    rf"{ATTENTION}\.(?:q_proj|q_lin|query|wq)": "self_attn.q_proj",
    rf"{ATTENTION}\.(?:k_proj|k_lin|key|wk)": "self_attn.k_proj",
    rf"{ATTENTION}\.(?:v_proj|v_lin|value|wv)": "self_attn.v_proj",
    rf"{ATTENTION}\.(?:o_proj|out_proj|out_lin|c_proj|dense|wo)": "self_attn.o_proj",
    rf"{ATTENTION}\.(?:qkv_proj|query_key_value|Wqkv|c_attn)": "self_attn.qkv_proj",
    r"(?:mlp\.gate_proj|feed_forward\.w1)": "mlp.gate_proj",
    r"(?:mlp\.up_proj|feed_forward\.w3)": "mlp.up_proj",
    r"(?:mlp\.down_proj|feed_forward\.w2|mlp\.c_proj|(?:mlp\.)?fc2|mlp\.fc_out|mlp\.dense_4h_to_h)": "mlp.down_proj",
    r"(?:mlp\.c_fc|(?:mlp\.)?fc1|mlp\.fc_in|mlp\.dense_h_to_4h)": "mlp.fc1",
}
"""Names within a layer that families give to the same matrix. A fused matrix (Phi-3's qkv_proj, GPT-2's c_attn) has
singular values of its own, which are those of none of its parts, and an MLP without a gate has no up_proj: such
matrices match their like alone. The order of rows in a fused matrix doesn't matter to its singular values."""


@dataclass(frozen=True)
class TransferOptions:
    """Options of a transfer to another layout; without effect where names and ranks are the same.

    depth: how layers match; see `match`.
    ranks: for matrices of different ranks. "leading" counts from the largest singular value: the target's further
        entries are 1, the source's are dropped. "relative" stretches z [r] over the target's r', linear interpolation
        at i (r - 1) / (r' - 1); that mixes neighbouring entries of z, which were learnt independently.
    unmatched: what a matrix gets that has no like in the expert: a ValueError, or z = 1, the base.
    """

    depth: Depth = "relative"
    ranks: Ranks = "leading"
    unmatched: Unmatched = "error"

    def __post_init__(self) -> None:
        _check_option("depth", self.depth, Depth)
        _check_option("ranks", self.ranks, Ranks)
        _check_option("unmatched", self.unmatched, Unmatched)


@dataclass(frozen=True)
class _Place:
    """stack: the module that holds the layers. kind: the matrix within its layer, as Llama calls it."""

    stack: str
    layer: int
    kind: str

    @classmethod
    def of(cls, name: str) -> _Place:
        """By the first part of the name that is a number; a name without one is its own kind in layer 0."""
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdecimal()), -1)
        kind = ".".join(parts[at + 1 :])
        kind = next((llama for pattern, llama in SAME_KIND.items() if re.fullmatch(pattern, kind)), kind)
        return cls(".".join(parts[: max(at, 0)]), int(parts[at]) if at >= 0 else 0, kind)


@dataclass(frozen=True)
class Matching:
    """The source matrix of each matrix of a target.

    sources: the source's matrix for each one of the target, by name in the target's order; None if there is none.
    unused: matrices of the source that no matrix of the target takes.
    """

    sources: dict[str, str | None]
    unused: tuple[str, ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Matrices of the target without a source."""
        return tuple(name for name, source in self.sources.items() if source is None)


def match(source: Layout, target: Layout, depth: Depth = "relative") -> Matching:
    """Matches matrices by their kind (`SAME_KIND`) and the depth of their layer.

    Stacks of layers ("model.layers", "transformer.h") match by name; where one is left over on each side, those two do.

    Args:
        depth: "relative": layer i of n takes the source's layer floor((i + 1/2) m / n) of m, the one that its middle
            falls into, which is layer i itself if both are equally deep; a layout tells the depth by its last layer.
            "absolute": layer i takes layer i, also right for an expert of some of the layers alone.
    """
    _check_option("depth", depth, Depth)
    places, stacks = {_Place.of(name): name for name in source.names}, _matching_stacks(source, target)
    deep, target_deep = _depths(source), _depths(target)
    sources: dict[str, str | None] = {}
    for name in target.names:
        place = _Place.of(name)
        stack, layer = stacks.get(place.stack), place.layer
        if stack is not None and depth == "relative":
            layer = (2 * layer + 1) * deep[stack] // (2 * target_deep[place.stack])
        sources[name] = None if stack is None else places.get(_Place(stack, layer, place.kind))
    used = set(sources.values())
    return Matching(sources, tuple(name for name in source.names if name not in used))


def _depths(layout: Layout) -> dict[str, int]:
    depths: dict[str, int] = {}
    for place in map(_Place.of, layout.names):
        depths[place.stack] = max(depths.get(place.stack, 0), place.layer + 1)
    return depths


def _matching_stacks(source: Layout, target: Layout) -> dict[str, str]:
    """The source's stack for each one of the target that has one."""
    theirs, mine = _depths(source), _depths(target)
    stacks = {stack: stack for stack in mine if stack in theirs}
    others = [stack for stack in mine if stack not in theirs], [stack for stack in theirs if stack not in mine]
    if len(others[0]) == len(others[1]) == 1:
        stacks[others[0][0]] = others[1][0]
    return stacks


def transfer(
    expert: Expert, layout: Layout, options: TransferOptions | None = None, *, shuffle_seed: int | None = None
) -> Expert:
    """The expert for another base: entry i of a matrix's z, in order of the singular values, is the target's entry i.

    Between layouts of the same names and ranks z stays what it is. Otherwise matrices are matched by `match`.

    Args:
        layout: of the target model, as `SVFModel.layout`.
        shuffle_seed: permutes the result within each matrix, the paper's control: the same numbers in no order.

    Returns:
        An expert of `layout`; its metadata is the given one's, with a note "transfer" (JSON) of the source and options.

    Raises:
        TypeError: an argument is of another type.
        ValueError: nothing matches, or a matrix has no like while `options.unmatched` is "error".
    """
    if not isinstance(expert, Expert):
        raise TypeError(f"expert: expected a t2.Expert, got {type(expert).__name__}")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a t2.Layout, got {type(layout).__name__}")
    if shuffle_seed is not None and type(shuffle_seed) is not int:
        raise TypeError(f"shuffle_seed: expected None or an integer, got {shuffle_seed!r}")
    options = options or TransferOptions()
    found = match(expert.layout, layout, options.depth)
    missing, nothing = found.unmatched, len(found.unmatched) == len(layout.names)
    if missing and (nothing or options.unmatched == "error"):
        raise ValueError(
            f"layout: expected matrices like the expert's, got {_listed(missing)} without one; the expert has "
            f"{_listed(found.unused)} left over" + ("" if nothing else "; unmatched=base leaves them at z = 1")
        )
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    windows = []
    for source, rank in zip(found.sources.values(), layout.ranks, strict=True):
        z = torch.ones(rank) if source is None else _of_rank(expert[source], rank, options.ranks)
        windows.append(z if generator is None else z[torch.randperm(rank, generator=generator)])
    note = {
        "base_model": expert.layout.base_model,
        "fingerprint": expert.layout.fingerprint,
        **asdict(options),
        "matrices_at_1": len(missing),
        "matrices_unused": len(found.unused),
        "shuffle_seed": shuffle_seed,
        "before": expert.metadata.get("transfer"),
    }
    return Expert(torch.cat(windows), layout, expert.metadata | {"transfer": json.dumps(note)})


def _of_rank(z: Tensor, rank: int, ranks: Ranks) -> Tensor:
    if len(z) == rank:
        return z
    if ranks == "relative":
        return torch.nn.functional.interpolate(z[None, None], size=rank, mode="linear", align_corners=True)[0, 0]
    return torch.cat([z[:rank], z.new_ones(max(0, rank - len(z)))])


def _listed(names: Iterable[str]) -> str:
    counts = Counter(".".join(part for part in name.split(".") if not part.isdecimal()) for name in names)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "nothing"


def _check_option(name: str, value: object, options: object) -> None:
    if value not in get_args(options):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(options))}, got {value!r}")


@dataclass(frozen=True)
class Alignment:
    """The scalar products of two weights' singular vectors: left u_i . u'_j and right v_i . v'_j, both [r, r].

    Ordered transfer gives position i of the target the change that was learnt for u_i v_i^T. It can work where
    u'_i v'_i^T is that piece, or nearly: singular vectors are only as stable as their values' gaps are wide against
    the difference of the weights (Davis and Kahan, Wedin), and within a cluster of close ones they turn freely.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, source: Factors, target: Factors) -> Alignment:
        """ValueError if the weights are not of one shape: their vectors then live in different spaces."""
        shapes = [(f.u.shape[0], f.vh.shape[1]) for f in (source, target)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"target: expected factors of a weight {list(shapes[0])}, got {list(shapes[1])}")
        return cls(source.u.T @ target.u, source.vh @ target.vh.T)

    @property
    def same(self) -> Tensor:
        """(|u_i . u'_i| + |v_i . v'_i|) / 2 by position, [r]: 1 for the same weight, about sqrt(2 / (pi n)) for
        unrelated ones of n rows or columns."""
        return (self.left.diagonal().abs() + self.right.diagonal().abs()) / 2

    def near(self, distance: int) -> Tensor:
        """The share of u_i and v_i (squared lengths, their mean) that lies in the span of the target's vectors at
        positions i - distance to i + distance, [r]."""
        squares = (self.left.square() + self.right.square()) / 2
        return squares.tril(distance).triu(-distance).sum(1)

    def products(self, change: Tensor, target_change: Tensor) -> Tensor:
        """<U diag(change) Vh, U' diag(target_change) Vh'>: the scalar product of two changes of the weights.

        With change = sigma (z - 1) it tells, over the norms, how far an expert does to both weights the same."""
        return change @ (self.left * self.right) @ target_change
