"""A model's score on a task: greedy answers, the task's own metric, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.experts.registry import ExpertChoice
from t2.generation.batching import length_batches
from t2.generation.cached_batch import SVFRunner
from t2.generation.decode import DecodeOptions, complete
from t2.generation.prompts import encode, encode_prompt, eos_ids_of
from t2.model.svf_model import SVFModel
from t2.tasks import Problem, Task
from t2.tasks.base import scores_of
from t2.tasks.statistics import wilson_interval
from t2.weights.loading import Tokenizer, tokenizer_of

Answerer = Callable[..., list[Tensor]]
"""Greedy answers to prompts, both as token ids [length]: (prompts, longest answer) -> answers. Where problems have
images: (prompts, longest answer, image inputs of each prompt) -> answers."""

IMAGES_AT_ONCE = 64
"""Problems with images that are in memory together."""


@dataclass(frozen=True)
class Evaluation:
    """Scores in [0, 1] and answers, in the order of the problems."""

    scores: tuple[float, ...]
    answers: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson_interval(self.accuracy, len(self.scores))


def evaluate(
    answerer: Answerer,
    task: Task,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    new_tokens: int | None = None,
    token_budget: int = 4096,
    announce: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Answers every problem, in batches of prompts of like length, and scores all of them.

    Args:
        answerer: gives greedy answers.
        task: whose metric counts.
        problems: of one of its splits.
        tokenizer: the model's, or its processor.
        new_tokens: longest answer; default the task's own.
        token_budget: most tokens of a batch, padding and answers included; one problem always fits.
        announce: called with the number of problems answered so far.
    """
    room = new_tokens or task.max_new_tokens
    with_images = any(problem.images for problem in problems)
    size = IMAGES_AT_ONCE if with_images else max(1, len(problems))
    answers: list[str] = []
    done = 0
    for first in range(0, len(problems), size):
        part = problems[first : first + size]
        encoded = [encode_prompt(problem, tokenizer) for problem in part]
        prompts = [prompt for prompt, _ in encoded]
        found = [""] * len(part)
        for indices in length_batches([len(prompt) + room for prompt in prompts], token_budget):
            arguments = [[prompts[i] for i in indices], room]
            arguments += [[encoded[i][1] for i in indices]] if with_images else []
            for index, answer in zip(indices, answerer(*arguments), strict=True):
                found[index] = str(tokenizer_of(tokenizer).decode(answer, skip_special_tokens=True))
            done += len(indices)
            announce(done)
        answers += found
    return Evaluation(tuple(scores_of(task, problems, answers)), tuple(answers))


def evaluate_experts(
    svf: SVFModel,
    experts: Mapping[str, ExpertChoice],
    task: Task,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int | None = None,
    token_budget: int = 4096,
    announce: Callable[[int], object] = lambda done: None,
) -> dict[str, Evaluation]:
    """Every problem answered by every expert, greedily, in one batch; the scores by expert.

    Args:
        experts: what `SVFModel.route` takes for a request, by name.
        task: whose metric counts.
        problems: of one of its splits.
        new_tokens: longest answer; default the task's own.
        token_budget: most tokens of a batch, with padding, answers and the rows of all experts; one problem always
            fits.
        announce: called with the number of problems answered so far.

    Raises:
        ValueError: there are no experts.
    """
    if not experts:
        raise ValueError("experts: expected at least one, got none")
    choices, room = list(experts.values()), new_tokens or task.max_new_tokens
    prompts = [encode(problem, tokenizer) for problem in problems]
    eos_ids, pad_token = eos_ids_of(svf.model, tokenizer), int(tokenizer.pad_token_id)
    options = DecodeOptions(room, tuple(eos_ids), pad_token, svf.sigma.device)

    def route(candidates: Sequence[int]) -> AbstractContextManager[None]:
        return svf.route([choices[candidate] for candidate in candidates])

    answers, done = [[""] * len(prompts) for _ in choices], 0
    for indices in length_batches([len(prompt) + room for prompt in prompts], token_budget // len(choices)):
        rows = [(index, candidate) for index in indices for candidate in range(len(choices))]
        found = complete(
            SVFRunner(svf),
            [prompts[index] for index, _ in rows],
            options,
            candidates=[candidate for _, candidate in rows],
            route=route,
        )
        for (index, candidate), answer in zip(rows, found, strict=True):
            answers[candidate][index] = str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
        done += len(indices)
        announce(done)
    return {
        name: Evaluation(tuple(scores_of(task, problems, column)), tuple(column))
        for name, column in zip(experts, answers, strict=True)
    }


def figures(found: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Accuracy, 95% interval and the score of each problem, by expert, as JSON has them."""
    return {
        name: {"accuracy": each.accuracy, "interval": each.interval, "scores": each.scores}
        for name, each in found.items()
    }
