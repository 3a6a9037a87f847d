"""Everything a run needs to go on as if it had never stopped, in one file that appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from t2.storage import FileFormatError, read_safetensors, write_safetensors

FORMAT = {"format": "t2-checkpoint", "format_version": "1"}


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


@dataclass
class Checkpoint:
    """A run after `state.step` updates: parameters, the best ones so far, the optimiser and the options."""

    state: State
    parameters: list[Tensor]
    best: list[Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        tensors = {f"parameters.{i}": tensor.detach() for i, tensor in enumerate(self.parameters)}
        tensors |= {f"best.{i}": tensor.detach() for i, tensor in enumerate(self.best)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()}
        metadata = FORMAT | {"state": json.dumps(asdict(self.state)), "options": json.dumps(self.options)}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises FileNotFoundError, or FileFormatError for a file that is no checkpoint of this version."""
        tensors, metadata = read_safetensors(path, "checkpoint")
        if {key: metadata.get(key) for key in FORMAT} != FORMAT:
            raise FileFormatError(f"{path}: expected a t2-checkpoint of version 1, got {metadata.get('format')}")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        def rows(prefix: str) -> list[Tensor]:
            found = part(prefix)
            return [found[str(i)] for i in range(len(found))]

        try:
            state, options = State(**json.loads(metadata["state"])), json.loads(metadata["options"])
            return cls(state, rows("parameters."), rows("best."), part("optimizer."), options)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: expected a complete checkpoint, got one without {error}") from error


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
