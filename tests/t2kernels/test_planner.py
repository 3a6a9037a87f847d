"""The cost model, the choice of a form, and the error bound of delta-k."""

from __future__ import annotations

import json
import math

import pytest
import torch

from t2kernels import decompose
from t2kernels.planner import (
    BF16_PRODUCTS,
    ROWS,
    CostModel,
    Phase,
    Plan,
    delta_components,
    plan_layer,
    storage_kind,
)
from t2kernels.weights import DeltaWeight, DenseWeight, FactoredWeight


def model(**changes):
    """A machine of round numbers: an entry costs 1 ns, and 10 ps for each row from 128 on."""
    kinds = ("float32", "bfloat16", "float16", "int8", "uint8", "int4", BF16_PRODUCTS)
    values = {
        "machine": "test",
        "entry": {kind: tuple(max(1e-9, rows * 1e-11) for rows in ROWS) for kind in kinds},
        "row": 0.0,
        "call": 0.0,
        "build": 1e-11,
        "pack": 1e-12,
    }
    return CostModel.from_dict(values | changes)


def test_a_product_costs_its_entries_at_so_many_rows():
    cost = model()
    assert cost.product(1, 1000, 2000, torch.float32) == pytest.approx(2e6 * 1e-9)
    assert cost.product(256, 1000, 1000, torch.int8) == pytest.approx(1e6 * 256e-11)
    assert cost.product(1024, 1000, 1000, torch.int8) == pytest.approx(1e6 * 1024e-11)
    assert cost.product(0, 1000, 1000, torch.float32) == 0
    assert model(row=1e-9).product(2, 1000, 500, torch.float32) == pytest.approx(5e5 * 1e-9 + 2 * 1500 * 1e-9)


def test_costs_between_measured_numbers_of_rows():
    cost = model(entry={kind: tuple(1e-9 * r for r in ROWS) for kind in model().entry})
    for rows in (1, 3, 4, 6, 100, 255, 256, 257, 4096):
        assert cost.product(rows, 100, 100, torch.float32) == pytest.approx(rows * 1e4 * 1e-9)


def test_one_expert_is_merged_when_the_phase_is_long_enough():
    cost, size = model(), (1024, 1024)
    short, long = Phase({64: 1}), Phase({4096: 100})
    assert plan_layer(cost, short, size, torch.float32).form == "factored"
    merged = plan_layer(cost, long, size, torch.float32)
    assert merged.form == "merged" and merged.predicted["merged"] < 0.6 * merged.predicted["factored"]
    several = plan_layer(cost, Phase({4096: 100}, experts=2), size, torch.float32)
    assert several.form == "factored" and "merged" not in several.predicted


def test_delta_is_chosen_where_few_components_will_do():
    phase = Phase({4096: 10}, experts=3)
    few = plan_layer(model(), phase, (1024, 1024), torch.float32, components=16, error=1e-3)
    assert (few.form, few.components, few.error) == ("delta", 16, 1e-3)
    many = plan_layer(model(), phase, (1024, 1024), torch.float32, components=1024)
    assert (many.form, many.components, many.error) == ("factored", 0, 0.0)


def test_delta_error_bound_is_the_error():
    torch.manual_seed(0)
    weight = torch.randn(60, 90)
    u, s, vh = decompose(weight)
    z = 1 + 0.3 * torch.randn(4, 60)
    for bound in (0.0, 0.05, 0.1, 0.2, 1.0):
        kept, error = delta_components(s, z, bound, multiple=8)
        assert error <= bound and (len(kept) % 8 == 0 or len(kept) == 60)
        worst = 0.0
        for row in z:
            exact = (u * (s * row)) @ vh
            delta = weight + (u[:, kept] * (s * (row - 1))[kept]) @ vh[kept]
            worst = max(worst, float((exact - delta).norm() / weight.norm()))
        assert worst == pytest.approx(error, abs=2e-6)
        if 0 < len(kept) < 60:
            fewer = kept[:-8]
            assert delta_components(s, z, bound, multiple=1)[0].numel() > len(fewer)
    assert len(delta_components(s, torch.ones(2, 60), 0.0)[0]) == 0  # the base needs none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_delta_weight(dtype):
    torch.manual_seed(0)
    weight = torch.randn(70, 90)
    u, s, vh = decompose(weight)
    kept = torch.arange(0, 70, 3)
    dense, change = DenseWeight.pack(weight, dtype=dtype), FactoredWeight.pack(u[:, kept], s[kept], vh[kept], dtype)
    x, d, slots, bias = torch.randn(5, 2, 90), torch.randn(3, len(kept)), torch.tensor([0, 2, 1, 1, 0]), torch.randn(70)
    cu, _, cv = change.factors()
    scaled = (x @ cv.T) * d[slots][:, None]
    expected = x @ dense.matrix().T + scaled @ cu.T + bias
    y = DeltaWeight(dense, change).linear(x, d, slots, bias)
    torch.testing.assert_close(y, expected, atol=2e-3 * float(expected.abs().max()), rtol=1e-3)


def test_explain_names_every_form_and_why_one_is_out():
    phase = Phase({32 * 40: 1, 32: 15}, experts=32)
    plan = Plan(phase, model(), {"a": plan_layer(model(), phase, (64, 64), torch.float32)})
    text = plan.explain()
    assert "distinct experts: 32" in text and "1 of 1280 rows, 15 of 32 rows" in text
    assert "needs one expert" in text and "no bound on the weight error" in text and "1 layers" in text
    plan.measured["factored"] = 1.25
    assert "measured 1.2500 s" in plan.explain()
    assert plan.predicted() == plan.predicted("factored") and plan.predicted("merged") == math.inf
    assert plan.forms() == {"factored": ["a"]}


def test_a_measured_model_goes_through_json():
    cost = CostModel.measure(rounds=1)
    again = CostModel.from_dict(json.loads(json.dumps(cost.to_dict())))
    assert again == cost
    assert cost.product(256, 4096, 4096, torch.float32) > cost.product(1, 4096, 4096, torch.float32) > 0
    assert storage_kind(torch.bfloat16, bf16_products=True) in cost.entry


@pytest.mark.parametrize(
    "bad", [{}, None, {"build": -1.0}, {"entry": {"float32": (1.0,)}}, {"call": "soon"}, {"entry": None}], ids=str
)
def test_a_broken_model_is_refused(bad):
    values = bad if not bad else model().to_dict() | bad
    with pytest.raises(ValueError, match="values: expected"):
        CostModel.from_dict(values)


def test_bad_phases():
    with pytest.raises(ValueError, match="passes: expected"):
        Phase({})
    with pytest.raises(ValueError, match="passes: expected"):
        Phase({-1: 2})
    with pytest.raises(ValueError, match="experts: expected at least 1, got 0"):
        Phase({1: 1}, experts=0)
    with pytest.raises(ValueError, match="max_weight_error: expected a number >= 0"):
        delta_components(torch.ones(3), torch.ones(1, 3), -0.1)
