"""Greedy answers of many rows, each with an expert of its own, and how likely the model found them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from t2.attention import growing_cache, new_cache
from t2.training.rollouts import LEAVING, Running, pad, positions, shared_prefix

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
    batch, rows = _Batch(running, device, pad_token), list(range(len(prompts)))
    tokens: list[list[int]] = [[] for _ in prompts]
    likelihoods: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    with torch.inference_mode(), ExitStack() as held:
        shared = _read_common(batch, prompts, candidates, route)
        ids, mask = (tensor.to(device) for tensor in pad([p[shared:] for p in prompts], pad_token, left=True))
        held.enter_context(route(candidates))
        logits = batch.read(ids, mask)
        for length in range(1, new_tokens + 1):
            highest, chosen = logits.float().max(dim=-1)
            log_p = highest - logits.float().logsumexp(dim=-1)
            for row, token, likelihood in zip(rows, chosen.tolist(), log_p.tolist(), strict=True):
                if not finished[row]:
                    tokens[row].append(token)
                    likelihoods[row].append(likelihood)
                    finished[row] = token in ends
            going_on = [place for place, row in enumerate(rows) if not finished[row]]
            if not going_on or length == new_tokens:
                break
            if len(going_on) <= (1 - LEAVING) * len(rows):
                rows = [rows[place] for place in going_on]
                held.close()
                held.enter_context(route([candidates[row] for row in rows]))
                keep = torch.tensor(going_on, device=device)
                batch.select(keep)
                chosen = chosen[keep]
            logits = batch.read(chosen.unsqueeze(1), torch.ones_like(chosen.unsqueeze(1)))
    return [Answer(torch.tensor(t), math.fsum(p) / len(p)) for t, p in zip(tokens, likelihoods, strict=True)]


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
