from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import t2
from t2.training.policies import Policy, SVFPolicy, make_policy, svf_config
from tests.t2.toy import toy_model

IDS = torch.tensor([[4, 5, 6, 7], [4, 8, 9, 2]])


def gradient_of(policy: Policy) -> torch.Tensor:
    with policy.learning():
        logits = policy.model(input_ids=IDS).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    policy.finish_gradients()
    return policy.parameters[0].grad


@pytest.mark.parametrize("parametrisation", ["free", "sigmoid"])
@pytest.mark.parametrize("targets", [("all-linear",), ("mlp",), ("attention",)])
def test_gradients_equal_the_published_way(make_options, parametrisation: str, targets: tuple[str, ...]):
    found = []
    for method in ("svf", "dense-compose"):
        policy = make_policy(
            toy_model(), make_options(method=method, parametrisation=parametrisation, target_modules=targets)
        )
        with torch.no_grad():
            noise = torch.randn(policy.trainable, generator=torch.Generator().manual_seed(0))
            policy.parameters[0].add_(0.1 * noise)
        found.append(gradient_of(policy))
    svf, published = found
    assert (svf - published).norm() <= 1e-4 * published.norm() and published.norm() > 0


@pytest.mark.parametrize("method", ["svf", "lora", "dense-compose"])
def test_every_method_starts_at_the_base_and_keeps_it(make_options, method: str):
    base = toy_model()(input_ids=IDS).logits
    policy = make_policy(toy_model(), make_options(method=method))
    with policy.acting(4, 1, 2), torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, base, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    with policy.acting(4, 1, 2), torch.no_grad():
        assert (policy.model(input_ids=IDS).logits - base).abs().max() > 0.01
    with policy.base(), torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, base, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["svf", "lora", "dense-compose"])
def test_only_the_parameters_get_gradients(make_options, method: str):
    policy = make_policy(toy_model(), make_options(method=method))
    if method == "lora":
        with policy.learning():
            policy.model(input_ids=IDS).logits.square().sum().backward()
        policy.finish_gradients()
    else:
        gradient_of(policy)
    mine = {id(parameter) for parameter in policy.parameters}
    others = [p for p in policy.transformer.parameters() if id(p) not in mine]
    assert others and all(p.grad is None for p in others)
    assert all(p.grad is not None for p in policy.parameters)


def test_saved_experts_serve(make_options, tmp_path):
    policy = SVFPolicy(toy_model(), make_options())
    with torch.no_grad():
        policy.parameters[0].mul_(1.1)
    path = policy.save(tmp_path / "expert", {"task": "say"})
    expert = t2.Expert.load(path)
    assert path.name == "expert.safetensors" and expert.metadata == {"task": "say"}
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    with policy.acting(4, 1, 2), torch.no_grad():
        expected = policy.model(input_ids=IDS).logits
        torch.testing.assert_close(svf(input_ids=IDS, experts=expert).logits, expected)


def test_saved_adapters_load_in_peft(make_options, tmp_path):
    from peft import PeftModel

    policy = make_policy(toy_model(), make_options(method="lora"))
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.2)
    path = policy.save(tmp_path / "adapter", {"task": "say"})
    policy.save(tmp_path / "adapter", {"task": "say"})
    assert sorted(p.suffix for p in path.iterdir() if p.name.startswith("adapter_model")) == [".safetensors"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(toy_model()), str(path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)


def test_a_wrapped_model_is_taken_as_it_is(make_options):
    options = make_options(factor_dtype="int8", target_modules=("mlp",))
    svf = t2.SVFModel(toy_model(), svf_config(options))
    policy = make_policy(svf, options)
    assert isinstance(policy, SVFPolicy) and policy.svf is svf and policy.transformer is svf.model
    assert torch.equal(gradient_of(policy), gradient_of(make_policy(toy_model(), options)))
    for changes, message in (
        ({"factor_dtype": "float16"}, r"model: expected one wrapped with dtype torch.float16, got torch.int8"),
        ({"target_modules": ("q_proj", "o_proj")}, r"model: expected one wrapped with target_modules"),
        ({"method": "lora"}, "model: expected a plain model for the method lora, got a wrapped one"),
    ):
        with pytest.raises(ValueError, match=message):
            make_policy(svf, dataclasses.replace(options, **changes))
