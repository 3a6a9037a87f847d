"""Reading the prompts of a batch into a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from t2.generation.images import ImageInputs, positions, positions_of
from t2.model.svf_model import SVFModel


class Running(Protocol):
    """What runs: `model` is called, `transformer` is the transformers model that this ends in."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def transformer(self) -> PreTrainedModel: ...


def read_prompts(
    running: Running, cache: DynamicCache, prefix: Tensor, ids: Tensor, mask: Tensor, images: ImageInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the cache with a prefix [S], which may be empty, and what each prompt has behind it [prompts, P].

    Returns:
        The logits [prompts, vocabulary] after each prompt; the mask [prompts, S + P] of what is in the cache; and how
        much further the text behind is than the count of tokens, [prompts, 1] (`positions_of`).
    """
    if len(prefix):
        running.model(input_ids=prefix[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
        mask = torch.cat([mask.new_ones(len(ids), len(prefix)), mask], dim=1)
        places, further = positions(mask)[:, len(prefix) :], mask.new_zeros(len(ids), 1)
    else:
        places, further = positions_of(running.transformer, ids, mask, images)
    logits = running.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **images,
    ).logits[:, -1]
    return logits, mask, further


@dataclass(frozen=True)
class Wrapped:
    """An SVFModel as something that runs (`t2.generation.prefill.Running`)."""

    model: SVFModel

    @property
    def transformer(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.model)
