"""Answers of a policy, drawn or greedy, and the logits of its tokens for the update.

Several answers to one prompt share its prefix: the prompt is read once, its keys and values are repeated for the
answers, and in the update the gradient flows back through them to the one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from t2.attention import growing_cache, new_cache
from t2.training.policies import Policy
from t2.vision import ImageInputs, collate, placeholder_tokens, positions, positions_of


@dataclass(frozen=True)
class Group:
    """A prompt and some answers to it, as token ids [length] without padding; an answer ends with its end token.

    `weights` are what the log-likelihood of each answer's tokens is multiplied with in the update, `images` what the
    model reads with the prompt beside its ids.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    weights: tuple[float, ...] = ()
    images: ImageInputs = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(len(answer) for answer in self.answers)


class Sampler(LogitsProcessor):
    """Draws each row's next token with random numbers of that row's own and leaves it as the only possible one.

    With one uniform number for each row and position, a row's answer depends neither on the batch around it nor on how
    many processes share the work.

    uniforms: [rows, tokens] float64 in [0, 1).
    width: of the padded prompts that come before the answers.
    """

    def __init__(self, uniforms: Tensor, width: int, temperature: float) -> None:
        self.uniforms, self.width, self.temperature = uniforms, width, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated = torch.softmax(scores.float() / self.temperature, dim=-1).double().cumsum(-1)
        below = self.uniforms[:, input_ids.shape[1] - self.width, None] * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, below, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def uniforms(seed: int, step: int, prompts: Sequence[int], samples: int, tokens: int) -> Tensor:
    """[len(prompts) * samples, tokens] float64 in [0, 1), fixed by the seed, the step and a prompt's place in it."""
    drawn = [numpy.random.default_rng([seed, step, prompt]).random((samples, tokens)) for prompt in prompts]
    return torch.from_numpy(numpy.concatenate(drawn))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None})


