"""The measurements behind the tables. Each is made once: its value is kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.adaptation import (
    Adaptation,
    BankFolder,
    ClassifierStrategy,
    FewShotStrategy,
    PromptStrategy,
    Strategy,
    few_shot_problems,
    two_pass,
)
from t2.adaptation.bank_folder import CLASSIFIER
from t2.adaptation.base import mixed
from t2.adaptation.few_shot import alone, keeper, mean_weights
from t2.adaptation.options import Granularity
from t2.adaptation.search import Fitness, SearchProgress
from t2.eval.lora_adapter import LoraAdapter
from t2.eval.result_cache import Key, ResultCache, tensor_digest, texts_digest
from t2.eval.spec import EvalSpec
from t2.experts.expert import Expert
from t2.experts.layout import Layout, fingerprint
from t2.generation.evaluate import Evaluation, evaluate, evaluate_experts
from t2.generation.prompts import encode
from t2.model.svf_model import ExpertChoice, SVFModel
from t2.tasks import Problem, Split, Task, get
from t2.tasks.classify import BASE, Prompt
from t2.weights.machine import machine

PROMPT, UNCALIBRATED = "prompt", "prompt, uncalibrated"
CHUNK = 50
"""Problems of a cell: so much work an interruption loses at most."""
Announce = Callable[[str, int, int], object]
"""(what is under way, how much of it is done, of how much)"""


class MissingResult(Exception):
    """A value is not there, and was not to be measured now."""


@dataclass(frozen=True)
class ResolvedTask:
    """A task of the plan. problems: those of its test split that count."""

    label: str
    task: Task
    problems: tuple[Problem, ...]
    new_tokens: int
    few_shot_from: Split
    identity: Mapping[str, Any]

    def few_shot(self, size: int, seed: int) -> list[Problem]:
        """Problems for a search, none of those that count."""
        skip = len(self.problems) if self.few_shot_from == "test" else 0
        try:
            return few_shot_problems(self.task, size, split=self.few_shot_from, seed=seed, skip=skip)
        except ValueError as error:
            raise ValueError(f"{self.label}: few_shot_from {self.few_shot_from}: {error}") from error


class EvalRunner:
    """Measures for a plan with a model that has the bank's experts.

    Args:
        svf: the model; `bank.add_to(svf)` was called.
        tokenizer: its tokenizer, as `t2.load` gives it.
        bank: domains, experts, and the classification expert.
        plan: tasks and sizes.
        cells: what was measured before.
        adapter: the LoRA adapter of the plan.
        token_budget: most tokens of a batch, padding and answers included. It changes times alone.
        announce: called as work goes on.

    Raises:
        ValueError: a seen task has no expert of its name, or the incumbent "classifier" no classification expert.
    """

    def __init__(
        self,
        svf: SVFModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: BankFolder,
        plan: EvalSpec,
        cells: ResultCache,
        *,
        adapter: LoraAdapter | None = None,
        token_budget: int = 16384,
        announce: Announce = lambda what, done, total: None,
    ) -> None:
        if unknown := [name for name in plan.seen if name not in bank.experts]:
            raise ValueError(f"seen: expected names of experts ({', '.join(bank.experts)}), got {', '.join(unknown)}")
        if CLASSIFIER in plan.incumbents and bank.classifier is None:
            raise ValueError("incumbents: expected a bank with a classification expert beside 'classifier', got none")
        if not isinstance(token_budget, int) or token_budget < 1:
            raise ValueError(f"token_budget: expected an integer >= 1, got {token_budget!r}")
        self.svf, self.tokenizer, self.bank, self.plan, self.cells = svf, tokenizer, bank, plan, cells
        self.adapter, self.token_budget, self.announce = adapter, token_budget, announce
        self.allowed = True
        """Whether what is not there is measured; a `MissingResult` says so otherwise."""
        self.experts = {name: tensor_digest(expert.z) for name, expert in bank.experts.items()}
        self.classifier = None if bank.classifier is None else tensor_digest(bank.classifier.z)
        self._judged: dict[str, ResolvedTask] = {}
        self._base = {
            "model": svf.layout.base_model,
            "fingerprint": svf.layout.fingerprint,
            "dtype": str(svf.svf_config.dtype),
            "bf16_products": svf.svf_config.bf16_products,
        }

    def judged(self, label: str) -> ResolvedTask:
        """A task of the plan by its label.

        Raises:
            ValueError: the task or its options are unknown, or it has no test problems.
        """
        if label not in self._judged:
            planned = self.plan.tasks[label]
            try:
                task = get(planned.task, **planned.options)
                problems = tuple(task.problems("test")[: planned.problems or self.plan.problems])
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            if not problems:
                raise ValueError(f"{label}: expected a task with test problems, got none of {planned.task}")
            room = planned.max_new_tokens or task.max_new_tokens
            identity = {"task": planned.task, "options": dict(planned.options), "new_tokens": room}
            self._judged[label] = ResolvedTask(label, task, problems, room, planned.few_shot_from, identity)
        return self._judged[label]

    def _cell(self, key: Key, value: Callable[[], Any]) -> Any:
        found = self.cells.find(key)
        if found is not None:
            return found
        if not self.allowed:
            raise MissingResult(f"{key['kind']} {key['label']}")
        return self.cells.put(key, value())

    # Answers

    def scores(self, label: str, choices: Mapping[str, ExpertChoice]) -> dict[str, list[float]]:
        """The score of each test problem by column. What is not there is answered in one batch, for all columns.

        Columns of the same z are answered once.
        """
        judged = self.judged(label)
        columns = {name: tensor_digest(self.svf.z_of(choice)) for name, choice in choices.items()}
        distinct = {column: name for name, column in reversed(columns.items())}
        found: dict[str, list[float]] = {column: [] for column in distinct}
        for start, problems in _chunks(judged.problems):
            keys = {column: self._answers_key(judged, problems, column) for column in distinct}
            known = {column: self.cells.find(key) for column, key in keys.items()}
            missing = {column: choices[distinct[column]] for column, value in known.items() if value is None}
            if missing and not self.allowed:
                raise MissingResult(f"answers {label}")
            if missing:
                names = ", ".join(distinct[column] for column in missing)
                answered = evaluate_experts(
                    self.svf,
                    missing,
                    judged.task,
                    problems,
                    self.tokenizer,
                    new_tokens=judged.new_tokens,
                    token_budget=self.token_budget,
                    announce=self._counting(f"{label}: {names}", start, len(judged.problems)),
                )
                known |= {column: self.cells.put(keys[column], _kept(each)) for column, each in answered.items()}
            for column, value in known.items():
                found[column] += cast(Mapping[str, Any], value)["scores"]
        return {name: found[column] for name, column in columns.items()}

    def lora(self, label: str) -> list[float]:
        """The score of each test problem with the plan's LoRA adapter."""
        assert self.adapter is not None
        adapter, judged, scores = self.adapter, self.judged(label), []
        for start, problems in _chunks(judged.problems):
            key = self._answers_key(judged, problems, f"lora {adapter.identity}")

            def answered(problems: Sequence[Problem] = problems, start: int = start) -> dict[str, Any]:
                return _kept(
                    evaluate(
                        adapter.answers,
                        judged.task,
                        problems,
                        self.tokenizer,
                        new_tokens=judged.new_tokens,
                        token_budget=self.token_budget,
                        announce=self._counting(f"{label}: LoRA", start, len(judged.problems)),
                    )
                )

            scores += self._cell(key, answered)["scores"]
        return scores

    def _answers_key(self, judged: ResolvedTask, problems: Sequence[Problem], column: str) -> Key:
        return {
            "kind": "answers",
            "label": judged.label,
            **self._base,
            **judged.identity,
            "problems": self._digest(problems),
            "column": column,
        }

    def _digest(self, problems: Sequence[Problem]) -> str:
        return texts_digest(*((encode(p, self.tokenizer).tolist(), p.solution) for p in problems))

    def _counting(self, what: str, start: int, total: int) -> Callable[[int], object]:
        self.announce(what, start, total)
        return lambda done: self.announce(what, start + done, total)

    # Pass one

    def strategies(self) -> dict[str, PromptStrategy]:
        """ "prompt" as in table 2, the same without calibration, and the classification expert if there is one."""
        made: dict[str, PromptStrategy] = {
            PROMPT: PromptStrategy(
                self.svf,
                self.tokenizer,
                self.bank.domains,
                calibration=self.plan.calibration,
                token_budget=self.token_budget,
            ),
            UNCALIBRATED: PromptStrategy(
                self.svf, self.tokenizer, self.bank.domains, calibration="none", token_budget=self.token_budget
            ),
        }
        if self.classifier is not None:
            made[CLASSIFIER] = ClassifierStrategy(
                self.svf, self.tokenizer, self.bank.domains, token_budget=self.token_budget
            )
        return made

    def labels(self, label: str) -> dict[str, list[str]]:
        """What each strategy dispatches the task's test problems to: an expert's name, or "base"."""
        return self._labels(label, self.judged(label).problems, self.strategies())

    def _labels(
        self, label: str, problems: Sequence[Problem], strategies: Mapping[str, PromptStrategy]
    ) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for names in ((PROMPT, UNCALIBRATED), (CLASSIFIER,)):  # these have the same pass one
            chosen = {name: strategies[name] for name in names if name in strategies}
            if not chosen:
                continue
            key = {
                "kind": "labels",
                "label": f"{label} {names[0]}",
                **self._base,
                "strategies": [[name, strategy.calibration] for name, strategy in chosen.items()],
                "classifier": self.classifier if CLASSIFIER in chosen else None,
                "domains": self._domains,
                "problems": self._digest(problems),
            }
            found |= self._cell(key, partial(self._chosen, label, problems, chosen))
        return found

    def _chosen(
        self, label: str, problems: Sequence[Problem], strategies: Mapping[str, PromptStrategy]
    ) -> dict[str, list[str]]:
        first, *_ = strategies
        self.announce(f"{label}: pass one, {first}", 0, len(problems))
        scores, names = strategies[first].label_scores(problems), (BASE, *self._mixed)
        return {
            name: [names[index] for index in strategy.probabilities(scores).argmax(-1).tolist()]
            for name, strategy in strategies.items()
        }

    @property
    def _domains(self) -> list[list[str]]:
        return [[domain.name, domain.description] for domain in self.bank.domains]

    # Few-shot

    def settled(
        self, label: str, size: int, seed: int, incumbent: str, granularity: Granularity = "model"
    ) -> dict[str, Any]:
        """The best mix for a task, or what stays in its place by the plan's margin (`keeper`): "names", "alpha" [E] or
        [G, E], "groups", "score", "kept" (None for the mix), "singles", "seconds", ..."""
        found = dict(self._search(label, size, seed, granularity))
        best, singles = Fitness(*found["best"]), {name: Fitness(*each) for name, each in found["singles"].items()}
        name = BASE if incumbent == BASE else self._vote(label, size, seed, incumbent)
        kept = keeper(best, singles, name, self.plan.search.margin)
        alpha = torch.tensor(found["alpha"])
        if kept is not None:
            alpha = alone(kept, found["names"], alpha)
        del found["best"]
        return found | {
            "alpha": alpha.tolist(),
            "mean_alpha": mean_weights(found["names"], alpha),
            "score": (best if kept is None else singles[kept]).score,
            "singles": {each: fitness.score for each, fitness in singles.items()},
            "incumbent": name,
            "kept": kept,
        }

    def _vote(self, label: str, size: int, seed: int, strategy: str) -> str:
        """What a strategy gives the most few-shot problems to."""
        judged = self.judged(label)
        chosen = {strategy: self.strategies()[strategy]}
        labels = self._labels(f"{label} {size} {seed}", judged.few_shot(size, seed), chosen)[strategy]
        return max((BASE, *self._mixed), key=labels.count)

    def _search(self, label: str, size: int, seed: int, granularity: Granularity) -> dict[str, Any]:
        """The best mix of a search, whatever the margin, and how good the singles are."""
        judged = self.judged(label)
        options = replace(self.plan.search, seed=seed, granularity=granularity, margin=0.0)
        problems = judged.few_shot(size, seed)
        searched = {name: value for name, value in asdict(options).items() if name != "token_budget"}
        key = {
            "kind": "search",
            "label": f"{label} {size} {seed}",
            **self._base,
            **judged.identity,
            "problems": self._digest(problems),
            "options": searched,
            "experts": [[name, self.experts[name]] for name in self._mixed],
        }
        memory = self.cells.path(key, ".memory")

        def found() -> dict[str, Any]:
            what = f"{label}: search with {size} problems, seed {seed}"
            self.announce(what, 0, options.generations)

            def announce(so_far: SearchProgress) -> None:
                done = len(so_far.generations)
                self.announce(f"{what}, {so_far.fitness.score:.0%}", done, options.generations)

            strategy = FewShotStrategy(
                self.svf,
                self.tokenizer,
                judged.task,
                problems,
                options=replace(options, token_budget=self.token_budget),
                experts=self._mixed,
                new_tokens=judged.new_tokens,
                memory=memory,
                announce=announce,
            )
            result = strategy.search()
            return {
                "names": result.names,
                "alpha": result.alpha.tolist(),
                "groups": result.groups,
                "best": list(asdict(result.fitness).values()),
                "singles": {name: list(asdict(fitness).values()) for name, fitness in result.singles.items()},
                "generations": len(result.generations),
                "stopped": result.stopped,
                "seconds": result.seconds,
            }

        value: dict[str, Any] = self._cell(key, found)
        memory.unlink(missing_ok=True)
        return value

    @property
    def _mixed(self) -> list[str]:
        return [domain.name for domain in self.bank.domains]

    def mix(self, found: Mapping[str, Any]) -> Tensor:
        """z [R] of what `settled` found."""
        alpha = torch.tensor(found["alpha"], dtype=torch.float32).unsqueeze(0)
        return mixed(self.svf.bank, found["names"], alpha, found["groups"])[0]

    # Times

    def times(self, label: str | None) -> dict[str, Any]:
        """Seconds of both passes over a batch of a task, or of all seen ones in turn, and of the base on the same.

        "seconds": {"base": [rounds], strategy: {"first": [rounds], "second": [rounds]}}; paths take turns after a
        round that does not count.
        """
        plan = self.plan
        chosen = [self.judged(each) for each in (plan.seen if label is None else (label,))]
        rounds = -(-plan.times_requests // len(chosen))
        columns = [judged.problems[:rounds] for judged in chosen]
        problems = [column[i] for i in range(rounds) for column in columns if i < len(column)][: plan.times_requests]
        room = max(judged.new_tokens for judged in chosen)
        key = {
            "kind": "times",
            "label": label or "mixed",
            **self._base,
            "problems": self._digest(problems),
            "new_tokens": room,
            "rounds": plan.times_rounds,
            "experts": self.experts,
            "classifier": self.classifier,
            "domains": self._domains,
            "machine": {name: machine()[name] for name in ("processor", "threads")},
        }

        def timed() -> dict[str, Any]:
            seconds = self._timed(label or "mixed batch", problems, room)
            return {"requests": len(problems), "new_tokens": room, "seconds": seconds}

        value: dict[str, Any] = self._cell(key, timed)
        return value

    def _timed(self, what: str, problems: Sequence[Problem], room: int) -> dict[str, Any]:
        strategies = {name: each for name, each in self.strategies().items() if name != UNCALIBRATED}
        base: list[float] = []
        passes: dict[str, dict[str, list[float]]] = {name: {"first": [], "second": []} for name in strategies}
        for round_ in range(-1, self.plan.times_rounds):
            self.announce(f"{what}: times", round_ + 1, self.plan.times_rounds + 1)
            seconds = two_pass(self.svf, self.tokenizer, problems, _Base(self.svf, self.tokenizer), **_greedy(room))
            found = {
                name: two_pass(self.svf, self.tokenizer, problems, strategy, **_greedy(room))
                for name, strategy in strategies.items()
            }
            if round_ >= 0:
                base.append(seconds.second_seconds)
                for name, each in found.items():
                    passes[name]["first"].append(each.first_seconds)
                    passes[name]["second"].append(each.second_seconds)
        return {"base": base, **passes}

    # Variants

    def widened(self, expert: Expert, name: str) -> Tensor:
        """z [R] of an expert of some of the model's matrices: 1 in the others.

        Raises:
            ValueError: it has matrices that the model has not, or is for other weights.
        """
        layout, keys = expert.layout, self.svf.weight_keys
        known = set(layout.names) <= set(keys)
        if not known or layout.fingerprint != fingerprint({matrix: keys[matrix] for matrix in layout.names}):
            raise ValueError(f"{name}: expected an expert of matrices of this model, got one of {_described(layout)}")
        z = torch.ones(self.svf.layout.R)
        for matrix in layout.names:
            z[self.svf.layout.window(matrix)] = expert[matrix]
        return z


class _Base(Strategy):
    """Leaves every request to the base."""

    name = "base"

    def adapt(self, prompts: Sequence[Prompt]) -> Adaptation:
        return Adaptation((BASE,), torch.ones(len(prompts), 1), 0.0, ("",) * len(prompts))


def _kept(found: Evaluation) -> dict[str, Any]:
    return {"scores": found.scores, "answers": found.answers}


def _greedy(room: int) -> dict[str, Any]:
    return {"max_new_tokens": room, "do_sample": False}


def _chunks(problems: Sequence[Problem]) -> list[tuple[int, Sequence[Problem]]]:
    return [(start, problems[start : start + CHUNK]) for start in range(0, len(problems), CHUNK)]


def _described(layout: Layout) -> str:
    return f"{len(layout.names)} matrices of {layout.base_model or 'an unnamed base'} ({layout.fingerprint[:12]})"
