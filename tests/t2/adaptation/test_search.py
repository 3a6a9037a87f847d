from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from t2.adaptation.search import (
    CMA,
    CrossEntropy,
    FewShotOptions,
    Fitness,
    make_search,
    run_search,
)

PLANTED = torch.tensor([0.15, 0.8, 0.35, 0.6])


def closeness(candidates: Tensor) -> list[Fitness]:
    return [Fitness(-float((candidate - PLANTED).square().sum()), 0.0) for candidate in candidates]


def search(method: str, evaluate=closeness, normalise=lambda c: c, **options):
    chosen = FewShotOptions(search=method, patience=1000, **options)
    return run_search(make_search(torch.eye(4), chosen, 0.25), evaluate, normalise)


@pytest.mark.parametrize("method, error", [("cem", 1e-2), ("cma", 1e-3), ("random", 0.25)])
def test_a_planted_optimum_is_found(method: str, error: float):
    for seed in range(3):
        found = search(method, generations=40, seed=seed)
        assert (found.alpha - PLANTED).norm() < error
        assert found.fitness == closeness(found.alpha.unsqueeze(0))[0]


@pytest.mark.parametrize("method", ["cem", "cma", "random"])
def test_a_search_is_fixed_by_its_seed(method: str):
    state = numpy.random.get_state()[1].copy()
    first, again, other = (search(method, generations=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.alpha, again.alpha) and first.fitness == again.fitness
    assert not torch.equal(first.alpha, other.alpha)
    assert (numpy.random.get_state()[1] == state).all()


@pytest.mark.parametrize("method", ["cem", "cma", "random"])
@pytest.mark.parametrize("index", range(4))
def test_never_worse_than_the_first_candidates(method: str, index: int):
    def needle(candidates: Tensor) -> list[Fitness]:
        hit = (candidates - torch.eye(4)[index]).abs().amax(-1) < 1e-6
        return [Fitness(0.9 if h else 0.1, 0.0) for h in hit.tolist()]

    found = search(method, needle, generations=6)
    assert torch.equal(found.alpha, torch.eye(4)[index]) and found.fitness.score == 0.9


@pytest.mark.parametrize("method", ["cem", "cma", "random"])
def test_ties_are_broken_by_likelihood_and_then_by_order(method: str):
    def tied(candidates: Tensor) -> list[Fitness]:
        return [Fitness(0.5, value) for value in (-(candidates - PLANTED).square().sum(-1)).tolist()]

    found = search(method, tied, generations=40 if method != "random" else 200)
    assert (found.alpha - PLANTED).norm() < (1e-2 if method != "random" else 0.2)
    even = search(method, lambda candidates: [Fitness(0.5, -math.inf)] * len(candidates), generations=3)
    assert torch.equal(even.alpha, torch.eye(4)[0])


def test_elites_are_remembered():
    options = FewShotOptions(population=10, elite_ratio=0.3)
    cem = CrossEntropy(torch.eye(4), options, 0.25)
    good, bad = cem.ask(), cem.ask()
    cem.tell(good, closeness(good))
    before = [candidate for _, candidate in cem.elites]
    cem.tell(bad, [Fitness(-100.0, 0.0)] * 10)
    assert len(cem.elites) == 3 and all(torch.equal(a, b) for a, (_, b) in zip(before, cem.elites, strict=True))
    best = torch.stack(before).double().numpy()
    numpy.testing.assert_allclose(cem.mean, best.mean(0))
    numpy.testing.assert_allclose(cem.std, best.std(0, ddof=1))


def test_candidates_stay_within_their_bounds_and_the_population():
    for method in ("cem", "cma", "random"):
        asked: list[Tensor] = []

        def seen(candidates: Tensor, asked=asked) -> list[Fitness]:
            asked.append(candidates)
            return closeness(candidates)

        search(method, seen, population=12, generations=4, low=0.1, high=0.7)
        assert torch.equal(asked[0][:4], torch.eye(4)) and len(asked[0]) == 12
        drawn = torch.cat([asked[0][4:], *asked[1:]])
        assert drawn.min() >= 0.1 - 1e-6 and drawn.max() <= 0.7 + 1e-6 and max(map(len, asked)) <= 12


def test_it_stops_when_every_answer_is_right_or_nothing_gets_better():
    right = search("cem", lambda candidates: [Fitness(1.0, -1.0)] * len(candidates))
    assert len(right.generations) == 1 and right.stopped == "every answer is right"
    options = FewShotOptions(patience=3, generations=50)
    flat = run_search(make_search(torch.eye(4), options, 0.25), lambda c: [Fitness(0.5, 0.0)] * len(c))
    assert len(flat.generations) == 4 and flat.stopped == "no better score for 3 generations"
    assert search("cem", generations=2).stopped == "2 generations"


def test_a_candidate_is_evaluated_once():
    counts: dict[bytes, int] = {}

    def counted(candidates: Tensor) -> list[Fitness]:
        for candidate in candidates:
            counts[candidate.numpy().tobytes()] = counts.get(candidate.numpy().tobytes(), 0) + 1
        return closeness(candidates)

    rounded = search("cem", counted, normalise=lambda c: c.round(decimals=1), generations=30)
    assert set(counts.values()) == {1}
    assert sum(g.evaluated for g in rounded.generations) == len(counts) < 30 * 32


def test_a_search_that_was_interrupted_goes_on_with_what_is_known():
    whole, memory, calls = search("cem", generations=6), {}, []

    def interrupted(candidates: Tensor) -> list[Fitness]:
        calls.append(len(candidates))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return closeness(candidates)

    def start():
        return make_search(torch.eye(4), FewShotOptions(patience=1000, generations=6), 0.25)

    with pytest.raises(KeyboardInterrupt):
        run_search(start(), interrupted, memory=memory)
    again = run_search(start(), interrupted, memory=memory)
    assert torch.equal(again.alpha, whole.alpha) and again.fitness == whole.fitness
    assert [g.evaluated for g in again.generations[:3]] == [0, 0, 0] and len(calls) == 4 + 3


def test_without_the_package_cma_an_error_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install 't2kernels\[adapt\]'"):
        CMA(torch.eye(4), FewShotOptions(), 0.25)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"search": "grid"}, "search: expected one of cem, cma, random, got 'grid'"),
        ({"population": 3}, "population: expected an integer >= 4"),
        ({"population": 4, "elite_ratio": 0.2}, "elite_ratio: expected at least 2 elites, got 0.2"),
        ({"elite_ratio": 1.5}, "elite_ratio: expected at least 2 elites"),
        ({"generations": 0}, "generations: expected an integer >= 1"),
        ({"margin": -1.0}, "margin: expected a number >= 0"),
        ({"low": 1.0}, r"high: expected a number above low \(1.0\)"),
        ({"low": -0.5}, "low: expected a number >= 0 where weights are normalised"),
        ({"granularity": "head"}, "granularity: expected one of"),
    ],
)
def test_bad_options(options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        FewShotOptions(**options)
    assert FewShotOptions(low=-0.5, coefficients="free").low == -0.5


def test_standard_errors_are_those_of_paired_scores():
    def scored(*scores: float) -> Fitness:
        return Fitness(sum(scores) / len(scores), -1.0, scores)

    only_this, only_that = 9, 4
    this = scored(*[1.0] * only_this, *[0.0] * only_that, *[1.0] * 5)
    that = scored(*[0.0] * only_this, *[1.0] * only_that, *[1.0] * 5)
    mcnemar = (only_this - only_that) ** 2 / (only_this + only_that)
    assert this.above(that) == pytest.approx(math.sqrt(mcnemar)) == -that.above(this)
    assert this.above(this) == 0.0
    assert scored(0.5, 0.0, 1.0).above(scored(0.0, 0.0, 1.0)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="shorter"):
        this.above(scored(1.0))
    with pytest.raises(ValueError, match="scores: expected those of each few-shot problem"):
        Fitness(0.5, -1.0).above(Fitness(0.2, -1.0))


def test_a_population_needs_room_for_the_start():
    with pytest.raises(ValueError, match="population: expected room for the 40 candidates of the start, got 32"):
        make_search(torch.eye(40), FewShotOptions(), 0.25)
