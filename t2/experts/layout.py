"""The layout of an expert's vector: which part belongs to which matrix of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import nn

from t2.weights.files import FileFormatError, file_errors, parse_json


@dataclass(frozen=True)
class Layout:
    """The decomposed matrices of one base model, in module order.

    An expert is one number per singular value of every matrix, laid end to end: matrix `names[i]` owns
    `z[offsets[i] : offsets[i] + ranks[i]]`, and the whole vector has `R = sum(ranks)` entries.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    fingerprint: str  # of the names and the content of every decomposed weight
    base_model: str = ""  # for people: the name the base was loaded by

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ranks) or not self.names:
            raise ValueError(
                f"ranks: expected one rank for each of at least one name, got {len(self.names)} names "
                f"and {len(self.ranks)} ranks"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("names: expected distinct module names, got duplicates")
        if min(self.ranks) < 1:
            raise ValueError(f"ranks: expected ranks >= 1, got {min(self.ranks)}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each matrix in the vector."""
        return (0, *accumulate(self.ranks))[:-1]

    @cached_property
    def R(self) -> int:
        """Length of an expert's vector."""
        return sum(self.ranks)

    def window(self, name: str) -> slice:
        """The part of an expert's vector that belongs to the matrix `name`."""
        try:
            index = self.names.index(name)
        except ValueError:
            raise ValueError(f"name: expected a decomposed matrix, got {name!r}") from None
        return slice(self.offsets[index], self.offsets[index] + self.ranks[index])

    def check_same(self, other: Layout, what: str, *, same_base: bool = True) -> None:
        """ValueError that says how `other` (the layout of `what`) differs from this one, if it does."""
        if other.names != self.names:
            missing = [n for n in self.names if n not in set(other.names)]
            extra = [n for n in other.names if n not in set(self.names)]
            raise ValueError(
                f"{what}: expected the {len(self.names)} matrices of this model, got {len(other.names)} matrices; "
                f"missing {missing[:3]}, unknown {extra[:3]}"
                + ("" if missing or extra else "; the same names in another order")
            )
        if other.ranks != self.ranks:
            name, mine, theirs = next(
                (n, a, b) for n, a, b in zip(self.names, self.ranks, other.ranks, strict=True) if a != b
            )
            raise ValueError(f"{what}: expected rank {mine} for {name}, got rank {theirs}")
        if same_base and other.fingerprint != self.fingerprint:
            raise ValueError(
                f"{what}: expected base weights {self.fingerprint[:12]} ({self.base_model or 'unnamed'}), got one "
                f"for {other.fingerprint[:12]} ({other.base_model or 'unnamed'}); strict=False accepts other weights "
                "of the same shapes"
            )

    def to_metadata(self) -> dict[str, str]:
        return {
            "base_model": self.base_model,
            "fingerprint": self.fingerprint,
            "names": json.dumps(self.names),
            "ranks": json.dumps(self.ranks),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str = "metadata") -> Layout:
        """The layout that `to_metadata` wrote; `where` names the file in errors.

        Raises FileFormatError where the metadata of a file does not describe a layout.
        """
        for field in ("names", "ranks", "fingerprint", "base_model"):
            if not isinstance(metadata.get(field), str):
                raise FileFormatError(f"{where}: expected a layout with names, ranks, fingerprint, got no {field}")
        names = parse_json(metadata["names"], f"{where}: names")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise FileFormatError(f"{where}: names: expected a list of module names, got {names!r:.80}")
        ranks = parse_json(metadata["ranks"], f"{where}: ranks")
        if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
            raise FileFormatError(f"{where}: ranks: expected a list of whole numbers, got {ranks!r:.80}")
        with file_errors(where):
            return cls(tuple(names), tuple(ranks), metadata["fingerprint"], metadata["base_model"])


def layout_of(model: nn.Module, weights: Mapping[str, Any], keys: Mapping[str, str]) -> Layout:
    """The layout of a model's target weights [out, in], by module name, with their keys in the factor cache.

    weights: tensors, or anything else with their shapes.
    """
    return Layout(
        names=tuple(weights),
        ranks=tuple(min(weight.shape) for weight in weights.values()),
        fingerprint=fingerprint(keys),
        base_model=str(getattr(model, "name_or_path", "") or type(model).__name__),
    )


def fingerprint(weight_keys: Mapping[str, str]) -> str:
    """Identity of a base: a hash over the names of its decomposed matrices and the content keys of their weights."""
    return hashlib.sha256(json.dumps(list(weight_keys.items())).encode()).hexdigest()
