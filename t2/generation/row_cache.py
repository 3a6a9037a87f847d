"""Keys and values of running requests: a row for each, in buffers that requests join and leave at any step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from t2.model.kv_cache import new_cache

BLOCK = 32
"""Tokens of a block of a prompt that is kept for other prompts."""
SPAN = 64
"""Lengths that a step reads are whole multiples of this."""


@dataclass(frozen=True)
class Places:
    """Where the next pass writes: the row and the position of each of its tokens, int64 [tokens]; and the length that
    rows are read to."""

    rows: Tensor
    positions: Tensor
    length: int


class RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`."""

    is_sliding = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self._owner.rows, self._owner.capacity
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], capacity, states.shape[-1]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self._owner.places
        assert places is not None and self.keys is not None and self.values is not None
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[places.rows, :, places.positions] = states[:, :, 0]
        return self.keys[:, :, : places.length], self.values[:, :, : places.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise RuntimeError("cache: expected a mask [tokens, 1, 1, length] from the engine, got none")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._owner.capacity

    def grow(self, capacity: int, filled: Mapping[int, int]) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                for row, length in filled.items():
                    new[row, :, :length] = old[row, :, :length]
                setattr(self, name, new)


class RowCache(Cache):
    """The buffers [rows, heads, capacity, head_dim] of all layers. `places` says what the next forward pass writes.

    A pass has one token in each of its rows (`t2.model.attention.shared_keys`). The buffers move where `reserve` makes
    room.
    """

    def __init__(self, layers: int, rows: int) -> None:
        self.rows, self.capacity = rows, 4 * SPAN
        self.places: Places | None = None
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])

    @classmethod
    def of(cls, model: nn.Module, rows: int) -> RowCache:
        """The cache of a transformers model.

        Raises:
            TypeError: a model whose cache holds anything but keys and values, or windows of them, or whose attention
                is not torch's "sdpa".
        """
        usual = new_cache(model)
        kind = type(model).__name__
        if usual is None or any(type(layer) is not DynamicLayer for layer in usual.layers):
            raise TypeError(f"model: expected one whose cache is all keys and values, got {kind}")
        attention = getattr(model.config, "_attn_implementation", None)
        if attention != "sdpa":
            raise TypeError(f"model: expected attn_implementation 'sdpa', got {attention!r} in {kind}")
        return cls(len(usual.layers), rows)

    def reserve(self, tokens: int, filled: Mapping[int, int]) -> None:
        """Makes room for so many tokens in every row. `filled`: tokens by row; nothing else is kept."""
        if tokens > self.capacity:
            self.capacity = max(-(-tokens // SPAN) * SPAN, 2 * self.capacity)
            for layer in self._layers():
                layer.grow(self.capacity, filled)

    def block(self, row: int, start: int) -> list[Tensor]:
        """A copy of one block of a row: keys and values of all layers."""
        part = slice(start, start + BLOCK)
        return [buffer[row, :, part].clone() for layer in self._layers() for buffer in (layer.keys, layer.values)]  # type: ignore[index]

    def set_block(self, row: int, start: int, block: Sequence[Tensor]) -> None:
        buffers = [(layer, name) for layer in self._layers() for name in ("keys", "values")]
        for (layer, name), part in zip(buffers, block, strict=True):
            getattr(layer, name)[row, :, start : start + BLOCK] = part

    def _layers(self) -> list[RowLayer]:
        return cast(list[RowLayer], self.layers)

    @property
    def nbytes(self) -> int:
        tensors = [buffer for layer in self._layers() for buffer in (layer.keys, layer.values) if buffer is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in tensors)


class PrefixStore:
    """Blocks of prompts that were read, for other prompts that begin the same way with the same expert.

    A block's key is a hash of the expert's content and of all tokens up to its end. The least used go when the store is
    full.

    limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.hits = self.lookups = 0
        self._blocks: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def _keys(self, expert: bytes, tokens: Sequence[int]) -> list[bytes]:
        digest, keys = xxhash.xxh3_128(expert), []
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            digest.update(torch.tensor(tokens[start : start + BLOCK]).numpy().tobytes())
            keys.append(digest.digest())
        return keys

    def load(self, expert: bytes, prompt: Sequence[int], cache: RowCache, row: int) -> int:
        """Fills a row with what is known of a prompt; returns how many tokens, at least one fewer than it has."""
        known = 0
        self.lookups += len(prompt) - 1
        for key in self._keys(expert, prompt[:-1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            cache.set_block(row, known, self._blocks[key])
            known += BLOCK
        self.hits += known
        return known

    def save(self, expert: bytes, prompt: Sequence[int], cache: RowCache, row: int) -> None:
        """Keeps the blocks of a row's prompt."""
        if not self.limit:
            return
        for index, key in enumerate(self._keys(expert, prompt)):
            if key not in self._blocks:
                block = cache.block(row, index * BLOCK)
                self._blocks[key] = block
                self.nbytes += sum(part.numel() * part.element_size() for part in block)
        while self.nbytes > self.limit:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= sum(part.numel() * part.element_size() for part in block)
