from __future__ import annotations

import itertools

import pytest

from t2.tasks.statistics import better_worse, paired_p


@pytest.mark.parametrize("differences", [[1] * 5 + [-1], [1, -1, 1, 0, 0], [-1] * 8, [0, 0], [0.25, -0.5, 0.25, 0.5]])
def test_mcnemar_is_the_share_of_sign_flips_at_least_as_uneven(differences):
    first = [0.5] * len(differences)
    second = [0.5 + difference / 2 for difference in differences]
    signs = [(d > 0) - (d < 0) for d in differences if d]
    flips = list(itertools.product((-1, 1), repeat=len(signs)))
    expected = sum(abs(sum(flip)) >= abs(sum(signs)) for flip in flips) / len(flips)
    assert paired_p(first, second) == pytest.approx(expected) == paired_p(second, first)
    assert better_worse(first, second) == (signs.count(1), signs.count(-1))


def test_problems_must_be_the_same():
    assert paired_p([], []) == 1.0
    with pytest.raises(ValueError, match="argument"):
        paired_p([1.0], [1.0, 0.0])
