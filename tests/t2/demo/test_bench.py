from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from t2.demo import bench
from tests.t2.toy import toy_model, toy_tokenizer


@pytest.fixture
def toy_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "LAYER", (64, 32))
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    toy_model().save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def test_the_table_has_limits_the_layer_and_the_model(toy_folder, tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = {"dtype": torch.float32, "model_dtype": torch.float32, "new_tokens": 2, "rounds": 1}
    figures = bench.run_bench(str(toy_folder), **options, results=path, console=Console())
    assert json.loads(path.read_text()) == json.loads(json.dumps(figures))
    said = capsys.readouterr().out
    for line in ("layer 64 x 32, 1 row |", "layer 64 x 32, 32 rows |", "32 requests of 2 new tokens |", "GB/s read"):
        assert line in said, said
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 2 + 3 + 2
    assert {name: len(each) for name, each in figures["layer"]["8"].items()} == {"ours": 8, "dense": 8}


@pytest.mark.parametrize("wrong", [{"new_tokens": 1}, {"rounds": 0}])
def test_options_are_checked_first(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bench.run_bench("no-model", **wrong)
