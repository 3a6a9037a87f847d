from __future__ import annotations

import threading

import pytest

from t2 import tasks
from t2.tasks.math import last_boxed
from t2.weights.files import FileFormatError

ROWS = [
    {"problem": "Half of one?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Solve $x^2=4$.", "level": "Level 2", "type": "Algebra", "solution": "So $x=\\boxed{\\{-2,2\\}}$."},
    {"problem": "An interval?", "level": "Level 3", "type": "Algebra", "solution": "$\\boxed{[0,1)}$"},
]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("a \\boxed{1} b \\boxed{\\frac{1}{2}} c", "\\boxed{\\frac{1}{2}}"),
        ("\\boxed{unclosed", None),
        ("none", None),
    ],
)
def test_the_last_box(text, boxed):
    assert last_boxed(text) == boxed


def test_answers_are_compared_as_mathematics(write, tmp_path):
    write(ROWS, "algebra/test-00000-of-00001")
    task = tasks.get("math", data=tmp_path)
    problems = task.problems("test")
    right = ["So \\boxed{0.5}.", "$\\{2, -2\\}$", "$\\boxed{[0, 1)}$"]
    wrong = ["\\boxed{\\frac{1}{3}}", "\\boxed{2}", "no idea"]
    assert task.scores(problems, right) == [1, 1, 1]
    assert task.scores(problems, wrong) == [0, 0, 0]
    assert task.scores(problems, [problem.solution for problem in problems]) == [1, 1, 1]
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(task.scores(problems, right)))
    thread.start()
    thread.join()
    assert scores == [1, 1, 1]


def test_every_subject_is_read(write, tmp_path):
    write(ROWS[:1], "algebra/train")
    write(ROWS[1:2], "geometry/train")
    assert len(tasks.get("math", data=tmp_path, validation_size=0).problems("train")) == 2


def test_solutions_without_a_box(write, tmp_path):
    write([{**ROWS[0], "solution": "It is 0.5."}], "test")
    with pytest.raises(FileFormatError, match="field 'solution': expected a text with"):
        tasks.get("math", data=tmp_path).problems("test")
