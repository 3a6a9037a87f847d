from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import t2
from t2.experts.support import support_of, top_components
from t2.generation.scoring import PromptGroup
from t2.training import Trainer
from t2.training.policies import make_policy
from t2.training.support import gradient_scores
from t2.weights.files import FileFormatError
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer


def train(options, **changes):
    return Trainer(toy_model(), toy_tokenizer(), SayTheWord(**changes), options)


def per_matrix(expert: t2.Expert) -> list[int]:
    return [int((expert[name] != 1).sum()) for name in expert.layout.names]


def test_scores_are_the_gradient_of_the_likelihood(make_options):
    policy = make_policy(toy_model(), make_options())
    prompts, solutions = (
        [torch.tensor([4, 5]), torch.tensor([4, 4, 6])],
        [torch.tensor([7, 2]), torch.tensor([9, 8, 2])],
    )
    groups = [PromptGroup(p, (s,), (0.25,)) for p, s in zip(prompts, solutions, strict=True)]
    scores = gradient_scores(policy, groups, pad_token=0, token_budget=8)  # one group a batch
    dense = toy_model().double()
    z = {}
    for name, layer in dense.named_modules():
        if name in policy.layout.names:
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            z[name] = torch.ones_like(s).requires_grad_()
            del layer._parameters["weight"]
            layer.weight = (u * (s * z[name])) @ vh
    for prompt, solution in zip(prompts, solutions, strict=True):
        logits = dense(input_ids=torch.cat([prompt, solution])[None]).logits[0, len(prompt) - 1 : -1]
        (-0.25 * torch.log_softmax(logits, -1).gather(1, solution[:, None]).sum()).backward(retain_graph=True)
    want = torch.cat([z[name].grad.abs() for name in policy.layout.names])
    torch.testing.assert_close(scores.double(), want, rtol=1e-3, atol=1e-5)
    assert policy.parameters[0].grad is None


def test_a_run_on_a_support_changes_its_components_alone(make_options):
    options = make_options(support=3)
    trainer = train(options)
    chosen = trainer.policy.support
    assert trainer.policy.trainable == len(chosen) == 3 * len(trainer.policy.layout.names)
    expert = t2.Expert.load(trainer.run().expert)
    last = t2.Expert.load(options.output / "last.safetensors")
    assert set(support_of([expert, last]).tolist()) <= set(chosen.tolist())
    assert per_matrix(last) == [3] * len(last.layout.names)


def test_an_interrupted_run_goes_on_with_its_support(make_options, tmp_path):
    whole = train(make_options(support=4, steps=6)).run()
    parts = make_options(support=4, steps=3, output=tmp_path / "parts")
    train(parts).run()
    resumed = make_options(support=4, steps=6, output=tmp_path / "parts", resume=True)
    trainer = train(resumed)
    trainer.run()
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole.expert.parent, tmp_path / "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_support_can_be_what_an_expert_changes_most(make_options, tmp_path):
    policy = make_policy(toy_model(), make_options())
    expert = t2.Expert.random(policy.layout, seed=3)
    expert.save(tmp_path / "before.safetensors")
    trainer = train(make_options(support=5, support_from=str(tmp_path / "before.safetensors")))
    want = top_components(policy.sigma * (expert.z - 1).abs(), policy.layout, 5)
    assert torch.equal(trainer.policy.support, want)


def test_the_support_can_be_what_all_experts_of_a_folder_change_most(make_options, tmp_path):
    policy = make_policy(toy_model(), make_options())
    ones = torch.ones(policy.layout.R)
    leading = policy.layout.window(policy.layout.names[0])
    for name, place, change in (("large", leading.start, 0.5), ("small", leading.start + 2, 0.01)):
        z = ones.clone()
        z[place] += change
        t2.Expert(z, policy.layout).save(tmp_path / f"{name}.safetensors")
    support = train(make_options(support=2, support_from=str(tmp_path))).policy.support
    assert support[:2].tolist() == [leading.start, leading.start + 2]  # an expert of small changes counts as much
    with pytest.raises(FileNotFoundError, match="expected files of experts"):
        (tmp_path / "empty").mkdir()
        train(make_options(support=2, support_from=str(tmp_path / "empty")))


def test_the_published_way_trains_the_same_support(make_options, tmp_path):
    found = []
    for method in ("svf", "dense-compose"):
        trainer = train(make_options(support=3, method=method, steps=1, output=tmp_path / method))
        trainer.run()
        found.append((trainer.policy.support, trainer.policy.parameters[0].detach()))
    (positions, ours), (same, theirs) = found
    assert torch.equal(positions, same)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"support": 0}, "support: expected an integer >= 1, got 0"),
        ({"support": 4, "method": "lora"}, "support: expected none unless z itself is trained"),
        ({"support": 4, "parametrisation": "sigmoid"}, "support: expected none unless z itself is trained"),
        ({"support_examples": 0}, "support_examples: expected an integer >= 1"),
    ],
)
def test_wrong_options_are_refused(make_options, changes, said):
    with pytest.raises(ValueError, match=said):
        make_options(**changes)


def test_a_gradient_needs_solutions(make_options):
    with pytest.raises(ValueError, match="support_from: expected training examples with solutions"):
        train(make_options(support=3), solutions=False)


def test_a_start_beside_the_support_is_refused(make_options, tmp_path):
    policy = make_policy(toy_model(), make_options())
    t2.Expert.random(policy.layout).save(tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match="start: expected an expert with z = 1 off the support"):
        train(make_options(support=3, start=tmp_path / "start.safetensors"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda support: support.flip(0),
        lambda support: support + 10_000,
        lambda support: support.to(torch.int32),
        lambda support: support[:0],
        lambda support: None,
    ],
)
def test_a_damaged_support_is_refused(make_options, damage):
    options = make_options(support=3, steps=2)
    train(options).run()
    path = options.output / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    changed = damage(tensors.pop("support"))
    save_file(tensors if changed is None else tensors | {"support": changed.contiguous()}, path, metadata)
    with pytest.raises(FileFormatError, match=r"checkpoint\.safetensors.*support"):
        train(make_options(support=3, steps=4, resume=True))
