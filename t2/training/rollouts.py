"""Answers of a policy, drawn or greedy, and the logits of its tokens for the update.

Several answers to one prompt share its prefix: the prompt is read once, its keys and values are repeated for the
answers, and in the update the gradient flows back through them to the one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from t2.attention import growing_cache, new_cache
from t2.training.policies import Policy


class Running(Protocol):
    """What runs: `model` is called, `transformer` is the transformers model that this ends in."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def transformer(self) -> PreTrainedModel: ...


@dataclass(frozen=True)
class Group:
    """A prompt and some answers to it, as token ids [length] without padding; an answer ends with its end token.

    `weights` are what the log-likelihood of each answer's tokens is multiplied with in the update.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    weights: tuple[float, ...] = ()

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
        samples: int = 1,
        draw: Tensor | None = None,
        temperature: float = 1.0,
        base: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """`samples` answers to each prompt, in one batch; each ends with its end token unless it was cut short.

        Args:
            prompts: token ids [length] each.
            new_tokens: the longest answer.
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
        )
        processors = LogitsProcessorList()
        if draw is not None:
            processors.append(Sampler(draw.to(self.device), width, temperature))
        phase = self.policy.base() if base else self.policy.acting(width, new_tokens, rows)
        with phase, torch.inference_mode():
            cache = self._prefix(ids, mask) if samples > 1 else None
            if cache is not None:
                cache.batch_repeat_interleave(samples)
            model: Any = self.policy.model
            out = model.generate(
                input_ids=ids.repeat_interleave(samples, 0),
                attention_mask=mask.repeat_interleave(samples, 0),
                generation_config=options,
                logits_processor=processors,
                **({} if cache is None else {"past_key_values": cache}),
            )
        answers = [self._cut(row) for row in out[:, width:].cpu().clone()]
        return [tuple(answers[i : i + samples]) for i in range(0, rows, samples)]

    def _prefix(self, ids: Tensor, mask: Tensor) -> DynamicCache | None:
        """Keys and values of all but the prompts' last tokens, or None where the model's cache cannot be repeated."""
        transformer = self.policy.transformer
        cache = growing_cache(transformer) or new_cache(transformer)
        if cache is None or ids.shape[1] < 2:
            return None
        self.policy.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions(mask[:, :-1]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def _cut(self, row: Tensor) -> Tensor:
        """The tokens up to the first end token, with it."""
        ended = torch.isin(row, torch.tensor(self.ends)).nonzero()
        return row[: int(ended[0]) + 1] if len(ended) else row


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many first tokens all prompts share, at least one of each left over."""
    first, shared = prompts[0], min(len(prompt) for prompt in prompts) - 1
    for prompt in prompts[1:]:
        different = (prompt[:shared] != first[:shared]).nonzero()
        shared = int(different[0]) if len(different) else shared
    return shared


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
            divided.append(Group(group.prompt, group.answers[part], group.weights[part]))
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
    """The answers of a micro-batch, padded: what `answer_logits` reads and the loss is over.

    `common` are token ids [C] that all prompts begin with and `prompt_ids` leaves out.
    """

    prompt_ids: Tensor  # [groups, P], left-padded
    prompt_mask: Tensor
    answer_ids: Tensor  # [answers, T], right-padded
    answer_mask: Tensor
    group: Tensor  # [answers], the row of the prompt
    common: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def targets(self) -> Tensor:
        """The answers' tokens one after the other, [tokens]."""
        return self.answer_ids[self.answer_mask.bool()]

    def per_token(self, values: Tensor) -> Tensor:
        """One value for each answer, [answers], as one for each of its tokens, [tokens]."""
        return values.unsqueeze(1).expand_as(self.answer_ids)[self.answer_mask.bool()]


def answer_tokens(
    batch: MicroBatch, pad_token: int, device: torch.device, *, share_common: bool = False
) -> AnswerTokens:
    """`share_common`: what all prompts begin with is read once; for models that `t2.attention.keeps_everything`."""
    prompts = [group.prompt for group in batch.groups]
    shared = common_prefix(prompts) if share_common else 0
    prompt_ids, prompt_mask = pad([prompt[shared:] for prompt in prompts], pad_token, left=True)
    answer_ids, answer_mask = pad([a for group in batch.groups for a in group.answers], pad_token, left=False)
    counts = torch.tensor([len(group.answers) for group in batch.groups])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    tensors = (prompt_ids, prompt_mask, answer_ids, answer_mask, rows, prompts[0][:shared])
    return AnswerTokens(*(tensor.to(device) for tensor in tensors))


def answer_logits(running: Running, tokens: AnswerTokens, *, share_prefix: bool = True) -> Tensor:
    """Logits [tokens, vocabulary] of each answer's tokens, one answer after the other, with their gradient.

    Args:
        running: a policy, or anything else that runs. Where it runs with a route, that is one expert for all rows.
        share_prefix: read each prompt once for all its answers; otherwise once an answer, which activation
            checkpointing (no cache) needs. Models without a cache of keys and values always do the latter.
    """
    model = running.model
    cache = new_cache(running.transformer) if share_prefix else None
    prompt_ids, prompt_mask, answers = tokens.prompt_ids, tokens.prompt_mask, tokens.answer_ids
    length, common = answers.shape[1], len(tokens.common)
    if cache is None:
        if common:
            raise ValueError(
                "tokens: expected whole prompts where no cache is shared, got ones without their beginning"
            )
        mask = torch.cat([prompt_mask[tokens.group], tokens.answer_mask], dim=1)
        logits = model(
            input_ids=torch.cat([prompt_ids[tokens.group], answers], dim=1),
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        return logits[tokens.answer_mask.bool()]
    if common:
        model(input_ids=tokens.common.unsqueeze(0), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompt_ids))
        prompt_mask = torch.cat([prompt_mask.new_ones(len(prompt_ids), common), prompt_mask], dim=1)
    first = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask)[:, common:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[tokens.group]
    if length == 1:
        return first[tokens.answer_mask.bool()]
    cache.batch_select_indices(tokens.group)
    seen = torch.cat([prompt_mask[tokens.group], tokens.answer_mask[:, :-1]], dim=1)
    rest = model(
        input_ids=answers[:, :-1],
        attention_mask=seen,
        position_ids=positions(seen)[:, prompt_mask.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)[tokens.answer_mask.bool()]
