"""Options of pass one and of the few-shot search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Calibration = Literal["none", "contextual", "batch"]
Method = Literal["cem", "cma", "random"]
Granularity = Literal["model", "layer", "matrix"]
Coefficients = Literal["normalised", "free"]


@dataclass(frozen=True)
class FewShotOptions:
    """Options of the search for the weights of a mix. "Published" are the values of arXiv 2501.06252 and its code.

    The paper's "per layer" weights are those of granularity "matrix". It has both kinds of coefficients; there W' is
    scaled to the sum of W's singular values, which only "normalised" comes near here. Its script runs 50 generations.

    A margin guards against luck: one more right completion of a few is little evidence where a hundred mixes were
    tried. `Fitness.above` has the standard error.
    """

    search: Method = "cem"
    """Search method: cross-entropy method (published), CMA-ES (package cma), or random candidates."""
    population: int = 32
    """Candidates per generation, scored as one batch (published)."""
    elite_ratio: float = 0.2
    """Share of the population that the next generation is drawn around (published; cem only)."""
    generations: int = 20
    """Maximum number of generations."""
    patience: int = 5
    """Generations without a better score after which the search stops."""
    granularity: Granularity = "model"
    """One weight per expert for the whole model, for each decoder layer, or for each matrix."""
    coefficients: Coefficients = "normalised"
    """Divide the weights by their sum (normalised), or use them as they are (free)."""
    low: float = 0.0
    """Lower bound of a weight before it is normalised (published)."""
    high: float = 1.0
    """Upper bound of a weight before it is normalised (published)."""
    margin: float = 0.0
    """Standard errors by which the best mix must beat the incumbent to replace it; 0 always takes the mix."""
    seed: int = 0
    """Seed for the few-shot examples and the candidates."""
    token_budget: int = 32768
    """Maximum tokens of a batch, padding and completions included."""

    def __post_init__(self) -> None:
        for name, known in (
            ("search", ("cem", "cma", "random")),
            ("granularity", ("model", "layer", "matrix")),
            ("coefficients", ("normalised", "free")),
        ):
            self._check(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("generations", "patience", "token_budget"):
            self._check(name, getattr(self, name) >= 1, "an integer >= 1")
        self._check("margin", self.margin >= 0, "a number >= 0")
        self._check("population", self.population >= 4, "an integer >= 4")
        self._check("elite_ratio", 2 <= int(self.elite_ratio * self.population) <= self.population, "at least 2 elites")
        self._check("high", self.low < self.high, f"a number above low ({self.low})")
        self._check("low", self.coefficients == "free" or self.low >= 0, "a number >= 0 where weights are normalised")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
