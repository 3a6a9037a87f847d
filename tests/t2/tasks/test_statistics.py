from __future__ import annotations

import itertools
import math

import pytest
from scipy.stats import binomtest

from t2.tasks.statistics import better_worse, paired_p, wilson_interval


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


@pytest.mark.parametrize(("better", "worse"), [(0, 1), (2, 9), (9, 2), (86, 150), (500, 500), (30, 170)])
def test_mcnemar_equals_the_sum_of_binomial_coefficients(better, worse):
    count = better + worse
    expected = min(1.0, 2 * sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count)
    first, second = [0.0] * better + [1.0] * worse, [1.0] * better + [0.0] * worse
    assert paired_p(first, second) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_the_exact2x2_vignette():
    """matrix(c(21, 9, 2, 12), 2, 2): p = 0.06543 (M. P. Fay, exact McNemar's test)."""
    first = [1.0] * 21 + [1.0] * 2 + [0.0] * 9 + [0.0] * 12
    second = [1.0] * 21 + [0.0] * 2 + [1.0] * 9 + [0.0] * 12
    assert round(paired_p(first, second), 5) == 0.06543


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_of_newcombe_and_scipy(right, count, low, high):
    """R. G. Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    found = wilson_interval(right / count, count)
    assert [round(bound, 4) for bound in found] == [low, high]
    confidence = math.erf(1.96 / math.sqrt(2))
    expected = binomtest(right, count).proportion_ci(confidence, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
