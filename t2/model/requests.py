"""The route of a batch: from one expert choice per request to slots that the layers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from t2.experts.registry import ExpertChoice, as_choices
from t2.experts.slots import SlotBuffer
from t2.model.decomposed import DecomposedLayers
from t2.model.routing import Route
from t2.model.serving_plan import ServingPlan, built_forms, check_plan


@contextmanager
def routed(
    decomposed: DecomposedLayers, experts: ExpertChoice | Sequence[ExpertChoice], plan: ServingPlan | None = None
) -> Iterator[None]:
    """Within the block, request i of a batch runs with `experts[i]`; `SVFModel.route` has the details."""
    choices = as_choices(experts)
    with ExitStack() as held:
        route, buffer = _resolve(decomposed, choices, held)
        if plan is not None:
            check_plan(plan, choices, decomposed.registry)
            forms = built_forms(plan, decomposed)
            route = Route(
                route.slots,
                forms={index: form.bind(decomposed.table.table) for index, form in forms.items()},
                is_base=route.is_base,
            )
        held.enter_context(decomposed.router.within(route))
        yield
        if buffer is not None and route.slots.is_cuda:  # a captured graph reads its buffer unseen
            route.was_read = buffer.was_read = route.was_read or buffer.was_read
        if not route.was_read and any(choice is not None for choice in choices):
            raise RuntimeError(
                "route: expected a layer to run with these experts within the block, but none has; the model ran "
                "in another thread, or not at all. Enter the route in the thread that calls the model"
            )


@contextmanager
def routed_slots(decomposed: DecomposedLayers, slots: Tensor) -> Iterator[None]:
    """The same for slots [requests] int64 that the caller holds."""
    decomposed.table.wait_for_writes()
    with decomposed.router.within(Route(slots, is_base=not bool(slots.any()))):
        yield


def _resolve(
    decomposed: DecomposedLayers, choices: Sequence[ExpertChoice], held: ExitStack
) -> tuple[Route, SlotBuffer | None]:
    table, registry = decomposed.table, decomposed.registry
    device = table.sigma.device
    if any(isinstance(choice, Tensor) and choice.requires_grad for choice in choices):
        scales = torch.stack([table.scales_of(registry.z_of(choice)) for choice in choices])
        return Route(torch.arange(len(choices), device=device), scales, table.widths), None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("route: expected to be entered before the capture of a CUDA graph, got one inside of it")
    slots = registry.hold_slots(choices, held)
    table.wait_for_writes()
    buffer = decomposed.router.buffers.take(slots)
    held.callback(decomposed.router.buffers.give_back, buffer)
    return Route(buffer.slots, is_base=all(choice is None for choice in choices)), buffer


def check_count(experts: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """ValueError unless a list of experts has one entry for each request of a model call's batch."""
    if not isinstance(experts, Sequence) or isinstance(experts, str):
        return
    named = [kwargs[k] for k in ("input_ids", "inputs", "inputs_embeds") if k in kwargs]
    batch = next((t for t in (*named, *args) if isinstance(t, Tensor)), None)
    if batch is not None and batch.shape[0] != len(experts):
        raise ValueError(
            f"experts: expected one entry for each of the {batch.shape[0]} requests of the batch, got {len(experts)}"
        )
