"""What a margin is judged by: draws of few problems, and the others of the task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.margin import drawn, main, mixes, summary


def test_mixes_sum_to_one_and_begin_with_each_alone():
    alpha = mixes(3, 24)
    assert alpha.shape == (24, 4) and torch.equal(alpha[:4], torch.eye(4))
    assert bool((alpha >= 0).all()) and torch.allclose(alpha.sum(-1), torch.ones(24))
    assert torch.equal(mixes(3, 24), alpha)


def test_a_better_mix_is_taken_where_few_problems_show_it():
    better = [[0.0] * 80, [1.0] * 80]
    assert set(drawn(better, 10, 2.0)) == {1.0}
    assert set(drawn(better, 3, 2.0)) == {0.0}  # 3 / sqrt(3) < 2


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_what_is_chosen_is_judged_on_the_other_problems(margin: float):
    scores = [[0.0] * 21, [1.0] * 20 + [0.0]]
    above = drawn(scores, 20, margin)  # one problem is left: the mix answers it, or it is the one that it does not
    assert set(above) == {0.0, 1.0} and sum(above) / len(above) == pytest.approx(20 / 21, abs=0.03)


def test_there_must_be_problems_that_were_not_drawn():
    with pytest.raises(ValueError, match="problems: expected more than 40, got 40"):
        main(problems=40)


def test_a_margin_keeps_the_base_where_mixes_are_only_lucky():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(24, 80, generator=generator) < 0.2).float().tolist()
    rows = {(row["problems"], row["margin"]): row for row in summary({"luck": {"scores": scores}})}
    below = [rows[20, margin]["below"]["luck"] for margin in (0.0, 1.5, 2.0)]
    assert below[0] > below[1] > below[2]
