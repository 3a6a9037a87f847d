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
from t2.generation.images import ImageInputs, collate, positions, positions_of
from t2.generation.prefill import Running, read_prompts
from t2.model.kv_cache import new_cache


@dataclass(frozen=True)
class Group:
    """A prompt and some answers to it, as token ids [length] without padding; an answer ends with its end token.

    `weights` are what the log-likelihood of each answer's tokens is multiplied with in the update, `counts` how many
    drawn answers each one stands for (1 if none are given), `images` what the model reads beside the ids.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    weights: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    images: ImageInputs = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", (1,) * len(self.answers))

    @property
    def longest(self) -> int:
        return max(len(answer) for answer in self.answers)

    @classmethod
    def of_distinct(
        cls, prompt: Tensor, answers: Sequence[Tensor], weights: Sequence[float], images: ImageInputs
    ) -> Group:
        """A group in which equal answers are one, with the sum of their weights."""
        distinct: dict[tuple[int, ...], tuple[Tensor, float, int]] = {}
        for answer, weight in zip(answers, weights, strict=True):
            key = tuple(answer.tolist())
            _, so_far, count = distinct.get(key, (answer, 0.0, 0))
            distinct[key] = answer, so_far + weight, count + 1
        kept, summed, counts = zip(*distinct.values(), strict=True)
        return cls(prompt, kept, summed, counts, images)

    def part(self, answers: slice) -> Group:
        """The group with some of its answers."""
        return replace(self, answers=self.answers[answers], weights=self.weights[answers], counts=self.counts[answers])


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

    repeated: every answer is read with a prompt of its own (`answer_logits` without `share_prefix`).
    """

    groups: tuple[Group, ...]
    shared: int = 0
    repeated: bool = False

    @property
    def tokens(self) -> int:
        """With padding."""
        answers = sum(len(group.answers) for group in self.groups)
        longest = max(group.longest for group in self.groups)
        prompts = answers if self.repeated else len(self.groups)
        behind = max(len(group.prompt) for group in self.groups) - self.shared
        return self.shared + prompts * behind + answers * longest


def micro_batches(
    groups: Sequence[Group], token_budget: int, shared: int = 0, *, repeated: bool = False
) -> Iterator[MicroBatch]:
    """The groups sorted by length, as many at a time as the budget holds; a group that exceeds it alone is divided.

    Args:
        shared: how many tokens all prompts begin with that are read once (`shared_prefix`).
        repeated: every answer is read with a prompt of its own.

    Raises:
        ValueError: one prompt with one answer exceeds the budget.
    """
    divided: list[Group] = []
    for group in groups:
        prompt = len(group.prompt)
        room = token_budget // (prompt + group.longest) if repeated else (token_budget - prompt) // group.longest
        if room < 1:
            raise ValueError(
                f"token_budget: expected room for the longest prompt with its answer, {len(group.prompt)} + "
                f"{group.longest} tokens, got {token_budget}"
            )
        for start in range(0, len(group.answers), room):
            divided.append(group.part(slice(start, start + room)))
    divided.sort(key=lambda group: (len(group.prompt), group.longest))
    batch: tuple[Group, ...] = ()
    for group in divided:
        if batch and MicroBatch((*batch, group), shared, repeated).tokens > token_budget:
            yield MicroBatch(batch, shared, repeated)
            batch = ()
        batch = (*batch, group)
    if batch:
        yield MicroBatch(batch, shared, repeated)


@dataclass(frozen=True)
class AnswerTokens:
    """The answers of a micro-batch, padded: what `answer_logits` reads and the loss is over."""

    prefix: Tensor  # [S], what all prompts begin with; may be empty
    prompt_ids: Tensor  # [groups, P], the prompts behind it, left-padded
    prompt_mask: Tensor
    answer_ids: Tensor  # [answers, T], right-padded
    answer_mask: Tensor
    group: Tensor  # [answers], the row of the prompt
    images: tuple[ImageInputs, ...] = field(default=(), kw_only=True)  # of each prompt, if there are any

    @property
    def targets(self) -> Tensor:
        """The answers' tokens one after the other, [tokens]."""
        return self.answer_ids[self.answer_mask.bool()]

    def per_token(self, values: Tensor) -> Tensor:
        """One value for each answer, [answers], as one for each of its tokens, [tokens]."""
        return values.unsqueeze(1).expand_as(self.answer_ids)[self.answer_mask.bool()]


def answer_tokens(batch: MicroBatch, pad_token: int, device: torch.device) -> AnswerTokens:
    shared, prompts = batch.shared, [group.prompt for group in batch.groups]
    prompt_ids, prompt_mask = pad([prompt[shared:] for prompt in prompts], pad_token, left=True)
    answer_ids, answer_mask = pad([a for group in batch.groups for a in group.answers], pad_token, left=False)
    counts = torch.tensor([len(group.answers) for group in batch.groups])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    tensors = (prompts[0][:shared], prompt_ids, prompt_mask, answer_ids, answer_mask, rows)
    images = tuple(group.images for group in batch.groups)
    return AnswerTokens(*(tensor.to(device) for tensor in tensors), images=images)


def answer_logits(running: Running, tokens: AnswerTokens, *, share_prefix: bool = True) -> Tensor:
    """Logits [tokens, vocabulary] of each answer's tokens, one answer after the other, with their gradient.

    Args:
        running: a policy, or anything else that runs. Where it runs with a route, that is one expert for all rows.
        share_prefix: read each prompt once for all its answers; otherwise once an answer, which activation
            checkpointing (no cache) needs. Models without a cache of keys and values always do the latter.
    """
    model, answers = running.model, tokens.answer_ids
    length = answers.shape[1]
    cache = new_cache(running.transformer) if share_prefix else None
    if cache is None:
        prefix = tokens.prefix.expand(len(answers), -1)
        mask = torch.cat([torch.ones_like(prefix), tokens.prompt_mask[tokens.group], tokens.answer_mask], dim=1)
        ids = torch.cat([prefix, tokens.prompt_ids[tokens.group], answers], dim=1)
        each = [tokens.images[row] for row in tokens.group.tolist()] if tokens.images else []
        inputs = collate(each, ids.shape[1] - length, after=length, device=ids.device)
        places, _ = positions_of(running.transformer, ids, mask, inputs)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=False,
            logits_to_keep=length + 1,
            **inputs,
        ).logits[:, :-1]
        return logits[tokens.answer_mask.bool()]
    inputs = collate(tokens.images, tokens.prompt_ids.shape[1], device=answers.device)
    first, seen, further = read_prompts(running, cache, tokens.prefix, tokens.prompt_ids, tokens.prompt_mask, inputs)
    first = first.index_select(0, tokens.group).unsqueeze(1)
    if length == 1:
        return first[tokens.answer_mask.bool()]
    repeat_rows(cache, tokens.group)
    seen = torch.cat([seen[tokens.group], tokens.answer_mask[:, :-1]], dim=1)
    rest = model(
        input_ids=answers[:, :-1],
        attention_mask=seen,
        position_ids=positions(seen)[:, 1 - length :] + further[tokens.group],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)[tokens.answer_mask.bool()]
