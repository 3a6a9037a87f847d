from __future__ import annotations

import json

import pytest

from t2 import tasks
from t2.tasks.arc import Choices, chosen_label
from t2.weights.files import FileFormatError

TEXTS = ["the Sun", "the Moon", "A planet", "Mars"]


def hub_row(labels=("A", "B", "C", "D"), key="A"):
    return {"id": "1", "question": "What is hot?", "choices": {"text": TEXTS, "label": list(labels)}, "answerKey": key}


def published_row(key="A"):
    choices = [{"text": text, "label": label} for text, label in zip(TEXTS, "ABCD", strict=True)]
    return {"id": "1", "question": {"stem": "What is hot?", "choices": choices}, "answerKey": key}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A", "A"),
        (" B. the Moon", "B"),
        ("(C) A planet", "C"),
        ("**D**", "D"),
        ("D\nbecause", "D"),
        ("The answer is B.", "B"),
        ("The correct answer is: (B) the Moon", "B"),
        ("Answer: C", "C"),
        ("At first the answer is A. No, the answer is D.", "D"),
        ("the moon.", "B"),
        ("A planet", "C"),
        ("A dog", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_label_an_answer_chooses(answer, label):
    assert chosen_label(answer, Choices(dict(zip("ABCD", TEXTS, strict=True)), "A")) == label


@pytest.mark.parametrize("row", [hub_row(), published_row()], ids=["hub", "published"])
@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge"])
def test_both_schemas_of_both_levels(write, tmp_path, row, name):
    level = "ARC-Easy" if name == "arc-easy" else "ARC-Challenge"
    for split in ("train", "validation", "test"):
        write([row], f"{level}/{split}-00000-of-00001")
        write([{**row, "answerKey": "Z"}], f"other/{split}")
    task = tasks.get(name, data=tmp_path)
    assert task.name == name
    (problem,) = task.problems("validation")
    assert problem.messages[-1]["content"] == "What is hot?\nA. the Sun\nB. the Moon\nC. A planet\nD. Mars"
    assert problem.solution == "A"
    assert task.scores([problem] * 3, ["A", "the sun", "B"]) == [1, 1, 0]
    assert task.rewards([problem], ["D"]) == [-1]


def test_numeric_labels(write, tmp_path):
    write([hub_row(labels="1234", key="3")], "test")
    task = tasks.get("arc-easy", data=tmp_path)
    (problem,) = task.problems("test")
    assert "\n3. A planet" in problem.messages[-1]["content"]
    assert task.scores([problem] * 4, ["3", "3) A planet", "The answer is 3", "1"]) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (hub_row(key="E"), "field 'answerKey': expected one of A, B, C, D, got 'E'"),
        (hub_row(labels="ABC"), "field 'choices': expected two or more texts"),
        (hub_row(labels="AACD"), "field 'choices'"),
        ({**hub_row(), "choices": ["a"]}, "field 'choices': expected dict"),
    ],
)
def test_malformed_rows(tmp_path, row, match):
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(FileFormatError, match=match):
        tasks.get("arc-easy", data=tmp_path).problems("test")
