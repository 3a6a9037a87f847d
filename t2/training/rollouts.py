"""Rollouts: completions of a policy, sampled for training or greedy for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2.generation.decode import DecodeOptions, complete
from t2.generation.images import ImageInputs
from t2.training.policies import Policy


@dataclass(frozen=True)
class RolloutGenerator:
    """Completions of a policy, in the phase that fits them.

    device: of the model.
    pad_token: fills rows of unequal length.
    eos_ids: tokens that end a completion.
    """

    policy: Policy
    device: torch.device
    pad_token: int
    eos_ids: tuple[int, ...]

    def completions(
        self,
        prompts: Sequence[Tensor],
        new_tokens: int,
        *,
        images: Sequence[ImageInputs] = (),
        samples: int = 1,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        base: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """`samples` completions of each prompt as token ids, in one batch; arguments as in `complete`.

        Args:
            base: runs the base model instead of the policy.
        """
        rows = len(prompts) * samples
        prompt_tokens = -(-sum(map(len, prompts)) // rows)  # by row: each prompt is read once for all its samples
        options = DecodeOptions(new_tokens, self.eos_ids, self.pad_token, self.device)
        with self.policy.base() if base else self.policy.acting(prompt_tokens, new_tokens, rows):
            found = complete(
                self.policy,
                prompts,
                options,
                images=images,
                samples=samples,
                uniforms=uniforms,
                temperature=temperature,
            )
        tokens = [completion.tokens for completion in found]
        return [tuple(tokens[i : i + samples]) for i in range(0, rows, samples)]
