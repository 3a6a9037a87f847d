"""Answers, logits and updates of policies whose prompts have images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import t2
from t2.generation import evaluate as evaluation
from t2.generation.evaluate import evaluate
from t2.generation.images import placeholder_tokens
from t2.generation.prompts import encode_prompt
from t2.generation.sampling import uniforms
from t2.generation.scoring import MicroBatch, PromptGroup, completion_logits, completion_tokens, micro_batches
from t2.training.policies import Policy, make_policy
from t2.training.rollouts import RolloutGenerator
from t2.training.trainer import Trainer
from tests.t2.vision.tiny_vlm import COLOURS, FAMILIES, SIZES, VOCABULARY, Colours, question, tiny_vlm

PROBLEMS = [question(colour, size) for colour, size in zip(COLOURS, SIZES, strict=True)]
ANSWERS = ([[10, 2], [11, 12, 2]], [[8]], [[2], [9, 10, 11, 2], [12, 2]])
families = pytest.mark.parametrize("family", FAMILIES)


def moved_policy(family: str, options: Any) -> tuple[Policy, Any]:
    model, processor = tiny_vlm(family)
    policy = make_policy(model, options)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy, processor


def groups_of(processor: Any) -> tuple[PromptGroup, ...]:
    encoded = [encode_prompt(problem, processor) for problem in PROBLEMS]
    return tuple(
        PromptGroup(ids, tuple(torch.tensor(a) for a in answers), (0.1,) * len(answers), (1,) * len(answers), inputs)
        for (ids, inputs), answers in zip(encoded, ANSWERS, strict=True)
    )


def one_by_one(policy: Policy, groups: tuple[PromptGroup, ...]) -> Tensor:
    """Every answer behind its own prompt and image; positions are the model's own."""
    rows = []
    for group in groups:
        for answer in group.completions:
            inputs = dict(group.images)
            if "mm_token_type_ids" in inputs:
                zeros = torch.zeros(1, len(answer), dtype=torch.int64)
                inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)
            ids = torch.cat([group.prompt, answer]).unsqueeze(0)
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
            rows.append(logits[len(group.prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "svf") for family in FAMILIES), ("qwen2_5_vl", "lora"), ("idefics3", "dense-compose")],
)
def test_logits_and_gradients_are_those_of_answers_one_by_one(make_options, family, method, share_prefix):
    policy, processor = moved_policy(family, make_options(method=method))
    groups = groups_of(processor)
    tokens = completion_tokens(MicroBatch(groups), 0, torch.device("cpu"))
    weights = torch.randn(len(tokens.targets), len(VOCABULARY), generator=torch.Generator().manual_seed(2))
    found = []
    for together in (True, False):
        with policy.learning():
            logits = (
                completion_logits(policy, tokens, share_prefix=share_prefix) if together else one_by_one(policy, groups)
            )
            (logits * weights).sum().backward()
        policy.finish_gradients()
        found.append((logits.detach(), *[p.grad.clone() for p in policy.parameters]))
        for parameter in policy.parameters:
            parameter.grad = None
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


@families
def test_answers_with_a_shared_prefix_are_those_alone(make_options, family):
    policy, processor = moved_policy(family, make_options())
    generator = RolloutGenerator(policy, torch.device("cpu"), 0, (2,))
    prompts, images = zip(*(encode_prompt(problem, processor) for problem in PROBLEMS), strict=True)
    shared = generator.completions(prompts, 5, images=images, samples=2)
    draw = uniforms(0, 0, range(3), 2, 5)
    drawn = generator.completions(prompts, 5, images=images, samples=2, uniforms=draw)
    model = policy.transformer
    for i in range(3):
        ((alone,),) = generator.completions(prompts[i : i + 1], 5, images=images[i : i + 1])
        assert all(answer.tolist() == alone.tolist() for answer in shared[i])
        (again,) = generator.completions(
            prompts[i : i + 1], 5, images=images[i : i + 1], samples=2, uniforms=draw[2 * i : 2 * i + 2]
        )
        assert [a.tolist() for a in again] == [a.tolist() for a in drawn[i]]
        with policy.learning(), torch.no_grad():
            ids = prompts[i].unsqueeze(0)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images[i]).logits[0, -1]
        logits[placeholder_tokens(model)] = -torch.inf
        assert int(logits.argmax()) == int(alone[0])
    assert not any(int(t) in placeholder_tokens(model) for row in (*shared, *drawn) for a in row for t in a)


