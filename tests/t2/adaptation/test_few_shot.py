from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from torch import Tensor

import t2
from t2.adaptation import Adaptation, FewShotOptions, FewShotStrategy, Strategy, few_shot_problems
from t2.adaptation.few_shot import matrix_groups, read_memory
from t2.adaptation.search import Fitness
from t2.generation.cached_batch import SVFRunner
from t2.generation.decode import DecodeOptions, complete
from t2.weights.files import FileFormatError
from tests.t2.toy import SayTheWord, toy_tokenizer

TASK = SayTheWord()
PROBLEMS = TASK.problems("train")
OPTIONS = FewShotOptions(population=8, elite_ratio=0.25, generations=3)
NAMES = ("red", "green", "blue")


@pytest.fixture
def make(make_svf):
    def make_strategy(svf: t2.SVFModel | None = None, **given) -> FewShotStrategy:
        options = FewShotOptions(**{"population": 8, "elite_ratio": 0.25, "generations": 3} | given.pop("options", {}))
        return FewShotStrategy(
            svf or make_svf(NAMES), toy_tokenizer(), given.pop("task", TASK), PROBLEMS, options=options, **given
        )

    return make_strategy


@torch.no_grad()
def answer_alone(model, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
    """Greedy, one row, no cache: the tokens and their mean log-likelihood."""
    ids, likelihoods = prompt.tolist(), []
    while len(likelihoods) < new_tokens and (not likelihoods or ids[-1] != 2):
        log_p = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        ids.append(int(log_p.argmax()))
        likelihoods.append(float(log_p.max()))
    return ids[len(prompt) :], statistics.fmean(likelihoods)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_a_population_in_one_batch_is_candidates_one_at_a_time(make, granularity: str, budget: int):
    strategy = make(options={"granularity": granularity, "token_budget": budget}, new_tokens=9)
    candidates = strategy._normalise(strategy._new_search().ask())
    z = strategy.vectors(candidates)
    found = strategy.evaluate(candidates)
    right_somewhere = False
    for index, vector in enumerate(z):
        plain = strategy.svf.merged_copy(vector)
        own = [answer_alone(plain, prompt, 9) for prompt in strategy.prompts]
        texts = [strategy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in own]
        scores = TASK.scores(PROBLEMS, texts)
        right = [likelihood for (_, likelihood), score in zip(own, scores, strict=True) if score]
        assert found[index].score == statistics.fmean(scores)
        expected = statistics.fmean(right) if right else -math.inf
        assert found[index].log_likelihood == pytest.approx(expected, abs=1e-4)
        right_somewhere |= bool(right)
    assert right_somewhere and len({fitness.score for fitness in found}) > 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3"])
def test_answers_do_not_depend_on_who_leaves_the_batch(tiny_model, family: str):
    svf = t2.SVFModel(tiny_model(family), t2.SVFConfig(progress=False))
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 90, (18,), generator=generator)
    prompts = [torch.cat([start, torch.randint(3, 90, (n,), generator=generator)]) for n in (1, 7, 3, 5, 2)]
    z = [t2.Expert.random(svf.layout, std=0.3, seed=seed).z for seed in range(3)]
    rows = [(c, p) for c in range(3) for p in range(5)]
    ends = tuple(range(0, 96, 9))  # an answer ends after nine tokens or so
    options, runner = DecodeOptions(24, ends, 0, torch.device("cpu")), SVFRunner(svf)
    together = complete(
        runner,
        [prompts[p] for _, p in rows],
        options,
        candidates=[c for c, _ in rows],
        route=lambda cs: svf.route([z[c] for c in cs]),
        likelihoods=True,
    )
    lengths = [len(answer.tokens) for answer in together]
    assert min(lengths) < 6 and max(lengths) > 10
    for (c, p), answer in zip(rows, together, strict=True):
        (alone,) = complete(runner, [prompts[p]], options, route=lambda cs, c=c: svf.route(z[c]), likelihoods=True)
        assert answer.tokens.tolist() == alone.tokens.tolist()
        assert answer.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        generated = svf.generate(
            prompts[p].unsqueeze(0), experts=z[c], max_new_tokens=24, do_sample=False, eos_token_id=list(ends)
        )
        assert generated[0, len(prompts[p]) :].tolist() == answer.tokens.tolist()


