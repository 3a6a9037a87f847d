"""Search methods for the weights alpha of a mix: cross-entropy method, CMA-ES, random.

Each has an ask-and-tell interface: `ask` gives a population of candidates, `tell` takes their fitness.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from t2.adaptation.options import FewShotOptions

Numbers = numpy.ndarray[Any, Any]


@dataclass(frozen=True, order=True)
class Fitness:
    """Fitness of a candidate, ordered by score, then log-likelihood; higher is better."""

    score: float
    """Mean score over the few-shot examples."""
    log_likelihood: float
    """Tie-breaker: tokens' mean log-likelihood, averaged over the candidate's right completions; -inf without any."""
    scores: tuple[float, ...] = field(default=(), compare=False)
    """Score on each few-shot example."""

    def above(self, other: Fitness) -> float:
        """Standard errors by which the score exceeds another candidate's on the same examples.

        sum(d) / sqrt(sum(d^2)) over the examples' score differences d, 0 if there are none. For scores of 0 and 1 it is
        the square root of McNemar's statistic: (b - c) / sqrt(b + c) for b examples that only this candidate gets
        right and c that only the other does. ValueError without scores, or for different examples.
        """
        if not self.scores:
            raise ValueError("scores: expected those of each few-shot problem, which a margin needs, got none")
        differences = [own - its for own, its in zip(self.scores, other.scores, strict=True)]
        spread = math.sqrt(sum(d * d for d in differences))
        return sum(differences) / spread if spread else 0.0


class Search(ABC):
    """A search in [low, high]^D.

    Args:
        first: candidates [K, D] of generation 0, before those that are drawn.
        options: population, bounds, seed.
    """

    def __init__(self, first: Tensor, options: FewShotOptions) -> None:
        if len(first) > options.population:
            raise ValueError(
                f"population: expected room for the {len(first)} candidates of the start, got {options.population}"
            )
        self.first = first
        self.options = options
        self.random = numpy.random.default_rng(options.seed)
        self.generation = 0

    def ask(self) -> Tensor:
        """The next candidates [population, D] float32."""
        count = self.options.population - (len(self.first) if self.generation == 0 else 0)
        drawn = torch.from_numpy(self._draw(count)).float().clamp(self.options.low, self.options.high)
        drawn = torch.cat([self.first, drawn]) if self.generation == 0 else drawn
        self.generation += 1
        return drawn

    @abstractmethod
    def _draw(self, count: int) -> Numbers:
        """[count, D] float64, bounds aside."""

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:  # noqa: B027  # random search learns nothing
        """Report the fitness of the candidates of the last `ask`."""


class RandomSearch(Search):
    """Uniform candidates."""

    def _draw(self, count: int) -> Numbers:
        return self.random.uniform(self.options.low, self.options.high, (count, self.first.shape[1]))


class CrossEntropy(Search):
    """Candidates from a normal distribution that is fitted to the elites of all generations so far.

    It starts around equal weights with half the range as standard deviation (published). The best so far is not asked
    for again in every generation, as published, but stays among the elites.
    """

    def __init__(self, first: Tensor, options: FewShotOptions, centre: float) -> None:
        super().__init__(first, options)
        self.mean = numpy.full(first.shape[1], centre)
        self.std = numpy.full(first.shape[1], (options.high - options.low) / 2)
        self.elites: list[tuple[Fitness, Tensor]] = []

    def _draw(self, count: int) -> Numbers:
        return self.mean + self.std * self.random.standard_normal((count, len(self.mean)))

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:
        pool = [*self.elites, *zip(fitness, candidates, strict=True)]
        pool.sort(key=lambda entry: entry[0], reverse=True)
        self.elites = pool[: int(self.options.elite_ratio * self.options.population)]
        chosen = torch.stack([candidate for _, candidate in self.elites]).double().numpy()
        self.mean, self.std = chosen.mean(0), chosen.std(0, ddof=1)


class CMA(Search):
    """CMA-ES of the package cma; it gets candidates as clamped to the bounds, and ranks, as fitness has two parts."""

    def __init__(self, first: Tensor, options: FewShotOptions, centre: float) -> None:
        super().__init__(first, options)
        try:
            import cma
        except ImportError as error:
            raise ImportError("search='cma' needs the package cma: pip install 't2kernels[adapt]'") from error
        self._strategy = cma.CMAEvolutionStrategy(
            numpy.full(first.shape[1], centre),
            0.3 * (options.high - options.low),
            {
                "popsize": options.population,
                "seed": numpy.nan,  # its own would seed numpy's global generator
                "randn": lambda *shape: self.random.standard_normal(shape),
                "verbose": -9,
            },
        )

    def _draw(self, count: int) -> Numbers:
        return numpy.stack(self._strategy.ask(count))

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:
        order = sorted(set(fitness), reverse=True)
        ranks = [float(order.index(each)) for each in fitness]
        self._strategy.tell(list(candidates.double().numpy()), ranks)


def make_search(first: Tensor, options: FewShotOptions, centre: float) -> Search:
    """Search by the method of the options. `centre`: the weight that it starts around."""
    if options.search == "random":
        return RandomSearch(first, options)
    return (CrossEntropy if options.search == "cem" else CMA)(first, options, centre)


@dataclass(frozen=True)
class Generation:
    """One generation: the best fitness so far, the population's mean score, and the number of new candidates."""

    best: Fitness
    mean: float
    evaluated: int
    seconds: float


