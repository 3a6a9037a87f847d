from __future__ import annotations

import json

import pytest
import torch

import t2
from t2 import cli
from t2.adaptation import ClassifierStrategy, load_bank_folder, save_bank_folder, two_pass


@pytest.fixture
def bank(folder, tmp_path):
    """A folder with two experts and a classifier for the tiny model."""
    model, _ = t2.load(folder)
    layout = t2.SVFModel(model, t2.SVFConfig(progress=False)).layout
    made = {name: t2.Expert.random(layout, std=2.0, seed=seed) for seed, name in enumerate("ad")}
    save_bank_folder(tmp_path / "bank", {"a": "b c", "d": "e"}, made, t2.Expert.random(layout, std=2.0, seed=5))
    return tmp_path / "bank"


@pytest.fixture
def task(tmp_path):
    rows = [{"prompt": " ".join("abcde"[: 1 + i % 5]) + " a" * (i // 5), "answer": "abcde"[i % 5]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text("def said(answer, row):\n    return 1.0 if row['answer'] in answer else -1.0\n")
    return (
        "--task",
        f"jsonl:{tmp_path / 'rows.jsonl'}",
        "--task-options",
        json.dumps({"reward": f"{tmp_path / 'judge.py'}:said", "max_new_tokens": 4}),
    )


def run(*args):
    """Exit code of `t2 ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return stop.value.code


def test_generate_tells_what_pass_one_chose_and_answers_with_it(folder, bank, capsys):
    prompts = ["b c", "e", "c c d"]
    for strategy in ("prompt", "classifier"):
        assert run("generate", folder, "--prompt", *prompts, "--bank", bank, "--adapt", strategy) == 0
        printed = capsys.readouterr().out
        assert all(f"> {prompt}\n[" in printed for prompt in prompts) and "second pass" in printed
    model, tokenizer = t2.load(folder)
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    loaded = load_bank_folder(bank)
    loaded.add_to(svf)
    strategy = ClassifierStrategy(svf, tokenizer, loaded.domains)
    expected = two_pass(svf, tokenizer, prompts, strategy, max_new_tokens=64, do_sample=False)
    for row, reason, answer in zip(
        expected.adaptation.alpha, expected.adaptation.reasons, expected.answers, strict=True
    ):
        assert f"[{expected.adaptation.names[int(row.argmax())]}: {reason}]\n{answer.strip()}\n" in printed
    named = [f"{name}={bank / name}.safetensors" for name in ("a", "d", "classifier")]
    described = ["a=b c", "d=e"]
    args = ("--prompt", *prompts, "--candidates", *named, "--domains", *described, "--adapt", "classifier")
    assert run("generate", folder, *args) == 0
    assert capsys.readouterr().out.split("first pass")[0] == printed.split("first pass")[0]


@pytest.mark.parametrize("search", ["cem", "cma", "random"])
def test_adapt_writes_the_mix(folder, bank, task, tmp_path, capsys, search):
    output = tmp_path / "mix.safetensors"
    options = ("--search", search, "--population", "10", "--generations", "2", "--few-shot", "6", "--seed", "3")
    assert run("adapt", folder, "--bank", bank, *task, "--output", output, *options) == 0
    expert = t2.Expert.load(output)
    alpha = json.loads(expert.metadata["alpha"])
    assert list(alpha) == ["base", "a", "d"] and sum(alpha.values()) == pytest.approx(1, abs=1e-5)
    bank_of = load_bank_folder(bank)
    z = alpha["base"] + sum(alpha[name] * bank_of.experts[name].z for name in "ad")
    torch.testing.assert_close(expert.z, z, atol=1e-5, rtol=1e-5)
    assert expert.metadata["seed"] == "3" and expert.metadata["problems"] == "6"
    assert float(expert.metadata["score"]) >= max(json.loads(expert.metadata["singles"]).values())
    printed = capsys.readouterr().out
    assert f"{alpha['base']:.3f}" in printed and "the mix" in printed
    assert [path.name for path in tmp_path.glob("mix*")] == ["mix.safetensors"]


@pytest.mark.parametrize("incumbent", ["classifier", "prompt", "d"])
def test_adapt_keeps_the_incumbent_where_no_mix_is_better(folder, bank, task, tmp_path, incumbent):
    output = tmp_path / "mix.safetensors"
    search = ("--population", "10", "--generations", "1", "--few-shot", "6", "--margin", "9")
    assert run("adapt", folder, "--bank", bank, *task, "--output", output, *search, "--incumbent", incumbent) == 0
    metadata = t2.Expert.load(output).metadata
    singles, alpha = json.loads(metadata["singles"]), json.loads(metadata["alpha"])
    named = metadata["incumbent"]
    assert named in singles and (incumbent != "d" or named == "d")
    assert alpha[named if singles[named] >= singles["base"] else "base"] == 1.0


def test_an_interrupted_search_goes_on(folder, bank, task, tmp_path, capsys, monkeypatch):
    from t2.adaptation import few_shot as fewshot

    inner, calls = fewshot.FewShotStrategy.evaluate, []

    def interrupted(self, candidates):
        calls.append(len(candidates))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, candidates)

    monkeypatch.setattr(fewshot.FewShotStrategy, "evaluate", interrupted)
    options = ("--population", "10", "--generations", "2", "--output", tmp_path / "mix.safetensors")
    (tmp_path / "judge.py").write_text("def said(answer, row):\n    return 1.0 if len(row['prompt']) > 9 else -1.0\n")
    assert run("adapt", folder, "--bank", bank, *task, *options) == 130
    assert "continues from" in capsys.readouterr().out and (tmp_path / "mix.search.json").is_file()
    assert run("adapt", folder, "--bank", bank, *task, *options) == 0
    assert calls[0] <= 10 and len(calls) == 3 and calls[2] == calls[1]
    assert not (tmp_path / "mix.search.json").exists()


def test_errors_are_one_line_and_exit_code_2(folder, bank, task, tmp_path, capsys):
    adapt = ("adapt", folder, *task, "--output", tmp_path / "x.safetensors")
    prompt = ("generate", folder, "--prompt", "a")
    (tmp_path / "plain").mkdir()
    for args, text in [
        ((*adapt,), "bank: expected a folder, or candidates as NAME=FILE, got neither"),
        ((*adapt, "--bank", bank, "--candidates", "a=b"), "bank: expected a folder, or candidates"),
        ((*adapt, "--bank", tmp_path / "plain"), "bank: expected a folder with domains.json"),
        ((*adapt, "--bank", bank, "--few-shot", "90"), "few_shot: expected 1 to"),
        ((*adapt, "--bank", bank, "--incumbent", "d"), "incumbent: expected a margin above 0 beside one"),
        ((*adapt, "--bank", bank, "--margin", "1", "--incumbent", "x"), "incumbent: expected one of base, a, d, got"),
        (("adapt", folder, "--task", "x", "--output", "x.safetensors", "--bank", bank), "task: expected one of"),
        (("adapt", folder, *task, "--output", "x.bin", "--bank", bank), "output: expected a file named *.safetensors"),
        ((*adapt[:4], "--task-options", "[", *adapt[6:], "--bank", bank), "task_options: expected a JSON object"),
        ((*prompt, "--bank", bank), "adapt: expected prompt or classifier beside a bank"),
        ((*prompt, "--bank", bank, "--adapt", "prompt", "--expert", "x"), "expert: expected none with --adapt"),
        ((*prompt, "--bank", bank, "--adapt", "prompt", "--domains", "a=b"), "domains: expected none beside a bank"),
        ((*prompt, "--candidates", "a=b", "--adapt", "prompt", "--domains", "a"), "domains: expected NAME=DESCRIPTION"),
    ]:
        assert run(*args) == 2, args
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error
    (bank / "classifier.safetensors").unlink()
    assert run(*adapt, "--bank", bank, "--margin", "1", "--incumbent", "classifier") == 2
    assert "incumbent: expected a bank with a classification expert" in capsys.readouterr().err
    assert run(*prompt, "--bank", bank, "--adapt", "classifier") == 2
    assert "adapt: expected a bank with a classification expert" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    assert run("adapt", "--help") == 0
    assert "Example: t2 adapt " in capsys.readouterr().out
