"""Experts that a model serves: one place for a name, its vector and its slot in the table."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from t2.experts.expert import Expert, ExpertBank, check_z
from t2.experts.layout import Layout
from t2.experts.slots import SlotTable

ExpertChoice = str | Mapping[str, float] | Expert | Tensor | None
"""The expert of one request: a name, a mix of names with weights, an expert, a vector z [R], or None for the base."""


def as_choices(experts: ExpertChoice | Sequence[ExpertChoice]) -> list[ExpertChoice]:
    """A list of choices: the sequence itself, or one entry for a single choice."""
    single = experts is None or isinstance(experts, str | Mapping | Expert | Tensor)
    return [experts] if single else list(experts)  # type: ignore[list-item,arg-type]


def choice_key(choice: ExpertChoice) -> object:
    """A key that is equal for choices that can share a slot."""
    if isinstance(choice, Mapping):
        return tuple(sorted((str(name), weight) for name, weight in choice.items()))
    return choice if choice is None or isinstance(choice, str) else id(choice)


class ExpertRegistry(ExpertBank):
    """The bank of a wrapped model: each expert keeps a slot of the table as long as it is registered.

    Experts may be added, replaced and removed while requests run: those that hold a slot finish with it.
    """

    def __init__(self, layout: Layout, table: SlotTable) -> None:
        super().__init__(layout)
        self._table = table
        self._slots: dict[str, int] = {}
        self._lock = threading.RLock()

    def add(self, name: str, expert: Expert, *, replace: bool = False, strict: bool = True) -> None:
        with self._lock:
            if isinstance(expert, Expert) and expert.layout.R == self.layout.R:
                self._table.scales_of(expert.z)  # raises before anything is changed
            super().add(name, expert, replace=replace, strict=strict)
            before = self._slots.get(name)
            self._slots[name] = self._table.allocate(self._rows[name])
            if before is not None:
                self._table.release(before)

    def remove(self, name: str) -> None:
        with self._lock:
            super().remove(name)
            self._table.release(self._slots.pop(name))

    def z_of(self, choice: ExpertChoice) -> Tensor:
        """The vector z [R] float32 of a choice; a given tensor keeps its gradient.

        Raises:
            TypeError, ValueError: not a choice, or an expert that is not registered or of another layout.
        """
        if choice is None:
            return torch.ones(self.layout.R)
        if isinstance(choice, str):
            return self[choice].z
        if isinstance(choice, Mapping):
            return self.mix(choice)
        if isinstance(choice, Expert):
            self.layout.check_same(choice.layout, "experts")
            return choice.z
        if isinstance(choice, Tensor):
            return check_z("experts", choice, (self.layout.R,)).float()
        raise TypeError(
            "experts: expected a name, a mapping of names to weights, an Expert, a tensor z [R] or None for each "
            f"request, got {type(choice).__name__}"
        )

    def hold_slots(self, choices: Sequence[ExpertChoice], held: ExitStack) -> list[int]:
        """The slot of each choice, kept until `held` closes; equal choices share one."""
        slots: dict[object, int] = {None: SlotTable.BASE}
        with self._lock:
            for choice in choices:
                key = choice_key(choice)
                if key in slots:
                    continue
                slots[key] = (
                    self._retain(choice) if isinstance(choice, str) else self._table.allocate(self.z_of(choice))
                )
                held.callback(self._table.release, slots[key])
        return [slots[choice_key(choice)] for choice in choices]

    def _retain(self, name: str) -> int:
        self._row(name)  # a ValueError for a name that is not there
        slot = self._slots[name]
        self._table.retain(slot)
        return slot
