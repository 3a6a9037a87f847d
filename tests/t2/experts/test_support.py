from __future__ import annotations

import pytest
import torch

import t2
from t2.experts.support import support_of, top_components

LAYOUT = t2.Layout(("a", "b", "c"), (4, 2, 7), "weights")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 100])
def test_top_components_are_the_largest_of_each_matrix(count):
    scores = torch.randn(LAYOUT.R, generator=torch.Generator().manual_seed(count))
    want = []
    for name in LAYOUT.names:
        window = LAYOUT.window(name)
        own = scores[window].tolist()
        largest = sorted(range(len(own)), key=lambda i: -own[i])[:count]
        want += sorted(window.start + i for i in largest)
    assert top_components(scores, LAYOUT, count).tolist() == want


def test_of_equal_scores_the_first_are_taken():
    assert top_components(torch.zeros(LAYOUT.R), LAYOUT, 2).tolist() == [0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("scores", "count", "said"),
    [
        (torch.zeros(3), 1, r"scores: expected shape \[13\], got \[3\]"),
        (torch.full((13,), torch.nan), 1, "scores: expected finite"),
        (torch.zeros(13), 0, "count: expected an integer >= 1, got 0"),
        (torch.zeros(13), 1.5, "count: expected an integer"),
    ],
)
def test_wrong_scores_and_counts_are_refused(scores, count, said):
    with pytest.raises(ValueError, match=said):
        top_components(scores, LAYOUT, count)


def test_the_support_of_experts_is_what_any_of_them_changes():
    first, second = torch.ones(13), torch.ones(13)
    first[[2, 5]], second[[5, 12]] = 1.1, 0.9
    experts = [t2.Expert(z, LAYOUT) for z in (first, second)]
    assert support_of(experts).tolist() == [2, 5, 12]
    assert support_of(experts[:1]).tolist() == [2, 5]
    assert support_of([t2.Expert(torch.ones(13), LAYOUT)]).tolist() == []


def test_a_support_needs_experts_of_one_layout():
    with pytest.raises(ValueError, match="experts: expected at least one"):
        support_of([])
    other = t2.Layout(("a", "b"), (4, 2), "weights")
    with pytest.raises(ValueError, match="experts: expected the 3 matrices"):
        support_of([t2.Expert(torch.ones(13), LAYOUT), t2.Expert(torch.ones(6), other)])
