"""The slot table and the route: which row of scales each request of the running batch uses.

Both lie at addresses that last. Experts come and go by writes into one table, and a batch finds its slots in a buffer
that the next batch of its size uses again. So compiled code and captured CUDA graphs run with other experts as they
are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from t2.experts.slots import ScaledLayer, SlotBuffers, SlotTable

LayerForm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A layer's product in another form than factored: (x, slots, bias) -> y."""


class Route:
    """One slot per request, and the scales these are rows of.

    Args:
        slots: [requests] int64.
        scales: [slots, columns] instead of the slot table, for an expert that a gradient has to reach, or the base.
        widths: the columns of each layer in the scales.
        forms: the products of the layers that a plan gave another form than the model's, by index.
        is_base: whether every request runs as the base.
    """

    def __init__(
        self,
        slots: Tensor,
        scales: Tensor | None = None,
        widths: Sequence[int] = (),
        forms: Mapping[int, LayerForm] | None = None,
        is_base: bool = False,
    ) -> None:
        self.slots = slots
        self.requests = slots.shape[0]
        self.forms = forms or {}
        self.is_base = is_base
        self._scales = scales
        self.was_read = False
        """True once a layer has run with it."""
        self._windows: Sequence[Tensor] | None = None
        if scales is not None:
            self._windows = scales.split(list(widths), dim=1)

    @property
    def is_plain(self) -> bool:
        """True if the route is slots of the table and nothing else."""
        return self._windows is None and not self.forms

    @property
    def requires_grad(self) -> bool:
        """True if a gradient has to reach the scales."""
        return self._scales is not None and self._scales.requires_grad

    def scales_of(self, layer: ScaledLayer) -> Tensor:
        """The scales [slots, r] of one layer."""
        return layer.scales if self._windows is None else self._windows[layer.index]

    def check(self, rows: int, layer: str) -> None:
        """ValueError unless the rows of a layer's input are the requests, each repeated the same number of times."""
        if rows % self.requests if self.requests else rows:
            raise ValueError(
                f"experts: expected one entry per request, got {self.requests} entries for {rows} rows in the first "
                f"dimension of the input of {layer}, which has to be that of the batch"
            )

    @cached_property
    def kept_slots(self) -> Tensor:
        """A copy of the slots for the backward pass, which may come when another batch has their buffer."""
        with torch.inference_mode(False):
            return self.slots.clone()