def test_text_and_images_meet_in_one_batch(make_options):
    policy, processor = moved_policy("qwen2_5_vl", make_options())
    generator = RolloutGenerator(policy, torch.device("cpu"), 0, (2,))
    text = t2.tasks.Problem(({"role": "user", "content": "what is it"},))
    prompts, images = zip(*(encode_prompt(problem, processor) for problem in (text, *PROBLEMS)), strict=True)
    found = generator.completions(prompts, 4, images=images, samples=2)
    (alone,) = generator.completions(prompts[:1], 4, images=images[:1], samples=2)
    (plain,) = generator.completions(
        prompts[:1], 4, samples=3
    )  # after other numbers of rows: nothing is kept between calls
    assert found[0][0].tolist() == alone[0].tolist()
    assert plain[0].tolist() == plain[2].tolist()


def test_micro_batches_keep_each_prompts_image():
    _, processor = tiny_vlm("qwen2_5_vl")
    groups = groups_of(processor)
    budget = max(len(group.prompt) + group.longest for group in groups)
    batches = list(micro_batches(groups, budget))
    assert len(batches) > len(groups)
    for batch in batches:
        for group in batch.groups:
            (original,) = (g for g in groups if g.prompt is group.prompt)
            assert group.images is original.images


@families
@pytest.mark.parametrize("objective", ["policy-gradient", "next-token"])
def test_one_step_moves_z_and_nothing_else(make_options, family, objective):
    model, processor = tiny_vlm(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, processor, Colours(), make_options(objective=objective, kl_coefficient=0.1))
    result = trainer.run()
    moved = trainer.policy.parameters[0].detach()
    assert result.finished and result.state.step == 1 and (moved - 1).abs().max() > 1e-4
    svf = trainer.policy.svf
    found = svf.unload().state_dict()
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert (t2.Expert.load(trainer.options.output / "last.safetensors").z - 1).abs().max() > 1e-4


def test_next_token_steps_learn_the_colours(make_options):
    model, processor = tiny_vlm("llava_next")
    options = make_options(objective="next-token", steps=12, prompts_per_step=6, learning_rate=5e-2, validate_every=12)
    trainer = Trainer(model, processor, Colours(), options)
    trainer.run()
    _, losses = trainer.metrics.series("loss")
    assert losses[-1] < 0.7 * losses[0]


def test_checkpointed_steps_are_the_same(make_options):
    found = []
    for checkpointing in (False, True):
        model, processor = tiny_vlm("qwen2_5_vl")
        options = make_options(gradient_checkpointing=checkpointing)
        options = type(options)(**{**vars(options), "output": options.output / str(checkpointing)})
        trainer = Trainer(model, processor, Colours(), options)
        trainer._update(trainer._drawn()[0])
        found.append(trainer.policy.parameters[0].grad)
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-4 * float(found[0].abs().max()))


@families
def test_evaluation_reads_images_a_few_at_a_time(make_options, family, monkeypatch):
    policy, processor = moved_policy(family, make_options())
    generator = RolloutGenerator(policy, torch.device("cpu"), 0, (2,))
    task, seen = Colours(), []

    def answer(prompts, room, images=()):
        seen.append(len(images))
        return [answers[0] for answers in generator.completions(prompts, room, images=images)]

    problems, counts = task.problems("test"), []
    whole = evaluate(answer, task, problems, processor, announce=counts.append)
    assert sum(seen) == counts[-1] == len(problems) == len(whole.scores)
    monkeypatch.setattr(evaluation, "IMAGES_AT_ONCE", 2)
    assert evaluate(answer, task, problems, processor) == whole
