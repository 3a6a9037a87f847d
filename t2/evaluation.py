"""A model's score on a task: greedy answers, the task's own metric, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.loading import Tokenizer, tokenizer_of
from t2.tasks import Problem, Task
from t2.tasks.base import scores_of
from t2.vision import encode_prompt

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


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95% (z = 1.96) confidence (E. B. Wilson, 1927)."""
    if count < 1:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The exact two-sided p-value of McNemar's test on scores of the same problems.

    How likely a split at least as uneven as this is, of the problems that one answers better than the other, if either
    were as likely to: p = min(1, 2 P(X <= min(better, worse))), X ~ Binomial(better + worse, 1/2).
    """
    better, worse = better_worse(first, second)
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def better_worse(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """On how many of the same problems the second has the higher score, and on how many the lower one."""
    pairs = list(zip(first, second, strict=True))
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The prompt's token ids [length]."""
    return encode_prompt(problem, tokenizer)[0]


def length_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of rows of like length, as many at a time as the budget holds with their padding; one row always fits."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= token_budget:
            end += 1
        yield order[start:end]
        start = end


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
