"""Keys and values of running requests: a row for each, in buffers that requests join and leave at any step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
import xxhash
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from t2.model.attention import shared_keys
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
            _zeros(states, (rows, states.shape[1], capacity, states.shape[-1])) for states in (key_states, value_states)
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
        raise RuntimeError("cache: expected ranges of keys from the engine, got no mask")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._owner.capacity


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros; on a CPU of memory that the system hands out when it is first written to."""
    with torch.inference_mode(False):
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        flat = torch.from_numpy(numpy.zeros(math.prod(shape) * like.dtype.itemsize, dtype=numpy.uint8))
        return flat.view(like.dtype).view(shape)


class RowCache(Cache):
    """The buffers [rows, heads, capacity, head_dim] of all layers. `places` says what the next forward pass writes.

    A pass has one token in each of its rows (`t2.model.attention.shared_keys`).
    """

    def __init__(self, windows: Sequence[int | None], rows: int, capacity: int) -> None:
        """windows: for each layer the keys that a token looks back at, itself included, or None for all."""
        self.windows, self.rows, self.capacity = tuple(windows), rows, capacity
        self.places: Places | None = None
        super().__init__(layers=[RowLayer(self) for _ in windows])

    @classmethod
    def of(cls, model: nn.Module, rows: int, capacity: int) -> RowCache:
        """The cache of a transformers model.

        Raises:
            TypeError: a model whose cache holds anything but keys and values, or whose attention is not torch's "sdpa".
        """
        usual = new_cache(model)
        kind = type(model).__name__
        if usual is None:
            raise TypeError(f"model: expected one whose cache is all keys and values, got {kind}")
        text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        named = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        windows = [getattr(layer, "sliding_window", None) for layer in usual.layers]
        if named or len({window for window in windows if window is not None}) > 1:
            found = ", ".join(sorted(named)) or "windows of several lengths"
            raise TypeError(
                f"model: expected layers that look at all keys or at one window of them, got {found} in {kind}"
            )
        attention = getattr(model.config, "_attn_implementation", None)
        if attention != "sdpa":
            raise TypeError(f"model: expected attn_implementation 'sdpa', got {attention!r} in {kind}")
        return cls(windows, rows, capacity)

    def ranges(self, places: Places) -> Tensor | dict[str, Tensor]:
        """What the model takes for `attention_mask`: int64 [tokens, 1, 1, 2], the first key that a token looks at and
        the end (`t2.model.attention.shared_keys`); by kind of layer if there are two."""
        ends = places.positions + 1

        def from_begin(begins: Tensor) -> Tensor:
            return torch.stack([begins, ends], dim=-1)[:, None, None]

        every = from_begin(torch.zeros_like(ends))
        window = next((window for window in self.windows if window is not None), None)
        if window is None:
            return every
        near = from_begin((ends - window).clamp_min(0))
        return {"full_attention": every, "sliding_attention": near} if None in self.windows else near

    def names(self) -> list[str]:
        """The names of all buffers."""
        return [f"{part}{i}" for i in range(len(self.layers)) for part in ("keys", "values")]

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name; there are none before the first pass."""
        found = (buffer for layer in self._layers() for buffer in (layer.keys, layer.values))
        return {name: buffer for name, buffer in zip(self.names(), found, strict=True) if buffer is not None}

    def take(self, buffers: Mapping[str, Tensor]) -> None:
        """Goes on with these buffers."""
        for i, layer in enumerate(self._layers()):
            layer.keys, layer.values, layer.is_initialized = buffers[f"keys{i}"], buffers[f"values{i}"], True

    def block(self, row: int, start: int) -> list[Tensor]:
        """A copy of one block of a row: keys and values of all layers."""
        return [buffer[row, :, start : start + BLOCK].clone() for buffer in self.buffers().values()]

    def set_block(self, row: int, start: int, block: Sequence[Tensor]) -> None:
        for buffer, part in zip(self.buffers().values(), block, strict=True):
            buffer[row, :, start : start + BLOCK] = part

    def _layers(self) -> list[RowLayer]:
        return cast(list[RowLayer], self.layers)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers().values())


def run_pass(model: nn.Module, cache: RowCache, places: Places, ids: Tensor) -> Tensor:
    """The model's output [tokens, ...] for ids [tokens], each a row with a place in the cache, in the route of now."""
    cache.places = places
    with shared_keys(places.rows):
        logits: Tensor = model(
            input_ids=ids[:, None],
            attention_mask=cache.ranges(places),
            position_ids=places.positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits[:, -1]


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