def test_a_model_without_a_cache_of_keys_answers_the_same(svf: t2.SVFModel, monkeypatch):
    prompts = [torch.tensor(ids) for ids in ([4, 5], [4, 4, 4, 6], [7], [4, 8, 9])]
    candidates, z = [0, 1, 2, 1], [t2.Expert.random(svf.layout, std=0.3, seed=seed).z for seed in range(3)]
    options = DecodeOptions(8, (2, 7), 0, torch.device("cpu"))

    def answers():
        route = lambda rows: svf.route([z[i] for i in rows])  # noqa: E731
        return complete(SVFRunner(svf), prompts, options, candidates=candidates, route=route, likelihoods=True)

    found = answers()
    monkeypatch.setattr("t2.generation.decode.new_cache", lambda model: None)
    monkeypatch.setattr("t2.generation.decode.growing_cache", lambda model: None)
    without = answers()
    assert [a.tokens.tolist() for a in found] == [a.tokens.tolist() for a in without]
    assert [a.log_likelihood for a in found] == pytest.approx([a.log_likelihood for a in without], abs=1e-4)


class Judged(SayTheWord):
    """Right is what the judge says."""

    def __init__(self, judge) -> None:
        super().__init__()
        self.judge = judge

    def scores(self, problems, answers):
        return [float(self.judge(answer)) for answer in answers]


@pytest.mark.parametrize("method", ["cem", "cma", "random"])
@pytest.mark.parametrize("name", ["base", *NAMES])
def test_never_worse_than_the_base_and_every_single_expert(make, make_svf, method: str, name: str):
    svf = make_svf(NAMES)
    choice = None if name == "base" else name
    plain = svf.merged_copy(choice)
    strategy = make(svf)
    own = {strategy.tokenizer.decode(answer_alone(plain, p, 3)[0], skip_special_tokens=True) for p in strategy.prompts}
    strategy = make(svf, task=Judged(own.__contains__), options={"search": method})
    result = strategy.search()
    assert result.fitness.score == 1.0 == result.singles[name].score
    assert all(result.fitness >= single for single in result.singles.values()) and set(result.singles) == {
        "base",
        *NAMES,
    }
    harder = make(svf, options={"search": method}).search()
    assert all(harder.fitness >= single for single in harder.singles.values())


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize(
    ("margin", "red", "taken"),
    [
        (0.0, (1, 1, 0, 0), True),  # as good as the base, but likelier
        (0.5, (1, 1, 0, 0), False),
        (1.0, (1, 1, 1, 0), True),
        (1.1, (1, 1, 1, 0), False),
        (1.1, (1, 1, 1, 1), True),
        (0.6, (0, 1, 1, 1), False),  # two more and one fewer: 1 / sqrt(3)
        (0.5, (0, 1, 1, 1), True),
    ],
)
def test_a_mix_takes_the_place_of_the_base_by_its_margin(
    make, margin: float, red: tuple[int, ...], taken: bool, granularity: str
):
    strategy = make(options={"margin": margin, "granularity": granularity})

    def fitness(scores: tuple[int, ...], likelihood: float) -> Fitness:
        return Fitness(statistics.fmean(scores), likelihood, tuple(map(float, scores)))

    def evaluate(candidates: Tensor) -> list[Fitness]:
        """ "red" alone has those scores, everything else the first two."""
        alone = strategy._alpha(candidates).reshape(len(candidates), -1, len(strategy.names))[..., 1].eq(1).all(-1)
        return [fitness(red, -1.0) if each else fitness((1, 1, 0, 0), -2.0) for each in alone.tolist()]

    result = strategy.search(evaluate)
    weights = result.mean_alpha
    assert weights == {"base": float(not taken), "red": float(taken), "green": 0.0, "blue": 0.0}
    assert result.fitness == result.singles["red" if taken else "base"]
    assert ("base stays, since" in result.stopped) == (not taken)


