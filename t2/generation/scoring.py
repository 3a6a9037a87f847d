"""Logits of given completions, with their gradient: each prompt is read once for all of its completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
)

from t2.generation.batching import pad
from t2.generation.cached_batch import CachedBatch, Runner
from t2.generation.images import ImageInputs, collate, positions, positions_of
from t2.model.kv_cache import new_cache


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and some completions to it, as token ids [length] without padding; a completion ends with its EOS id.

    weights: factors of each completion's log-likelihood in the update.
    counts: number of sampled completions that each one stands for; default 1.
    images: image inputs of the prompt.
    """

    prompt: Tensor
    completions: tuple[Tensor, ...]
    weights: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    images: ImageInputs = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", (1,) * len(self.completions))

    @property
    def longest(self) -> int:
        return max(len(completion) for completion in self.completions)

    @classmethod
    def from_samples(
        cls, prompt: Tensor, completions: Sequence[Tensor], weights: Sequence[float], images: ImageInputs
    ) -> PromptGroup:
        """A group in which equal completions are one, with the sum of their weights."""
        distinct: dict[tuple[int, ...], tuple[Tensor, float, int]] = {}
        for completion, weight in zip(completions, weights, strict=True):
            key = tuple(completion.tolist())
            _, so_far, count = distinct.get(key, (completion, 0.0, 0))
            distinct[key] = completion, so_far + weight, count + 1
        kept, summed, counts = zip(*distinct.values(), strict=True)
        return cls(prompt, kept, summed, counts, images)

    def part(self, place: slice) -> PromptGroup:
        """The group with some of its completions."""
        return replace(
            self,
            completions=self.completions[place],
            weights=self.weights[place],
            counts=self.counts[place],
        )


def repeat_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Goes on with these rows, as `batch_select_indices`, but with a gradient that has the same bits every time.

    The gradient of indexing adds by atomics on a CPU, in whatever order threads come; that of index_select does not.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)


@dataclass(frozen=True)
class MicroBatch:
    """Groups whose tokens go through the model together, after `shared` tokens that all prompts begin with.

    repeated: every completion is read with a prompt of its own (`completion_logits` without `share_prefix`).
    """

    groups: tuple[PromptGroup, ...]
    shared: int = 0
    repeated: bool = False

    @property
    def tokens(self) -> int:
        """With padding."""
        completions = sum(len(group.completions) for group in self.groups)
        longest = max(group.longest for group in self.groups)
        prompts = completions if self.repeated else len(self.groups)
        behind = max(len(group.prompt) for group in self.groups) - self.shared
        return self.shared + prompts * behind + completions * longest


def micro_batches(
    groups: Sequence[PromptGroup], token_budget: int, shared: int = 0, *, repeated: bool = False
) -> Iterator[MicroBatch]:
    """The groups sorted by length, as many at a time as the budget holds; a group that exceeds it alone is divided.

    Args:
        shared: how many tokens all prompts begin with that are read once (`shared_prefix`).
        repeated: every completion is read with a prompt of its own.

    Raises:
        ValueError: one prompt with one completion exceeds the budget.
    """
    divided: list[PromptGroup] = []
    for group in groups:
        prompt = len(group.prompt)
        room = token_budget // (prompt + group.longest) if repeated else (token_budget - prompt) // group.longest
        if room < 1:
            raise ValueError(
                f"token_budget: expected room for the longest prompt with its completion, {len(group.prompt)} + "
                f"{group.longest} tokens, got {token_budget}"
            )
        for start in range(0, len(group.completions), room):
            divided.append(group.part(slice(start, start + room)))
    divided.sort(key=lambda group: (len(group.prompt), group.longest))
    batch: tuple[PromptGroup, ...] = ()
    for group in divided:
        if batch and MicroBatch((*batch, group), shared, repeated).tokens > token_budget:
            yield MicroBatch(batch, shared, repeated)
            batch = ()
        batch = (*batch, group)
    if batch:
        yield MicroBatch(batch, shared, repeated)


