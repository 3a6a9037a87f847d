"""The program that measures HumanEval goes on where it stopped, and only from answers made as asked."""

from __future__ import annotations

import pytest

from benchmarks.tasks.humaneval import Answers

SETTINGS = {"model": "m", "new_tokens": 8}


def test_answers_are_there_after_an_interruption(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    answers = Answers(path, SETTINGS)
    assert answers.rows == {}
    answers.add([{"task_id": "HumanEval/1", "answer": "a\nb"}])
    answers.add([{"task_id": "HumanEval/0", "answer": "ü"}])
    again = Answers(path, SETTINGS)
    assert again.rows["HumanEval/1"]["answer"] == "a\nb" and len(again.rows) == 2


def test_answers_of_another_model_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    Answers(path, SETTINGS).add([])
    with pytest.raises(ValueError, match=r"answers: .*answers\.jsonl was made with .*'new_tokens': 8.*; delete it"):
        Answers(path, {**SETTINGS, "new_tokens": 9})
