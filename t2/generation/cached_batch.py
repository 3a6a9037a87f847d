"""Rows of a batch that are read further and further into one key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from t2.generation.images import ImageInputs, positions, positions_of
from t2.model.svf_model import SVFModel


class Runner(Protocol):
    """A model to run: `model` is called, `transformer` is the transformers model in it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def transformer(self) -> PreTrainedModel: ...


@dataclass(frozen=True)
class SVFRunner:
    """A wrapped model as a `Runner`."""

    model: SVFModel

    @property
    def transformer(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.model)


class CachedBatch:
    """The cache of a batch, and the mask [rows, tokens] of what its rows have in it.

    offset: [rows, 1], by how much the position of a row's next token exceeds its count of tokens (`positions_of`).
    """

    def __init__(self, runner: Runner, cache: DynamicCache) -> None:
        self.runner, self.cache = runner, cache
        self.mask: Tensor | None = None
        self.offset: Tensor | None = None

    def read(self, ids: Tensor, mask: Tensor, images: ImageInputs | None = None) -> Tensor:
        """Appends tokens [rows, new] with their mask; returns the logits [rows, vocabulary] after the last ones.

        images: what the model reads beside the ids; only in the first call.
        """
        inputs: Mapping[str, Tensor] = images or {}
        if self.mask is None or self.offset is None:
            self.mask = mask
            places, self.offset = positions_of(self.runner.transformer, ids, mask, inputs)
        else:
            self.mask = torch.cat([self.mask, mask], dim=1)
            places = positions(self.mask)[:, -ids.shape[1] :] + self.offset
        logits: Tensor = self.runner.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        ).logits[:, -1]
        return logits

    def append(self, tokens: Tensor) -> Tensor:
        """Appends one token [rows] to every row; returns the logits [rows, vocabulary] after it."""
        return self.read(tokens[:, None], torch.ones_like(tokens[:, None]))

    def repeat(self, times: int) -> None:
        """Goes on with every row so many times, one copy behind the other."""
        assert self.mask is not None and self.offset is not None
        self.cache.batch_repeat_interleave(times)
        self.mask, self.offset = self.mask.repeat_interleave(times, 0), self.offset.repeat_interleave(times, 0)

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, which may repeat."""
        assert self.mask is not None and self.offset is not None
        self.cache.batch_select_indices(rows)
        self.mask, self.offset = self.mask[rows], self.offset[rows]

    def read_prompts(self, prefix: Tensor, ids: Tensor, mask: Tensor, images: ImageInputs | None = None) -> Tensor:
        """Reads a prefix [S], which may be empty, once for all, and behind it the rest of each prompt [prompts, P]."""
        if len(prefix):
            self.read(prefix[None], torch.ones_like(prefix[None]))
            self.repeat(len(ids))
        return self.read(ids, mask, images)
