"""Mixes of experts: their names, and their z."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

LARGEST_WEIGHT = 10.0
_PART = re.compile(r"(?P<name>.+):(?P<weight>[0-9.eE+-]+)")


def parse_mix(name: str) -> dict[str, float] | None:
    """The weights of a mix "NAME:WEIGHT+NAME:WEIGHT" by name; None where `name` is not of this form.

    Raises:
        ValueError: a weight is no number from -10 to 10.
    """
    parts = [_PART.fullmatch(part) for part in name.split("+")] if ":" in name else []
    weights = {part["name"]: part["weight"] for part in parts if part is not None}
    if not parts or None in parts or len(weights) < len(parts):
        return None
    try:
        found = {name: float(weight) for name, weight in weights.items()}
    except ValueError as error:
        raise ValueError(f"expected a mix NAME:WEIGHT+NAME:WEIGHT, got {name!r:.200}") from error
    if not all(math.isfinite(weight) and abs(weight) <= LARGEST_WEIGHT for weight in found.values()):
        raise ValueError(f"expected weights from -10 to 10, got {name!r:.200}")
    return found


def mix_rows(alpha: Tensor, rows: Tensor) -> Tensor:
    """alpha @ rows, [B, R] float32, for experts' z.

    A component at which all rows are 1 gives exactly 1 where the weights add up to 1 but for rounding: so a mix of
    experts on a support is on it too.

    Args:
        alpha: weights [B, E]. rows: z [E, R].
    """
    total = alpha.double().sum(-1, keepdim=True)
    total = torch.where((total - 1).abs() < 1e-6, 1.0, total).float()
    return total + alpha.float() @ (rows - 1)
