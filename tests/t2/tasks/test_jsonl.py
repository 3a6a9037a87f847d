from __future__ import annotations

import json

import pytest

from t2 import tasks
from t2.storage import FileFormatError

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
    ],
)
def test_malformed_rows(tmp_path, row, match):
    path = tmp_path / "mine.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(FileFormatError, match=match):
        tasks.get(f"jsonl:{path}").problems("train")


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
