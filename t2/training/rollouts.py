"""Answers of a policy, drawn or greedy, and the logits of its tokens for the update.

What rows have in common is read once: the tokens that all prompts of a batch begin with (a system prompt, the words of
the task), then each prompt for all its answers. Their keys and values are repeated for the rows that follow, and in the
update the gradient flows back through them. Of equal answers to a prompt the update sees one, with the weight of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from transformers.cache_utils import DynamicSlidingWindowLayer

from t2.attention import growing_cache, new_cache
from t2.decoding import decode, until_end
from t2.training.policies import Policy
from t2.vision import ImageInputs, collate, placeholder_tokens, positions, positions_of

WORTH_SHARING = 8
"""Tokens that prompts must have in common for a pass of their own."""
BLOCK = 256
"""Entries of the vocabulary whose probabilities are added up before the token is looked for among them."""


class Running(Protocol):
    """What runs: `model` is called, `transformer` is the transformers model that this ends in."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def transformer(self) -> PreTrainedModel: ...


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


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """A token for each row, drawn from softmax(logits / temperature) by the row's own uniform number.

    The token is the one where the cumulated probability passes the number: first the block of the vocabulary, then the
    token in it, so that only one block a row is cumulated entry by entry.

    Args:
        logits: [rows, vocabulary]; -inf is never drawn.
        uniforms: float64 [rows] in [0, 1).

    Returns:
        int64 [rows].
    """
    p = torch.softmax(logits.float() / temperature if temperature != 1.0 else logits.float(), dim=-1)
    p = nn.functional.pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass = p.sum(-1).double()
    cumulated = mass.cumsum(-1)
    below = uniforms[:, None] * cumulated[:, -1:]
    block = torch.searchsorted(cumulated, below, right=True).clamp_(max=mass.shape[-1] - 1)
    within = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    rest = below - (cumulated - mass).gather(1, block)
    rest = torch.minimum(rest.clamp_(min=0), within[:, -1:] * (1 - 1e-15))  # the block's sum was in float32
    return (block * BLOCK + torch.searchsorted(within, rest, right=True))[:, 0]


class Sampler(LogitsProcessor):
    """For transformers' own `generate`: leaves each row's drawn token as the only possible one.

    uniforms: [rows, tokens] float64 in [0, 1).
    width: of the padded prompts that come before the answers.
    """

    def __init__(self, uniforms: Tensor, width: int, temperature: float) -> None:
        self.uniforms, self.width, self.temperature = uniforms, width, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = draw_tokens(scores, self.uniforms[:, input_ids.shape[1] - self.width], self.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def uniforms(seed: int, step: int, prompts: Sequence[int], samples: int, tokens: int) -> Tensor:
    """[len(prompts) * samples, tokens] float64 in [0, 1), fixed by the seed, the step and a prompt's place in it.

    With one number for each row and position, a row's answer depends neither on the batch around it nor on how many
    processes share the work.
    """
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
        rows = len(prompts) * samples
        draw = None if draw is None else draw.to(self.device)
        read = -(-sum(map(len, prompts)) // rows)  # of the prompts, by row
        phase = self.policy.base() if base else self.policy.acting(read, new_tokens, rows)
        with phase, torch.inference_mode():
            transformer = self.policy.transformer
            cache = growing_cache(transformer) or new_cache(transformer)
            if cache is None:
                found = self._generated(prompts, images, new_tokens, samples, draw, temperature)
            else:
                found = self._decoded(cache, prompts, images, new_tokens, samples, draw, temperature)
        answers = [until_end(row, self.ends) for row in found.cpu().clone()]
        return [tuple(answers[i : i + samples]) for i in range(0, rows, samples)]

    def _decoded(
        self,
        cache: DynamicCache,
        prompts: Sequence[Tensor],
        images: Sequence[ImageInputs],
        new_tokens: int,
        samples: int,
        draw: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """Tokens [rows, new_tokens], as `decode` gives them."""
        shared = 0 if any(images) else shared_prefix(prompts, cache)
        ids, mask = pad([prompt[shared:] for prompt in prompts], self.pad_token, left=True)
        prefix, ids, mask = (tensor.to(self.device) for tensor in (prompts[0][:shared], ids, mask))
        first = read_prompts(self.policy, cache, prefix, ids, mask, collate(images, ids.shape[1], device=self.device))
        logits, mask, further = (tensor.repeat_interleave(samples, 0) for tensor in first)
        cache.batch_repeat_interleave(samples)
        forbidden = placeholder_tokens(self.policy.transformer) if any(images) else []

        def choose(logits: Tensor, rows: Tensor, place: int) -> Tensor:
            if forbidden:
                logits[:, forbidden] = -torch.inf
            return logits.argmax(-1) if draw is None else draw_tokens(logits, draw[rows, place], temperature)

        def select(kept: Tensor) -> None:
            nonlocal mask, further
            mask, further = mask[kept], further[kept]
            cache.batch_select_indices(kept)

        def read(token: Tensor) -> Tensor:
            nonlocal mask
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            after: Tensor = self.policy.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1 + further,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            return after

        return decode(logits, choose, read, select, new_tokens=new_tokens, ends=self.ends)

    def _generated(
        self,
        prompts: Sequence[Tensor],
        images: Sequence[ImageInputs],
        new_tokens: int,
        samples: int,
        draw: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """As `_decoded`, by transformers, for models that keep more than keys and values."""
        ids, mask = (tensor.to(self.device) for tensor in pad(prompts, self.pad_token, left=True))
        width = ids.shape[1]
        options = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.ends),
            pad_token_id=self.pad_token,
            suppress_tokens=placeholder_tokens(self.policy.transformer) if any(images) else None,
        )
        model: Any = self.policy.model
        out = model.generate(
            input_ids=ids.repeat_interleave(samples, 0),
            attention_mask=mask.repeat_interleave(samples, 0),
            generation_config=options,
            logits_processor=LogitsProcessorList([] if draw is None else [Sampler(draw, width, temperature)]),
            **collate([each for each in images for _ in range(samples)], width, device=self.device),
        )
        return out[:, width:]


def shared_prefix(prompts: Sequence[Tensor], cache: DynamicCache | None) -> int:
    """How many tokens at the start of all prompts to read once for all of them; at least one token is left of each.

    0 where a layer keeps a window alone: it counts places, and behind a shared prefix padding takes some.
    """
    if len(prompts) < 2 or cache is None or any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return 0
    length = min(len(prompt) for prompt in prompts) - 1
    starts = torch.stack([prompt[:length] for prompt in prompts])
    same = int((starts == starts[0]).all(0).long().cumprod(0).sum())
    return same if same >= WORTH_SHARING else 0


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
