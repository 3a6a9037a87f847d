from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2.eval import load_spec
from t2.eval.result_cache import ResultCache
from t2.eval.spec import parse_spec
from t2.weights.files import FileFormatError

TASK = {"task": "gsm8k"}


def test_defaults_are_those_of_the_paper():
    plan = parse_spec({"seen": {"a": TASK}, "unseen": {"b": TASK}})
    assert plan.problems == 200 and plan.few_shot == (10,) and plan.few_shot_sizes == (3, 5, 10, 20)
    assert plan.search.population == 32 and plan.search.elite_ratio == 0.2
    assert list(plan.tasks) == ["a", "b"] and plan.ablated == ("b",) and plan.timed == ("a", "b")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "spec: expected an object, got"),
        ({}, "spec: expected the key seen, got none"),
        ({"seen": {}}, "seen: expected at least one, got"),
        ({"seen": {"a": TASK}, "tasks": 1}, "spec: expected keys among seen, unseen, .*, got 'tasks'"),
        ({"seen": {"a": {}}}, "seen.a: expected the key task, got"),
        ({"seen": {"a": {"task": 3}}}, "seen.a.task: expected a valid string, got 3"),
        ({"seen": {"a": TASK | {"options": []}}}, "seen.a.options: expected an object"),
        ({"seen": {"a": TASK | {"problems": 0}}}, "seen.a.problems: expected greater than or equal to 1, got 0"),
        (
            {"seen": {"a": TASK | {"few_shot_from": "x"}}},
            "seen.a.few_shot_from: expected 'train', ",
        ),
        ({"seen": {"a": TASK}, "unseen": {"a": TASK}}, "unseen: expected names that no seen task has"),
        ({"seen": {"a": TASK}, "unseen": {"base": TASK}}, "seen, unseen: expected names other than base and others"),
        ({"seen": {"a": TASK}, "problems": True}, "problems: expected a valid integer, got True"),
        ({"seen": {"a": TASK}, "few_shot": 10}, "few_shot: expected a valid array, got 10"),
        ({"seen": {"a": TASK}, "few_shot_sizes": []}, "few_shot_sizes: expected at least one, got"),
        ({"seen": {"a": TASK}, "few_shot_seeds": [0, 0]}, "few_shot_seeds: expected distinct values"),
        ({"seen": {"a": TASK}, "few_shot_tasks": ["b"]}, r"few_shot_tasks: expected tasks of the spec \(a\), got"),
        ({"seen": {"a": TASK}, "times_tasks": "a"}, "times_tasks: expected a valid array, got 'a'"),
        ({"seen": {"a": TASK}, "few_shot_per_layer": 1}, "few_shot_per_layer: expected a valid boolean, got 1"),
        ({"seen": {"a": TASK}, "search": {"population": 2}}, "search.population: expected an integer >= 4, got 2"),
        ({"seen": {"a": TASK}, "search": {"population": "9"}}, "search.population: expected a valid integer, got '9'"),
        ({"seen": {"a": TASK}, "search": {"seed": 1}}, "search.seed: expected none here"),
        ({"seen": {"a": TASK}, "search": {"elites": 1}}, "search: expected keys among search, population"),
        ({"seen": {"a": TASK}, "incumbents": ["a"]}, "incumbents: expected some of base, prompt, classifier, got"),
        ({"seen": {"a": TASK}, "incumbents": []}, "incumbents: expected at least one, got"),
        ({"seen": {"a": TASK}, "search": {"margin": 1e99}}, "search.margin: expected a number up to 2147483647, got"),
        (
            {"seen": {"a": TASK}, "incumbents": ["base", "prompt"]},
            "search.margin: expected a number above 0 for",
        ),
        ({"seen": {"a": TASK}, "lora": 1}, "lora: expected a valid string, got 1"),
        ({"seen": {"a": TASK}, "calibration": "batch"}, "calibration: expected 'none' or 'contextual', got 'batch'"),
        ({"seen": {"a": TASK}, "variants": {"v": {"b": "f"}}}, r"variants.v: expected seen tasks \(a\), got \['b'\]"),
        ({"seen": {"a": TASK}, "variants": {"v": {"a": 1}}}, "variants.v.a: expected a valid string, got 1"),
    ],
)
def test_errors_name_the_key(content, text):
    with pytest.raises(ValueError, match=text):
        parse_spec(content)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="spec: expected a JSON file"):
        load_spec(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="spec: expected JSON, got"):
        load_spec(tmp_path / "plan.json")
    shipped = Path(__file__).parents[3] / "benchmarks" / "eval_plan.json"
    plan = load_spec(shipped)
    assert list(plan.seen) == ["sums", "reading", "logic"] and len(plan.unseen) >= 3
    assert json.loads(shipped.read_text())["seen"]["sums"] == {
        "task": plan.seen["sums"].task,
        "options": plan.seen["sums"].options,
    }


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"seen": NaN}', '{"seen": {"a": {"task": ""}}}', '{"problems": 1e999}']
)
def test_files_that_are_no_plan_are_named(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"plan\.json: "):
        load_spec(tmp_path / "plan.json")


@pytest.mark.parametrize("change", ["{", "[]", "[" * 100_000, {"value": 2}, {"key": {}}, {"digest": "x"}])
def test_a_damaged_cell_is_named_and_measured_anew(tmp_path, change):
    cells, key = ResultCache(tmp_path), {"kind": "score", "label": "a"}
    assert cells.find(key) is None and cells.put(key, {"right": (1, 0)}) == {"right": [1, 0]} == cells.find(key)
    path = cells.path(key)
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged, and measured anew"):
        assert cells.find(key) is None
