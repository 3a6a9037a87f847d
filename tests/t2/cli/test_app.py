from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2
from t2 import cli
from t2.cli.app import COMMANDS
from t2.demo.merged_check import compare_row
from t2.demo.run import run_demo
from t2.experts.transfer import TransferOptions, transfer
from t2.tasks.statistics import wilson_interval
from t2.weights.memory_model import Rates
from tests.t2.weights.test_estimate import LLAMA_8B


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args):
    """Exit code of `t2 ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return stop.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"Example: t2 {command} " in capsys.readouterr().out


def test_help_imports_no_command():
    script = (
        "import sys\nfrom t2.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["adapt", "--help"], ["eval", "--help"]):
        ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        loaded = set(ended.stderr.split())
        assert ended.returncode == 0 and not loaded & {"torch", "transformers", "numpy"}, ended.stderr
        expected = {f"t2.cli.{name}" for name in arguments[:1] if name in COMMANDS}
        assert {f"t2.cli.{name}" for name in COMMANDS} & loaded == expected
    assert "usage: t2 eval" in ended.stdout


def test_version_and_module():
    ended = subprocess.run([sys.executable, "-m", "t2", "--version"], capture_output=True, text=True)
    assert ended.returncode == 0 and re.fullmatch(r"t2 \d+\.\d+.*\n", ended.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_their_options(shell, capsys):
    assert not run("--tyro-print-completion", shell)
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "--factor-dtype" in script and "--kl-coefficient" in script


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("demo", "--dtype", "int8"), "--factor-dtype"),
        (("decompose", "m", "--plan"), "t2 estimate MODEL"),
        (("eval", "m", "--plan=x"), "--spec"),
        (("generate", "m", "--experts", "a=b"), "--candidates"),
        (("train", "m", "--no-skip_even_prompts"), "--no-skip-zero-advantage"),
    ],
)
def test_old_option_names_give_the_new_ones(old, new, capsys):
    assert run(*old) == 2
    assert new in capsys.readouterr().err


def test_decompose_fills_the_cache_once_and_verifies(folder, cache, capsys):
    assert run("decompose", folder, "--verify") == 0
    assert "14 matrices" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (cache / "factors").iterdir()}
    assert len(files) == 14
    assert run("decompose", folder, "--target-modules", "q_proj", "v_proj") == 0
    assert "4 matrices" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (cache / "factors").iterdir()}
    first = next(iter(files))
    data = bytearray(first.read_bytes())
    data[-5] ^= 0x40
    first.write_bytes(data)
    assert run("decompose", folder, "--verify") == 2
    assert first.name in capsys.readouterr().err


def test_processes_decompose_shares_of_a_model(folder, cache, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, count in enumerate((5, 10, 14)):
        monkeypatch.setenv("RANK", str(rank))
        assert run("decompose", folder, "--workers", 2) == 0
        assert f"process {rank + 1} of 3: {(5, 5, 4)[rank]} matrices" in capsys.readouterr().out
        assert len(list((cache / "factors").iterdir())) == count
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run("decompose", folder, "--workers", 0) == 2
    assert "workers" in capsys.readouterr().err


def test_generate_answers_each_prompt_with_its_expert(folder, tmp_path, capsys):
    model, tokenizer = t2.load(folder)
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        t2.Expert.random(svf.layout, std=2.0, seed=i).save(path)
        svf.add_expert(str(path), t2.Expert.load(path))
    assert run("generate", folder, "--prompt", "a b", "c d e", "--expert", *paths, "--max-new-tokens", 5) == 0
    printed = capsys.readouterr().out
    assert "> a b\n" in printed and "> c d e\n" in printed
    batch = tokenizer(["a b ", "c d e "], return_tensors="pt", padding=True)
    out = svf.generate(**batch, experts=[str(path) for path in paths], max_new_tokens=5, do_sample=False)
    for row in out[:, batch["input_ids"].shape[1] :]:
        assert tokenizer.decode(row, skip_special_tokens=True).strip() in printed
    assert run("generate", folder, "--prompt", "a b", "c", "--max-new-tokens", 2) == 0


@pytest.fixture
def other_expert(tmp_path):
    """A file: an expert of a deeper and wider model than `folder`."""
    config = LlamaConfig(vocab_size=8, hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    svf = t2.SVFModel(LlamaForCausalLM(config), t2.SVFConfig(cache=False))
    t2.Expert.random(svf.layout, std=2.0, seed=1).save(tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_transfer_writes_an_expert_of_the_model(folder, tmp_path, other_expert, capsys):
    moved, shuffled = tmp_path / "moved.safetensors", tmp_path / "shuffled.safetensors"
    assert run("transfer", folder, "--expert", other_expert, "--output", moved) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "14 of 14 matrices have the z of one of the expert's, 7 of its 21 were not used" in printed
    options = ("--shuffle-seed", 3, "--ranks", "relative", "--depth", "absolute")
    assert run("transfer", folder, "--expert", other_expert, "--output", shuffled, *options) == 0
    svf, source = t2.SVFModel(t2.load(folder)[0]), t2.Expert.load(other_expert)
    svf.add_expert("moved", t2.Expert.load(moved))
    assert torch.equal(svf.bank["moved"].z, transfer(source, svf.layout).z)
    expected = transfer(source, svf.layout, TransferOptions("absolute", "relative"), shuffle_seed=3)
    assert torch.equal(t2.Expert.load(shuffled).z, expected.z)


def test_transfer_measures_on_a_task(folder, tmp_path, other_expert, capsys):
    rows = [{"prompt": " ".join(words), "answer": words[0]} for words in itertools.permutations("abcd", 3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ("--task", f"jsonl:{tmp_path / 'test.jsonl'}", "--task-options", '{"max_new_tokens": 3}')
    arguments = ("--expert", other_expert, "--output", tmp_path / "moved.safetensors", *task)
    assert run("transfer", folder, *arguments, "--problems", 2, "--shuffles", 2, "--shuffle-seed", 5) == 0
    assert "shuffled 6" in capsys.readouterr().out
    results = json.loads((tmp_path / "moved.json").read_text())
    assert list(results["conditions"]) == ["base", "ordered", "shuffled 5", "shuffled 6"]
    assert results["problems"] == 2 and results["expert"] == str(other_expert)
    for row in results["conditions"].values():
        assert row["interval"] == list(wilson_interval(row["accuracy"], 2))


def test_errors_are_one_line_and_exit_code_2(folder, tmp_path, other_expert, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"not an expert")
    for args, text in [
        (("decompose", tmp_path / "absent"), "absent"),
        (("decompose", folder, "--target-modules", "nothing"), "target_modules: expected"),
        (("generate", folder, "--prompt", "a", "--expert", tmp_path / "bad.safetensors"), "bad.safetensors"),
        (("generate", folder, "--prompt", "a", "b", "c", "--expert", "x", "y"), "expert: expected none, one, or"),
        (("transfer", folder, "--expert", tmp_path / "bad.safetensors", "--output", "x"), "bad.safetensors"),
        (
            ("transfer", folder, "--expert", other_expert, "--output", "x", "--task", "gsm8k", "--task-options", "1"),
            "task_options: expected a JSON object, got '1'",
        ),
        (("demo", "--model", folder, "--new-tokens", "1"), "new_tokens: expected at least 2, got 1"),
        (("train", folder, "--task", "x", "--output", "y", "--steps", "0"), "t2: steps: expected an integer >= 1"),
        (("estimate", folder, "--new-tokens", "0"), "t2: new_tokens: expected an integer >= 1, got 0"),
        (("train", folder, "--options", tmp_path / "none.json"), "none.json can't be read: No such file"),
        (
            ("adapt", folder, "--task", "gsm8k", "--candidates", f"a={other_expert}", "--output", "x", "--margin=-1"),
            "t2: margin: expected a number >= 0, got -1.0",
        ),
    ]:
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error and error.splitlines()[-1].startswith("t2: ")


def test_demo_on_a_tiny_model(folder, tmp_path):
    pytest.importorskip("peft")
    assert run_demo(str(folder), requests=3, new_tokens=2, checked_tokens=4, results=tmp_path / "r.json")
    assert (tmp_path / "r.json").is_file()


def test_compare_row_lets_only_ties_differ():
    merged = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.9999, 0.0], [5.0, 0.0, 0.0]])
    own = merged + 1e-3 * torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    same = compare_row(merged, merged, torch.tensor([2, 0, 0]), "x")
    assert same.equal and same.passed and same.logit_difference == 0
    tie = compare_row(merged, own, torch.tensor([2, 1, 1]), "x")
    assert not tie.equal and tie.passed and tie.ties[0][0] == 1
    wrong = compare_row(merged, own, torch.tensor([0, 0, 0]), "x")
    assert not wrong.equal and not wrong.passed


def test_sharded_models_are_read_matrix_by_matrix(folder, cache, tmp_path, capsys, monkeypatch):
    sharded = tmp_path / "sharded"
    model, tokenizer = t2.load(folder)
    model.save_pretrained(sharded, max_shard_size="3KB")
    tokenizer.save_pretrained(sharded)
    assert run("generate", sharded, "--prompt", "a b", "--max-new-tokens", 4, "--stream", "no") == 0
    whole = capsys.readouterr().out
    files = {path.name for path in (cache / "factors").iterdir()}
    monkeypatch.setattr("t2.weights.streaming.load", None)  # not called
    assert run("decompose", sharded, "--verify") == 0
    assert "14 matrices" in capsys.readouterr().out
    assert run("generate", sharded, "--prompt", "a b", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == whole
    assert {path.name for path in (cache / "factors").iterdir()} == files
    assert run("decompose", sharded, "--model-dtype", "bfloat16") == 0
    assert len(list((cache / "factors").iterdir())) == 28


def test_estimate_needs_the_config_alone(folder, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Rates, "measure", classmethod(lambda cls: cls(1e9, 1e10, 1e11)))
    path, found = tmp_path / "config.json", tmp_path / "estimate.json"
    path.write_text(json.dumps(LLAMA_8B))
    assert run("estimate", path, "--model-dtype", "bfloat16", "--new-tokens", 100, "--json", found) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "224 matrices; an expert is 720,896 param",
        "1.394 times",
        "14336 x 4096",
        "4 completions of 100",
    ):
        assert text in printed
    facts = json.loads(found.read_text())
    assert facts["parameters_per_expert"] == 720_896 and facts["work"]["new_tokens"] == 100
    assert facts["decompose"]["seconds"] > 0 and facts["model_dtype"] == "bfloat16"
    (folder / "model.safetensors").unlink()
    assert run("estimate", folder, "--target-modules", "q_proj", "v_proj") == 0
    assert "4 matrices" in capsys.readouterr().out
    path.write_text(json.dumps({"model_type": "gpt2"}))
    assert run("estimate", path) == 0
    assert "activations of gpt2 models cannot be estimated" in " ".join(capsys.readouterr().out.split())
    assert not cache.exists()
    for args, text in (
        ((tmp_path / "absent.json",), "absent.json does not exist"),
        ((path, "--new-tokens", 0), "new_tokens: expected an integer >= 1, got 0"),
    ):
        assert run("estimate", *args) == 2
        assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("engine", "options", "name"),
    [
        ("t2", ("--replicas", "2"), "replicas"),
        ("vllm", ("--max-replicas", "2"), "max_replicas"),
        ("vllm", ("--max-body", "10"), "max_body"),
        ("vllm", ("--log-prompts",), "log_prompts"),
        ("ray", ("--max-connections", "10"), "max_connections"),
    ],
)
def test_serve_refuses_what_its_engine_does_not_take(engine, options, name, capsys):
    assert run("serve", "no-such-model", "--engine", engine, *options) == 2
    assert f"t2: {name}: expected another --engine" in capsys.readouterr().err
