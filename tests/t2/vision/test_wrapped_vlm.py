"""SVF on the language model of models that read images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import t2
from t2.generation.images import collate, placeholder_tokens
from t2.generation.prompts import encode_prompt
from t2.model.attention import MARK
from t2.model.layers import Packed, RoutedLinear
from t2.tasks import Problem
from t2.weights.targets import language_model, linear_layers, select_targets
from tests.t2.vision.tiny_vlm import COLOURS, FAMILIES, IMAGE, SIZES, VOCABULARY, batch_of, question, tiny_vlm

PROBLEMS = [question(colour, size) for colour, size in zip(COLOURS, SIZES, strict=True)]
TOWER = {"llava_next": "model.language_model", "qwen2_5_vl": "model.language_model"}
families = pytest.mark.parametrize("family", FAMILIES)


def wrap(model: nn.Module, **options: Any) -> t2.SVFModel:
    return t2.SVFModel(model, t2.SVFConfig(cache=False, progress=False, **options))


def tower(family: str) -> str:
    return TOWER.get(family, "model.text_model")


@families
def test_targets_are_the_language_models(family: str):
    model, _ = tiny_vlm(family)
    assert language_model(model) is model.get_submodule(tower(family))
    every = select_targets(model, "all-linear")
    assert len(every) == 14 and all(name.startswith(f"{tower(family)}.layers.") for name in every)
    assert len(select_targets(model, "mlp")) == 6 and len(select_targets(model, "attention")) == 8
    assert len(select_targets(model, ["q_proj", "v_proj"])) == 4
    assert len(select_targets(model, r".*layers\.0\..*")) == 7
    outside = next(
        name for name, m in model.named_modules() if type(m) is nn.Linear and not name.startswith(tower(family))
    )
    assert outside not in linear_layers(model)
    with pytest.raises(ValueError, match=r"target_modules: expected .*, got "):
        select_targets(model, outside)


@families
def test_what_comes_before_the_language_model_is_untouched(family: str):
    model, _ = tiny_vlm(family)
    before = {name: module for name, module in model.named_modules() if not name.startswith(tower(family))}
    config = copy.deepcopy(model.config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svf = wrap(model, dtype=torch.int8)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items())
    assert [name for name, module in before.items() if isinstance(module, Packed)] == ["lm_head"]
    assert not any(hasattr(module, MARK) for module in before.values())
    assert sum(isinstance(module, RoutedLinear) for module in model.modules()) == 14
    assert model.config.to_dict() == config.to_dict()
    found = svf.unload().state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@families
@pytest.mark.parametrize("targets", ["all-linear", "mlp"])
def test_z_of_one_is_the_base_and_merges_back(family: str, targets: str):
    model, processor = tiny_vlm(family)
    batch = batch_of(processor, PROBLEMS)
    with torch.no_grad():
        base = model(**batch).logits
        svf = wrap(model, target_modules=targets)
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(svf(**batch).logits[kept], base[kept], atol=1e-3, rtol=1e-3)
        ones = t2.Expert(torch.ones(svf.layout.R), svf.layout)
        torch.testing.assert_close(svf(**batch, experts=ones).logits[kept], base[kept], atol=1e-3, rtol=1e-3)
        assert torch.equal(svf.merged_copy(None)(**batch).logits, base)


@families
def test_a_mixed_batch_is_each_request_alone_with_its_merged_model(family: str):
    model, processor = tiny_vlm(family)
    svf = wrap(model)
    for i in range(2):
        svf.add_expert(f"e{i}", t2.Expert.random(svf.layout, std=0.5, seed=i))
    experts = ["e0", None, {"e0": 0.5, "e1": 0.5}]
    batch = batch_of(processor, PROBLEMS)
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": placeholder_tokens(model)}
    with torch.no_grad():
        logits = svf(**batch, experts=experts).logits
        answers = svf.generate(**batch, experts=experts, **options)[:, batch["input_ids"].shape[1] :]
        base = svf(**batch).logits
    for row, (problem, expert) in enumerate(zip(PROBLEMS, experts, strict=True)):
        plain = svf.merged_copy(expert)
        alone = batch_of(processor, [problem])
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            torch.testing.assert_close(logits[row, -length:], plain(**alone).logits[0], atol=2e-3, rtol=1e-3)
            expected = plain.generate(**alone, **options)[0, length:]
        own = answers[row][: len(expected)]
        assert own.tolist() == expected.tolist()
    assert (logits[0, -1] - base[0, -1]).abs().max() > 0.05
    assert torch.equal(logits[1], base[1])


@families
def test_several_answers_to_one_request_share_its_image_and_expert(family: str):
    model, processor = tiny_vlm(family)
    svf = wrap(model)
    expert = t2.Expert.random(svf.layout, std=0.5)
    batch = batch_of(processor, PROBLEMS[:2])
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "suppress_tokens": placeholder_tokens(model)}
    found = svf.generate(**batch, experts=[expert, None], **options)
    assert found.tolist()[0] == svf.generate(**batch, experts=[expert, expert], **options).tolist()[0]
    assert found.tolist()[1] == svf.generate(**batch, experts=[None, None], **options).tolist()[1]


@families
def test_the_gradient_of_z_is_autograds_through_the_dense_weights(family: str):
    model, processor = tiny_vlm(family)
    batch = batch_of(processor, PROBLEMS[:2])
    svf = wrap(model)
    z = (1 + 0.2 * torch.randn(svf.layout.R, generator=torch.Generator().manual_seed(0))).requires_grad_()
    direction = torch.randn(len(VOCABULARY), generator=torch.Generator().manual_seed(1))
    (svf(**batch, experts=z).logits[:, -1] @ direction).sum().backward()
    plain = svf.merged_copy(None).double()
    dense = z.detach().double().requires_grad_()
    weights = {}
    for name in svf.layout.names:
        u, s, vh = torch.linalg.svd(plain.get_submodule(name).weight.detach(), full_matrices=False)
        weights[f"{name}.weight"] = (u * (s * dense[svf.layout.window(name)])) @ vh
    batch = {name: each.double() if each.is_floating_point() else each for name, each in batch.items()}
    logits = torch.func.functional_call(plain, weights, kwargs=batch).logits
    (logits[:, -1] @ direction.double()).sum().backward()
    assert (z.grad.double() - dense.grad).norm() <= 1e-3 * dense.grad.norm() and dense.grad.norm() > 0


@families
def test_prompts_collated_are_the_processors_batch(family: str):
    _, processor = tiny_vlm(family)
    encoded = [encode_prompt(problem, processor) for problem in PROBLEMS]
    batch = batch_of(processor, PROBLEMS)
    width = batch["input_ids"].shape[1]
    found = collate([inputs for _, inputs in encoded], width)
    assert found.keys() == batch.keys() - {"input_ids", "attention_mask"}
    for name, tensor in found.items():
        assert torch.equal(tensor, batch[name]), name
    for row, (ids, _) in enumerate(encoded):
        assert ids.tolist() == batch["input_ids"][row, width - len(ids) :].tolist()


def test_text_alone_needs_no_image_and_images_need_a_processor():
    _, processor = tiny_vlm("qwen2_5_vl")
    problem = question("red", (30, 30))
    ids, inputs = encode_prompt(Problem(({"role": "user", "content": "what is it"},)), processor)
    assert inputs == {} and IMAGE not in ids and [VOCABULARY[i] for i in ids][-1] == "Assistant:"
    with pytest.raises(ValueError, match="tokenizer: expected the processor of a model that reads images"):
        encode_prompt(problem, processor.tokenizer)
    several = collate([inputs, encode_prompt(problem, processor)[1]], 12, after=2)
    assert several["mm_token_type_ids"].shape == (2, 14) and not several["mm_token_type_ids"][0].any()
    assert collate([], 4) == {} == collate([{}, {}], 4)
