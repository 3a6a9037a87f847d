"""Banks that grow by `t2 bank`."""

from __future__ import annotations

import json
import shutil

import pytest

import t2
from t2.adaptation import bank_edit
from t2.adaptation.bank_edit import SIZES, add_domain, add_prompts, bank_status, classifier_task, init_bank
from t2.adaptation.bank_folder import load_bank_folder
from t2.cli import main
from t2.experts.layout import Layout
from t2.tasks import get, options_of
from t2.tasks.classify import OTHERS
from tests.t2.toy import toy_model, toy_tokenizer

LAYOUT = Layout(("a", "b"), (3, 4), "f" * 64, "tiny")


@pytest.fixture
def files(tmp_path):
    """Experts and data of three domains."""
    for i, name in enumerate(("sums", "logic", "maps")):
        t2.Expert.random(LAYOUT, seed=i).save(tmp_path / f"{name}.safetensors")
        rows = [{"prompt": f"{name} question {n}", "answer": str(n)} for n in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def task(files, name):
    return get(f"jsonl:{files / name}.jsonl")


def add(files, name, **options):
    given = {"description": f"about {name}", "task": task(files, name)} | options
    return add_domain(files / "bank", name, files / f"{name}.safetensors", **given)


def test_a_bank_grows_and_shrinks(files):
    folder = files / "bank"
    init_bank(folder)
    assert bank_status(folder) == []
    assert add(files, "sums").prompts == {"train": 40, "validation": 5, "test": 5}
    add(files, "logic", task=None)
    bank = load_bank_folder(folder)
    assert [(d.name, d.description) for d in bank.domains] == [("sums", "about sums"), ("logic", "about logic")]
    assert bank.experts["logic"].z.equal(t2.Expert.load(files / "logic.safetensors").z)
    add_prompts(folder, "logic", task(files, "logic"))
    assert all(sum(status.prompts.values()) == 50 for status in bank_status(folder))
    name, options = classifier_task(folder)
    made = get(name, **options_of(options))
    assert set(made.tasks) == {OTHERS, "sums", "logic"}
    problem = made.problems("train")[0]
    assert problem.reference in ("sums", "logic", OTHERS)
    assert "- sums: about sums" in problem.messages[0]["content"]
    bank_edit.remove_domain(folder, "sums")
    assert [status.domain.name for status in bank_status(folder)] == ["logic"]
    assert not (folder / "prompts" / "sums").exists()
    with pytest.raises(ValueError, match="expected a bank with other domains"):
        bank_edit.remove_domain(folder, "logic")


def test_a_bank_keeps_no_more_prompts_than_it_says(files):
    rows = [{"prompt": f"question {n}", "answer": "1"} for n in range(1000)]
    (files / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert add(files, "sums").prompts == SIZES
    lines = (files / "bank" / "prompts" / "sums" / "train.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"prompt", "answer"} and json.loads(line)["answer"] == "sums" for line in lines)


def test_the_classifier_is_told_from_the_domains_it_was_trained_on(files):
    folder = files / "bank"
    add(files, "sums")
    assert [status.known for status in bank_status(folder)] == [False]
    t2.Expert.random(LAYOUT).save(files / "plain.safetensors")
    bank_edit.set_classifier(folder, files / "plain.safetensors")
    assert [status.known for status in bank_status(folder)] == [None]
    trained = t2.Expert(t2.Expert.random(LAYOUT).z, LAYOUT, {"domains": json.dumps(["sums"])})
    trained.save(files / "trained.safetensors")
    bank_edit.set_classifier(folder, files / "trained.safetensors")
    add(files, "logic")
    assert [status.known for status in bank_status(folder)] == [True, False]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sums", {}, "name: expected a new one"),
        ("logic", {"replace": True}, "name: expected one that the bank has"),
        ("../logic", {}, "domains: expected names that are file names"),
        ("classifier", {}, "domains: expected names that are file names"),
        ("base", {}, "name: expected a name other than"),
        ("logic", {"description": None}, "description: expected one line"),
        ("logic", {"description": "two\nlines"}, "description: expected one line"),
    ],
)
def test_what_does_not_fit_leaves_the_bank_as_it_was(files, name, options, message):
    folder = files / "bank"
    add(files, "sums")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = {"description": "about it", "task": task(files, "logic")} | options
    with pytest.raises(ValueError, match=message):
        add_domain(folder, name, files / "logic.safetensors", **given)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_first_domain_that_does_not_fit_leaves_no_folder(files):
    with pytest.raises(ValueError, match="description: expected one line"):
        add(files, "sums", description=None)
    assert not (files / "bank").exists()


def test_what_a_killed_run_left_is_no_prompt(files):
    add(files, "sums")
    left = files / "bank" / "prompts" / "sums.new"
    left.mkdir()
    (left / "train.jsonl").write_text(json.dumps({"prompt": "old", "answer": "sums"}) + "\n")
    add_prompts(files / "bank", "sums", task(files, "logic"))
    prompts = (files / "bank" / "prompts" / "sums" / "train.jsonl").read_text()
    assert "logic question" in prompts and "old" not in prompts


def test_experts_of_another_base_are_refused(files):
    add(files, "sums")
    other = Layout(LAYOUT.names, LAYOUT.ranks, "e" * 64, "other")
    t2.Expert.random(other).save(files / "logic.safetensors")
    with pytest.raises(ValueError, match="expected base weights"):
        add(files, "logic")
    assert not (files / "bank" / "logic.safetensors").exists()


def test_domains_without_prompts_are_named(files):
    add(files, "sums", task=None)
    with pytest.raises(ValueError, match="expected prompts of 'sums' for train, validation, test"):
        classifier_task(files / "bank")


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_path_of_a_bank_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    toy_model().save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    svf, _ = t2.load_svf(tmp_path / "toy", t2.SVFConfig(progress=False))
    for i, name in enumerate(("red", "green")):
        t2.Expert.random(svf.layout, std=0.1, seed=i).save(tmp_path / f"{name}.safetensors")
        rows = [{"prompt": f"{name} {n}", "answer": "1"} for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("bank", "init", "bank") == 0
    assert "no domains yet" in capsys.readouterr().out
    for name in ("red", "green"):
        given = (
            "--name",
            name,
            "--expert",
            f"{name}.safetensors",
            "--description",
            name,
            "--task",
            f"jsonl:{name}.jsonl",
        )
        assert run("bank", "add", "bank", *given) == 0
    assert "`auto` never chooses red, green" in capsys.readouterr().out.replace("\n", " ")
    assert run("bank", "check", "bank") == 1
    assert run("bank", "train-classifier", "toy", "bank", "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "now" in out and "others" in out
    assert run("bank", "check", "bank") == 0
    assert run("bank", "list", "bank") == 0
    assert (
        run(
            "eval",
            "toy",
            "--expert",
            "red.safetensors",
            "green.safetensors",
            "--task",
            "jsonl:red.jsonl",
            "--max-new-tokens",
            "3",
            "--output",
            "scores.json",
        )
        == 0
    )
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores) == {"base", "red", "green"}
    assert len(scores["red"]["scores"]) == 6
    assert 0 <= scores["red"]["p"] <= 1
    assert run("bank", "remove", "bank", "--name", "red") == 0
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "gsm8k"), "expected --expert and --task together"),
        (("--expert", "x.safetensors"), "expected --expert and --task together"),
        ((), "expected --bank, --spec and --output together"),
        (("--expert", "x.safetensors", "--task", "jsonl:none.jsonl"), "x.safetensors"),
    ],
)
def test_what_eval_is_asked_for_is_checked_first(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("eval", "no-such-model", *arguments) == 2
    assert message in capsys.readouterr().err
