"""The loop that answers come from: a token for every row of a batch after each other, until all have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEAVING = 0.2
"""Share of a batch's rows that have to be finished before those leave it, which copies the keys of the others."""


def decode(
    logits: Tensor,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    read: Callable[[Tensor], Tensor],
    select: Callable[[Tensor], object],
    *,
    new_tokens: int,
    ends: Sequence[int],
) -> Tensor:
    """Tokens [rows, new_tokens] int64; what stands behind a row's first end token means nothing (`until_end`).

    Rows that have ended leave the batch when enough of them have (`LEAVING`).

    Args:
        logits: [rows, vocabulary] after the prompts.
        choose: (logits [batch, vocabulary], rows [batch], place of the token) -> tokens [batch].
        read: tokens [batch] -> the logits after them.
        select: keeps these places of the batch alone; called before `read`.
        ends: tokens that end an answer.
    """
    count, device = len(logits), logits.device
    found = torch.full((count, new_tokens), ends[0], device=device)
    rows = torch.arange(count, device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    ending = torch.tensor(list(ends), device=device)
    for place in range(new_tokens):
        token = choose(logits, rows, place)
        found[rows, place] = token
        going &= ~torch.isin(token, ending)
        left = int(going.sum())
        if not left or place == new_tokens - 1:
            break
        if left <= (1 - LEAVING) * len(rows):
            kept = going.nonzero()[:, 0]
            rows, going, token = rows[kept], going[kept], token[kept]
            select(kept)
        logits = read(token)
    return found


def until_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """The tokens [length] up to the first end token, with it; all if there is none."""
    ended = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device)).nonzero()
    return tokens[: int(ended[0]) + 1] if len(ended) else tokens
