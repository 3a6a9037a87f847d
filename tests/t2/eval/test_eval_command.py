from __future__ import annotations

import json

import pytest

from t2 import cli
from t2.eval import document
from t2.eval import runner as measuring


def run(*args):
    """Exit code of `t2 ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return stop.value.code


@pytest.fixture
def command(folder, bank, content, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(content))
    return ("eval", folder, "--bank", bank, "--spec", tmp_path / "plan.json", "--output", tmp_path / "out")


def test_writes_results_tables_and_plots(command, tmp_path, capsys):
    assert run(*command) == 0
    out = tmp_path / "out"
    expected = {"alphas.png", "cells", "dispatch.png", "results.json", "sizes.png", "summary.json", "tables.md"}
    assert {path.name for path in out.iterdir()} == expected
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in expected if name.endswith("png"))
    results, kept = (json.loads((out / name).read_text()) for name in ("results.json", "summary.json"))
    assert results["dtype"] == "float32" and results["machine"]["torch"] and results["versions"]["transformers"]
    assert results["plan"]["problems"] == 8 and set(results["experts"]) == {"a", "d", "classifier"}
    column = results["sections"]["table2"]["new"]["columns"]["classifier"]
    assert len(column["scores"]) == 8
    assert "scores" not in json.dumps(kept) and kept["sections"]["table2"]["new"]["columns"]["classifier"]["p"] <= 1
    page = (out / "tables.md").read_text()
    assert page == document(results) == document(kept)
    assert f"{column['accuracy']:.1%}" in page and "new (unseen), 8 problems" in page
    for title in ("Fine-tuned", "Adaptation", "Dispatcher", "Times", "Learned weights", "Few-shot sizes"):
        assert f"## {title}" in page
    assert "Adaptation" in capsys.readouterr().out
    assert not list((out / "cells").glob("*.memory"))


def test_only_some_sections_and_an_interruption(command, tmp_path, capsys, monkeypatch):
    inner = measuring.evaluate_experts

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "evaluate_experts", interrupted)
    assert run(*command, "--only", "table1") == 130
    assert "continues from" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(measuring, "evaluate_experts", inner)
    assert run(*command, "--only", "table1", "dispatch", "--factor-dtype", "bfloat16", "--bf16-products") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["sections"]) == ["table1", "dispatch"] and results["bf16_products"] is True


def test_errors_are_one_line_and_exit_code_2(command, content, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    for change, text in [
        ({"seen": {"z": content["seen"]["a"]}}, "seen: expected names of experts"),
        ({"unseen": {"new": {"task": "nothing"}}}, "new: task: expected one of"),
        ({"lora": str(tmp_path / "none")}, "lora: expected a folder with adapter_config.json"),
        ({"variants": {"v": {"a": str(tmp_path / "none")}}}, "none does not exist"),
        ({"few_shot": [4000]}, "a: few_shot_from train: few_shot: expected 1 to"),
    ]:
        plan.write_text(json.dumps(content | change))
        assert run(*command) == 2, change
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error
    assert run(*command, "--token-budget", "0") == 2
    assert "token_budget: expected an integer >= 1" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    assert run("eval", "--help") == 0
    assert "Example: t2 eval " in capsys.readouterr().out
