"""Plans on a whole model."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

import t2
from t2.model import serving_plan as planning
from t2kernels.planner import CostModel
from tests.t2.tiny_lm import add_random_experts, prompts, wrap
from tests.t2kernels.test_planner import model


@pytest.fixture
def svf(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    add_random_experts(svf, 3)
    return svf


@pytest.fixture(autouse=True)
def free_reading(monkeypatch):
    """Reading weights back costs nothing, whatever the disk does."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)


def free_building():
    """A machine where merging costs nothing, and so is always worth it."""
    return model(build=0.0, pack=0.0)


def run(svf, experts, plan=None, rows=3):
    with torch.no_grad():
        if plan is None:
            return svf(input_ids=prompts(rows), experts=experts).logits
        with svf.route(experts, plan):
            return svf.model(input_ids=prompts(rows)).logits


def test_merged_and_factored_forms_give_the_same_model(svf):
    plan = svf.plan("e1", batch=3, prompt_tokens=6, new_tokens=4, cost=free_building())
    assert plan.plan.forms() == {"merged": list(svf.layout.names)}
    torch.testing.assert_close(run(svf, "e1", plan), run(svf, "e1"), atol=2e-3, rtol=1e-3)
    generated = svf.generate(input_ids=prompts(3), experts="e1", plan=plan, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, svf.generate(input_ids=prompts(3), experts="e1", max_new_tokens=4, do_sample=False))


def test_delta_stays_within_its_bound_and_is_exact_at_the_base(svf):
    experts = ["e0", None, "e2"]
    exact = run(svf, experts)
    errors = []
    for bound in (0.2, 0.0):
        plan = svf.plan(experts, prompt_tokens=6, new_tokens=4, max_weight_error=bound, cost=free_building())
        layers = plan.plan.layers  # too small for delta-k to pay, so it is imposed
        plan.plan.layers = {name: dataclasses.replace(layer, form="delta") for name, layer in layers.items()}
        errors.append(float((run(svf, experts, plan) - exact).abs().max()))
    assert errors[1] < 2e-3 < errors[0]
    base = svf.plan(None, batch=3, prompt_tokens=6, new_tokens=4, max_weight_error=0.0, cost=model(build=1.0))
    assert base.plan.forms() == {"delta": list(svf.layout.names)}
    assert all(layer.components == 0 for layer in base.plan.layers.values())
    torch.testing.assert_close(run(svf, None, base), run(svf, None), atol=2e-3, rtol=1e-3)


def test_a_plan_serves_only_the_experts_it_was_made_for(svf):
    plan = svf.plan("e1", batch=3, prompt_tokens=6, new_tokens=4, cost=free_building())
    with pytest.raises(ValueError, match="plan: expected one made for this call's experts"):
        run(svf, "e2", plan)
    svf.add_expert("e1", t2.Expert.random(svf.layout, seed=9), replace=True)
    with pytest.raises(ValueError, match="plan: expected one made for this call's experts"):
        run(svf, "e1", plan)
    trained = svf.bank["e1"].z.clone().requires_grad_()
    plan = svf.plan(trained, batch=3, prompt_tokens=6, new_tokens=4, cost=free_building())
    with pytest.raises(ValueError, match="plan: expected None where a gradient"):
        run(svf, trained, plan)


def test_plans_leave_other_routes_alone(svf):
    before = run(svf, ["e0", "e1", None])
    plan = svf.plan("e1", batch=3, prompt_tokens=6, new_tokens=4, cost=free_building())
    run(svf, "e1", plan)
    assert torch.equal(run(svf, ["e0", "e1", None]), before)


def test_measured_times_are_explained(svf, monkeypatch):
    monkeypatch.undo()
    plan = svf.plan(["e0", "e1"], prompt_tokens=6, new_tokens=4, max_weight_error=0.1)
    assert "measured" not in plan.explain()
    svf.measure_plan(plan)
    assert plan.explain().count("measured") == len(plan.plan.forms())


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch"])
def test_bad_sizes(svf, name):
    sizes = {"prompt_tokens": 3, "new_tokens": 4, "batch": 2} | {name: -1}
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got -1"):
        svf.plan("e0", **sizes)


def test_the_cost_model_is_measured_once_and_anew_when_unreadable(tmp_path, monkeypatch):
    path, measured = tmp_path / "sub" / "cost.json", []
    measure = CostModel.measure
    monkeypatch.setattr(CostModel, "measure", classmethod(lambda cls: measured.append(1) or measure(rounds=1)))
    first = planning.cost_model(path)
    assert planning.cost_model(path) == first and len(measured) == 1
    monkeypatch.setattr(CostModel, "measure", classmethod(lambda cls: measured.append(1) or first))
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({"another machine": stored[CostModel.machine_key()]}))
    planning.cost_model(path)
    assert len(measured) == 2 and set(json.loads(path.read_text())) == {"another machine", CostModel.machine_key()}
    sound = stored[CostModel.machine_key()]
    changes = ({"call": -1}, {"row": 1e300}, {"pack": "x"}, {"entry": []}, {"entry": {}}, {"build": None})
    fields = [json.dumps({CostModel.machine_key(): sound | change}) for change in changes]
    for broken in ("{", "[]", "[" * 10**5, "[NaN]", *fields):
        path.write_text(broken)
        with pytest.warns(RuntimeWarning, match=f"cost model {path} is damaged, and measured anew"):
            planning.cost_model(path)
    assert len(measured) == 2 + 4 + len(fields)
