from __future__ import annotations

import gzip
import json

import pytest

from t2 import tasks
from t2.tasks.data import read_rows
from t2.weights.files import FileFormatError

ROWS = [{"prompt": f"Say {i}.", "answer": str(i), "weight": i} for i in range(20)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_is_split_and_judged_by_its_answers(path):
    task = tasks.get(f"jsonl:{path}")
    splits = {split: task.problems(split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    assert len({p.messages[0]["content"] for found in splits.values() for p in found}) == 20
    problem = splits["train"][0]
    assert task.rewards([problem] * 2, [f" {problem.solution}\n", "x"]) == [1, -1]
    assert task.scores([problem] * 2, [problem.solution, "x"]) == [1, 0]


def test_a_reward_function_from_a_file(path, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(answer, row):\n    return row['weight'] * len(answer) / 100\n")
    task = tasks.get(f"jsonl:{path}", reward=f"{tmp_path / 'mine.py'}:reward", validation_size=1, test_size=1)
    problems = sorted(task.problems("train"), key=lambda p: p.reference["weight"])
    assert len(problems) == 18
    weight = problems[-1].reference["weight"]
    assert task.rewards(problems[-1:], ["ab"]) == [weight * 2 / 100]
    assert task.scores(problems[-1:] * 2, ["ab", "a" * 100]) == [0, 1]


def test_a_reward_function_from_a_module_or_itself(path, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def same(answer, row):\n    return answer == row['answer']\n")
    monkeypatch.syspath_prepend(tmp_path)
    for reward in ("my_rewards:same", lambda answer, row: answer == row["answer"]):
        task = tasks.get(f"jsonl:{path}", reward=reward)
        problem = task.problems("test")[0]
        assert task.rewards([problem] * 2, [problem.solution, ""]) == [1, 0]


def test_files_for_each_split_and_conversations(write, tmp_path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for split in ("train", "validation", "test"):
        write([{"messages": [*messages, {"role": "user", "content": split}], "answer": "x"}], f"mine/{split}")
    task = tasks.get(f"jsonl:{tmp_path / 'mine'}")
    (problem,) = task.problems("validation")
    assert problem.messages == (*messages, {"role": "user", "content": "validation"}) and problem.solution == "x"


def test_a_system_prompt_stands_before_prompts(path):
    task = tasks.get(f"jsonl:{path}", system_prompt="Be brief.")
    assert task.problems("test")[0].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"answer": "1"}, "line 1: no field 'prompt'"),
        ({"prompt": "1"}, "line 1: no field 'answer', which a task without a reward function needs"),
        ({"messages": [], "answer": "1"}, "field 'messages': expected a list of"),
        ({"messages": [{"role": "user"}], "answer": "1"}, "field 'messages'"),
        ({"prompt": 5, "answer": "1"}, "line 1: field 'prompt': expected str, got 5"),
        *(({"prompt": "a", "answer": answer}, "line 1: field 'answer'") for answer in (None, [1], {"a": 1})),
        *(
            ({"messages": [message], "answer": "1"}, "line 1: field 'messages'")
            for message in (
                5,
                {"role": 5, "content": "x"},
                {"role": "user", "content": None},
                *({"role": "user", "content": parts} for parts in ([], [5], ["x"], [{"text": "x"}])),
                *({"role": "user", "content": [{"type": "text"} | text]} for text in ({}, {"text": 5}, {"text": None})),
            )
        ),
    ],
)
def test_malformed_rows(tmp_path, row, match):
    path = tmp_path / "mine.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(FileFormatError, match=match):
        tasks.get(f"jsonl:{path}").problems("train")


@pytest.mark.parametrize("place", [12, 24, 45, 66, -6])
def test_flipped_bits_of_a_gzip(path, place):
    packed = bytearray(gzip.compress(path.read_bytes(), mtime=0))
    packed[place] ^= 0x10
    (path.parent / "flipped.jsonl.gz").write_bytes(packed)
    with pytest.raises(FileFormatError, match=r"flipped\.jsonl\.gz, "):
        tasks.get(f"jsonl:{path.parent / 'flipped.jsonl.gz'}").problems("train")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": "a", "answer": NaN}', '{"prompt": "\\ud800"}'])
def test_lines_that_are_no_json(path, text):
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(FileFormatError, match=r"mine\.jsonl, line 21: not JSON"):
        tasks.get(f"jsonl:{path}").problems("train")


def test_files_with_too_few_rows_are_named(path):
    for text in ("", json.dumps(ROWS[0])):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.jsonl: "):
            tasks.get(f"jsonl:{path}").problems("train")


def test_parts_of_a_message_may_have_null_for_the_keys_of_others(write, tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "of": "x"}]
    file = write([{"messages": [{"role": "user", "content": parts}], "answer": str(i)} for i in range(3)], "mine")
    problem = tasks.get(f"jsonl:{file}").problem(read_rows(file)[0])
    assert problem.messages[0]["content"] == parts


@pytest.mark.parametrize("value", ["1", None, float("nan")])
def test_rewards_have_to_be_numbers(path, value):
    task = tasks.get(f"jsonl:{path}", reward=lambda answer, row: value)
    with pytest.raises(ValueError, match="reward: expected a finite number"):
        task.rewards(task.problems("test")[:1], ["x"])


@pytest.mark.parametrize(
    ("reward", "error", "match"),
    [
        ("reward", ValueError, "expected 'module:function' or 'file.py:function', got 'reward'"),
        ("none.py:reward", FileNotFoundError, "none.py does not exist"),
        ("json:none", ValueError, "json has no function 'none'"),
        ("no_such_module:f", ImportError, "no_such_module"),
        (3, TypeError, "expected a function or its name, got int"),
    ],
)
def test_reward_names_are_checked(path, reward, error, match):
    with pytest.raises(error, match=match):
        tasks.get(f"jsonl:{path}", reward=reward)
