"""Check of a mixed batch against the reference: each request's expert merged into a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RowCheck:
    """Comparison of one request with its expert merged into a plain model."""

    expert: str
    equal: bool  # all tokens
    logit_difference: float  # largest, over tokens up to the first that differs
    ties: list[tuple[int, float]]  # where tokens differ first: position and gap of the two leading logits

    @property
    def passed(self) -> bool:
        """Tokens may differ only where the two leading logits are closer than the logits' own error."""
        return self.equal or all(gap <= 2 * self.logit_difference for _, gap in self.ties)


@torch.no_grad()
def check_row(plain: Any, batch: Mapping[str, Tensor], generated: Any, row: int, expert: str) -> RowCheck:
    """Compare one row of a mixed batch with `plain`, a causal LM that has the row's expert built in.

    If the plain model, fed the row's own tokens, would have chosen each of them, it generates the same ones.

    Args:
        batch: `input_ids` and `attention_mask`, left-padded.
        generated: output of `generate(**fixed_length(n), return_dict_in_generate=True, output_logits=True)`.
    """
    width = batch["input_ids"].shape[1]
    prompt = batch["input_ids"][row, width - int(batch["attention_mask"][row].sum()) :]
    answer = generated.sequences[row, width:]
    merged = plain(input_ids=torch.cat([prompt, answer])[None, :-1]).logits[0, len(prompt) - 1 :]
    own = torch.stack([step[row] for step in generated.logits])
    return compare_row(merged, own, answer, expert)


def compare_row(merged_logits: Tensor, logits: Tensor, tokens: Tensor, expert: str) -> RowCheck:
    """Compare logits [tokens, vocabulary] at the positions that chose `tokens` [tokens] greedily."""
    differs = (merged_logits.argmax(-1) != tokens).nonzero().flatten().tolist()
    until = differs[0] + 1 if differs else len(tokens)
    difference = float((merged_logits[:until] - logits[:until]).abs().max())
    ties = []
    if differs:
        first, second = merged_logits[differs[0]].topk(2).values.tolist()
        ties.append((differs[0], first - second))
    return RowCheck(expert, not differs, difference, ties)