class _Scaled(torch.autograd.Function):
    """sigma (z - offset) as one row. Saves no tensor for its backward pass: any number of these may run through it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sigma: Tensor, offset: float) -> Tensor:
        ctx.sigma = sigma
        return (sigma * (z - offset)).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.squeeze(0) * ctx.sigma, None, None


class _WithGradient(torch.autograd.Function):
    """`values`, with a gradient that goes to `window`."""

    @staticmethod
    def forward(ctx: Any, window: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class TrainedRoute(Route):
    """The route of an expert in training.

    A layer's scales are computed from z whenever it asks, so they are never those of an earlier z. Gradients of all
    layers and passes meet in one node, which adds them up in one vector: each layer's own slice of z would cost a
    vector of that length.

    z: one value for each column of the table.
    """

    def __init__(self, z: Tensor, table: SlotTable) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64, device=z.device))
        self._z, self._sigma, self._offset, self._widths = z, table.column_sigma, table.offset, list(table.widths)
        self._starts = (0, *accumulate(self._widths))
        self._gradients: Sequence[Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def requires_grad(self) -> bool:
        return self._z.requires_grad

    def scales_of(self, layer: ScaledLayer) -> Tensor:
        window = slice(*self._starts[layer.index : layer.index + 2])
        values = (self._sigma[window] * (self._z.detach()[window] - self._offset)).unsqueeze(0)
        if not (torch.is_grad_enabled() and self._z.requires_grad):
            return values
        if self._gradients is None:
            self._gradients = _Scaled.apply(self._z, self._sigma, self._offset).split(self._widths, dim=1)
        scales: Tensor = _WithGradient.apply(self._gradients[layer.index], values)
        return scales


class Router:
    """The route of the current context (thread or task), which layers read; or the default for every row.

    Compiled code cannot read a context variable. `traced_slots` gives it the slots from plain attributes instead, which
    every call reads again: those of the thread's innermost route, or the base's while no thread has one. So threads may
    run one compiled model side by side.

    Where these slots could be another's, the call is not compiled: it runs eagerly, right but slowly, and with
    fullgraph=True it is an error. That is in a thread without a route while others have one (a task may have handed its
    work to the thread), and while tasks of one thread are inside routes of their own. `SVFModel.forward` and `generate`
    enter a route in any case; around other calls `route(None)` says base.

    One thing goes unnoticed: a task that calls a compiled model outside of any route while another task of the thread
    awaits something inside its own.
    """

    def __init__(self, table: SlotTable) -> None:
        device = table.sigma.device
        self.table = table
        self.buffers = SlotBuffers(device)
        self.outputs_left = OutputsLeft()
        with torch.inference_mode(False):
            base = torch.zeros(1, dtype=torch.int64, device=device)
        self._base = Route(base, table.base_row.unsqueeze(0), table.widths, is_base=True)
        self._default: TrainedRoute | None = None
        self._active: ContextVar[Route | None] = ContextVar("t2_route", default=None)
        self._lock = threading.Lock()
        self._entered = 0
        self._here = threading.local()
        self._unrouted: Tensor | None = base
        self._others_routed = False

    @property
    def default(self) -> TrainedRoute | None:
        """An expert in training; None is the base."""
        return self._default

    @default.setter
    def default(self, trained: TrainedRoute | None) -> None:
        with self._lock:
            self._default = trained
            self._set_unrouted()

    @property
    def current(self) -> Route:
        """The route that a layer runs with."""
        return self._active.get() or self._default or self._base

    def traced_slots(self) -> Tensor | None:
        """The slots of a compiled call, as rows of the slot table; None where slots are not all there is to its route.

        An error, which ends the compilation, if plain attributes cannot say which route is the call's.
        """
        if hasattr(self._here, "slots"):
            slots, unclear = self._here.slots, self._here.unclear
            self._here.route.was_read = True
        else:
            slots, unclear = self._unrouted, self._others_routed
        if unclear:
            raise RuntimeError(
                "route: a compiled model was called where other threads or tasks are inside routes of their own; enter "
                "a route in the thread that calls it (None is the base), and let tasks of one thread take turns"
            )
        return slots

    @contextmanager
    def within(self, route: Route) -> Iterator[None]:
        """Within the block, in this thread or task, layers run with the route."""
        token = self._active.set(route)
        here, entry = self._here.__dict__, (_task(), route)  # of this thread, also where another one ends the block
        with self._lock:
            here.setdefault("entries", []).append(entry)
            self._entered += 1
            self._publish(here)
        try:
            yield
        finally:
            with self._lock:
                here["entries"].remove(entry)
                self._entered -= 1
                self._publish(here)
            self._active.reset(token)

    def held(self) -> AbstractContextManager[None]:
        """Enters the route that is in force anyway, so that compiled code finds it; not for an expert in training."""
        route = self._active.get() or (self._base if self._default is None else None)
        return nullcontext() if route is None else self.within(route)

    def _publish(self, here: dict[str, Any]) -> None:
        """Sets the attributes that compiled code of this thread reads, and those without a route of their own."""
        entries: list[tuple[object, Route]] = here["entries"]
        if entries:
            task, route = entries[-1]
            here["slots"] = route.slots if route.is_plain or route is self._base else None
            here["unclear"] = any(other is not task for other, _ in entries)
            here["route"] = route
        else:
            here.pop("slots", None)
            here.pop("route", None)
        self.outputs_left.clear()
        self._set_unrouted()

    def _set_unrouted(self) -> None:
        self._unrouted = self._base.slots if self._default is None else None
        self._others_routed = self._entered > 0


class OutputsLeft(threading.local):
    """Outputs that the first layer of a `SharedInput` computed for the others, in compiled code.

    One for the whole model in each thread, and empty again when the last of the others has taken its output: so a graph
    ends with nothing in it, and no layer differs from another by it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.group: Any = None
        self.x: Tensor | None = None
        self.outputs: list[Tensor] | None = None


def _task() -> object:
    """The asyncio task that runs, if one does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
