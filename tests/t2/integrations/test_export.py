"""Experts written for other programs, which read them without this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import t2
from t2.cli import main
from t2.integrations import export
from tests.t2.tiny_lm import prompts, wrap
from tests.t2.toy import toy_model, toy_tokenizer

READ = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("t2", "t2kernels"):
            raise ImportError(name)

sys.meta_path.insert(0, Without())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(ids)["ids"]).logits}, out)
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model in a folder, and an expert of it in a file, with factors in a cache of their own."""
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    toy_model().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    svf, _ = t2.load_svf(tmp_path / "base", t2.SVFConfig(progress=False))
    t2.Expert.random(svf.layout, std=0.3).save(tmp_path / "expert.safetensors")
    save_file({"ids": prompts(2).clamp(max=8)}, tmp_path / "ids.safetensors")
    return tmp_path


def logits_elsewhere(folder, model, adapter=""):
    files = [str(folder / name) for name in ("ids.safetensors", "logits.safetensors")]
    arguments = [str(folder / model), str(folder / adapter) if adapter else "", *files]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return load_file(files[1])["logits"]


def wanted(folder):
    svf, _ = t2.load_svf(folder / "base", t2.SVFConfig(progress=False))
    expert = t2.Expert.load(folder / "expert.safetensors")
    with torch.no_grad():
        return svf(input_ids=load_file(folder / "ids.safetensors")["ids"], experts=expert).logits


def exported(folder, name, *more):
    arguments = ["export", folder / "base", "--expert", folder / "expert.safetensors", "--output", folder / name, *more]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_a_merged_model_answers_without_this_package(base):
    assert exported(base, "merged") == 0
    torch.testing.assert_close(logits_elsewhere(base, "merged"), wanted(base), atol=1e-4, rtol=1e-4)
    assert (base / "merged" / "tokenizer.json").is_file()


def test_a_lora_adapter_of_full_rank_is_the_expert(base, capsys):
    assert exported(base, "lora", "--format", "lora", "--rank", "64") == 0
    assert "rank 32 keeps 100.0% of the change" in capsys.readouterr().out
    torch.testing.assert_close(logits_elsewhere(base, "base", "lora"), wanted(base), atol=1e-4, rtol=1e-4)


def test_a_peft_adapter_is_the_expert(base):
    import t2.integrations.peft  # noqa: F401 — registers the method

    assert exported(base, "peft", "--format", "peft") == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "base"), base / "peft")
    with torch.no_grad():
        logits = model(input_ids=load_file(base / "ids.safetensors")["ids"]).logits
    torch.testing.assert_close(logits, wanted(base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_a_smaller_rank_keeps_what_it_says(tiny_model, cache_dir, tmp_path, form):
    options = {"form": "delta", "support": 20} if form == "delta" else {}
    svf = wrap(tiny_model("llama"), cache_dir, **options)
    z = torch.ones(svf.layout.R)
    own = torch.arange(len(z)) if svf.support is None else svf.support
    z[own] += 0.3 * torch.randn(len(own), generator=torch.Generator().manual_seed(0))
    expert = t2.Expert(z, svf.layout)
    loss = export.export_lora(svf, expert, tmp_path / "lora", 6)
    tensors, kept, whole, least = load_file(tmp_path / "lora" / export.WEIGHTS), 0.0, 0.0, {}
    for name in svf.layout.names:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == loss.rank == 6
        change = svf.decomposed.merged_weight(name, z) - svf.decomposed.dense(name)[0]
        lost, all_of_it = float((change - b @ a).square().sum()), float(change.square().sum())
        best = torch.linalg.svdvals(change)[6:].square().sum()
        assert lost == pytest.approx(float(best), rel=1e-3)
        least[name] = 1 - lost / all_of_it
        kept, whole = kept + all_of_it - lost, whole + all_of_it
    assert loss.kept == pytest.approx(kept / whole, rel=1e-3)
    assert loss.worst == (min(least, key=least.get), pytest.approx(min(least.values()), rel=1e-3))


def test_an_expert_on_a_support_stays_one(tiny_model, cache_dir, tmp_path):
    svf = wrap(tiny_model("llama"), cache_dir, form="delta", support=3)
    z = torch.ones(svf.layout.R)
    z[svf.support] = 1.5
    export.export_peft(svf, t2.Expert(z, svf.layout), tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / export.WEIGHTS)
    assert all(tensor.tolist() == [0.5] * 3 for tensor in tensors.values()) and len(tensors) == len(svf.layout.names)


def test_what_can_not_be_exported_is_refused(base, tiny_model, cache_dir, tmp_path, capsys):
    assert exported(base, "lora", "--format", "lora", "--rank", "0") == 2
    assert "rank: expected an integer >= 1, got 0" in capsys.readouterr().err
    assert exported(base, "base") == 2
    assert "output: expected a folder that is not there yet" in capsys.readouterr().err
    svf = wrap(tiny_model("llama"), cache_dir)
    with pytest.raises(ValueError, match="expert: expected base weights"):
        export.export_peft(svf, t2.Expert.load(base / "expert.safetensors"), tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (base / "lora").exists()
