"""The slot table and the route: which row of scales each request of the running batch uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from t2.layout import Layout

LayerForm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A layer's product in another form than factored: (x, slots, bias) -> y."""


class Route:
    """The scales in use and one slot per request. Layer i sees its own column window of the table.

    `forms` are the products of the layers that a plan gave another form than factored, by index.
    """

    def __init__(
        self, table: Tensor, slots: Tensor, layout: Layout, forms: Mapping[int, LayerForm] | None = None
    ) -> None:
        self.forms = forms or {}
        self.table = table
        self.slots = slots
        self.requires_grad = table.requires_grad
        self.windows = table.split(list(layout.ranks), dim=1)

    def check(self, rows: int) -> None:
        """ValueError unless the rows are the requests, each repeated the same number of times."""
        requests = self.slots.shape[0]
        if rows % requests if requests else rows:
            raise ValueError(f"experts: expected one entry per request, got {requests} entries for {rows} rows")


class SlotTable:
    """`table` [slots, R] float32 of rows sigma * z. Slot 0 is the base model (z = 1) and stays.

    Slots are counted references: an expert holds its slot, and so does every route that uses it. A slot that is
    written is always a free one, so replacing or removing an expert never changes a batch that is running. The table
    doubles when it is full; routes made before keep the tensor they were made from.
    """

    BASE = 0

    def __init__(self, layout: Layout, sigma: Tensor) -> None:
        self.layout = layout
        self.sigma = sigma
        self.table = sigma.unsqueeze(0).repeat(8, 1)
        self._references = [1] + [0] * 7
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        """Slots that hold something, the base's included."""
        return sum(count > 0 for count in self._references)

    def to(self, device: torch.device) -> None:
        with self._lock:
            self.sigma, self.table = self.sigma.to(device), self.table.to(device)

    def allocate(self, z: Tensor) -> int:
        """Writes sigma * z to a free slot and returns it with one reference."""
        with torch.inference_mode(False):  # a table made in inference mode could not be trained through later
            return self._allocate(z)

    def _allocate(self, z: Tensor) -> int:
        row = self.sigma * z.detach().to(self.sigma)
        with self._lock:
            if 0 not in self._references:
                self.table = torch.cat([self.table, torch.empty_like(self.table)])
                self._references += [0] * len(self._references)
            slot = self._references.index(0)
            self._references[slot] = 1
            self.table[slot] = row
        return slot

    def retain(self, slot: int) -> None:
        with self._lock:
            self._references[slot] += 1

    def release(self, slot: int) -> None:
        with self._lock:
            self._references[slot] -= 1


class TrainedRoute:
    """The route of an expert in training: sigma * z, through which the gradient reaches z, anew in each forward pass.

    Layers ask for it in the order of their index, so one that is not above the last one's begins another pass.
    """

    def __init__(self, z: Tensor, sigma: Tensor, layout: Layout) -> None:
        self._z, self._sigma, self._layout = z, sigma, layout
        self._slots = torch.zeros(1, dtype=torch.int64, device=sigma.device)
        self._last = -1
        self._learning = False
        self._route: Route | None = None

    def anew(self) -> Route:
        return Route((self._sigma * self._z).unsqueeze(0), self._slots, self._layout)

    def of_layer(self, index: int) -> Route:
        learning = torch.is_grad_enabled()
        if self._route is None or index <= self._last or learning != self._learning:
            self._route = self.anew()
        self._last, self._learning = index, learning
        return self._route


class Router:
    """What the layers ask: the route of the current context (thread or task), or the default for every row.

    `default` is an expert in training; None is the base.
    """

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.default: TrainedRoute | None = None
        base = torch.zeros(1, dtype=torch.int64, device=table.sigma.device)
        self._base = Route(table.sigma.unsqueeze(0), base, table.layout)
        self._active: ContextVar[Route | None] = ContextVar("t2_route", default=None)

    @property
    def lasting(self) -> Route:
        """A route for a part of the model that is to run twice with the same one."""
        return self._active.get() or (self._base if self.default is None else self.default.anew())

    def of_layer(self, index: int) -> Route:
        """The route that the layer with this index runs with."""
        active = self._active.get()
        if active is not None:
            return active
        return self._base if self.default is None else self.default.of_layer(index)

    @contextmanager
    def within(self, route: Route) -> Iterator[None]:
        """Within the block, in this thread or task, layers run with the route."""
        token = self._active.set(route)
        try:
            yield
        finally:
            self._active.reset(token)
