"""REINFORCE with a KL penalty (arXiv 2501.06252, section 3.1), and its loss over the vocabulary in one pass.

    J = E[ r(y) log pi_z(y | x) ] - lambda KL(pi_z || pi_base)

with log pi(y | x) and the KL added up over the tokens of an answer. The KL is exact at every token that was drawn: the
whole vocabulary of both models, not an estimate from the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2.training.options import Baseline

Head = Callable[[Tensor], Tensor]


def advantages(
    rewards: Tensor, baseline: Baseline = "none", *, normalise: bool = False, clip: float | None = None
) -> Tensor:
    """Advantages: the factors of each completion's log-likelihood.

    Args:
        rewards: [prompts, samples].
        baseline: "none"; "group" subtracts the mean reward of the prompt's completions (GRPO); "leave-one-out" the mean
            of the others (RLOO), which keeps the gradient unbiased.
        normalise: divide by the standard deviation over the whole batch, unless it is 0.
        clip: maximum absolute value, applied last.

    Returns:
        [prompts, samples] float32.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [prompts, samples], got {list(rewards.shape)}")
    samples = rewards.shape[1]
    values = rewards.float()
    if baseline != "none":
        if baseline == "leave-one-out" and samples < 2:
            raise ValueError(f"rewards: expected at least 2 samples a prompt to leave one out, got {samples}")
        values = values - values.mean(dim=1, keepdim=True)
        if baseline == "leave-one-out":
            values = values * (samples / (samples - 1))
    if normalise:
        spread = values.std(correction=0)
        values = values / spread if spread > 0 else values
    return values if clip is None else values.clamp(-clip, clip)


@dataclass
class TokenStatistics:
    """Sums over tokens, without gradient."""

    tokens: int = 0
    log_likelihood: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        return TokenStatistics(
            self.tokens + other.tokens,
            self.log_likelihood + other.log_likelihood,
            self.kl + other.kl,
            self.entropy + other.entropy,
        )


class _PolicyLoss(torch.autograd.Function):
    """sum_i ( -weight_i log p_i[token_i] + kl_weight count_i KL(p_i || q_i) ) over rows of logits [tokens, vocabulary].

    Autograd would keep half a dozen arrays of the logits' size. The gradient is known in closed form,

        dL/dlogit = weight (p - onehot(token)) + kl_weight count p (log p - log q - KL)

    so the forward pass computes it some rows at a time; and with a head, which makes logits of hidden states, nothing
    that spans the vocabulary is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        tokens: Tensor,
        weights: Tensor,
        counts: Tensor,
        base: Tensor | None,
        kl_weight: float,
        head: Head | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(4, dtype=torch.float64, device=states.device)  # loss, log-likelihood, KL, entropy
        gradient = torch.empty_like(states)
        for start in range(0, states.shape[0], chunk):
            rows = slice(start, start + chunk)
            gradient[rows], part = _chunk(
                states[rows],
                tokens[rows, None],
                weights[rows, None].float(),
                counts[rows, None].float(),
                None if base is None else base[rows],
                kl_weight,
                head,
            )
            sums += part
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(states.dtype), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient if grad_loss == 1 else gradient * grad_loss, None, None, None, None, None, None, None


def _chunk(
    states: Tensor,
    tokens: Tensor,
    weights: Tensor,
    counts: Tensor,
    base: Tensor | None,
    kl_weight: float,
    head: Head | None,
) -> tuple[Tensor, Tensor]:
    """The gradient of some rows, and their sums. All but `states` and `base` are [rows, 1]."""
    with torch.enable_grad():
        own = states.detach().requires_grad_(head is not None)
        logits = own if head is None else head(own)
    log_p = torch.log_softmax(logits.detach().float(), dim=-1)
    p = log_p.exp()
    chosen = log_p.gather(1, tokens)
    entropy = -(p * log_p).sum(dim=1, keepdim=True)
    change = weights * p
    change.scatter_add_(1, tokens, -weights)
    kl = torch.zeros_like(entropy)
    if base is not None:
        of_base = base if head is None else head(base)
        ratio = log_p.sub_(torch.log_softmax(of_base.float(), dim=-1))
        kl = (p * ratio).sum(dim=1, keepdim=True)
        change.addcmul_(p, ratio.sub_(kl).mul_(counts), value=kl_weight)
    change = change.to(logits.dtype)
    gradient = change if head is None else torch.autograd.grad(logits, own, change)[0]
    loss = (kl_weight * counts * kl - weights * chosen).sum()
    sums = torch.stack([loss, *((counts * value).sum() for value in (chosen, kl, entropy))])
    return gradient, sums.double()


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    weights: Tensor,
    base_logits: Tensor | None = None,
    kl_weight: float = 0.0,
    *,
    counts: Tensor | None = None,
    head: Head | None = None,
    chunk: int = 64,
) -> tuple[Tensor, TokenStatistics]:
    """sum over tokens of -weight log pi(token) + kl_weight count KL(pi || pi_base), and statistics of the tokens.

    Args:
        logits: policy logits [tokens, vocabulary], already divided by the temperature.
        tokens: sampled tokens, int64 [tokens].
        weights: [tokens], each token's advantage divided by the number of terms in its average.
        base_logits: base model's logits, like `logits`, without gradient; None leaves the KL out (and counts it as 0).
        kl_weight: weight of the KL penalty, divided in the same way.
        counts: [tokens], number of sampled tokens that each one stands for; default 1.
        head: makes logits of hidden states [rows, hidden]; `logits` and `base_logits` are then those, [tokens, hidden].
        chunk: rows whose float32 temporaries are held at once.

    Returns:
        The loss, a scalar with gradient for `logits`; and sums over the tokens.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: expected shape [tokens, vocabulary], got {list(logits.shape)}")
    counts = torch.ones_like(tokens) if counts is None else counts
    for name, tensor in (("tokens", tokens), ("weights", weights), ("counts", counts)):
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name}: expected shape [{logits.shape[0]}], got {list(tensor.shape)}")
    if base_logits is not None and base_logits.shape != logits.shape:
        raise ValueError(f"base_logits: expected shape {list(logits.shape)}, got {list(base_logits.shape)}")
    loss, sums = _PolicyLoss.apply(logits, tokens, weights, counts, base_logits, float(kl_weight), head, chunk)
    _, log_likelihood, kl, entropy = sums.tolist()
    return loss, TokenStatistics(int(counts.sum()), log_likelihood, kl, entropy)
