from __future__ import annotations

import json

import pytest

from t2 import tasks
from t2.sandbox import Limits, runner
from t2.tasks.code import definition, extract_code
from t2.weights.files import FileFormatError

isolating = pytest.mark.skipif(all(runner.why_not(name) for name in runner.BACKENDS), reason="nothing isolates here")
pytestmark = pytest.mark.usefixtures("sandbox_turn")
LIMITS = Limits(timeout=20)

MBPP_PRO = [
    {
        "id": i,
        "raw_problem": f"# Write a function to add {i}.\ndef add(x):",
        "raw_solution": f"def add(x):\n    return x + {i}",
        "new_problem": f"# Given a list, write a function to add {i} to each.\ndef add_all(xs):",
        "new_solution": "def add_all(xs):\n    return [add(x) for x in xs]",
        "test_code": f"assert add_all([1]) == [{1 + i}]\nassert add_all([]) == []",
    }
    for i in range(6)
]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("x = 1", "x = 1"),
        ("    return 1", "    return 1"),
    ],
)
def test_code_is_extracted(answer, code):
    assert extract_code(answer) == code


def test_definitions_are_found_by_their_whole_name():
    code = "def ff(x): pass\nclass A:\n    def f(self): pass\ndef f (x): pass"
    assert code[definition(code, "f") :] == "def f (x): pass"
    assert definition("g = f(1)", "f") is None


@isolating
def test_humaneval_solutions_pass_and_others_do_not():
    task = tasks.get("humaneval", limits=LIMITS)
    problems = task.problems("test")
    assert len(problems) == 164 and problems[0].reference.task_id == "HumanEval/0"
    chosen = [p for p in problems if p.reference.task_id in {"HumanEval/0", "HumanEval/38", "HumanEval/163"}]
    assert task.scores(problems, [problem.solution for problem in problems]) == [1] * 164
    assert task.scores(chosen, ["```python\npass\n```"] * 3) == [0, 0, 0]
    assert "has_close_elements" in chosen[0].messages[-1]["content"]


@isolating
def test_humaneval_tests_call_the_helpers_of_the_prompt():
    """Those that an answer defines with the same names would make any answer right."""
    task = tasks.get("humaneval", limits=LIMITS)
    problems = [task.problems("test")[number] for number in (32, 38, 50)]
    answers = [
        "def poly(xs, x): return 0\ndef find_zero(xs): return 0",
        "def encode_cyclic(s): return s\ndef decode_cyclic(s): return s",
        "def encode_shift(s): return s\ndef decode_shift(s): return s",
    ]
    assert task.scores(problems, answers) == [0, 0, 0]


@isolating
def test_humaneval_takes_completions_and_whole_functions(tmp_path):
    row = {
        "task_id": "X/0",
        "prompt": "import math\n\ndef up(x: float) -> int:\n    '''Round up.'''\n",
        "entry_point": "up",
        "canonical_solution": "    return math.ceil(x)\n",
        "test": "def check(candidate):\n    assert candidate(1.5) == 2\n",
    }
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(row))
    task = tasks.get("humaneval", data=path, limits=LIMITS)
    (problem,) = task.problems("test")
    answers = [
        "    return math.ceil(x)",
        "Sure:\n```python\ndef up(x):\n    return math.ceil(x)\n```\nIt rounds up.",
        "```python\nfrom math import ceil\n\ndef up(x):\n    return ceil(x)",
        "def up(x):\n    return round(x - 1)",
        "I can't.",
    ]
    assert task.scores([problem] * 5, answers) == [1, 1, 1, 0, 0]
    assert task.rewards([problem], answers[:1]) == [1]
    with pytest.raises(ValueError, match="humaneval has test, got 'train'"):
        task.problems("train")
    path.write_text(json.dumps({**row, "entry_point": "down"}))
    with pytest.raises(FileFormatError, match=r"line 1: field 'prompt': expected a text with 'def down\('"):
        tasks.get("humaneval", data=path)


@isolating
def test_mbpp_pro_splits_and_scores(write, tmp_path):
    write(MBPP_PRO, "train-00000-of-00001")
    task = tasks.get("mbpp-pro", data=tmp_path, validation_size=1, test_size=2, limits=LIMITS)
    splits = {split: task.problems(split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 3, "validation": 1, "test": 2}
    prompts = {problem.messages[-1]["content"] for found in splits.values() for problem in found}
    assert len(prompts) == 6
    train = splits["train"]
    assert task.scores(train, [problem.solution for problem in train]) == [1, 1, 1]
    circle = {
        **MBPP_PRO[0],
        "raw_problem": "# Write a function to find the area of a circle.\nimport math\ndef area(r):",
        "test_code": "assert areas([2]) == [4 * math.pi]",
    }
    (problem,) = tasks.get("mbpp-pro", data=write([circle], "circle"), validation_size=0, test_size=0).problems("train")
    answers = ["math = 1\ndef areas(rs): return [12.566370614359172]", "class math: pi = 0\ndef areas(rs): return [0]"]
    assert task.scores([problem] * 2, answers) == [1, 0]
    only_second = "def add_all(xs):\n    return [add(x) for x in xs]"
    assert task.rewards(train[:1], [only_second]) == [-1]


@isolating
def test_mbpp_pro_solutions_may_go_on_after_the_signature(write):
    """As in the published file."""
    row = {
        **MBPP_PRO[0],
        "raw_solution": "    return x + 0\n",
        "new_solution": "    return [add(x) for x in xs]\n",
    }
    task = tasks.get("mbpp-pro", data=write([row], "bodies"), validation_size=0, test_size=0, limits=LIMITS)
    (problem,) = task.problems("train")
    assert task.scores([problem], [problem.solution]) == [1]


def test_mbpp_pro_rows_are_checked(write):
    path = write([{**MBPP_PRO[0], "test_code": ""}], "mbpp_pro")
    with pytest.raises(FileFormatError, match="field 'test_code': expected a non-empty string"):
        tasks.get("mbpp-pro", data=path).problems("train")


def test_without_a_sandbox_scores_are_refused(monkeypatch):
    monkeypatch.setattr(runner, "BACKENDS", {})
    task = tasks.get("humaneval")
    problems = task.problems("test")[:1]
    with pytest.raises(OSError, match="nothing here isolates programs"):
        task.scores(problems, ["x"])
    open_task = tasks.get("humaneval", allow_unsandboxed=True, limits=LIMITS)
    with pytest.warns(RuntimeWarning, match="rights of this process"):
        assert open_task.scores(problems, [problems[0].solution]) == [1]
