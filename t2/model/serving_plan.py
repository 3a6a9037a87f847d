"""Plans for a whole model: which form each decomposed layer takes for a phase of work, and the weights that needs."""

from __future__ import annotations

import json
import statistics
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2.experts.registry import ExpertChoice, ExpertRegistry, as_choices, choice_key
from t2.model.decomposed import DecomposedLayers
from t2.model.layers import RoutedLinear
from t2.model.routing import LayerForm, Route
from t2kernels.files import cache_root, strict_json, write_text
from t2kernels.planner import CostModel, Phase, Plan, delta_components, plan_layer
from t2kernels.weights import DeltaWeight, DenseWeight, FactoredWeight


def cost_model(path: Path | None = None) -> CostModel:
    """This machine's cost model: measured the first time (a second or two), then read from the cache.

    `path` defaults to `cache_root() / "cost-model.json"`, which holds one model per instruction set, number
    of threads and torch version; a file that is damaged is named in a warning and measured anew.
    """
    path = cache_root() / "cost-model.json" if path is None else path
    key, known = CostModel.machine_key(), _read(path)
    if key in known:
        try:
            return CostModel.from_dict(known[key])
        except ValueError as error:
            _warn(path, error)
    model = CostModel.measure()
    write_text(path, json.dumps(known | {key: model.to_dict()}, indent=1) + "\n")
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        known = strict_json(path.read_bytes())
        if not isinstance(known, dict):
            raise ValueError("expected an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, error)
        return {}
    return known


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(f"cost model {path} is damaged, and measured anew ({error})", RuntimeWarning, stacklevel=3)


@dataclass
class Merged:
    """W' of one expert."""

    weight: DenseWeight

    def bind(self, table: Tensor) -> LayerForm:
        return lambda x, slots, bias: self.weight.linear_unchecked(x, bias)


@dataclass
class Delta:
    """W and the k components that experts change most; their sigma, and their columns of the slot table."""

    weight: DeltaWeight
    sigma: Tensor
    columns: Tensor

    def bind(self, table: Tensor) -> LayerForm:
        scales = table[:, self.columns] - self.sigma
        return lambda x, slots, bias: self.weight.linear_unchecked(x, scales, slots, bias)


@dataclass
class ServingPlan:
    """The result of `SVFModel.plan`: pass it to `generate` or `route` together with the experts it was made for.

    Its weights are built when it is first used, and freed with it.
    """

    plan: Plan
    experts: dict[object, Tensor]  # z [R] of each distinct expert, by the key of its choice
    forms: dict[int, Merged | Delta] | None = None  # by layer index, once built
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def explain(self) -> str:
        """The chosen forms and why, with predicted and, after `SVFModel.measure_plan`, measured times."""
        return self.plan.explain()


def make_plan(
    decomposed: DecomposedLayers,
    experts: ExpertChoice | Sequence[ExpertChoice],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int | None = None,
    max_weight_error: float | None = None,
    cost: CostModel | None = None,
) -> ServingPlan:
    """Chooses a form for each layer; arguments as in `SVFModel.plan`."""
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch", batch or 1)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    if decomposed.config.mesh is not None:
        raise ValueError("plan: expected a model of one process, got one that is divided over several")
    choices = as_choices(experts)
    rows = batch or len(choices)
    distinct = {choice_key(choice): decomposed.registry.z_of(choice).detach() for choice in choices}
    z = torch.stack(list(distinct.values()))
    passes: dict[int, int] = {rows * prompt_tokens: 1}
    passes[rows] = passes.get(rows, 0) + new_tokens - 1
    if decomposed.table.support is not None and max_weight_error is not None:
        raise ValueError(f"max_weight_error: expected None in the delta form, which is exact, got {max_weight_error}")
    phase, cost, layers = Phase(passes, len(distinct)), cost or cost_model(), {}
    routed = decomposed.routed
    largest = max(routed, key=lambda name: routed[name].in_features * routed[name].out_features)
    start = time.perf_counter()
    decomposed.dense(largest)
    fetch = (time.perf_counter() - start) / (routed[largest].in_features * routed[largest].out_features)
    for name, layer in routed.items():
        weight, components, error = layer.weight, None, 0.0
        if max_weight_error is not None:
            kept, error = delta_components(weight.s.cpu(), z[:, decomposed.layout.window(name)], max_weight_error)
            components = len(kept)
        layers[name] = plan_layer(
            cost,
            phase,
            (weight.out_features, weight.in_features),
            weight.dtype,
            bf16_products=weight.bf16_products,
            fetch=fetch * weight.in_features * weight.out_features,
            components=components,
            error=error,
            support=weight.rank if isinstance(weight, DeltaWeight) else None,
        )
    return ServingPlan(Plan(phase, cost, layers, max_weight_error), distinct)


def check_plan(plan: ServingPlan, choices: Sequence[ExpertChoice], registry: ExpertRegistry) -> None:
    """ValueError unless the plan was made for these experts, as they are now."""
    for choice in choices:
        if isinstance(choice, Tensor) and choice.requires_grad:
            raise ValueError("plan: expected None where a gradient has to reach an expert, got a plan")
        planned = plan.experts.get(choice_key(choice))
        if planned is None or not torch.equal(planned, registry.z_of(choice).detach()):
            raise ValueError(f"plan: expected one made for this call's experts, got another for {choice!r:.80}")


def built_forms(plan: ServingPlan, decomposed: DecomposedLayers) -> dict[int, Merged | Delta]:
    """The plan's merged and delta-k weights by layer index, built the first time; times go to `plan.plan.measured`."""
    with plan.lock:
        if plan.forms is None:
            watch = plan.plan.measured
            built: dict[int, Merged | Delta] = {}
            for name, layer in plan.plan.layers.items():
                if layer.form == decomposed.config.form:
                    continue
                start, build = time.perf_counter(), _merged_form if layer.form == "merged" else _delta_form
                built[decomposed.layers[name].layer.index] = build(name, decomposed, plan)
                watch[layer.form] = watch.get(layer.form, 0.0) + time.perf_counter() - start
            plan.forms = built
        return plan.forms


def _merged_form(name: str, decomposed: DecomposedLayers, plan: ServingPlan) -> Merged:
    (z,) = plan.experts.values()
    return Merged(_pack_like(decomposed.merged_weight(name, z), decomposed.layers[name].layer))


def _delta_form(name: str, decomposed: DecomposedLayers, plan: ServingPlan) -> Delta:
    weight, (u, s, vh) = decomposed.dense(name)
    layer, window, bound = decomposed.layers[name].layer, decomposed.layout.window(name), plan.plan.max_weight_error
    assert bound is not None
    z = torch.stack(list(plan.experts.values()))[:, window]
    kept, _ = delta_components(layer.weight.s.cpu(), z, bound)
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.int64)  # a component that nothing changes
    stored = layer.weight
    change = FactoredWeight.pack(u[:, kept], s[kept], vh[kept], dtype=stored.dtype, bf16_products=stored.bf16_products)
    base = decomposed.table.sigma[window][kept]
    return Delta(DeltaWeight(_pack_like(weight, layer), change), base, kept + window.start)


