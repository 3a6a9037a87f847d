"""Supports: the components of each matrix that an expert may change. At all others its z is 1."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from t2.experts.expert import Expert, ExpertBank
from t2.experts.layout import Layout
from t2.weights.files import FileFormatError, read_safetensors, write_safetensors

FORMAT, FORMAT_VERSION = "t2-support", "1"
Chosen = int | float | str | Path | Tensor
"""A support: a number of components of each matrix, a share of them, a file, or positions."""


def resolve(chosen: Chosen, layout: Layout) -> Tensor:
    """Positions [K] int64 in z, in increasing order, at least one in each matrix.

    Args:
        chosen: k, the k leading components of each matrix (those with the largest singular values); a share of them
            between 0 and 1; a file of `save`, or of experts, whose support it then is (`support_of`), or a folder of
            such; or positions. A matrix without any has its first one.

    Raises:
        TypeError, ValueError: another value, or a file for other matrices or weights.
        FileNotFoundError, FileFormatError: the file cannot be read.
    """
    if isinstance(chosen, Tensor):
        positions = check_positions("support", chosen, layout.R)
    elif isinstance(chosen, str | Path):
        positions = load(chosen, layout)
    elif isinstance(chosen, bool) or not isinstance(chosen, int | float):
        raise TypeError(
            f"support: expected a number of components, a share, a file or positions, got {type(chosen).__name__}"
        )
    elif (isinstance(chosen, float) and not 0 < chosen < 1) or (isinstance(chosen, int) and chosen < 1):
        raise ValueError(f"support: expected an integer >= 1 or a share between 0 and 1, got {chosen}")
    else:
        most = [chosen if isinstance(chosen, int) else max(1, round(chosen * rank)) for rank in layout.ranks]
        leading = [range(o, o + min(k, r)) for o, r, k in zip(layout.offsets, layout.ranks, most, strict=True)]
        positions = torch.tensor([p for own in leading for p in own])
    empty = [start for start, count in zip(layout.offsets, counts(positions, layout), strict=True) if not count]
    return torch.cat([positions, torch.tensor(empty, dtype=torch.int64)]).sort().values if empty else positions


def check_positions(name: str, positions: Tensor, R: int) -> Tensor:
    """Positions on the CPU; ValueError unless they are increasing int64 [K] in a vector of length R."""
    given = positions.detach().cpu()
    if (
        given.dtype != torch.int64
        or given.dim() != 1
        or not len(given)
        or bool((given.diff() < 1).any())
        or not 0 <= int(given[0]) <= int(given[-1]) < R
    ):
        raise ValueError(
            f"{name}: expected increasing positions int64 [K] below {R}, got {given.dtype} {list(given.shape)}"
        )
    return given


def counts(positions: Tensor, layout: Layout) -> tuple[int, ...]:
    """The number of positions in each matrix."""
    ends = torch.searchsorted(positions.cpu(), torch.tensor([*layout.offsets, layout.R])).tolist()
    return tuple(end - start for start, end in pairwise(ends))


def save(path: str | Path, positions: Tensor, layout: Layout) -> None:
    """Writes a support to a safetensors file, whole or not at all."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    positions = check_positions("positions", positions, layout.R)
    write_safetensors(path, {"positions": positions}, header | layout.to_metadata())


def load(path: str | Path, layout: Layout) -> Tensor:
    """The support in a file of `save`, or the one of the experts in a file or folder, for the weights of `layout`."""
    path = Path(path)
    if path.is_dir():
        return torch.cat([load(file, layout) for file in _files_in(path)]).unique()
    tensors, metadata = read_safetensors(path, "support")
    kind = metadata.get("format")
    if kind in ("t2-bank", "t2-expert"):
        return support_of(experts_in(path, layout))
    if (kind, metadata.get("format_version")) != (FORMAT, FORMAT_VERSION) or "positions" not in tensors:
        raise FileFormatError(f"{path}: expected a support, an expert or a bank, got {kind!r}")
    layout.check_same(Layout.from_metadata(metadata, str(path)), str(path))
    try:
        return check_positions("positions", tensors["positions"], layout.R)
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error


def experts_in(path: str | Path, layout: Layout, *, same_base: bool = True) -> list[Expert]:
    """The experts in an expert's or a bank's file, or in a folder of such, for the matrices of `layout`.

    Raises:
        FileNotFoundError, FileFormatError: nothing there, or another file.
        ValueError: they are for other matrices or, with `same_base`, other weights.
    """
    path = Path(path)
    if path.is_dir():
        return [expert for file in _files_in(path) for expert in experts_in(file, layout, same_base=same_base)]
    _, metadata = read_safetensors(path, "experts")
    if metadata.get("format") == "t2-bank":
        bank = ExpertBank.load(path)
        experts = [bank[name] for name in bank]
    else:
        experts = [Expert.load(path)]
    for expert in experts:
        layout.check_same(expert.layout, str(path), same_base=same_base)
    return experts


def _files_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"support: expected files of experts in {folder}, found none")
    return files


def changes_of(experts: Iterable[Expert], sigma: Tensor) -> Tensor:
    """How much experts change each component, [R]: the root of the mean square of sigma (z - 1), to which each expert
    adds the same in all.

    Args:
        sigma: singular values [R].
    """
    changes = torch.stack([sigma.cpu() * (expert.z - 1) for expert in experts])
    return (changes / changes.norm(dim=1, keepdim=True).clamp(min=1e-30)).square().mean(0).sqrt()


def top_components(scores: Tensor, layout: Layout, count: int) -> Tensor:
    """Positions [K] int64 in z of the `count` highest scores of each matrix, in increasing order.

    A matrix of a lower rank has all of its components in it; of equal scores the first ones are taken.

    Args:
        scores: [R], finite; for instance the size of a gradient, or of sigma (z - 1).
        count: components of a matrix, at least 1.

    Raises:
        ValueError: another shape or count, or scores that are not finite.
    """
    if tuple(scores.shape) != (layout.R,):
        raise ValueError(f"scores: expected shape [{layout.R}], got {list(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite numbers, got NaN or infinite ones")
    if type(count) is not int or count < 1:
        raise ValueError(f"count: expected an integer >= 1, got {count!r}")
    chosen = [
        start + own.sort(descending=True, stable=True).indices[:count].sort().values
        for start, own in zip(layout.offsets, scores.cpu().split(list(layout.ranks)), strict=True)
    ]
    return torch.cat(chosen)


def support_of(experts: Iterable[Expert]) -> Tensor:
    """Positions [K] int64 in z where any of these experts of one layout differs from the base, in increasing order.

    Raises:
        ValueError: no experts, or of several layouts.
    """
    given = list(experts)
    if not given:
        raise ValueError("experts: expected at least one, got none")
    for other in given[1:]:
        given[0].layout.check_same(other.layout, "experts", same_base=False)
    return (torch.stack([expert.z for expert in given]) != 1).any(0).nonzero()[:, 0]
