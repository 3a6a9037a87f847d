"""Sampling with one uniform number for each row and position, independent of the batch around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, set_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn from the nucleus of `top_p` with the seed's numbers.

    seed: None is a new one for each request.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected an integer of at most 64 bits, got {self.seed}")

    def seeded(self) -> dict[str, Any]:
        """Options of `generate` in transformers, whose generators are seeded here where there is a seed."""
        if self.temperature == 0.0:
            return {"do_sample": False}
        if self.seed is not None:
            set_seed(self.seed)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


BLOCK = 256
"""Entries of the vocabulary whose probabilities are added up before the token is looked for among them."""


def likeliest_tokens(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of [rows, vocabulary], the first of equals; on a CPU five times as fast, block by block."""
    exact = logits.float()  # torch is slow at 16 bits
    whole = exact.shape[-1] // BLOCK * BLOCK
    if exact.device.type != "cpu" or not whole:
        return exact.argmax(-1)
    blocks = exact[:, :whole].unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    tokens = block[:, 0] * BLOCK + within.argmax(-1)
    if whole < exact.shape[-1]:
        both = torch.stack([tokens, whole + exact[:, whole:].argmax(-1)], -1)
        tokens = both.gather(1, exact.gather(1, both).argmax(-1, keepdim=True))[:, 0]
    return tokens


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


def without_tail(logits: Tensor, top_p: Tensor) -> Tensor:
    """Logits [rows, vocabulary] with -inf for all but the likeliest tokens that together have `top_p` [rows]."""
    if bool((top_p >= 1).all()):
        return logits
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    out = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= top_p[:, None])
    return logits.masked_fill(out, -torch.inf)


class UniformSampler(LogitsProcessor):
    """`draw_tokens` for transformers' own `generate`: leaves each row's drawn token as the only possible one.

    uniforms: [rows, tokens] float64 in [0, 1).
    width: tokens of the padded prompts.
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
