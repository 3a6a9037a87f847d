"""Greedy answers of many rows, each with an expert of its own, and how likely the model found them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from t2.generation.batching import pad, shared_prefix
from t2.generation.decode import decode, until_end
from t2.generation.images import positions
from t2.generation.prefill import Running
from t2.model.kv_cache import growing_cache, new_cache

RouteOf = Callable[[Sequence[int]], AbstractContextManager[None]]
"""For rows of these candidates, in this order: within the block each runs with its candidate's expert."""


@dataclass(frozen=True)
class Answer:
    """tokens: int64 [length], the end token included unless it was cut short. log_likelihood: the mean over them."""

    tokens: Tensor
    log_likelihood: float


class _Batch:
    """Rows that are read further and further: all their tokens' keys and values, or the tokens where there is no
    such cache."""

    def __init__(self, running: Running, device: torch.device, pad_token: int) -> None:
        self.running, self.device, self.pad_token = running, device, pad_token
        self.cache: DynamicCache | None = growing_cache(running.transformer) or new_cache(running.transformer)
        self.ids = torch.empty(0, 0, dtype=torch.int64, device=device)
        self.mask = self.ids

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Appends tokens [rows, new]; returns the logits [rows, vocabulary] after the last ones."""
        if not len(self.ids):
            self.ids, self.mask = ids[:, :0], mask[:, :0]
        self.ids, self.mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        if self.cache is None:
            arguments = {"input_ids": self.ids, "position_ids": positions(self.mask), "use_cache": False}
        else:
            places = positions(self.mask)[:, -ids.shape[1] :]
            arguments = {
                "input_ids": ids,
                "position_ids": places,
                "past_key_values": self.cache,
                "use_cache": True,
            }
        logits: Tensor = self.running.model(**arguments, attention_mask=self.mask, logits_to_keep=1).logits[:, -1]
        return logits

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, which may repeat."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


def greedy(
    running: Running,
    prompts: Sequence[Tensor],
    candidates: Sequence[int],
    route: RouteOf,
    *,
    new_tokens: int,
    ends: Sequence[int],
    pad_token: int,
    device: torch.device,
) -> list[Answer]:
    """The likeliest token after each other, until an end token; one batch, which rows leave when they are finished.

    What all prompts begin with is read once for each candidate.

    Args:
        prompts: token ids [length] of each row.
        candidates: the candidate that a row belongs to.
        route: gives rows their experts.
        new_tokens: the longest answer.
        ends: tokens that end an answer.
    """
    batch, rows = _Batch(running, device, pad_token), list(candidates)
    log_p = torch.zeros(len(prompts), new_tokens, dtype=torch.float64, device=device)

    def choose(logits: Tensor, rows: Tensor, place: int) -> Tensor:
        highest, tokens = logits.float().max(dim=-1)
        log_p[rows, place] = (highest - logits.float().logsumexp(dim=-1)).double()
        return tokens

    with torch.inference_mode(), ExitStack() as held:

        def select(kept: Tensor) -> None:
            rows[:] = [rows[place] for place in kept.tolist()]
            held.close()
            held.enter_context(route(rows))
            batch.select(kept)

        def read(tokens: Tensor) -> Tensor:
            return batch.read(tokens[:, None], torch.ones_like(tokens[:, None]))

        shared = _read_common(batch, prompts, candidates, route)
        ids, mask = (tensor.to(device) for tensor in pad([p[shared:] for p in prompts], pad_token, left=True))
        held.enter_context(route(candidates))
        found = decode(batch.read(ids, mask), choose, read, select, new_tokens=new_tokens, ends=ends).cpu()
    answers = [until_end(row, ends) for row in found.clone()]
    means = [float(row[: len(answer)].mean()) for row, answer in zip(log_p.cpu(), answers, strict=True)]
    return [Answer(answer, mean) for answer, mean in zip(answers, means, strict=True)]


def _read_common(batch: _Batch, prompts: Sequence[Tensor], candidates: Sequence[int], route: RouteOf) -> int:
    """Reads what all prompts begin with, once for each candidate, and returns how many tokens that is."""
    distinct = sorted(set(candidates))
    if len(distinct) == len(prompts):
        return 0
    shared = shared_prefix(prompts, batch.cache)
    if shared:
        ids = prompts[0][:shared].to(batch.device).expand(len(distinct), -1)
        with route(distinct):
            batch.read(ids, torch.ones_like(ids))
        place = {candidate: index for index, candidate in enumerate(distinct)}
        batch.select(torch.tensor([place[candidate] for candidate in candidates], device=batch.device))
    return shared