def scored(strategy: FewShotStrategy, scores: dict[str, tuple[int, ...]]):
    """An evaluation: singles have the scores of their name, mixes those of "mix"."""

    def evaluate(candidates: Tensor) -> list[Fitness]:
        found = []
        for weights in strategy._alpha(candidates).reshape(len(candidates), -1, len(strategy.names)):
            alone = [name for name, weight in zip(strategy.names, weights.T, strict=True) if bool((weight == 1).all())]
            own = scores.get(alone[0] if alone else "mix", (0, 0, 0, 0))
            found.append(Fitness(statistics.fmean(own), -1.0, tuple(map(float, own))))
        return found

    return evaluate


class Votes(Strategy):
    """Gives the first problem to one expert and all others to another."""

    name = "votes"

    def adapt(self, prompts):
        alpha = torch.tensor([[0.0, 1.0, 0.0], *[[0.0, 0.0, 1.0]] * (len(prompts) - 1)])
        return Adaptation(("base", "blue", "green"), alpha, 0.0, ("",) * len(prompts))


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({"green": (1, 1, 0, 0), "mix": (1, 1, 1, 0)}, "green"),  # one more is no evidence
        ({"green": (0, 0, 0, 0), "mix": (1, 0, 0, 0)}, "green"),  # nor where all are as bad
        ({"green": (1, 0, 0, 0), "mix": (1, 1, 1, 1)}, None),
        ({"base": (1, 0, 0, 0), "green": (0, 0, 0, 0), "mix": (1, 1, 0, 0)}, "base"),
        ({"base": (1, 0, 0, 0), "green": (0, 1, 0, 0), "mix": (1, 1, 0, 0)}, "green"),
        ({"red": (1, 1, 0, 0), "green": (1, 0, 0, 0)}, "green"),
    ],
)
def test_an_incumbent_stays_unless_a_mix_is_better_by_the_margin(make, make_svf, scores, kept, granularity: str):
    svf = make_svf(NAMES)
    for incumbent in ("green", Votes(svf, toy_tokenizer())):
        strategy = make(svf, options={"margin": 1.5, "granularity": granularity}, incumbent=incumbent)
        result = strategy.search(scored(strategy, scores))
        assert result.incumbent == "green" == strategy.expert().metadata["incumbent"]
        alone = {name for name, weight in result.mean_alpha.items() if weight == 1}
        assert alone == ({kept} if kept else set())
        assert (f"{kept} stays, since" in result.stopped) == (kept is not None)
        if kept:
            torch.testing.assert_close(strategy.expert().z, svf.z_of(None if kept == "base" else kept))


