"""Everything a run needs to go on as if it had never stopped, in one file that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer

from t2.model import SVFModel
from t2.storage import FileFormatError, checksum, parse_json, read_safetensors, write_safetensors

FORMAT = {"format": "t2-checkpoint", "format_version": "2"}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of a parameter."""


@dataclass
class State:
    """What changes during a run beside parameters and the optimiser's moments.

    The order of prompts and all random numbers are functions of the seed and `step`.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    rate_scale: float = 1.0
    first_entropy: float | None = None
    first_kl: float | None = None
    last_alarm: int = -1
    base_score: float | None = None

    @classmethod
    def parse(cls, text: str, where: str) -> State:
        """Raises FileFormatError that names the field which is no possible state of a run."""
        found = parse_json(text, where)
        names = {each.name for each in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise FileFormatError(f"{where}: expected the fields {sorted(names)}, got {found!r:.200}")
        for name, value in found.items():
            if name in ("step", "best_step", "last_alarm"):
                low = -1 if name == "last_alarm" else 0
                high = float("inf") if name == "step" or type(found["step"]) is not int else found["step"]
                good, expected = type(value) is int and low <= value <= high, f"an integer from {low} to {high}"
            elif name == "rate_scale":
                good, expected = _is_number(value) and 0 < value <= 1, "a number above 0, at most 1"
            else:
                good, expected = value is None or _is_number(value), "a finite number or null"
            if not good:
                raise FileFormatError(f"{where}, {name}: expected {expected}, got {value!r:.80}")
        return cls(**found)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e300  # type: ignore[arg-type]


@dataclass
class Checkpoint:
    """A run after `state.step` updates: parameters, the best ones so far, the optimiser and the options.

    base: `fingerprint_of` the model that the run was started on.
    """

    state: State
    base: str
    parameters: list[Tensor]
    best: list[Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        tensors = {f"parameters.{i}": tensor.detach() for i, tensor in enumerate(self.parameters)}
        tensors |= {f"best.{i}": tensor.detach() for i, tensor in enumerate(self.best)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()}
        said = {"state": json.dumps(asdict(self.state)), "options": json.dumps(self.options), "base": self.base}
        write_safetensors(path, tensors, FORMAT | said)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises FileNotFoundError, or FileFormatError for a file that is no checkpoint of this version."""
        tensors, metadata = read_safetensors(path, "checkpoint")
        if (found := {key: metadata.get(key) for key in FORMAT}) != FORMAT:
            raise FileFormatError(f"{path}: expected {FORMAT}, got {found}")
        if missing := {"state", "options", "base"} - metadata.keys():
            raise FileFormatError(f"{path}: expected a complete checkpoint, got one without {sorted(missing)}")
        options = parse_json(metadata["options"], f"{path}, options")
        if not isinstance(options, dict):
            raise FileFormatError(f"{path}, options: expected options by name, got {options!r:.80}")
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise FileFormatError(f"{path}, {name}: expected tensors of {list(parts)}, got another")
            parts[part][rest] = tensor
        state = State.parse(metadata["state"], f"{path}, state")
        rows = {
            part: [parts[part].get(str(i), torch.empty(0)) for i in range(len(parts[part]))]
            for part in ("parameters", "best")
        }
        return cls(state, metadata["base"], rows["parameters"], rows["best"], parts["optimizer"], options)

    def check(self, path: Path, parameters: Sequence[Tensor]) -> None:
        """FileFormatError that names the tensor which does not fit these parameters, or is not finite."""

        def fit(name: str, tensor: Tensor, like: Tensor) -> None:
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise FileFormatError(
                    f"{path}, {name}: expected {like.dtype} {list(like.shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )
            if not bool(tensor.isfinite().all()):
                raise FileFormatError(f"{path}, {name}: expected finite numbers, got NaN or infinite ones")

        for part, values in (("parameters", self.parameters), ("best", self.best)):
            if len(values) != len(parameters):
                raise FileFormatError(f"{path}, {part}: expected {len(parameters)} tensors, got {len(values)}")
            for i, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
                fit(f"{part}.{i}", value, parameter.detach().cpu())
        known = {f"{i}.{name}": parameters[i] for i in range(len(parameters)) for name in MOMENTS}
        for name, tensor in self.optimizer.items():
            if name not in known:
                raise FileFormatError(f"{path}, optimizer.{name}: expected a moment of {len(parameters)} parameters")
            count = name.endswith(".step")
            fit(f"optimizer.{name}", tensor, torch.zeros(()) if count else known[name].detach().cpu())
            if not name.endswith(".exp_avg") and bool((tensor < 0).any()):
                raise FileFormatError(f"{path}, optimizer.{name}: expected numbers >= 0, got negative ones")
        for place in {name.partition(".")[0] for name in self.optimizer}:
            if missing := [name for name in MOMENTS if f"{place}.{name}" not in self.optimizer]:
                raise FileFormatError(f"{path}, optimizer.{place}: expected {MOMENTS}, got none of {missing}")
        if self.state.step and not self.optimizer:
            raise FileFormatError(f"{path}, optimizer: expected the moments of {self.state.step} steps, got none")


def fingerprint_of(model: nn.Module) -> str:
    """Identity of a base model: of all its weights, names and dtypes included."""
    wrapped = model if isinstance(model, SVFModel) else None
    digest = xxhash.xxh3_128((wrapped.layout.fingerprint if wrapped else "").encode())
    for name, tensor in (wrapped.model if wrapped else model).named_parameters():
        digest.update(f"{name}|{checksum(tensor)}|".encode())
    return digest.hexdigest()


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and counts by "parameter.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    saved = optimizer.state_dict()
    saved["state"] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        saved["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(saved)
