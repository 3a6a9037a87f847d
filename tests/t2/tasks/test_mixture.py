from __future__ import annotations

import pytest

from t2 import tasks
from t2.tasks.mixture import Mixture
from tests.t2.toy import SayTheWord


class Shouting(SayTheWord):
    """The same words, wanted twice."""

    max_new_tokens = 5

    def problems(self, split):
        return super().problems(split)[:3]

    def scores(self, problems, answers):
        return [float(a.split() == [p.reference] * 2) for p, a in zip(problems, answers, strict=True)]


def test_tasks_take_turns_and_judge_their_own_answers():
    task = Mixture({"say": SayTheWord(), "shout": Shouting()})
    problems = task.problems("train")
    assert [problem.reference[0] for problem in problems] == ["say", "shout"] * 3
    assert task.max_new_tokens == 5 and problems[0].solution == "red"
    answers = ["red", "red", "blue", "green green", "blue", "blue blue"]
    assert task.scores(problems, answers) == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert task.rewards(problems[1:2], ["red red"]) == [1.0]
    assert task.scores([], []) == []


def test_a_mixture_by_name():
    sums = {"name": "reasoning-gym:chain_sum", "train_size": 3, "validation_size": 1, "test_size": 2}
    task = tasks.get("mixture", tasks={"a": sums, "b": sums | {"seed": 1}}, max_new_tokens=4)
    assert len(task.problems("train")) == 6 and task.max_new_tokens == 4
    solutions = [str(problem.solution) for problem in task.problems("test")]
    assert task.scores(task.problems("test"), solutions) == [1.0] * 4


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match="tasks: expected at least one, got none"):
        Mixture({})
    with pytest.raises(TypeError, match="tasks: expected a Task for a, got str"):
        Mixture({"a": "gsm8k"})
    with pytest.raises(ValueError, match=r"tasks: expected \{label"):
        tasks.get("mixture", tasks={"a": "gsm8k"})