@dataclass
class SearchProgress:
    """State of a search: the best candidate [D] so far, normalised, and the generations that led to it."""

    alpha: Tensor
    fitness: Fitness
    generations: list[Generation] = field(default_factory=list)
    stopped: str = ""


Evaluate = Callable[[Tensor], Sequence[Fitness]]
"""Fitness of candidates [N, D]."""
Memory = dict[bytes, Fitness]
"""Fitness of candidates evaluated so far, keyed by their float32 bytes."""


def run_search(
    search: Search,
    evaluate: Evaluate,
    normalise: Callable[[Tensor], Tensor] = lambda candidates: candidates,
    *,
    memory: Memory | None = None,
    announce: Callable[[SearchProgress], object] = lambda found: None,
) -> SearchProgress:
    """Run generations until the score is 1, stops rising for `patience` of them, or `generations` is reached.

    Each candidate is evaluated once. Ties go to the first.

    Args:
        evaluate: called once per generation with its new candidates, normalised.
        normalise: [N, D] -> [N, D], such as the division by a sum.
        memory: results so far, which the search reads and adds to; an interrupted search continues from them.
        announce: called after each generation.
    """
    options, memory = search.options, {} if memory is None else memory
    found: SearchProgress | None = None
    since = 0
    for _ in range(options.generations):
        start = time.perf_counter()
        asked = search.ask()
        candidates = normalise(asked)
        keys = [candidate.numpy().tobytes() for candidate in candidates]
        new = {key: index for index, key in enumerate(keys) if key not in memory}
        if new:
            memory.update(zip(new, evaluate(candidates[list(new.values())]), strict=True))
        fitness = [memory[key] for key in keys]
        search.tell(asked, fitness)
        best = max(range(len(fitness)), key=lambda index: fitness[index])
        since += 1
        if found is None or fitness[best] > found.fitness:
            since = 0 if found is None or fitness[best].score > found.fitness.score else since
            found = SearchProgress(candidates[best].clone(), fitness[best], [] if found is None else found.generations)
        mean = sum(each.score for each in fitness) / len(fitness)
        found.generations.append(Generation(found.fitness, mean, len(new), time.perf_counter() - start))
        if found.fitness.score >= 1.0:
            found.stopped = "every answer is right"
        elif since >= options.patience:
            found.stopped = f"no better score for {since} generations"
        announce(found)
        if found.stopped:
            return found
    assert found is not None
    found.stopped = f"{options.generations} generations"
    return found
