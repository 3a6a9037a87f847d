"""Several tasks as one, in turns: what a single adapter for all domains is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from t2.tasks.base import Problem, Split, Task, scores_of


class Mixture(Task):
    """Problems of other tasks in turns, as many of each as the smallest one has; each task scores its own.

    Args:
        tasks: by any name; a problem's reference is then (name, the task's own reference).
        max_new_tokens: room for an answer; default the most that one of the tasks has.

    Raises:
        TypeError: something is no Task. ValueError: there are none.
    """

    name = "mixture"

    def __init__(self, tasks: Mapping[str, Task], *, max_new_tokens: int | None = None) -> None:
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        for name, task in tasks.items():
            if not isinstance(task, Task):
                raise TypeError(f"tasks: expected a Task for {name}, got {type(task).__name__}")
        self.tasks = dict(tasks)
        self.max_new_tokens = max_new_tokens or max(task.max_new_tokens for task in tasks.values())

    def problems(self, split: Split) -> Sequence[Problem]:
        columns = [
            [replace(problem, reference=(name, problem.reference)) for problem in task.problems(split)]
            for name, task in self.tasks.items()
        ]
        return [problem for row in zip(*columns, strict=False) for problem in row]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        scores = [0.0] * len(problems)
        for name, task in self.tasks.items():
            places = [place for place, problem in enumerate(problems) if problem.reference[0] == name]
            own = [replace(problems[place], reference=problems[place].reference[1]) for place in places]
            found = scores_of(task, own, [answers[place] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores
