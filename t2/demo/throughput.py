"""Timing of several ways to serve a batch, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass
class PathResult:
    """Timings of one way of serving: whole `generate` calls, or several calls for requests served one at a time."""

    name: str
    experts: int  # in a batch
    requests: int
    new_tokens: int  # per request
    seconds: list[float] = field(default_factory=list)  # each round's
    step_seconds: list[float] = field(default_factory=list)  # each round's median over the tokens after the first

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time, prompts included: the median round."""
        return self.requests * self.new_tokens / statistics.median(self.seconds)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens per second once the prompts are read: the median round."""
        return self.requests / statistics.median(self.step_seconds) if self.step_seconds else None


@dataclass
class ServingPath:
    """A way of serving: `generate(n, **inputs and options)` completes the first n requests of the batch."""

    name: str
    experts: int
    generate: Callable[..., Any]
    rounds: int


class StepClock(StoppingCriteria):
    """Records the time of each new token of a `generate` call, as a criterion that never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def median_step(self) -> float:
        return statistics.median(b - a for a, b in pairwise(self.times))


def fixed_length(tokens: int) -> dict[str, Any]:
    """Options for `generate` to decode exactly this many tokens greedily: no token counts as EOS."""
    return {"max_new_tokens": tokens, "eos_token_id": None, "do_sample": False}


def time_paths(
    paths: Sequence[ServingPath],
    batch: Mapping[str, Tensor],
    new_tokens: int,
    announce: Callable[[str], Any] = lambda name: None,
) -> list[PathResult]:
    """Time every path on the whole batch in turns (A B C A B C), since shared machines drift.

    Each path first runs once on a single request, untimed.

    Args:
        batch: tokenised prompts, one row a request.
        new_tokens: per request, at least 2.
        announce: called with a path's name before its turn.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens: expected at least 2, got {new_tokens}")
    requests = next(iter(batch.values())).shape[0]
    results = [PathResult(path.name, path.experts, requests, new_tokens) for path in paths]
    for path in paths:
        path.generate(1, **{name: tensor[:1] for name, tensor in batch.items()}, **fixed_length(1))
    for turn in range(max(path.rounds for path in paths)):
        for path, result in zip(paths, results, strict=True):
            if turn >= path.rounds:
                continue
            announce(path.name)
            clock, start = StepClock(), time.perf_counter()
            path.generate(
                requests, **batch, **fixed_length(new_tokens), stopping_criteria=StoppingCriteriaList([clock])
            )
            result.seconds.append(time.perf_counter() - start)
            result.step_seconds.append(clock.median_step)
    return results