@dataclass(frozen=True)
class CompletionTokens:
    """The completions of a micro-batch, padded: what `completion_logits` reads and the loss is over."""

    prefix: Tensor  # [S], what all prompts begin with; may be empty
    prompt_ids: Tensor  # [groups, P], the prompts behind it, left-padded
    prompt_mask: Tensor
    completion_ids: Tensor  # [completions, T], right-padded
    completion_mask: Tensor
    group: Tensor  # [completions], the row of the prompt
    images: tuple[ImageInputs, ...] = field(default=(), kw_only=True)  # of each prompt, if there are any

    @property
    def targets(self) -> Tensor:
        """The completions' tokens one after the other, [tokens]."""
        return self.completion_ids[self.completion_mask.bool()]

    def per_token(self, values: Tensor) -> Tensor:
        """One value for each completion, [completions], as one for each of its tokens, [tokens]."""
        return values.unsqueeze(1).expand_as(self.completion_ids)[self.completion_mask.bool()]


def completion_tokens(batch: MicroBatch, pad_token: int, device: torch.device) -> CompletionTokens:
    shared, prompts = batch.shared, [group.prompt for group in batch.groups]
    prompt_ids, prompt_mask = pad([prompt[shared:] for prompt in prompts], pad_token, left=True)
    completion_ids, completion_mask = pad(
        [a for group in batch.groups for a in group.completions], pad_token, left=False
    )
    counts = torch.tensor([len(group.completions) for group in batch.groups])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    tensors = (prompts[0][:shared], prompt_ids, prompt_mask, completion_ids, completion_mask, rows)
    images = tuple(group.images for group in batch.groups)
    return CompletionTokens(*(tensor.to(device) for tensor in tensors), images=images)


def completion_logits(runner: Runner, tokens: CompletionTokens, *, share_prefix: bool = True) -> Tensor:
    """Logits [tokens, vocabulary] of each completion's tokens, one completion after the other, with their gradient.

    Args:
        runner: a policy or another model to run. A route around it is one expert for all rows.
        share_prefix: read each prompt once for all its completions; otherwise once a completion, which activation
            checkpointing (no cache) needs. Models without a cache of keys and values always do the latter.
    """
    model, completions = runner.model, tokens.completion_ids
    length = completions.shape[1]
    cache = new_cache(runner.transformer) if share_prefix else None
    if cache is None:
        prefix = tokens.prefix.expand(len(completions), -1)
        mask = torch.cat([torch.ones_like(prefix), tokens.prompt_mask[tokens.group], tokens.completion_mask], dim=1)
        ids = torch.cat([prefix, tokens.prompt_ids[tokens.group], completions], dim=1)
        each = [tokens.images[row] for row in tokens.group.tolist()] if tokens.images else []
        inputs = collate(each, ids.shape[1] - length, after=length, device=ids.device)
        places, _ = positions_of(runner.transformer, ids, mask, inputs)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=False,
            logits_to_keep=length + 1,
            **inputs,
        ).logits[:, :-1]
        return logits[tokens.completion_mask.bool()]
    inputs = collate(tokens.images, tokens.prompt_ids.shape[1], device=completions.device)
    batch = CachedBatch(runner, cache)
    logits = batch.read_prompts(tokens.prefix, tokens.prompt_ids, tokens.prompt_mask, inputs)
    assert batch.mask is not None and batch.offset is not None
    first = logits.index_select(0, tokens.group).unsqueeze(1)
    if length == 1:
        return first[tokens.completion_mask.bool()]
    repeat_rows(cache, tokens.group)
    seen = torch.cat([batch.mask[tokens.group], tokens.completion_mask[:, :-1]], dim=1)
    rest = model(
        input_ids=completions[:, :-1],
        attention_mask=seen,
        position_ids=positions(seen)[:, 1 - length :] + batch.offset[tokens.group],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)[tokens.completion_mask.bool()]