def pad(rows: Sequence[Tensor], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """The rows [length] as one matrix [rows, longest], and its mask (int64, 1 where a row has something)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@dataclass(frozen=True)
class Generator:
    """Answers of a policy.

    device: where the model is. pad_token: fills rows. ends: tokens that end an answer.
    """

    policy: Policy
    device: torch.device
    pad_token: int
    ends: tuple[int, ...]

    def answers(
        self,
        prompts: Sequence[Tensor],
        new_tokens: int,
        *,
        images: Sequence[ImageInputs] = (),
        samples: int = 1,
        draw: Tensor | None = None,
        temperature: float = 1.0,
        base: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """`samples` answers to each prompt, in one batch; each ends with its end token unless it was cut short.

        Args:
            prompts: token ids [length] each.
            new_tokens: the longest answer.
            images: of each prompt, or none at all. No token that stands for an image is answered then.
            draw: uniform numbers [len(prompts) * samples, new_tokens]; greedy answers without.
            base: whether the base model answers.
        """
        ids, mask = (tensor.to(self.device) for tensor in pad(prompts, self.pad_token, left=True))
        width, rows = ids.shape[1], len(prompts) * samples
        options = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.ends),
            pad_token_id=self.pad_token,
            suppress_tokens=placeholder_tokens(self.policy.transformer) if any(images) else None,
        )
        processors = LogitsProcessorList()
        if draw is not None:
            processors.append(Sampler(draw.to(self.device), width, temperature))
        phase = self.policy.base() if base else self.policy.acting(width, new_tokens, rows)
        with phase, torch.inference_mode():
            inputs = collate(images, width, device=self.device)
            places, _ = positions_of(self.policy.transformer, ids, mask, inputs)
            cache = self._prefix(ids, mask, places, inputs) if samples > 1 else None
            if cache is not None:
                cache.batch_repeat_interleave(samples)
                rest: dict[str, Any] = {"past_key_values": cache, "position_ids": places.repeat_interleave(samples, -2)}
            else:
                rest = dict(collate([each for each in images for _ in range(samples)], width, device=self.device))
            model: Any = self.policy.model
            out = model.generate(
                input_ids=ids.repeat_interleave(samples, 0),
                attention_mask=mask.repeat_interleave(samples, 0),
                generation_config=options,
                logits_processor=processors,
                **rest,
            )
        answers = [self._cut(row) for row in out[:, width:].cpu().clone()]
        return [tuple(answers[i : i + samples]) for i in range(0, rows, samples)]

    def _prefix(self, ids: Tensor, mask: Tensor, places: Tensor, images: ImageInputs) -> DynamicCache | None:
        """Keys and values of all but the prompts' last tokens, or None where the model's cache cannot be repeated."""
        transformer = self.policy.transformer
        cache = growing_cache(transformer) or new_cache(transformer)
        if cache is None or ids.shape[1] < 2:
            return None
        self.policy.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=places[..., :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **{name: each[:, :-1] if name.endswith("token_type_ids") else each for name, each in images.items()},
        )
        return cache

    def _cut(self, row: Tensor) -> Tensor:
        """The tokens up to the first end token, with it."""
        ended = torch.isin(row, torch.tensor(self.ends)).nonzero()
        return row[: int(ended[0]) + 1] if len(ended) else row


@dataclass(frozen=True)
class MicroBatch:
    """Groups whose tokens go through the model together."""

    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        """With padding."""
        answers = sum(len(group.answers) for group in self.groups)
        longest = max(group.longest for group in self.groups)
        return len(self.groups) * max(len(group.prompt) for group in self.groups) + answers * longest


def micro_batches(groups: Sequence[Group], token_budget: int) -> Iterator[MicroBatch]:
    """The groups sorted by length, as many at a time as the budget holds; a group that exceeds it alone is divided.

    Raises:
        ValueError: one prompt with one answer exceeds the budget.
    """
    divided: list[Group] = []
    for group in groups:
        room = (token_budget - len(group.prompt)) // group.longest
        if room < 1:
            raise ValueError(
                f"token_budget: expected room for the longest prompt with its answer, {len(group.prompt)} + "
                f"{group.longest} tokens, got {token_budget}"
            )
        for start in range(0, len(group.answers), room):
            part = slice(start, start + room)
            divided.append(replace(group, answers=group.answers[part], weights=group.weights[part]))
    divided.sort(key=lambda group: (len(group.prompt), group.longest))
    batch: tuple[Group, ...] = ()
    for group in divided:
        if batch and MicroBatch((*batch, group)).tokens > token_budget:
            yield MicroBatch(batch)
            batch = ()
        batch = (*batch, group)
    if batch:
        yield MicroBatch(batch)


@dataclass(frozen=True)
class AnswerTokens:
    """The answers of a micro-batch, padded: what `answer_logits` reads and the loss is over."""

    prompt_ids: Tensor  # [groups, P], left-padded
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
    prompt_ids, prompt_mask = pad([group.prompt for group in batch.groups], pad_token, left=True)
    answer_ids, answer_mask = pad([a for group in batch.groups for a in group.answers], pad_token, left=False)
    counts = torch.tensor([len(group.answers) for group in batch.groups])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    tensors = (prompt_ids, prompt_mask, answer_ids, answer_mask, rows)
    images = tuple(group.images for group in batch.groups)
    return AnswerTokens(*(tensor.to(device) for tensor in tensors), images=images)


def answer_logits(policy: Policy, tokens: AnswerTokens, *, share_prefix: bool = True) -> Tensor:
    """Logits [tokens, vocabulary] of each answer's tokens, one answer after the other, with their gradient.

    Args:
        share_prefix: read each prompt once for all its answers; otherwise once an answer, which activation
            checkpointing (no cache) needs. Models without a cache of keys and values always do the latter.
    """
    model = policy.model
    cache = new_cache(policy.transformer) if share_prefix else None
    prompt_ids, prompt_mask, answers = tokens.prompt_ids, tokens.prompt_mask, tokens.answer_ids
    width, length = prompt_ids.shape[1], answers.shape[1]
    if cache is None:
        mask = torch.cat([prompt_mask[tokens.group], tokens.answer_mask], dim=1)
        ids = torch.cat([prompt_ids[tokens.group], answers], dim=1)
        each = [tokens.images[row] for row in tokens.group.tolist()] if tokens.images else []
        inputs = collate(each, width, after=length, device=ids.device)
        places, _ = positions_of(policy.transformer, ids, mask, inputs)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=False,
            logits_to_keep=length + 1,
            **inputs,
        ).logits[:, :-1]
        return logits[tokens.answer_mask.bool()]
    inputs = collate(tokens.images, width, device=prompt_ids.device)
    places, further = positions_of(policy.transformer, prompt_ids, prompt_mask, inputs)
    first = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **inputs,
    ).logits[tokens.group]
    if length == 1:
        return first[tokens.answer_mask.bool()]
    cache.batch_select_indices(tokens.group)
    seen = torch.cat([prompt_mask[tokens.group], tokens.answer_mask[:, :-1]], dim=1)
    rest = model(
        input_ids=answers[:, :-1],
        attention_mask=seen,
        position_ids=positions(seen)[:, width:] + further[tokens.group],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)[tokens.answer_mask.bool()]
