"""Measurements behind the tables of `t2 eval`. Each is taken once and stored in the result cache at once."""

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
from t2.adaptation.strategies import PASS_ONE, pass_one
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
"""Examples per cached result, which is also the most work that an interruption loses."""
Announce = Callable[[str, int, int], object]
"""(description, steps done, steps in all) of the measurement in progress."""


class MissingResult(Exception):
    """Raised in cache-only mode when a result is missing."""


@dataclass(frozen=True)
class EvalTask:
    """One task of the spec with its test examples (`problems`)."""

    label: str
    task: Task
    problems: tuple[Problem, ...]
    new_tokens: int
    few_shot_from: Split
    identity: Mapping[str, Any]

    def few_shot(self, size: int, seed: int) -> list[Problem]:
        """Few-shot examples for a search, none of them a test example."""
        skip = len(self.problems) if self.few_shot_from == "test" else 0
        try:
            return few_shot_problems(self.task, size, split=self.few_shot_from, seed=seed, skip=skip)
        except ValueError as error:
            raise ValueError(f"{self.label}: few_shot_from {self.few_shot_from}: {error}") from error


class EvalRunner:
    """Measures what a spec asks for, with a model whose bank has all experts.

    Args:
        svf: the model; `bank.add_to(svf)` was called.
        tokenizer: its tokenizer, as `t2.load` gives it.
        bank: domains, experts, and the classification expert.
        spec: tasks and sizes.
        cache: results of earlier runs; new ones are added.
        adapter: LoRA adapter of the spec, if it has one.
        token_budget: maximum tokens of a batch, padding and completions included; affects speed only.
        announce: called with the progress.

    Raises:
        ValueError: a seen task has no expert of its name, or the incumbent "classifier" no classification expert.
    """

    def __init__(
        self,
        svf: SVFModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: BankFolder,
        spec: EvalSpec,
        cache: ResultCache,
        *,
        adapter: LoraAdapter | None = None,
        token_budget: int = 16384,
        announce: Announce = lambda what, done, total: None,
    ) -> None:
        if unknown := [name for name in spec.seen if name not in bank.experts]:
            raise ValueError(f"seen: expected names of experts ({', '.join(bank.experts)}), got {', '.join(unknown)}")
        if CLASSIFIER in spec.incumbents and bank.classifier is None:
            raise ValueError("incumbents: expected a bank with a classification expert beside 'classifier', got none")
        if not isinstance(token_budget, int) or token_budget < 1:
            raise ValueError(f"token_budget: expected an integer >= 1, got {token_budget!r}")
        self.svf, self.tokenizer, self.bank, self.spec, self.cache = svf, tokenizer, bank, spec, cache
        self.adapter, self.token_budget, self.announce = adapter, token_budget, announce
        self.allowed = True
        """Measure missing results (True), or raise `MissingResult` for them (cache-only mode)."""
        self.experts = {name: tensor_digest(expert.z) for name, expert in bank.experts.items()}
        self.classifier = None if bank.classifier is None else tensor_digest(bank.classifier.z)
        self._tasks: dict[str, EvalTask] = {}
        self._base = {
            "model": svf.layout.base_model,
            "fingerprint": svf.layout.fingerprint,
            "dtype": str(svf.svf_config.dtype),
            "bf16_products": svf.svf_config.bf16_products,
        }

    def task(self, label: str) -> EvalTask:
        """A task of the spec by its label.

        Raises:
            ValueError: the task or its options are unknown, or it has no test problems.
        """
        if label not in self._tasks:
            planned = self.spec.tasks[label]
            try:
                task = get(planned.task, **planned.options)
                problems = tuple(task.problems("test")[: planned.problems or self.spec.problems])
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            if not problems:
                raise ValueError(f"{label}: expected a task with test problems, got none of {planned.task}")
            room = planned.max_new_tokens or task.max_new_tokens
            identity = {"task": planned.task, "options": dict(planned.options), "new_tokens": room}
            self._tasks[label] = EvalTask(label, task, problems, room, planned.few_shot_from, identity)
        return self._tasks[label]

    def _cell(self, key: Key, value: Callable[[], Any]) -> Any:
        found = self.cache.find(key)
        if found is not None:
            return found
        if not self.allowed:
            raise MissingResult(f"{key['kind']} {key['label']}")
        return self.cache.put(key, value())

    # Answers

    def scores(self, label: str, choices: Mapping[str, ExpertChoice]) -> dict[str, list[float]]:
        """Score of each test example by column. All columns missing in the cache share the same batches.

        Columns with equal z are evaluated once.
        """
        entry = self.task(label)
        columns = {name: tensor_digest(self.svf.z_of(choice)) for name, choice in choices.items()}
        distinct = {column: name for name, column in reversed(columns.items())}
        found: dict[str, list[float]] = {column: [] for column in distinct}
        for start, problems in _chunks(entry.problems):
            keys = {column: self._answers_key(entry, problems, column) for column in distinct}
            known = {column: self.cache.find(key) for column, key in keys.items()}
            missing = {column: choices[distinct[column]] for column, value in known.items() if value is None}
            if missing and not self.allowed:
                raise MissingResult(f"answers {label}")
            if missing:
                names = ", ".join(distinct[column] for column in missing)
                answered = evaluate_experts(
                    self.svf,
                    missing,
                    entry.task,
                    problems,
                    self.tokenizer,
                    new_tokens=entry.new_tokens,
                    token_budget=self.token_budget,
                    announce=self._counting(f"{label}: {names}", start, len(entry.problems)),
                )
                known |= {column: self.cache.put(keys[column], _kept(each)) for column, each in answered.items()}
            for column, value in known.items():
                found[column] += cast(Mapping[str, Any], value)["scores"]
        return {name: found[column] for name, column in columns.items()}

    def lora(self, label: str) -> list[float]:
        """Score of each test example with the spec's LoRA adapter."""
        assert self.adapter is not None
        adapter, entry, scores = self.adapter, self.task(label), []
        for start, problems in _chunks(entry.problems):
            key = self._answers_key(entry, problems, f"lora {adapter.identity}")

            def answered(problems: Sequence[Problem] = problems, start: int = start) -> dict[str, Any]:
                return _kept(
                    evaluate(
                        adapter.answers,
                        entry.task,
                        problems,
                        self.tokenizer,
                        new_tokens=entry.new_tokens,
                        token_budget=self.token_budget,
                        announce=self._counting(f"{label}: LoRA", start, len(entry.problems)),
                    )
                )

            scores += self._cell(key, answered)["scores"]
        return scores

    def _answers_key(self, entry: EvalTask, problems: Sequence[Problem], column: str) -> Key:
        return {
            "kind": "answers",
            "label": entry.label,
            **self._base,
            **entry.identity,
            "problems": self._digest(problems),
            "column": column,
        }

    def _digest(self, problems: Sequence[Problem]) -> str:
        return texts_digest(*((encode(p, self.tokenizer).tolist(), p.solution) for p in problems))

    def _counting(self, what: str, start: int, total: int) -> Callable[[int], object]:
        self.announce(what, start, total)
        return lambda done: self.announce(what, start + done, total)

    # Pass one

    def strategies(self) -> dict[str, Strategy]:
        """Pass-one strategies by column: those of `PASS_ONE`, and the prompt strategy without calibration.

        Without a classification expert in the bank there is no column "classifier".
        """
        made: dict[str, Strategy] = {
            PROMPT: PromptStrategy(
                self.svf,
                self.tokenizer,
                self.bank.domains,
                calibration=self.spec.calibration,
                token_budget=self.token_budget,
            ),
            UNCALIBRATED: PromptStrategy(
                self.svf, self.tokenizer, self.bank.domains, calibration="none", token_budget=self.token_budget
            ),
        }
        for name in PASS_ONE:
            if name != PROMPT and (name != CLASSIFIER or self.classifier is not None):
                made[name] = pass_one(name, self.svf, self.tokenizer, self.bank.domains, token_budget=self.token_budget)
        return made

    def labels(self, label: str) -> dict[str, list[str]]:
        """Expert that each strategy chooses for each test example: its name, or "base"."""
        return self._labels(label, self.task(label).problems, self.strategies())

    def _labels(
        self, label: str, problems: Sequence[Problem], strategies: Mapping[str, Strategy]
    ) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for names in ((PROMPT, UNCALIBRATED), *((name,) for name in PASS_ONE if name != PROMPT)):  # share pass one
            chosen = {name: strategies[name] for name in names if name in strategies}
            if not chosen:
                continue
            key = {
                "kind": "labels",
                "label": f"{label} {names[0]}",
                **self._base,
                "strategies": [[name, getattr(strategy, "calibration", None)] for name, strategy in chosen.items()],
                "classifier": self.classifier if CLASSIFIER in chosen else None,
                "domains": self._domains,
                "problems": self._digest(problems),
            }
            found |= self._cell(key, partial(self._chosen, label, problems, chosen))
        return found

    def _chosen(
        self, label: str, problems: Sequence[Problem], strategies: Mapping[str, Strategy]
    ) -> dict[str, list[str]]:
        first, *_ = strategies
        self.announce(f"{label}: pass one, {first}", 0, len(problems))
        scores: Tensor | None = None
        chosen: dict[str, list[str]] = {}
        for name, strategy in strategies.items():
            if isinstance(strategy, PromptStrategy):  # the label scores do not depend on the calibration
                scores = strategy.label_scores(problems) if scores is None else scores
                names: Sequence[str] = (BASE, *self._mixed)
                weights = strategy.probabilities(scores)
            else:
                adaptation = strategy.adapt(problems)
                names, weights = adaptation.names, adaptation.alpha
            chosen[name] = [names[index] for index in weights.argmax(-1).tolist()]
        return chosen

    @property
    def _domains(self) -> list[list[str]]:
        return [[domain.name, domain.description] for domain in self.bank.domains]

    # Few-shot

    def settled(
        self, label: str, size: int, seed: int, incumbent: str, granularity: Granularity = "model"
    ) -> dict[str, Any]:
        """Outcome of the few-shot search: the best mix for a task, or the single expert kept by the spec's margin.

        Keys: "names", "alpha" [E] or [G, E], "groups", "score", "kept" (None for the mix), "singles", "seconds", ...
        """
        found = dict(self._search(label, size, seed, granularity))
        best, singles = Fitness(*found["best"]), {name: Fitness(*each) for name, each in found["singles"].items()}
        name = BASE if incumbent == BASE else self._vote(label, size, seed, incumbent)
        kept = keeper(best, singles, name, self.spec.search.margin)
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
        """Majority choice of a strategy on the few-shot examples: an expert's name, or "base"."""
        entry = self.task(label)
        chosen = {strategy: self.strategies()[strategy]}
        labels = self._labels(f"{label} {size} {seed}", entry.few_shot(size, seed), chosen)[strategy]
        return max((BASE, *self._mixed), key=labels.count)

    def _search(self, label: str, size: int, seed: int, granularity: Granularity) -> dict[str, Any]:
        """Best mix of a search without a margin, and the fitness of the base and of each expert alone."""
        entry = self.task(label)
        options = replace(self.spec.search, seed=seed, granularity=granularity, margin=0.0)
        problems = entry.few_shot(size, seed)
        searched = {name: value for name, value in asdict(options).items() if name != "token_budget"}
        key = {
            "kind": "search",
            "label": f"{label} {size} {seed}",
            **self._base,
            **entry.identity,
            "problems": self._digest(problems),
            "options": searched,
            "experts": [[name, self.experts[name]] for name in self._mixed],
        }
        memory = self.cache.path(key, ".memory")

        def found() -> dict[str, Any]:
            what = f"{label}: search with {size} problems, seed {seed}"
            self.announce(what, 0, options.generations)

            def announce(so_far: SearchProgress) -> None:
                done = len(so_far.generations)
                self.announce(f"{what}, {so_far.fitness.score:.0%}", done, options.generations)

            strategy = FewShotStrategy(
                self.svf,
                self.tokenizer,
                entry.task,
                problems,
                options=replace(options, token_budget=self.token_budget),
                experts=self._mixed,
                new_tokens=entry.new_tokens,
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
        """z [R] of the mix or the expert that `settled` gives."""
        alpha = torch.tensor(found["alpha"], dtype=torch.float32).unsqueeze(0)
        return mixed(self.svf.bank, found["names"], alpha, found["groups"])[0]

    # Times

    def times(self, label: str | None) -> dict[str, Any]:
        """Seconds of both passes over a batch of one task, or of all seen tasks, and of the base on the same batch.

        "seconds": {"base": [rounds], strategy: {"first": [rounds], "second": [rounds]}}; the paths take turns, after
        one round of warm-up.
        """
        spec = self.spec
        chosen = [self.task(each) for each in (spec.seen if label is None else (label,))]
        rounds = -(-spec.times_requests // len(chosen))
        columns = [entry.problems[:rounds] for entry in chosen]
        problems = [column[i] for i in range(rounds) for column in columns if i < len(column)][: spec.times_requests]
        room = max(entry.new_tokens for entry in chosen)
        key = {
            "kind": "times",
            "label": label or "mixed",
            **self._base,
            "problems": self._digest(problems),
            "new_tokens": room,
            "rounds": spec.times_rounds,
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
        for round_ in range(-1, self.spec.times_rounds):
            self.announce(f"{what}: times", round_ + 1, self.spec.times_rounds + 1)
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
        """z [R] of an expert that covers only some of the model's matrices; the others get z = 1.

        Raises:
            ValueError: the expert has matrices that the model lacks, or is for other weights.
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
    """Strategy that leaves every request to the base."""

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