def test_an_incumbent_is_a_single_and_needs_a_margin(make, make_svf):
    svf, options = make_svf(NAMES), {"margin": 1.0}
    for call, text in [
        (lambda: make(svf, incumbent="green"), "incumbent: expected a margin above 0 beside one"),
        (lambda: make(svf, incumbent="yellow", options=options), "incumbent: expected one of base, red, green, blue"),
        (
            lambda: make(svf, incumbent=Votes(svf, toy_tokenizer()), experts=["red"], options=options).search(),
            "incumbent: expected one of base, red, got 'green'",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("coefficients", ["normalised", "free"])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_the_result_is_the_expert_that_it_says(make, tmp_path, coefficients: str, granularity: str):
    strategy = make(options={"coefficients": coefficients, "granularity": granularity, "seed": 5})
    adaptation = strategy.adapt(["say red", "say one"])
    result = strategy.result
    assert torch.equal(adaptation.alpha[0], result.alpha) and torch.equal(adaptation.alpha[1], result.alpha)
    sums = result.alpha.sum(-1)
    assert coefficients == "free" or torch.allclose(sums, torch.ones_like(sums))
    expert = strategy.expert()
    expert.save(tmp_path / "mixed.safetensors")
    loaded = t2.Expert.load(tmp_path / "mixed.safetensors")
    assert loaded.metadata["seed"] == "5" and loaded.metadata["task"] == "say"
    for choice in adaptation.choices(strategy.svf):
        torch.testing.assert_close(strategy.svf.z_of(choice), loaded.z)
    again = make(options={"coefficients": coefficients, "granularity": granularity, "seed": 5}).search()
    assert torch.equal(again.alpha, result.alpha) and again.fitness == result.fitness
    assert float(loaded.metadata["score"]) == result.fitness.score
    assert adaptation.seconds > 0 and strategy.adapt(["say"]).seconds < adaptation.seconds


def test_layers_are_groups(make_svf):
    layout = make_svf().layout
    groups = matrix_groups(layout, FewShotOptions(granularity="layer"))
    assert [f"layers.{group}." in name for name, group in zip(layout.names, groups, strict=True)] == [True] * 14
    assert matrix_groups(layout, FewShotOptions()) == ()
    assert matrix_groups(layout, FewShotOptions(granularity="matrix")) == tuple(range(14))


def test_nothing_is_left_of_all_zeros_but_the_base(make):
    strategy = make()
    assert strategy._normalise(torch.tensor([[0.0, 0, 0, 0], [0, 2, 2, 0]])).tolist() == [
        [1, 0, 0, 0],
        [0, 0.5, 0.5, 0],
    ]


def test_a_search_goes_on_from_its_memory(make, tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    whole = make().search()
    first = make(memory=path, announce=lambda found: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.search()
    second = make(memory=path)
    asked: list[int] = []
    inner = second.evaluate
    found = second.search(lambda candidates: asked.append(len(candidates)) or inner(candidates))
    assert torch.equal(found.alpha, whole.alpha) and found.fitness == whole.fitness
    assert found.generations[0].evaluated == 0 and sum(asked) == sum(g.evaluated for g in whole.generations[1:])
    with pytest.raises(FileFormatError, match=r"memory: .*memory.json is of a search with another"):
        make(memory=path, experts=["red"])
    path.write_text("{")
    with pytest.raises(FileFormatError, match=r"memory: .* is not of a few-shot search"):
        make(memory=path)


def test_few_shot_problems_are_drawn_without_repeats():
    problems = few_shot_problems(TASK, 5, seed=1)
    assert len({id(problem) for problem in problems}) == 5 and few_shot_problems(TASK, 8)
    task = SayTheWord()
    fixed = task.problems("train")
    task.problems = lambda split: fixed
    assert few_shot_problems(task, 3, seed=1) == few_shot_problems(task, 3, seed=1)
    assert few_shot_problems(task, 3, seed=1) != few_shot_problems(task, 3, seed=2)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"few_shot: expected 1 to 8 problems of say's train, got {count}"):
            few_shot_problems(TASK, count)


def test_what_does_not_fit_is_refused(make, make_svf):
    svf = make_svf(NAMES)
    for call, text in [
        (lambda: make(svf, experts=["yellow"]), r"experts: expected names of the bank \(red, green, blue\), got"),
        (lambda: make(svf, experts=[]), "experts: expected names of the bank"),
        (lambda: make(svf, experts=["red", "red"]), "experts: expected names of the bank"),
        (lambda: make(make_svf(())), r"experts: expected names of the bank \(empty\), got \[\]"),
        (lambda: FewShotStrategy(svf, toy_tokenizer(), TASK, []), "problems: expected at least one, got none"),
        (lambda: make(svf, options={"population": 4, "elite_ratio": 0.5}), "population: expected room for the 5"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize(
    "change",
    [
        "[" * 100_000,
        "[]",
        *(json.dumps({"identity": "x", "candidates": each}) for each in (5, {"00": [1, 2]}, {"zz": [1, 2, []]})),
        *(json.dumps({"identity": "x", "candidates": {"00": each}}) for each in ([None, 0, []], [0, 0, ["x"]])),
        '{"identity": "x", "candidates": {"00": [NaN, 0, []]}}',
        '{"identity": 5, "candidates": {}}',
    ],
)
def test_a_memory_that_is_damaged_is_named(tmp_path, change):
    (tmp_path / "mine.memory").write_text(change)
    with pytest.raises(FileFormatError, match=r"mine\.memory is not of a few-shot search"):
        read_memory(tmp_path / "mine.memory")
