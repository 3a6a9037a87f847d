"""The choice of a support: the components of each matrix that training may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2.experts.support import changes_of, experts_in, top_components
from t2.generation.scoring import PromptGroup, completion_logits, completion_tokens, micro_batches
from t2.training.loss import policy_loss
from t2.training.policies import ExpertPolicy


def gradient_scores(
    policy: ExpertPolicy, groups: Sequence[PromptGroup], *, pad_token: int, token_budget: int
) -> Tensor:
    """|d loss / d z| [R] of the weighted likelihood of the groups' completions, at the policy's z.

    Args:
        groups: prompts with their solutions as completions.
        pad_token: fills rows of unequal length.
        token_budget: most tokens of a batch, padding included.
    """
    (parameters,) = policy.parameters
    for batch in micro_batches(groups, token_budget):
        tokens = completion_tokens(batch, pad_token, parameters.device)
        weights = torch.tensor([weight for group in batch.groups for weight in group.weights], device=parameters.device)
        with policy.learning():
            loss, _ = policy_loss(
                completion_logits(policy, tokens), tokens.targets, tokens.per_token(weights), None, 0.0
            )
            loss.backward()
    policy.finish_gradients()
    assert parameters.grad is not None
    scores, parameters.grad = parameters.grad.abs(), None
    return scores


def support_like(policy: ExpertPolicy, path: Path, count: int) -> Tensor:
    """Positions [K] of the `count` components of each matrix that earlier experts change most: `experts_in(path)`.

    Raises:
        FileNotFoundError, FileFormatError: a file cannot be read. ValueError: it is for other matrices.
    """
    experts = experts_in(path, policy.layout, same_base=False)
    return top_components(changes_of(experts, policy.sigma), policy.layout, count)