def _pack_like(weight: Tensor, layer: RoutedLinear) -> DenseWeight:
    """A dense weight [out, in] packed in the storage of the layer's factors."""
    stored = layer.weight
    return DenseWeight.pack(weight, dtype=stored.dtype, bf16_products=stored.bf16_products).to(stored.s.device)


@torch.no_grad()
def measure_plan(plan: ServingPlan, decomposed: DecomposedLayers) -> None:
    """Times each layer in its planned form on random activations; `SVFModel.measure_plan` has the details."""
    (choice, *_) = plan.experts
    z, table = plan.experts[choice], decomposed.table
    measured = plan.plan.measured
    measured.clear()
    plan.forms = None
    built = built_forms(plan, decomposed)
    scales = table.scales_of(z).unsqueeze(0)
    forms = {index: form.bind(scales) for index, form in built.items()}
    zeros = torch.zeros(1, dtype=torch.int64, device=scales.device)
    route = Route(zeros, scales, table.widths, forms)
    for rows, count in plan.plan.phase.passes.items():
        sweeps = [_seconds_by_form(plan, decomposed, route, rows) for _ in range(3)]
        for form in plan.plan.forms():
            seconds = statistics.median(sweep[form] for sweep in sweeps)
            measured[form] = measured.get(form, 0.0) + count * seconds


def _seconds_by_form(plan: ServingPlan, decomposed: DecomposedLayers, route: Route, rows: int) -> dict[str, float]:
    seconds = dict.fromkeys(plan.plan.forms(), 0.0)
    for name, layer in plan.plan.layers.items():
        module = decomposed.layers[name].layer
        x = torch.randn(rows, module.in_features, device=route.slots.device)
        start = time.perf_counter()
        module.alone(x, route)
        seconds[layer.form] += time.perf_counter() - start
    return seconds
