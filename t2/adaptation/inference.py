"""Two-pass inference (arXiv 2501.06252, section 3.2): pass one chooses experts, pass two completes the same batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.adaptation.base import Adaptation, Strategy
from t2.generation.batching import pad
from t2.generation.prompts import encode
from t2.model.svf_model import SVFModel
from t2.tasks.base import Problem
from t2.tasks.classify import Prompt


@dataclass(frozen=True)
class TwoPass:
    """Result of both passes. sequences: token ids [B, length], prompts included. answers: texts after the prompts."""

    adaptation: Adaptation
    sequences: Tensor
    answers: tuple[str, ...]
    first_seconds: float
    second_seconds: float


def as_problem(prompt: Prompt) -> Problem:
    """Problem of a prompt; a text becomes a user message."""
    if isinstance(prompt, Problem):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Problem(tuple(dict(message) for message in messages))


def two_pass(
    svf: SVFModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    strategy: Strategy | str,
    **generate_kwargs: Any,
) -> TwoPass:
    """Choose experts for a batch of prompts, and complete it with them.

    Args:
        prompts: texts, problems or conversations; they go through the chat template.
        strategy: a strategy, or the name of one set by `svf.set_adaptation`.
        generate_kwargs: for `svf.generate`, such as max_new_tokens.

    Raises:
        ValueError: no prompts, or an unknown strategy.
    """
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    chosen = svf.adaptation(strategy)
    encoded = [encode(as_problem(prompt), tokenizer) for prompt in prompts]
    ids, mask = (tensor.to(svf.sigma.device) for tensor in pad(encoded, int(tokenizer.pad_token_id), left=True))
    start = time.perf_counter()
    adaptation = cast(Adaptation, chosen.adapt(prompts))
    middle = time.perf_counter()
    experts = adaptation.choices(svf)
    sequences = svf.generate(input_ids=ids, attention_mask=mask, experts=experts, **generate_kwargs)
    end = time.perf_counter()
    answers = tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
    return TwoPass(adaptation, sequences, tuple(answers), middle - start, end - middle)
