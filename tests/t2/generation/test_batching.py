from __future__ import annotations

import random

import pytest

from t2.generation.batching import length_batches


@pytest.mark.parametrize("budget", [1, 7, 30, 100, 10_000])
def test_batches_hold_every_row_once_within_the_budget_and_are_full(budget):
    lengths = [random.Random(0).randint(1, 12) for _ in range(20)] + [3] * 15
    batches = list(length_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
        if following is not None:
            assert (len(batch) + 1) * lengths[following[0]] > budget
