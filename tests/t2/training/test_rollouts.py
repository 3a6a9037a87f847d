from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from t2.generation.batching import shared_prefix
from t2.generation.prompts import eos_ids_of
from t2.generation.sampling import UniformSampler, draw_tokens, uniforms
from t2.generation.scoring import (
    MicroBatch,
    PromptGroup,
    completion_logits,
    completion_tokens,
    micro_batches,
    repeat_rows,
)
from t2.model.kv_cache import new_cache
from t2.training.policies import Policy, make_policy
from t2.training.rollouts import RolloutGenerator
from tests.t2.toy import toy_model, toy_tokenizer

LONG = [4, 4, 5, 4, 6, 7, 4, 8, 9]
PROMPTS = [torch.tensor(ids) for ids in ([4, 5], [4, 4, 4, 6], [7], [4, 8, 9])]
GROUPS = tuple(
    PromptGroup(
        prompt,
        tuple(torch.tensor(a) for a in answers),
        tuple(0.1 * (i + 1) for i in range(len(answers))),
        (1,) * len(answers),
    )
    for prompt, answers in zip(PROMPTS, ([[5, 2], [6, 7, 2]], [[8]], [[2], [9, 10, 11, 2], [3, 2]], [[5]]), strict=True)
)


@pytest.fixture
def policy(make_options) -> Policy:
    policy = make_policy(toy_model(), make_options())
    with torch.no_grad():
        policy.parameters[0].add_(0.2 * torch.randn(policy.trainable, generator=torch.Generator().manual_seed(1)))
    return policy


@pytest.fixture
def generator(policy: Policy) -> RolloutGenerator:
    return RolloutGenerator(policy, torch.device("cpu"), 0, (2,))


def test_the_sampler_draws_each_token_as_often_as_it_should():
    torch.manual_seed(0)
    scores = 2 * torch.randn(1, 11)
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    drawn = UniformSampler(grid, 3, 0.7)(torch.zeros(count, 3, dtype=torch.int64), scores.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=11) / count
    torch.testing.assert_close(shares, torch.softmax(scores[0] / 0.7, -1), atol=2 / count, rtol=0)


def test_the_sampler_draws_only_what_is_possible():
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(3, -1)
    edges = torch.tensor([[0.0], [0.5], [1.0 - 1e-16]], dtype=torch.float64)
    drawn = UniformSampler(edges, 1, 1.0)(torch.zeros(3, 1, dtype=torch.int64), scores).argmax(-1)
    assert set(drawn.tolist()) <= {1, 3}


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 577, 1031])
def test_tokens_are_drawn_where_the_cumulated_probability_passes_the_number(vocabulary: int):
    torch.manual_seed(vocabulary)
    logits = 4 * torch.randn(400, vocabulary)
    numbers = torch.rand(400, dtype=torch.float64)
    cumulated = torch.softmax(logits.double() / 1.3, -1).cumsum(-1)
    expected = torch.searchsorted(cumulated, numbers[:, None] * cumulated[:, -1:], right=True)[:, 0]
    away = (cumulated - numbers[:, None]).abs().amin(-1) > 1e-6  # from an edge, where rounding decides
    found = draw_tokens(logits, numbers, 1.3)
    assert away.sum() > 350 and torch.equal(found[away], expected[away])
    assert draw_tokens(logits[:0], numbers[:0]).shape == (0,)


def test_uniform_numbers_belong_to_a_prompt_of_a_step():
    every = uniforms(5, 3, range(4), 2, 6)
    assert torch.equal(uniforms(5, 3, [2], 2, 6), every[4:6])
    assert not torch.equal(uniforms(5, 4, range(4), 2, 6), every)
    assert not torch.equal(uniforms(6, 3, range(4), 2, 6), every)
    assert every.min() >= 0 and every.max() < 1


def test_drawn_answers_do_not_depend_on_the_batch_around_them(generator: RolloutGenerator):
    draw = uniforms(0, 0, range(4), 3, 5)
    together = generator.completions(PROMPTS, 5, samples=3, uniforms=draw)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generator.completions([prompt], 5, samples=3, uniforms=draw[3 * i : 3 * i + 3])
        assert [a.tolist() for a in alone] == [a.tolist() for a in together[i]]
    assert len({tuple(a.tolist()) for answers in together for a in answers}) > 4


def test_answers_that_share_a_prefix_are_those_that_do_not(generator: RolloutGenerator):
    shared = generator.completions(PROMPTS, 6, samples=2)
    for prompt, answers in zip(PROMPTS, shared, strict=True):
        ((alone,),) = generator.completions([prompt], 6)
        assert all(answer.tolist() == alone.tolist() for answer in answers)


