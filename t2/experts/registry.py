"""Experts that a model serves: one place for a name, its vector, and its slot in the table."""

from __future__ import annotations

import threading

from t2.experts.expert import Expert, ExpertBank
from t2.experts.layout import Layout
from t2.experts.slots import SlotTable


class ServedExperts(ExpertBank):
    """The bank of a wrapped model: each of its experts has a slot of the table as long as it has its name.

    Safe to change while requests run: those that hold a slot finish with it.
    """

    def __init__(self, layout: Layout, table: SlotTable) -> None:
        super().__init__(layout)
        self._table = table
        self._slots: dict[str, int] = {}
        self._lock = threading.RLock()

    def add(self, name: str, expert: Expert, *, replace: bool = False, strict: bool = True) -> None:
        with self._lock:
            super().add(name, expert, replace=replace, strict=strict)
            before = self._slots.get(name)
            self._slots[name] = self._table.allocate(self._rows[name])
            if before is not None:
                self._table.release(before)

    def remove(self, name: str) -> None:
        with self._lock:
            super().remove(name)
            self._table.release(self._slots.pop(name))

    def retain(self, name: str) -> int:
        """The slot of an expert, with one reference more. Raises ValueError for a name that is not there."""
        with self._lock:
            self._row(name)
            slot = self._slots[name]
            self._table.retain(slot)
            return slot
