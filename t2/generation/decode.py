"""The decode engine: completions of many prompts in one batch, sampled or greedy, each row with an expert of its own.

What rows have in common is read once: the tokens that all prompts begin with (a system prompt, the words of the task),
then each prompt for all its samples. Their keys and values are repeated for the rows that follow. Rows leave the batch
when they are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from t2.generation.batching import pad, shared_prefix
from t2.generation.cached_batch import CachedBatch, Runner
from t2.generation.images import ImageInputs, collate, placeholder_tokens
from t2.generation.sampling import UniformSampler, draw_tokens, likeliest_tokens
from t2.model.kv_cache import growing_cache, new_cache

LEAVING = 0.2
"""Share of a batch's rows that have to be finished before those leave it, which copies the keys of the others."""

RouteOf = Callable[[Sequence[int]], AbstractContextManager[None]]
"""A context for rows of these candidates, in this order: within it each row runs with its candidate's expert."""


@dataclass(frozen=True)
class Completion:
    """Tokens int64 [length], ended by an EOS id unless cut short.

    `log_likelihood` is the mean over the tokens of the model's log-probability; NaN where it was not asked for.
    """

    tokens: Tensor
    log_likelihood: float = float("nan")


@dataclass(frozen=True)
class DecodeOptions:
    """Limits and ids of a decode call.

    new_tokens: most tokens of a completion.
    eos_ids: tokens that end one.
    pad_token: fills rows of unequal length.
    device: of the model.
    """

    new_tokens: int
    eos_ids: tuple[int, ...]
    pad_token: int
    device: torch.device


def complete(
    runner: Runner,
    prompts: Sequence[Tensor],
    options: DecodeOptions,
    *,
    candidates: Sequence[int] | None = None,
    route: RouteOf | None = None,
    images: Sequence[ImageInputs] = (),
    samples: int = 1,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    likelihoods: bool = False,
) -> list[Completion]:
    """`samples` completions of each prompt, in one batch, prompt by prompt.

    A model whose cache holds more than keys and values is decoded by its own `generate`, all rows to the end.

    Args:
        prompts: token ids [length] each.
        candidates: the candidate that each prompt belongs to; default all the same.
        route: gives rows their experts; default: whatever route the caller is in.
        images: image inputs of each prompt, or none at all. No token that stands for an image is generated then.
        uniforms: random numbers [len(prompts) * samples, new_tokens] float64 in [0, 1); without them greedy.
        temperature: of sampling.
        likelihoods: whether to compute `Completion.log_likelihood`.
    """
    batch = _Batch(runner, prompts, options, candidates, route, images, samples, uniforms, temperature, likelihoods)
    with torch.inference_mode():
        cache = growing_cache(runner.transformer) or new_cache(runner.transformer)
        tokens = batch.generated() if cache is None else batch.decoded(CachedBatch(runner, cache))
    found = [until_eos(row, options.eos_ids) for row in tokens.cpu().clone()]
    if not likelihoods:
        return [Completion(row) for row in found]
    means = [float(log_p[: len(row)].mean()) for log_p, row in zip(batch.log_p.cpu(), found, strict=True)]
    return [Completion(row, mean) for row, mean in zip(found, means, strict=True)]


