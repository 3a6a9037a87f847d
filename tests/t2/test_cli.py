from __future__ import annotations

import pytest

import t2
from t2 import cli
from t2.demo import run_demo
from t2.merged_check import compare_row


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args):
    """Exit code of `t2 ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return stop.value.code


@pytest.mark.parametrize("command", ["demo", "decompose", "generate"])
def test_help_shows_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"Example: t2 {command} " in capsys.readouterr().out


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


def test_errors_are_one_line_and_exit_code_2(folder, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"not an expert")
    for args, text in [
        (("decompose", tmp_path / "absent"), "absent"),
        (("decompose", folder, "--target-modules", "nothing"), "target_modules: expected"),
        (("generate", folder, "--prompt", "a", "--expert", tmp_path / "bad.safetensors"), "bad.safetensors"),
        (("generate", folder, "--prompt", "a", "b", "c", "--expert", "x", "y"), "expert: expected none, one, or"),
        (("demo", "--model", folder, "--new-tokens", "1"), "new_tokens: expected at least 2, got 1"),
    ]:
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error


def test_demo_on_a_tiny_model(folder, tmp_path):
    pytest.importorskip("peft")
    assert run_demo(str(folder), requests=3, new_tokens=2, checked_tokens=4, results=tmp_path / "r.json")
    assert (tmp_path / "r.json").is_file()


def test_compare_row_lets_only_ties_differ():
    import torch

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
    monkeypatch.setattr("t2.streaming.load", None)  # not called
    assert run("decompose", sharded, "--verify") == 0
    assert "14 matrices" in capsys.readouterr().out
    assert run("generate", sharded, "--prompt", "a b", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == whole
    assert {path.name for path in (cache / "factors").iterdir()} == files
    assert run("decompose", sharded, "--model-dtype", "bfloat16") == 0
    assert len(list((cache / "factors").iterdir())) == 28
