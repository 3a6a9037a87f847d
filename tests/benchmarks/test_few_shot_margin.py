"""What a margin is judged by: draws of few problems, and the others of the task."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.adaptation.few_shot_margin import gains_over_draws, main, mixes, summary


def test_mixes_sum_to_one_and_begin_with_each_alone():
    alpha = mixes(3, 24)
    assert alpha.shape == (24, 4) and torch.equal(alpha[:4], torch.eye(4))
    assert bool((alpha >= 0).all()) and torch.allclose(alpha.sum(-1), torch.ones(24))
    assert torch.equal(mixes(3, 24), alpha)


def to_base(scores: list[list[float]]) -> dict[str, list[str]]:
    """Two singles, and all problems dispatched to the base."""
    return {"singles": ["base", "a"], "labels": ["base"] * len(scores[0])}


def test_a_better_mix_is_taken_where_few_problems_show_it():
    better = [[0.0] * 80, [0.0] * 80, [1.0] * 80]
    assert set(gains_over_draws(better, 10, 2.0, **to_base(better))) == {1.0}
    assert set(gains_over_draws(better, 3, 2.0, **to_base(better))) == {0.0}  # 3 / sqrt(3) < 2


def test_what_most_of_the_few_were_dispatched_to_stays():
    scores = [[0.0] * 80, [1.0, 0.0] * 40, [1.0] * 80]
    taken = ["a"] * 60 + ["base"] * 20
    above = gains_over_draws(scores, 9, 9.0, ["base", "a"], taken)
    assert 0.0 in above and 0.3 < statistics.median(above) < 0.7 and max(above) < 1.0
    assert set(gains_over_draws(scores, 9, 9.0, **to_base(scores))) == {0.0}


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_what_is_chosen_is_judged_on_the_other_problems(margin: float):
    scores = [[0.0] * 21, [0.0] * 21, [1.0] * 20 + [0.0]]
    above = gains_over_draws(scores, 20, margin, **to_base(scores))
    # one problem is left: the mix answers it, or it is the one that it does not
    assert set(above) == {0.0, 1.0} and sum(above) / len(above) == pytest.approx(20 / 21, abs=0.03)


def test_there_must_be_problems_that_were_not_gains_over_draws():
    with pytest.raises(ValueError, match="problems: expected more than 40, got 40"):
        main(problems=40)


def test_a_margin_keeps_the_base_where_mixes_are_only_lucky():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(24, 80, generator=generator) < 0.2).float().tolist()
    made = summary({"luck": {"scores": scores, **to_base(scores)}})
    rows = {(row["problems"], row["margin"], row["incumbent"]): row for row in made}
    below = [rows[20, margin, "base"]["below"]["luck"] for margin in (0.0, 1.5, 2.0)]
    assert rows[20, 1.5, "classifier"]["below"] == rows[20, 1.5, "base"]["below"]
    assert below[0] > below[1] > below[2]
