"""Several ways of doing one thing, timed in turns inside one pytest-benchmark test."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from t2kernels import limits

CACHE_BYTES = 1 << 27  # weights of consecutive calls together, so that none is still in cache
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.5, 3, 25


def cold(make: Callable[[int], Any], weight_bytes: int, run: Callable[[Any], Any]) -> Callable[[], Any]:
    """Call that takes the next of several weight copies each time, too many for the caches; make(i) gives copy i."""
    copies = itertools.cycle([make(i) for i in range(min(64, math.ceil(CACHE_BYTES / weight_bytes)))])
    return lambda: run(next(copies))


def in_turns(benchmark: Any, paths: Mapping[str, Callable[[], Any]], min_rounds: int = MIN_ROUNDS, **info: Any) -> None:
    """Times every path once a round, in turns, and the machine's limits with them; pytest-benchmark shows the first.

    Each round starts with another path, since the first one after the limits finds caches and threads in their state.
    `extra_info` gets `info`, each path's seconds, and for each round the bytes read and FMAs a second at that moment.
    """
    reader = limits.Reader()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    rates: dict[str, list[float]] = {name: [] for name in ("read", *limits.ARITHMETIC)}

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def one_round() -> None:
        rates["read"].append((1 << 27) / timed(lambda: reader.read(1 << 27)))
        for kind in limits.ARITHMETIC:
            if limits.multiply_adds(kind, 1):
                rates[kind].append((1 << 28) / timed(lambda kind=kind: limits.multiply_adds(kind, 1 << 28)))
        first = next(starts)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(timed(paths[name]))

    names = list(paths)
    starts = itertools.cycle(range(len(names)))
    with torch.inference_mode():
        whole_round = sum(timed(run) for run in paths.values())
        rounds = max(min_rounds, min(MAX_ROUNDS, int(SECONDS / whole_round)))
        benchmark.pedantic(next(iter(paths.values())), setup=one_round, rounds=rounds)
    benchmark.extra_info.update(info, seconds=_rounded(seconds), rates=_rounded(rates))


def _rounded(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.4g}") for value in column] for name, column in values.items()}
