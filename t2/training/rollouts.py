"""Answers of a policy, drawn or greedy, and the logits of its tokens for the update.

What rows have in common is read once: the tokens that all prompts of a batch begin with (a system prompt, the words of
the task), then each prompt for all its answers. Their keys and values are repeated for the rows that follow, and in the
update the gradient flows back through them. Of equal answers to a prompt the update sees one, with the weight of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
)

from t2.generation.batching import pad, shared_prefix
from t2.generation.decode import decode, until_end
from t2.generation.images import ImageInputs, collate, placeholder_tokens
from t2.generation.prefill import read_prompts
from t2.generation.sampling import Sampler, draw_tokens
from t2.model.kv_cache import growing_cache, new_cache
from t2.training.policies import Policy


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