def test_answers_end_with_their_end_token(generator: RolloutGenerator):
    for answers in generator.completions(PROMPTS, 30, samples=4, uniforms=uniforms(1, 0, range(4), 4, 30)):
        for answer in answers:
            ends = (answer == 2).nonzero().flatten().tolist()
            assert ends in ([], [len(answer) - 1]) and (ends or len(answer) == 30)


@pytest.mark.parametrize("samples", [1, 3])
def test_what_prompts_begin_with_is_read_once(generator: RolloutGenerator, samples: int, monkeypatch):
    prompts = [torch.tensor([*LONG, *prompt.tolist()]) for prompt in PROMPTS]
    read: list[int] = []
    forward = generator.policy.model.forward
    monkeypatch.setattr(
        generator.policy.model, "forward", lambda **kw: (read.append(kw["input_ids"].numel()), forward(**kw))[1]
    )
    draw = uniforms(0, 0, range(4), samples, 6)
    together = generator.completions(prompts, 6, samples=samples, uniforms=draw)
    assert read[:2] == [len(LONG), 4 * 4]
    assert read[2:] and all(count <= 4 * samples for count in read[2:])
    for i, prompt in enumerate(prompts):
        (alone,) = generator.completions([prompt], 6, samples=samples, uniforms=draw[samples * i : samples * (i + 1)])
        assert [a.tolist() for a in alone] == [a.tolist() for a in together[i]]


def test_rows_that_have_ended_leave_the_batch(generator: RolloutGenerator, monkeypatch):
    rows: list[int] = []
    forward = generator.policy.model.forward
    monkeypatch.setattr(
        generator.policy.model, "forward", lambda **kw: (rows.append(len(kw["input_ids"])), forward(**kw))[1]
    )
    answers = generator.completions(PROMPTS, 30, samples=8, uniforms=uniforms(1, 0, range(4), 8, 30))
    lengths = [len(a) for group in answers for a in group]
    assert rows[1] == 32 and rows[-1] < 16 and rows[1:] == sorted(rows[1:], reverse=True)
    assert sum(rows[1:]) < 1.25 * sum(lengths) + 32


def test_the_base_answers_where_it_is_asked(generator: RolloutGenerator):
    base = make_greedy(toy_model(), PROMPTS)
    found = [answers[0] for answers in generator.completions(PROMPTS, 5, base=True)]
    assert [a.tolist() for a in found] == base
    assert [answers[0].tolist() for answers in generator.completions(PROMPTS, 5)] != base


def make_greedy(model, prompts: list[Tensor]) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids, answer = prompt.tolist(), []
        while len(answer) < 5 and (not answer or answer[-1] != 2):
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        answers.append(answer)
    return answers


