from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console

import t2
from t2.adaptation import load_bank_folder
from t2.adaptation.bank_folder import SHIPPED, bank_path
from t2.demo.bank import bank_tasks, show_bank

MODEL = "smollm2-135m-instruct"


def test_the_bank_that_ships_is_found_by_name():
    bank = load_bank_folder(MODEL)
    folder = bank_path(MODEL)
    assert folder == SHIPPED / MODEL and bank.classifier is not None
    assert set(bank_tasks(folder)) == {domain.name for domain in bank.domains} == set(bank.experts)
    for name, expert in (*bank.experts.items(), ("classifier", bank.classifier)):
        assert expert.layout.R == 97_920 and 0.001 < float((expert.z - 1).abs().mean()) < 0.5
        assert expert.metadata["command"].startswith("t2 train ")
        assert (folder / f"{name}.safetensors").stat().st_size < 220_000
        assert (folder / f"{name}.png").is_file()


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir()
    with pytest.raises(FileNotFoundError, match=r"bank: expected a folder with domains.json"):
        load_bank_folder(MODEL)


@pytest.mark.slow
def test_experts_that_ship_answer_their_domains():
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.float32))
    out = StringIO()
    bank, tasks = load_bank_folder(MODEL), bank_tasks(bank_path(MODEL))
    found = show_bank(Console(file=out, width=140), svf, tokenizer, bank, tasks, ["Who wrote Hamlet?"], rounds=1)
    assert found["requests"] == 28 and found["dispatched_right"] >= 25
    assert found["adapted_accuracy"] >= found["base_accuracy"] + 0.25
    assert "sums" in out.getvalue() and "adapted" in out.getvalue()
