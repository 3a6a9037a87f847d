"""The loss without the vocabulary's logits of all tokens, and the models that it is for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from t2.generation.head import OutputHead
from t2.generation.scoring import MicroBatch, PromptGroup, completion_logits, completion_tokens
from t2.training import Trainer
from t2.training.loss import policy_loss
from t2.training.policies import make_policy
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer

GROUPS = (
    PromptGroup(torch.tensor([4, 5]), (torch.tensor([5, 2]), torch.tensor([6, 6, 2])), (0.5, -0.25)),
    PromptGroup(torch.tensor([4, 4, 6]), (torch.tensor([2]),), (1.0,)),
)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("method", ["svf", "lora", "dense-compose"])
def test_loss_and_gradient_of_hidden_states_are_those_of_logits(make_options, method: str, share_prefix: bool):
    policy = make_policy(toy_model(), make_options(method=method))
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokens = completion_tokens(MicroBatch(GROUPS), 0, torch.device("cpu"))
    weights = tokens.per_token(torch.tensor([weight for group in GROUPS for weight in group.weights]))
    head = OutputHead.of(policy)
    assert head is not None

    def states(apart: bool):
        if not apart:
            return completion_logits(policy, tokens, share_prefix=share_prefix)
        with head.left_out():
            return completion_logits(policy, tokens, share_prefix=share_prefix)

    found = []
    for apart in (False, True):
        with torch.no_grad(), policy.base():
            base = states(apart)
        with policy.learning():
            own = states(apart)
            assert own.shape == (len(tokens.targets), 32 if apart else 14)
            loss, seen = policy_loss(own, tokens.targets, weights, base, 0.3, head=head if apart else None, chunk=2)
            loss.backward()
        policy.finish_gradients()
        found.append((loss.detach(), torch.tensor([seen.kl, seen.entropy]), *[p.grad for p in policy.parameters]))
        for parameter in policy.parameters:
            parameter.grad = None
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_another_thread_gets_logits_meanwhile(make_options):
    policy = make_policy(toy_model(), make_options(method="svf"))
    head, ids = OutputHead.of(policy), torch.tensor([[4, 5, 6]])
    want = policy.model(input_ids=ids).logits
    with ThreadPoolExecutor(1) as other, head.left_out():
        assert policy.model(input_ids=ids).logits.shape == (1, 3, 32)
        assert torch.equal(other.submit(lambda: policy.model(input_ids=ids).logits).result(), want)
        with head.left_out():
            pass
        assert policy.model(input_ids=ids).logits.shape == (1, 3, 32)
    assert torch.equal(policy.model(input_ids=ids).logits, want)


@pytest.mark.parametrize("config", [Gemma2Config, CohereConfig])
def test_a_model_that_changes_its_logits_has_no_head_apart(make_options, config):
    sizes = dict(vocab_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(
        config(num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    )
    policy = make_policy(model, make_options(method="lora"))
    assert OutputHead.of(policy) is None


def test_training_is_the_same_either_way(make_options, tmp_path, monkeypatch):
    def curve(name):
        options = make_options(steps=4, output=tmp_path / name, temperature=0.7, kl_coefficient=0.1)
        trainer = Trainer(toy_model(), toy_tokenizer(), SayTheWord(), options)
        trainer.run()
        return trainer.metrics.series("loss")[1], trainer.metrics.series("kl")[1], trainer.policy.z().detach()

    apart = curve("apart")
    monkeypatch.setattr(OutputHead, "of", classmethod(lambda cls, runner: None))
    for one, other in zip(apart, curve("whole"), strict=True):
        assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-3, atol=1e-4)
