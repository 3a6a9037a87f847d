"""Verification of a wrapped model by a short probe, before and after its layers are replaced.

Before, the probe (`t2.model.probe`) finds the target layers that see the requests in the first dimension of their
input: if the first request becomes a copy of the last, its rows have to become the last one's, and no others change.
It also measures how far outputs move when each layer's product is off by the rounding of its factors' storage. After,
outputs at z = 1 have to be the base's but for that, and in a batch of several experts each row has to be the same as
when all rows have its expert.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from t2.model.decomposed import DecomposedLayers
from t2.model.layers import RoutedLinear
from t2.model.probe import DIFFERENT, Calls, Probe, recording, relative_error, run_model
from t2.model.requests import routed
from t2kernels.packing import INT4

ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
    torch.int8: 1e-2,
    torch.float8_e4m3fn: 4e-2,
    torch.uint8: 1e-2,
    INT4: 1e-1,
}
"""Relative error of a product, by the storage of its factors or the dtype of its input."""
BESIDE = 3.0
"""Rows may move this many times as far beside requests with other experts as the base's own rows do beside others."""
STD = 0.3
"""Standard deviation of z - 1 in the experts of the probe."""


class VerificationError(ValueError):
    """A wrapped model does not compute what it should."""


@dataclass
class Trouble:
    """A fault of a wrapped model: the layers to leave out, or none if that does not help, and what happened."""

    names: list[str]
    cause: str


def check(decomposed: DecomposedLayers, probe: Probe, rounding: float, *, base: bool = True) -> Trouble | None:
    """Runs the wrapped model; None if it does what it should.

    base: whether the plain model's outputs are there to compare with.
    """
    model, layers = decomposed.model, decomposed.routed
    exact = rounding <= 10 * ROUNDING[torch.float32]
    tight = 1e-3 if exact else 2e-2
    generator = torch.Generator().manual_seed(3)
    table = decomposed.table
    experts = [
        table.with_columns(1 + STD * table.columns_of(torch.randn(table.layout.R, generator=generator).to(table.sigma)))
        for _ in range(2)
    ]
    choices = [(*experts, None)[row % 3] for row in range(probe.rows)]

    def run(choice: Any) -> Tensor:
        with routed(decomposed, choice):
            return run_model(model, probe.inputs, probe.rows)

    def generated(choice: Any, rows: Sequence[int] | None = None) -> Tensor | None:
        with routed(decomposed, choice):
            return probe.generated(model, rows)

    def calls(choice: Any) -> Calls:
        with recording(layers) as made:
            run(choice)
        return made

    try:
        plain = run(None)
        if any(layer.keeps_module for layer in layers.values()):
            own = _dependence(plain, probe, lambda inputs, rows: run_model(model, inputs, rows))
            if own > tight:
                tight = BESIDE * own
                warnings.warn(
                    f"the base's quantised layers give a request other outputs beside other requests, off by {own:.2g} "
                    "of their size, whether it has an expert or not",
                    stacklevel=5,
                )
        if base:
            assert probe.output is not None
            off = distance(plain, probe.output, probe.bound, exact=exact)
            if off is not None:
                where = _first(calls(None), probe.calls)
                return Trouble([], f"with z = 1 outputs are off by {off:.2g} of their size{where}")
        mixed = run(choices)
        answers = generated(None) if probe.tokens is not None or not base else None
        if base and answers is not None and _differ(answers, probe.tokens, probe.bound, exact):
            return Trouble([], "with z = 1 tokens that are generated are others than the plain model's")
        answers = None if answers is None else generated(choices)
        for expert in (*experts, None):
            rows = [row for row, choice in enumerate(choices) if choice is expert]
            wanted = plain if expert is None else run(expert)
            off = distance(mixed[rows], wanted[rows], tight, exact=True)
            if off is not None:
                together, alone = (_of_requests(calls(choice), rows, probe.rows) for choice in (choices, expert))
                where = _first(together, alone)
                return Trouble([], f"in a batch of several experts a row is off by {off:.2g} of its size{where}")
            if answers is not None and _differ(answers, generated(expert, rows), tight, True, rows):
                return Trouble([], "tokens that are generated for a request depend on the other requests of its batch")
    except Exception as error:
        return Trouble(_culprits(error, layers, lambda: run(None)), f"{type(error).__name__}: {error}")
    return None


def _dependence(whole: Tensor, probe: Probe, run: Callable[[Mapping[str, Any], int], Tensor]) -> float:
    """How far a request's outputs are from those that it has alone, relative to their size: the largest of all."""

    def alone(value: Any, row: int) -> Any:
        batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == probe.rows
        return value[row : row + 1] if batched else value

    found = [run({name: alone(value, row) for name, value in probe.inputs.items()}, 1) for row in range(probe.rows)]
    return float(relative_error(torch.cat(found), whole).max())


def distance(got: Tensor, want: Tensor, bound: float, *, exact: bool) -> float | None:
    """Largest relative error of the outputs, or None: of any token, or unless `exact` of more than a quarter of them.

    Rounding lets the routers of a mixture of experts choose others for a token here and there.
    """
    if got.shape != want.shape:
        return float("inf")
    off = relative_error(got, want)
    share = float((off > bound).float().mean())
    return float(off.max()) if share > (0.0 if exact else 0.25) else None


def _differ(
    got: Tensor | None, want: Tensor | None, bound: float, exact: bool, rows: Sequence[int] | None = None
) -> bool:
    """Whether generated tokens' logits differ: those of all requests, or of some."""
    if got is None or want is None:
        return True
    chosen = slice(None) if rows is None else list(rows)
    return distance(got[chosen], want[chosen], bound, exact=exact) is not None


def _of_requests(calls: Calls, requests: Sequence[int], count: int) -> Calls:
    """The calls' inputs of some of a batch's requests."""
    return [
        replace(call, rows=call.rows.unflatten(0, (count, -1))[list(requests)]) if len(call.rows) % count == 0 else call
        for call in calls
    ]


def _first(calls: Calls, wanted: Calls) -> str:
    """Between which calls outputs went astray, for errors."""
    before = "the input"
    for call, want in zip(calls, wanted, strict=False):
        if call.shape != want.shape or float(relative_error(call.rows, want.rows).max()) > DIFFERENT:
            return f", first between {before} and {call.name}"
        before = call.name
    return f", after {before}"


def _culprits(error: BaseException, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[str]:
    """The layers to leave out for an error: the one whose weight was read last, or those right below its module."""
    reads: list[str] = []

    def watched(self: RoutedLinear, name: str) -> Any:
        if name == "weight" and sys._getframe(1).f_globals.get("__name__") != RoutedLinear.__module__:
            reads.append(self.name)
        return nn.Module.__getattr__(self, name)

    RoutedLinear.__getattr__ = watched  # type: ignore[assignment]
    try:
        run()
    except Exception:
        if reads:
            return reads[-1:]
    finally:
        del RoutedLinear.__getattr__
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    names = {id(module): name for name, module in layers.items()}
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            if id(module) in names:
                return [names[id(module)]]
            below = [names[id(child)] for child in module.children() if id(child) in names]
            if below:
                return below
    return []
