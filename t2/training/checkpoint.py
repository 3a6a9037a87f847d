"""Checkpoint of a run: all state that an exact resume needs, in one file that is written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from t2.weights.files import FileFormatError, parse_json, read_safetensors, write_safetensors

FORMAT = {"format": "t2-checkpoint", "format_version": "2"}
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, in the shape of their parameter; beside them is a count `step`."""


@dataclass
class State:
    """State of a run beside parameters and the optimiser's moments.

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


@dataclass(frozen=True)
class Base:
    """Base model of a run: its name (informative), dtype, and a fingerprint of all its weights."""

    name: str
    dtype: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'}, {self.dtype}, {self.fingerprint[:12]}"


@dataclass
class Checkpoint:
    """A run after `state.step` updates: parameters, the best ones so far, the optimiser, the base and the options.

    support: positions [K] int64 in z that the parameters are of; None where they are all of it.
    """

    state: State
    parameters: list[Tensor]
    best: list[Tensor]
    base: Base
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    support: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        tensors = {f"parameters.{i}": tensor.detach() for i, tensor in enumerate(self.parameters)}
        tensors |= {f"best.{i}": tensor.detach() for i, tensor in enumerate(self.best)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()}
        if self.support is not None:
            tensors["support"] = self.support
        told = {"state": asdict(self.state), "base": asdict(self.base), "options": self.options}
        write_safetensors(path, tensors, FORMAT | {name: json.dumps(value) for name, value in told.items()})

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint, each field of its metadata checked; `check` compares its tensors with a run's.

        Raises FileNotFoundError, or FileFormatError for a file that is no checkpoint of this version.
        """
        tensors, metadata = read_safetensors(path, "checkpoint")
        if {key: metadata.get(key) for key in FORMAT} != FORMAT:
            found = metadata.get("format"), metadata.get("format_version")
            raise FileFormatError(f"{path}: expected a t2-checkpoint of version 2, got {found}")
        told = {}
        for name in ("state", "base", "options"):
            told[name] = parse_json(metadata.get(name, "null"), f"{path}: {name}")
            if not isinstance(told[name], dict):
                raise FileFormatError(f"{path}: {name}: expected an object, got {told[name]!r:.80}")
        state, base = State(**_fields_of(State, told["state"], path)), Base(**_fields_of(Base, told["base"], path))
        _check_state(state, path)
        steps = told["options"].get("steps", state.step)
        if type(steps) is not int or steps < state.step:
            raise FileFormatError(
                f"{path}: state.step: expected at most options.steps, {steps!r:.80}, got {state.step}"
            )
        for each in fields(Base):
            if not isinstance(getattr(base, each.name), str):
                raise FileFormatError(
                    f"{path}: base.{each.name}: expected a text, got {getattr(base, each.name)!r:.80}"
                )
        support = tensors.pop("support", None)
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise FileFormatError(
                    f"{path}: tensor {name!r}: expected parameters, best, optimizer and support alone"
                )
            parts[part][rest] = tensor
        rows = {}
        for part in ("parameters", "best"):
            if set(parts[part]) != {str(i) for i in range(len(parts[part]))}:
                raise FileFormatError(
                    f"{path}: {part}: expected them numbered from 0 on, got {sorted(parts[part])[:5]}"
                )
            rows[part] = [parts[part][str(i)] for i in range(len(parts[part]))]
        return cls(state, rows["parameters"], rows["best"], base, parts["optimizer"], told["options"], support)

    def check(self, path: Path, base: Base, parameters: Sequence[Tensor]) -> None:
        """Raise a FileFormatError with the file and the field unless this is of a run on this base, with parameters
        like these, and all of its numbers are finite."""
        if (self.base.dtype, self.base.fingerprint) != (base.dtype, base.fingerprint):
            raise FileFormatError(
                f"{path}: base: expected the weights that the run was started on ({self.base}), got another base "
                f"model's, or the same in another dtype ({base})"
            )
        for part, given in (("parameters", self.parameters), ("best", self.best)):
            if len(given) != len(parameters):
                raise FileFormatError(f"{path}: {part}: expected {len(parameters)} tensors, got {len(given)}")
            for i, (tensor, like) in enumerate(zip(given, parameters, strict=True)):
                _check_like(tensor, like, f"{path}: {part}.{i}")
        wanted = {f"{i}.{name}" for i in range(len(parameters)) for name in ("step", *MOMENTS)}
        if self.optimizer and set(self.optimizer) != wanted:
            wrong = sorted(set(self.optimizer) ^ wanted)[:3]
            raise FileFormatError(
                f"{path}: optimizer: expected Adam's moments of each parameter, missing or extra {wrong}"
            )
        for i, like in enumerate(parameters if self.optimizer else ()):
            for name in MOMENTS:
                _check_like(self.optimizer[f"{i}.{name}"], like, f"{path}: optimizer.{i}.{name}")
            if bool((self.optimizer[f"{i}.exp_avg_sq"] < 0).any()):
                raise FileFormatError(f"{path}: optimizer.{i}.exp_avg_sq: expected numbers >= 0, got negative ones")
            count = self.optimizer[f"{i}.step"]
            if (
                count.dtype != torch.float32
                or count.numel() != 1
                or not 1 <= float(count) <= self.state.step
                or float(count) % 1
            ):
                raise FileFormatError(
                    f"{path}: optimizer.{i}.step: expected a whole number from 1 to {self.state.step}, got {count}"
                )


def _fields_of(kind: type, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check that an object has exactly the fields of a dataclass, and return it."""
    wanted = {each.name for each in fields(kind)}
    if wrong := set(given) ^ wanted:
        raise FileFormatError(f"{path}: {kind.__name__.lower()}: missing or unknown {', '.join(sorted(wrong)[:5])}")
    return given


def _check_state(state: State, path: Path) -> None:
    def check(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise FileFormatError(f"{path}: state.{name}: expected {expected}, got {getattr(state, name)!r:.80}")

    most = (1 << 31) - 1
    for name, least in (("step", 0), ("best_step", 0), ("last_alarm", -1)):
        value = getattr(state, name)
        check(name, type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")
        check(name, value <= state.step, f"at most the step, {state.step}")
    for name in ("best_score", "first_entropy", "first_kl", "base_score"):
        check(name, getattr(state, name) is None or _is_number(getattr(state, name)), "a finite number or null")
    check("rate_scale", _is_number(state.rate_scale) and 0 < state.rate_scale <= 1, "a number above 0, at most 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _check_like(tensor: Tensor, like: Tensor, where: str) -> None:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise FileFormatError(
            f"{where}: expected {like.dtype} {list(like.shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise FileFormatError(f"{where}: expected finite numbers, got NaN or infinite ones")


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and counts by "parameter.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimiser the moments that `optimizer_tensors` gave, as `Checkpoint.check` found them sound."""
    saved = optimizer.state_dict()
    saved["state"] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        saved["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(saved)
