from __future__ import annotations

from decimal import Decimal

import pytest

from t2 import tasks
from t2.tasks.gsm8k import final_number
from t2.weights.files import FileFormatError

ROWS = [
    {
        "question": f"A box has {i} pens. How many pens do two boxes have?",
        "answer": f"2*{i}=<<2*{i}={2 * i}>>\n#### {a}",
    }
    for i, a in [(1, "2"), (600, "1,200"), (3, "6"), (4, "8"), (5, "10")]
]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("5 + 5 = 10\n#### 10", "10"),
        ("#### 1,234", "1234"),
        ("####-3.50 or so", "-3.5"),
        ("#### $70", "70"),
        ("#### 1\nno wait\n#### 2", "2"),
        ("It is 3, no 4.", "4"),
        ("They cost $1,500.25.", "1500.25"),
        ("18 dollars", "18"),
        ("-7", "-7"),
        ("none", None),
        ("####", None),
    ],
)
def test_the_final_number(answer, number):
    assert final_number(answer) == (None if number is None else Decimal(number))


def test_splits_prompts_and_scores(write, tmp_path):
    write(ROWS, "train")
    write(ROWS[:2], "test")
    task = tasks.get("gsm8k", data=tmp_path, validation_size=2)
    train, validation, test = (task.problems(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (3, 2, 2)
    assert not {p.messages for p in map(freeze, train)} & {p.messages for p in map(freeze, validation)}
    second = test[1]
    assert second.messages[0]["role"] == "system" and second.messages[1]["content"].startswith("A box has 600")
    assert second.solution == "2*600=\n#### 1,200" and second.reference == 1200
    answers = ["#### 2", "The boxes have 1200.0 pens"]
    assert task.scores(test, answers) == [1, 1] and task.rewards(test, ["#### 3", "nothing"]) == [-1, -1]
    assert task.scores(test, [problem.solution for problem in test]) == [1, 1]
    with pytest.raises(ValueError, match="gsm8k has train, validation, test, got 'dev'"):
        task.problems("dev")


def freeze(problem):
    return type(problem)(tuple(tuple(m.items()) for m in problem.messages))


def test_rows_without_a_marked_answer(write, tmp_path):
    write([ROWS[0], {"question": "?", "answer": "12"}], "test")
    with pytest.raises(
        FileFormatError, match=r"test\..*2: field 'answer': expected a text that ends with '#### NUMBER'"
    ):
        tasks.get("gsm8k", data=tmp_path).problems("test")


def test_empty_and_wrong_fields(write, tmp_path):
    write([{"question": 3, "answer": "#### 1"}], "test")
    write([{"question": " ", "answer": "#### 1"}], "train")
    task = tasks.get("gsm8k", data=tmp_path)
    with pytest.raises(FileFormatError, match="field 'question': expected str, got 3"):
        task.problems("test")
    with pytest.raises(FileFormatError, match="field 'question': expected a non-empty string"):
        task.problems("train")


@pytest.mark.parametrize("options", [{"validation_size": -1}, {"max_new_tokens": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected an integer >="):
        tasks.get("gsm8k", **options)
