"""Rewards and scores of a task of the user's own are checked before anything is made of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from t2.generation.evaluate import evaluate
from t2.tasks.base import Problem, Task, rewards_of, scores_of
from tests.t2.toy import toy_tokenizer


class Mine(Task):
    name = "my-task"
    max_new_tokens = 1

    def __init__(self, values: Any) -> None:
        self.values = values

    def problems(self, split):
        return [Problem(({"role": "user", "content": "x"},))] * 2

    def scores(self, problems, answers):
        return self.values

    def rewards(self, problems, answers):
        return self.values


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        torch.tensor([1.0, 0.0]),
        [torch.tensor(1), torch.tensor([0.0])],
        np.array([1, 0]),
        [np.float32(1), np.int8(0)],
        [Fraction(1), 0],
        iter([1, 0]),
    ],
)
def test_numbers(values):
    found = rewards_of(Mine(values), [], ["a", "b"])
    assert found == [1.0, 0.0] and all(type(value) is float for value in found)


@pytest.mark.parametrize(
    "values",
    [
        *([value, 1.0] for value in (float("nan"), float("inf"), -1e300, 10**400, None, "1.0", [1.0], 1j, {})),
        torch.tensor([float("nan"), 1.0]),
        torch.ones(2, 2),
        torch.tensor(1.0),
        [],
        [1.0],
        [1.0, 1.0, 1.0],
        None,
        "11",
        {0: 1.0, 1: 1.0},
    ],
    ids=repr,
)
def test_no_numbers(values):
    for what, function in (("reward", rewards_of), ("score", scores_of)):
        with pytest.raises((ValueError, TypeError), match=rf"^{what}: expected .*my-task"):
            function(Mine(values), [], ["a", "b"])


def test_the_published_reward_checks_scores():
    with pytest.raises(ValueError, match=r"reward, made from scores: expected .*my-task"):
        Task.rewards(Mine([None, 1.0]), [], ["a", "b"])


def test_an_evaluation_checks_scores():
    with pytest.raises(ValueError, match=r"score: expected .*my-task"):
        evaluate(
            lambda prompts, room: [torch.tensor([4])] * len(prompts),
            Mine([1.0]),
            Mine(0).problems("test"),
            toy_tokenizer(),
        )