class _Batch:
    """One call of `complete`; arguments as there."""

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Tensor],
        options: DecodeOptions,
        candidates: Sequence[int] | None,
        route: RouteOf | None,
        images: Sequence[ImageInputs],
        samples: int,
        uniforms: Tensor | None,
        temperature: float,
        likelihoods: bool,
    ) -> None:
        self.runner, self.prompts, self.options = runner, prompts, options
        self.candidates = list(candidates) if candidates is not None else [0] * len(prompts)
        self.route = route or (lambda rows: nullcontext())
        self.images, self.samples, self.temperature = images, samples, temperature
        self.uniforms = None if uniforms is None else uniforms.to(options.device)
        self.rows = [candidate for candidate in self.candidates for _ in range(samples)]
        self.forbidden = placeholder_tokens(runner.transformer) if any(images) else []
        self.likelihoods = likelihoods
        shape = len(self.rows) if likelihoods else 0, options.new_tokens
        self.log_p = torch.zeros(shape, dtype=torch.float64, device=options.device)

    def decoded(self, batch: CachedBatch) -> Tensor:
        """Tokens [rows, new_tokens]; those behind a row's first EOS id mean nothing."""
        device, rows = self.options.device, list(self.rows)
        with ExitStack() as held:

            def select(kept: Tensor) -> None:
                rows[:] = [rows[place] for place in kept.tolist()]
                held.close()
                held.enter_context(self.route(rows))
                batch.select(kept)

            shared = self._read_prefix(batch)
            ids, mask = pad([prompt[shared:] for prompt in self.prompts], self.options.pad_token, left=True)
            held.enter_context(self.route(self.candidates))  # it serves the samples of each prompt too
            logits = batch.read(ids.to(device), mask.to(device), collate(self.images, ids.shape[1], device=device))
            if self.samples > 1:
                batch.repeat(self.samples)
                logits = logits.repeat_interleave(self.samples, 0)
            return self._loop(logits, batch, select)

    def _read_prefix(self, batch: CachedBatch) -> int:
        """Reads the tokens that all prompts begin with, once for each candidate; returns how many those are."""
        distinct = sorted(set(self.candidates))
        if any(self.images) or len(distinct) == len(self.prompts):
            return 0
        shared = shared_prefix(self.prompts, batch.cache)
        if shared:
            prefix = self.prompts[0][:shared].to(self.options.device).expand(len(distinct), -1)
            with self.route(distinct):
                batch.read(prefix, torch.ones_like(prefix))
            place = {candidate: index for index, candidate in enumerate(distinct)}
            batch.select(torch.tensor([place[candidate] for candidate in self.candidates], device=self.options.device))
        return shared

    def _loop(self, logits: Tensor, batch: CachedBatch, select: Callable[[Tensor], None]) -> Tensor:
        count, device, eos_ids = len(logits), logits.device, self.options.eos_ids
        found = torch.full((count, self.options.new_tokens), eos_ids[0], device=device)
        rows = torch.arange(count, device=device)
        going = torch.ones_like(rows, dtype=torch.bool)
        ending = torch.tensor(list(eos_ids), device=device)
        for place in range(self.options.new_tokens):
            token = self._choose(logits, rows, place)
            found[rows, place] = token
            going &= ~torch.isin(token, ending)
            left = int(going.sum())
            if not left or place == self.options.new_tokens - 1:
                break
            if left <= (1 - LEAVING) * len(rows):
                kept = going.nonzero()[:, 0]
                rows, going, token = rows[kept], going[kept], token[kept]
                select(kept)
            logits = batch.append(token)
        return found

    def _choose(self, logits: Tensor, rows: Tensor, place: int) -> Tensor:
        """The next token [batch] of these rows, given logits [batch, vocabulary]."""
        if self.forbidden:
            logits[:, self.forbidden] = -torch.inf
        if self.uniforms is not None:
            tokens = draw_tokens(logits, self.uniforms[rows, place], self.temperature)
        else:
            tokens = likeliest_tokens(logits)
        if self.likelihoods:
            exact = logits.float()
            chosen = exact.gather(1, tokens[:, None])[:, 0]
            self.log_p[rows, place] = (chosen - exact.logsumexp(dim=-1)).double()
        return tokens

    def generated(self) -> Tensor:
        """Tokens [rows, at most new_tokens] by transformers' `generate`."""
        device = self.options.device
        ids, mask = (tensor.to(device) for tensor in pad(self.prompts, self.options.pad_token, left=True))
        width = ids.shape[1]
        options = GenerationConfig(
            max_new_tokens=self.options.new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.options.eos_ids),
            pad_token_id=self.options.pad_token,
            suppress_tokens=self.forbidden or None,
            return_dict_in_generate=self.likelihoods,
            output_logits=self.likelihoods,
        )
        sampler = UniformSampler(self.uniforms, width, self.temperature) if self.uniforms is not None else None
        model: Any = self.runner.model
        with self.route(self.rows):
            out = model.generate(
                input_ids=ids.repeat_interleave(self.samples, 0),
                attention_mask=mask.repeat_interleave(self.samples, 0),
                generation_config=options,
                logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
                **collate([each for each in self.images for _ in range(self.samples)], width, device=device),
            )
        if not self.likelihoods:
            return out[:, width:]
        tokens = out.sequences[:, width:]
        for place, logits in enumerate(out.logits):
            exact = logits.float()
            chosen = exact.gather(1, tokens[:, place : place + 1])[:, 0]
            self.log_p[:, place] = (chosen - exact.logsumexp(dim=-1)).double()
        return tokens


def until_eos(tokens: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """The tokens [length] up to the first EOS id, with it; all if there is none."""
    ended = torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device)).nonzero()
    return tokens[: int(ended[0]) + 1] if len(ended) else tokens
