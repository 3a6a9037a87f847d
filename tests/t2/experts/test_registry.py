"""Slots of registered experts: held, replaced, given back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from t2 import Expert, Layout
from t2.experts.registry import ExpertRegistry
from t2.experts.slots import SlotTable

LAYOUT = Layout(("a", "b"), (3, 2), "0" * 64, "model")
SIGMA = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])


class Layer:
    """Takes its view of the table."""

    def __init__(self, index: int) -> None:
        self.index = index

    def set_scales(self, scales: torch.Tensor) -> None:
        self.scales = scales


@pytest.fixture
def table() -> SlotTable:
    table = SlotTable(LAYOUT, SIGMA, slots=2)
    table.bind([Layer(0), Layer(1)])
    return table


@pytest.fixture
def registry(table: SlotTable) -> ExpertRegistry:
    registry = ExpertRegistry(LAYOUT, table)
    registry.add("e", Expert.random(LAYOUT, seed=0))
    return registry


def test_experts_have_a_row_sigma_z(registry, table):
    with ExitStack() as held:
        base, slot = registry.hold_slots([None, "e"], held)
        assert base == 0 and torch.equal(table.table[0], SIGMA)
        assert torch.equal(table.table[slot], SIGMA * registry["e"].z)


def test_a_replaced_expert_gives_its_slot_back_when_its_requests_end(registry, table):
    assert table.in_use == 2
    with ExitStack() as held:
        (before,) = registry.hold_slots(["e"], held)
        old = table.table[before].clone()
        registry.add("e", Expert.random(LAYOUT, seed=1), replace=True)
        assert table.in_use == 3 and torch.equal(table.table[before], old)
    assert table.in_use == 2
    for seed in range(9):
        registry.add("e", Expert.random(LAYOUT, seed=seed), replace=True)
    assert table.in_use == 2 and len(table.table) == 4


def test_a_removed_expert_gives_its_slot_back(registry, table):
    registry.remove("e")
    assert table.in_use == 1
    with pytest.raises(ValueError), ExitStack() as held:
        registry.hold_slots(["e"], held)


def test_equal_choices_share_a_slot_and_mixes_give_theirs_back(registry, table):
    with ExitStack() as held:
        slots = registry.hold_slots([{"e": 0.5}, "e", {"e": 0.5}, None], held)
        assert slots[0] == slots[2] != slots[1] and table.in_use == 3
    assert table.in_use == 2
