"""Search for the weights alpha of a mix: the cross-entropy method, CMA-ES, or at random.

All ask for a population of candidates at a time, and are told how good each is.
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
    """How good a candidate is, the greater the better, in this order."""

    score: float
    """Mean score over the few-shot problems."""
    log_likelihood: float
    """Breaks ties: the mean over its own right answers of their tokens' mean log-likelihood; -inf without any."""
    scores: tuple[float, ...] = field(default=(), compare=False)
    """Of each few-shot problem."""

    def above(self, other: Fitness) -> float:
        """Standard errors by which the score is above that of another candidate on the same problems.

        sum(d) / sqrt(sum(d^2)) over the differences d of each problem's scores, 0 where there is none. Of right and
        wrong answers: (b - c) / sqrt(b + c) with the b problems that only this one answers and the c that only the
        other does, the square root of McNemar's statistic. ValueError without scores, or of different problems.
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
        """How good the candidates of the last `ask` were."""


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
    """CMA-ES of the package cma. It is told ranks, since a fitness is two numbers; and candidates as they are after the
    bounds, which it takes for what they are, not its own."""

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
    """The options' method. `centre`: the weight that all start around."""
    if options.search == "random":
        return RandomSearch(first, options)
    return (CrossEntropy if options.search == "cem" else CMA)(first, options, centre)


@dataclass(frozen=True)
class Generation:
    """best: the fitness of the best candidate so far. mean: the population's mean score. evaluated: candidates that
    were not known from before."""

    best: Fitness
    mean: float
    evaluated: int
    seconds: float


@dataclass
class SearchProgress:
    """The best candidate [D] of a search, as `normalise` made it, and its way there."""

    alpha: Tensor
    fitness: Fitness
    generations: list[Generation] = field(default_factory=list)
    stopped: str = ""


Evaluate = Callable[[Tensor], Sequence[Fitness]]
"""How good candidates [N, D] are."""
Memory = dict[bytes, Fitness]
"""What is known of candidates, by the bytes of their float32 numbers."""


def run_search(
    search: Search,
    evaluate: Evaluate,
    normalise: Callable[[Tensor], Tensor] = lambda candidates: candidates,
    *,
    memory: Memory | None = None,
    announce: Callable[[SearchProgress], object] = lambda found: None,
) -> SearchProgress:
    """Generations until the score is 1, has not risen for `patience` of them, or there have been enough.

    A candidate is evaluated once, however often it is asked for. Of equally good ones the first counts.

    Args:
        evaluate: gets candidates as `normalise` makes them, all new ones of a generation at once.
        normalise: [N, D] -> [N, D], such as the division by a sum.
        memory: what is known already; new results go there. A search that was interrupted goes on with it.
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
