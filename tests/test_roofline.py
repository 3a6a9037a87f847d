from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import roofline, roofline_page
from benchmarks.readme import ROOT
from benchmarks.roofline import BATCHES, CHIPS, CROSSINGS, FORMS, MODELS, Group, crossing, decode, group_ops, prefill

H200 = CHIPS["H200"]
LLAMA = MODELS["Llama-3-8B"]
PAIRS = [(model, chip) for model in MODELS.values() for chip in CHIPS.values()]


@pytest.mark.parametrize(
    ("name", "rank", "lora", "ratio"),
    [
        ("SmolLM2-135M", 97_920, 4_884_480, 1.490),
        ("Llama-3-8B", 720_896, 41_943_040, 1.394),
        ("Llama-3-70B", 3_440_640, 207_093_760, 1.395),
    ],
)
def test_sizes_are_the_models_own(name, rank, lora, ratio):
    model = MODELS[name]
    assert (model.rank, model.lora) == (rank, lora)
    assert model.factored_entries / model.entries == pytest.approx(ratio, abs=5e-4)


def test_operations_of_a_prefill_have_the_ratio_of_the_weights():
    def linears(form):
        ops = [op for group in LLAMA.groups for op in group_ops(FORMS[form], group, H200, 2048, 1)]
        return sum(op.operations for op in ops)

    assert linears("dense bf16") == pytest.approx(2 * 2048 * LLAMA.entries / LLAMA.layers)
    assert linears("factored bf16") / linears("dense bf16") == pytest.approx(1.394, abs=5e-4)


def test_one_matrix_by_hand():
    k = Group("k", 4096, (1024,))

    def moved(form, distinct):
        ops = group_ops(FORMS[form], k, H200, 32, distinct)
        return len(ops), sum(op.launches for op in ops), sum(op.bytes for op in ops)

    factors = 1024 * 4096 + 1024 * 1024
    assert moved("dense bf16", 8) == (1, 1, 2 * 1024 * 4096)
    assert moved("merged bf16", 8) == (1, 1, 8 * 2 * 1024 * 4096)
    assert moved("factored bf16", 8) == (2, 2, 2 * factors + 8 * 4 * 1024)
    assert moved("factored int8", 1) == (2, 2, factors * (1 + 1 / 32) + 4 * 1024)
    assert moved("delta r/8 bf16", 1) == (2, 2, 2 * (1024 * 4096 + factors / 8) + 4 * 1024 / 8)
    assert moved("LoRA r=16 bf16", 8) == (3, 3, 2 * 1024 * 4096 + 8 * 2 * 16 * (4096 + 1024))
    assert moved("PEFT LoRA r=16 bf16", 8)[1] == 1 + 8 * 10


def test_time_is_the_slower_limit_and_the_launches():
    (op,) = group_ops(FORMS["dense bf16"], Group("", 4096, (4096,)), H200, 1, 1)
    assert op.seconds(H200, 1e15) == pytest.approx(2 * 4096**2 / (0.85 * 4.8e12) + 2.5e-6)
    assert op.seconds(H200, 1e9) == pytest.approx(2 * 4096**2 / 1e9 + 2.5e-6)


@pytest.mark.parametrize("one_launch", [False, True])
def test_launches_of_a_step(one_launch):
    step = decode(FORMS["factored bf16"], LLAMA, H200, 8, 8, one_launch=one_launch)
    assert step.launches == 32 * (4 * (1 if one_launch else 2) + 5) + 3


@pytest.mark.parametrize("name", FORMS)
def test_more_work_never_takes_less_time(name):
    form = FORMS[name]
    for model, chip in PAIRS:
        by_batch = [decode(form, model, chip, batch, batch).seconds for batch in BATCHES]
        by_experts = [decode(form, model, chip, 64, experts).seconds for experts in roofline.EXPERTS]
        by_tokens = [prefill(form, model, chip, tokens, 1).seconds for tokens in roofline.TOKENS]
        assert all(times == sorted(times) for times in (by_batch, by_experts, by_tokens))
        assert by_experts[-1] == by_experts[-2]


@pytest.mark.parametrize(("ours", "peer"), CROSSINGS, ids=lambda form: form.name)
def test_crossings_are_where_the_times_cross(ours, peer):
    for model, chip in PAIRS:
        first = crossing(ours, peer, model, chip, 64)
        ahead = [
            decode(ours, model, chip, 64, distinct).seconds < decode(peer, model, chip, 64, distinct).seconds
            for distinct in range(1, 65)
        ]
        assert ahead == [first is not None and distinct >= first for distinct in range(1, 65)]


def test_page_and_results_are_current():
    again = "regenerate: python benchmarks/roofline.py"
    assert (ROOT / "docs" / "roofline.md").read_text() == roofline_page.document(), again
    assert (roofline_page.RESULTS / "roofline.json").read_text() == roofline_page.figures(), again
    assert json.loads(roofline_page.figures())["what"].startswith("predictions")