def one_by_one(policy: Policy, groups: tuple[PromptGroup, ...]) -> Tensor:
    """Every answer behind its own prompt, without a batch, a cache or padding."""
    rows = []
    for group in groups:
        for answer in group.completions:
            logits = policy.model(input_ids=torch.cat([group.prompt, answer]).unsqueeze(0)).logits[0]
            rows.append(logits[len(group.prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("common", [[], LONG])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("method", ["svf", "lora", "dense-compose"])
def test_logits_and_gradients_are_those_of_answers_one_by_one(
    make_options, method: str, share_prefix: bool, common: list[int]
):
    groups = tuple(
        PromptGroup(torch.tensor([*common, *group.prompt.tolist()]), group.completions, group.weights, group.counts)
        for group in GROUPS
    )
    policy = make_policy(toy_model(), make_options(method=method))
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    shared = shared_prefix([group.prompt for group in groups], new_cache(policy.transformer))
    assert shared == len(common)
    tokens = completion_tokens(MicroBatch(groups, shared), 0, torch.device("cpu"))
    assert tokens.targets.tolist() == [t for g in GROUPS for a in g.completions for t in a.tolist()]
    gradients = []
    weights = torch.randn(len(tokens.targets), 14, generator=torch.Generator().manual_seed(2))
    for together in (True, False):
        with policy.learning():
            one_pass = completion_logits(policy, tokens, share_prefix=share_prefix) if together else None
            logits = one_by_one(policy, groups) if one_pass is None else one_pass
            (logits * weights).sum().backward()
        policy.finish_gradients()
        gradients.append((logits.detach(), *[p.grad.clone() for p in policy.parameters]))
        for parameter in policy.parameters:
            parameter.grad = None
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_gradients_of_repeated_rows_have_the_same_bits_every_time():
    torch.set_num_threads(2)  # the fixture restores it
    rows = torch.zeros(64, dtype=torch.int64)
    states = torch.randn(2, 1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(64, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(20):
        keys, values = (state.clone().requires_grad_() for state in states)
        cache = new_cache(toy_model())
        cache.update(keys, values, 0)
        del cache.layers[1:]
        repeat_rows(cache, rows)
        torch.testing.assert_close(cache.layers[0].keys, keys[rows], rtol=0, atol=0)
        ((cache.layers[0].keys + cache.layers[0].values) * weights).sum().backward()
        gradients.append((keys.grad, values.grad))
    expected = weights.double().sum(0, keepdim=True).float()
    torch.testing.assert_close(gradients[0][0], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(grad, first) for pair in gradients for grad, first in zip(pair, gradients[0], strict=True))


def test_values_of_answers_reach_their_tokens():
    tokens = completion_tokens(MicroBatch(GROUPS), 0, torch.device("cpu"))
    values = torch.arange(7.0)
    lengths = [len(a) for g in GROUPS for a in g.completions]
    assert tokens.per_token(values).tolist() == [float(i) for i, n in enumerate(lengths) for _ in range(n)]


def contents(groups: Sequence[PromptGroup]) -> list[tuple[list[int], list[int], float]]:
    """Prompt, answer and weight of every answer."""
    pairs = [(g.prompt, a, w) for g in groups for a, w in zip(g.completions, g.weights, strict=True)]
    return sorted((prompt.tolist(), answer.tolist(), weight) for prompt, answer, weight in pairs)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("budget", [9, 12, 20, 1000])
def test_micro_batches_hold_every_answer_once_within_the_budget(budget: int, repeated: bool):
    batches = list(micro_batches(GROUPS, budget, repeated=repeated))
    for batch in batches:
        tokens = completion_tokens(batch, 0, torch.device("cpu"))
        prompts = tokens.prompt_ids[tokens.group] if repeated else tokens.prompt_ids
        assert batch.tokens == prompts.numel() + tokens.completion_ids.numel() <= budget
    assert contents([group for batch in batches for group in batch.groups]) == contents(GROUPS)
    assert len(batches) == 1 or budget < 1000


def test_a_budget_too_small_for_one_answer_is_refused():
    with pytest.raises(ValueError, match=r"token_budget: .* 4 \+ 1 tokens, got 4"):
        list(micro_batches(GROUPS[1:2], 4))
    assert list(micro_batches([], 4)) == []


def test_prompts_share_what_they_begin_with_if_it_is_worth_a_pass():
    cache = new_cache(toy_model())
    assert shared_prefix([torch.tensor([*LONG, 4, 5]), torch.tensor([*LONG, 4, 6, 7])], cache) == len(LONG) + 1
    assert shared_prefix([torch.tensor([*LONG, 4]), torch.tensor([*LONG, 4])], cache) == len(LONG)
    assert shared_prefix([torch.tensor([4, 5, 6, 7]), torch.tensor([4, 5, 6, 8])], cache) == 0
    assert shared_prefix([torch.tensor(LONG)], cache) == 0
    assert shared_prefix([torch.tensor([*LONG, 4])] * 2, None) == 0
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)
    assert shared_prefix([torch.tensor([*LONG, 4])] * 2, cache) == 0


def test_equal_answers_are_one_with_the_weight_of_all():
    answers = [torch.tensor(a) for a in ([5, 2], [6, 2], [5, 2], [5], [6, 2])]
    group = PromptGroup.from_samples(PROMPTS[0], answers, [0.5, -1.0, 0.25, 2.0, -1.0], {})
    assert [a.tolist() for a in group.completions] == [[5, 2], [6, 2], [5]]
    assert group.weights == (0.75, -2.0, 2.0) and group.counts == (2, 2, 1)


def test_models_without_a_plain_cache_answer_through_transformers(generator: RolloutGenerator, monkeypatch):
    draw = uniforms(0, 0, range(4), 2, 5)
    ours = generator.completions(PROMPTS, 5, samples=2, uniforms=draw), generator.completions(PROMPTS, 5)
    monkeypatch.setattr("t2.generation.decode.growing_cache", lambda model: None)
    monkeypatch.setattr("t2.generation.decode.new_cache", lambda model: None)
    theirs = generator.completions(PROMPTS, 5, samples=2, uniforms=draw), generator.completions(PROMPTS, 5)
    for one, other in zip(ours, theirs, strict=True):
        assert [[a.tolist() for a in answers] for answers in one] == [[a.tolist() for a in row] for row in other]


def test_end_tokens_are_the_models_and_the_tokenizers():
    model = toy_model()
    model.generation_config.eos_token_id = [2, 9]
    assert eos_ids_of(model, toy_tokenizer()) == [2, 9]
    model.generation_config.eos_token_id = None
    assert eos_ids_of(model, toy_tokenizer()) == [2]
