from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2.training.loss import advantages, policy_loss


def test_advantages_are_rewards_less_their_baseline():
    rewards = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(advantages(rewards), rewards)
    torch.testing.assert_close(advantages(rewards, "group")[0], torch.tensor([1.5, -0.5, -0.5, -0.5]))
    loo = advantages(rewards, "leave-one-out")
    for i in range(4):
        others = rewards[0, torch.arange(4) != i]
        assert loo[0, i] == pytest.approx(float(rewards[0, i] - others.mean()))
    assert not loo[1].any()
    assert advantages(rewards, "group", normalise=True).std(correction=0) == pytest.approx(1.0)
    assert not advantages(torch.ones(2, 3), "group", normalise=True).any()
    assert advantages(rewards, "group", clip=0.25).abs().max() == 0.25


@pytest.mark.parametrize(
    ("rewards", "baseline", "message"),
    [
        (torch.ones(3), "none", r"rewards: expected shape \[prompts, samples\], got \[3\]"),
        (torch.ones(3, 1), "leave-one-out", "at least 2 samples"),
    ],
)
def test_advantages_refuse(rewards: Tensor, baseline: str, message: str):
    with pytest.raises(ValueError, match=message):
        advantages(rewards, baseline)  # type: ignore[arg-type]


def reference(logits: Tensor, tokens: Tensor, weights: Tensor, base: Tensor | None, kl_weight: float) -> Tensor:
    """The formula in torch's own operators, float64."""
    log_p = torch.log_softmax(logits, -1)
    loss = -(weights * log_p.gather(1, tokens[:, None])[:, 0]).sum()
    if base is not None:
        log_q = torch.log_softmax(base, -1)
        loss = loss + kl_weight * (log_p.exp() * (log_p - log_q)).sum()
    return loss


@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
@pytest.mark.parametrize("with_base", [False, True])
def test_policy_loss_and_its_gradient_are_those_of_autograd(tokens: int, with_base: bool):
    torch.manual_seed(tokens)
    logits = (3 * torch.randn(tokens, 577)).requires_grad_()
    base = logits.detach() + torch.randn(tokens, 577) if with_base else None
    chosen, weights = torch.randint(577, (tokens,)), torch.randn(tokens)
    loss, seen = policy_loss(logits, chosen, weights, base, 0.3, chunk=32)
    (0.5 * loss).backward()

    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, chosen, weights.double(), None if base is None else base.double(), 0.3)
    (0.5 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    log_p = torch.log_softmax(exact.detach(), -1)
    assert seen.tokens == tokens
    assert seen.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-4, abs=1e-6)
    assert seen.log_likelihood == pytest.approx(float(log_p.gather(1, chosen[:, None]).sum()), rel=1e-4, abs=1e-6)
    if base is None:
        assert seen.kl == 0.0
    else:
        kl = (log_p.exp() * (log_p - torch.log_softmax(base.double(), -1))).sum()
        assert seen.kl == pytest.approx(float(kl), rel=1e-4, abs=1e-6)


def test_a_token_that_counts_several_times_is_several_tokens():
    torch.manual_seed(0)
    logits, base = torch.randn(3, 40), torch.randn(3, 40)
    chosen, counts = torch.tensor([1, 2, 3]), torch.tensor([1, 3, 2])
    weights = torch.tensor([0.5, -1.0, 2.0])
    once = logits.clone().requires_grad_()
    loss, seen = policy_loss(once, chosen, weights, base, 0.3, counts=counts)
    loss.backward()
    each = torch.repeat_interleave(torch.arange(3), counts)
    all_logits = logits.clone().requires_grad_()
    every, expected = policy_loss(all_logits[each], chosen[each], (weights / counts)[each], base[each], 0.3)
    every.backward()
    torch.testing.assert_close(loss, every)
    torch.testing.assert_close(once.grad, all_logits.grad)
    assert (
        seen.tokens == 6 and seen.kl == pytest.approx(expected.kl) and seen.entropy == pytest.approx(expected.entropy)
    )


def test_the_kl_of_a_model_to_itself_is_nothing():
    logits = torch.randn(5, 40).requires_grad_()
    loss, seen = policy_loss(logits, torch.zeros(5, dtype=torch.int64), torch.zeros(5), logits.detach(), 1.0)
    loss.backward()
    assert abs(seen.kl) < 1e-5 and logits.grad.abs().max() < 1e-6


def test_half_precision_logits_keep_their_dtype():
    logits = torch.randn(9, 40).bfloat16().requires_grad_()
    loss, _ = policy_loss(logits, torch.zeros(9, dtype=torch.int64), torch.ones(9))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.ones(2, 3, 4)}, r"logits: expected shape \[tokens, vocabulary\], got \[2, 3, 4\]"),
        ({"tokens": torch.ones(3, dtype=torch.int64)}, r"tokens: expected shape \[2\], got \[3\]"),
        ({"weights": torch.ones(2, 1)}, r"weights: expected shape \[2\], got \[2, 1\]"),
        ({"base_logits": torch.ones(2, 9)}, r"base_logits: expected shape \[2, 5\], got \[2, 9\]"),
    ],
)
def test_policy_loss_refuses(arguments: dict[str, Tensor], message: str):
    given = {"logits": torch.ones(2, 5), "tokens": torch.zeros(2, dtype=torch.int64), "weights": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        policy_loss(**given | arguments)
