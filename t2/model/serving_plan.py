"""Plans for a whole model: which form each decomposed layer takes for a phase of work, and the weights that needs."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from t2.model.routing import LayerForm
from t2kernels.files import cache_root, strict_json, write_text
from t2kernels.planner import CostModel, DeltaWeight, Plan
from t2kernels.weights import DenseWeight


def cost_model(path: Path | None = None) -> CostModel:
    """This machine's cost model: measured the first time (a second or two), then read from the cache.

    `path` defaults to `cache_root() / "cost-model.json"`, which holds one model per instruction set, number
    of threads and torch version; a file that is damaged is named in a warning and measured anew.
    """
    path = cache_root() / "cost-model.json" if path is None else path
    key, known = CostModel.machine_key(), _read(path)
    if key in known:
        try:
            return CostModel.from_dict(known[key])
        except ValueError as error:
            _warn(path, error)
    model = CostModel.measure()
    write_text(path, json.dumps(known | {key: model.to_dict()}, indent=1) + "\n")
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        known = strict_json(path.read_bytes())
        if not isinstance(known, dict):
            raise ValueError("expected an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, error)
        return {}
    return known


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(f"cost model {path} is damaged, and measured anew ({error})", RuntimeWarning, stacklevel=3)


@dataclass
class Merged:
    """W' of one expert."""

    weight: DenseWeight

    def bind(self, table: Tensor) -> LayerForm:
        return lambda x, slots, bias: self.weight.linear_unchecked(x, bias)


@dataclass
class Delta:
    """W and the k components that experts change most; their sigma, and their columns of the slot table."""

    weight: DeltaWeight
    sigma: Tensor
    columns: Tensor

    def bind(self, table: Tensor) -> LayerForm:
        scales = table[:, self.columns] - self.sigma
        return lambda x, slots, bias: self.weight.linear(x, scales, slots, bias)


@dataclass
class ServingPlan:
    """What `SVFModel.plan` gives: pass it to `generate` or `route` together with the experts it was made for.

    Its weights are built when it is first used, and freed with it.
    """

    plan: Plan
    experts: dict[object, Tensor]  # z [R] of each distinct expert, by the key of its choice
    forms: dict[int, Merged | Delta] | None = None  # by layer index, once built

    def explain(self) -> str:
        """What was chosen and why, with predicted and, after `SVFModel.measure_plan`, measured times."""
        return self.plan.explain()
