"""The slot table, one row of scales for each expert in use, and the buffers that hold the slots of running batches.

Both lie at addresses that last, so compiled code and captured CUDA graphs run with other experts as they are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from t2.experts.layout import Layout
from t2.experts.support import counts


class Streams:
    """The streams that have used one piece of GPU memory, for others to wait for; nothing on another device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._users: list[Any] = []

    def used(self) -> None:
        """Notes that the current stream has used it."""
        if self._device is not None:
            current = torch.cuda.current_stream(self._device)
            if current not in self._users:
                self._users.append(current)

    def wait(self) -> None:
        """Lets the current stream go on after all that its users were given to do so far."""
        for stream in self._users:
            current = torch.cuda.current_stream(self._device)
            if stream != current:
                current.wait_stream(stream)

    def take_over(self) -> None:
        """`wait`, before the current stream writes: it is then the only user to wait for."""
        self.wait()
        self._users.clear()
        self.used()


class SlotBuffer:
    """The slots of one running batch."""

    def __init__(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.slots = torch.zeros(length, dtype=torch.int64, device=device)
        self.holds = (0,) * length
        self.busy = False
        self.was_read = False
        self.streams = Streams(device)


class SlotBuffers:
    """Buffers for the slots of running batches, [requests] int64 each.

    A batch takes the first free one of its length, so batches that run one after the other share an address, while
    nested ones and those of other threads have their own. Filling one does not make the host wait for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, list[SlotBuffer]] = {}
        self._lock = threading.Lock()

    def take(self, ids: Sequence[int]) -> SlotBuffer:
        """A buffer that holds these ids, until it is given back."""
        with self._lock:
            known = self._buffers.setdefault(len(ids), [])
            buffer = next((buffer for buffer in known if not buffer.busy), None)
            if buffer is None:
                buffer = SlotBuffer(len(ids), self._device)
                known.append(buffer)
            buffer.busy = True
        buffer.streams.take_over()
        if buffer.holds != tuple(ids):
            with torch.inference_mode(False):
                new = torch.tensor(ids, dtype=torch.int64)
                if self._device.type == "cuda":
                    buffer.slots.copy_(new.pin_memory(), non_blocking=True)
                else:
                    buffer.slots.copy_(new)
            buffer.holds = tuple(ids)
        return buffer

    def give_back(self, buffer: SlotBuffer) -> None:
        """Lets the next batch have it."""
        buffer.streams.used()
        buffer.busy = False


class ScaledLayer(Protocol):
    """A layer that reads its columns of the slot table, `scales` [slots, r]."""

    index: int
    scales: Tensor

    def set_scales(self, scales: Tensor) -> None:
        """Takes a view [slots, r] of the table."""


class SlotTable:
    """`table` [slots, R] float32 of rows sigma * z. Slot 0 is the base model (z = 1) and stays.

    In the delta form rows are sigma (z - 1) at the support's positions, [slots, K]: what an expert adds to the base.

    Slots are counted references: an expert holds its slot, and so does every route that uses it. A slot that is
    written is always a free one, so replacing or removing an expert never changes a batch that is running.

    The table doubles when it is full. It is then another tensor, and `generation` one higher: layers get new views of
    it, compiled code is compiled once more, and CUDA graphs that were captured before must be captured again. On a GPU
    the host waits until the device has read the old one.
    """

    BASE = 0

    def __init__(self, layout: Layout, sigma: Tensor, slots: int = 8, support: Tensor | None = None) -> None:
        self.layout = layout
        self.sigma = sigma
        self.support = None if support is None else support.to(sigma.device)
        """The positions [K] in z that experts may change, in the delta form."""
        self.widths = layout.ranks if support is None else counts(support, layout)
        """The columns of each layer."""
        self.generation = 0
        with torch.inference_mode(False):  # a table made in inference mode could not be trained through later
            self.table = torch.empty(slots, sum(self.widths), device=sigma.device)
        self.reset()
        self._references = [1] + [0] * (slots - 1)
        self._layers: list[ScaledLayer] = []
        self._lock = threading.Lock()
        self._set_streams()

    def _set_streams(self) -> None:
        self._written = Streams(self.sigma.device)
        self._released = [Streams(self.sigma.device) for _ in self._references]

    def reset(self) -> None:
        """Takes sigma as it is now, and fills every slot with the base."""
        with torch.inference_mode(False):
            self.column_sigma = self.columns_of(self.sigma)
            self.base_row = self.column_sigma if self.support is None else torch.zeros_like(self.column_sigma)
            self.table[:] = self.base_row

    @property
    def offset(self) -> float:
        """Scales are sigma (z - offset)."""
        return 0.0 if self.support is None else 1.0

    def columns_of(self, values: Tensor) -> Tensor:
        """Those of [..., R] values, one for each component, that columns belong to."""
        return values if self.support is None else values[..., self.support]

    def with_columns(self, values: Tensor) -> Tensor:
        """z [R] with these values at the columns' components, and 1 at all others."""
        if self.support is None:
            return values
        return torch.ones_like(self.sigma).index_copy(0, self.support, values.to(self.sigma))

    def scales_of(self, z: Tensor) -> Tensor:
        """The row of scales of an expert z [R].

        Raises:
            ValueError: z is not 1 at a component off the support.
        """
        z = z.to(self.sigma)
        if self.support is not None:
            off = z.detach().clone()
            off[self.support] = 1.0
            if others := int((off != 1.0).sum()):
                raise ValueError(
                    f"experts: expected z = 1 off the support of {len(self.support)} components that this model has in "
                    f"the delta form, got {others} others that differ, by up to {float((off - 1).abs().max()):.3g}; "
                    "weights of a mix have to add up to 1, and the factored form runs every expert"
                )
        return self.column_sigma * (self.columns_of(z) - self.offset)

    @property
    def in_use(self) -> int:
        """Slots that hold something, the base's included."""
        return sum(count > 0 for count in self._references)

    def bind(self, layers: Sequence[ScaledLayer]) -> None:
        """Gives layers, in the order of the layout, their views of the table, now and whenever it moves."""
        with self._lock:
            self._layers = list(layers)
            self._give_views()

    def _give_views(self) -> None:
        with torch.inference_mode(False):
            for layer, columns in zip(self._layers, self.table.split(list(self.widths), dim=1), strict=True):
                layer.set_scales(columns)

    def to(self, device: torch.device) -> None:
        with self._lock, torch.inference_mode(False):
            self.sigma, self.table = self.sigma.to(device), self.table.to(device)
            self.column_sigma, self.base_row = self.column_sigma.to(device), self.base_row.to(device)
            self.support = None if self.support is None else self.support.to(device)
            self._set_streams()
            self.generation += 1
            self._give_views()

    def allocate(self, z: Tensor) -> int:
        """Writes the scales of z [R] to a free slot and returns it with one reference; raises as `scales_of` does."""
        with torch.inference_mode(False):
            row = self.scales_of(z.detach())
            with self._lock:
                if 0 not in self._references:
                    self._double()
                slot = self._references.index(0)
                self._references[slot] = 1
                self._released[slot].take_over()
                self._written.take_over()
                self.table[slot] = row
        return slot

    def _double(self) -> None:
        if self.table.is_cuda:
            torch.cuda.synchronize(self.table.device)
        self.table = torch.cat([self.table, torch.empty_like(self.table)])
        self._references += [0] * len(self._references)
        self._released += [Streams(self.sigma.device) for _ in self._released]
        self.generation += 1
        self._give_views()

    def wait_for_writes(self) -> None:
        """Lets the current stream of a GPU read what was written on another one."""
        self._written.wait()

    def retain(self, slot: int) -> None:
        with self._lock:
            self._references[slot] += 1

    def release(self, slot: int) -> None:
        with self._lock:
            self._released[slot].used()
            self._references[slot] -= 1
