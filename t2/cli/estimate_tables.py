"""Estimates of `t2.weights.estimate` as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from t2.weights.estimate import RESERVED, ModelEstimate
from t2.weights.step_sizes import StepSizes


def size(count: float) -> str:
    """Readable size in GB, or MB below 1 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Readable duration in hours, minutes or seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.1f} s"


def show(estimate: ModelEstimate, work: StepSizes, console: Console) -> None:
    """Print matrices, decomposition, storage, serving, and training with the sizes of `work`."""
    facts = estimate.to_dict(work)
    console.print(_matrices(facts))
    console.print(
        f"{facts['matrices']} matrices; an expert is {facts['parameters_per_expert']:,} parameters "
        f"({size(facts['slot'])}); {facts['multiply_adds']:.3f} times the dense model's FLOPs"
    )
    console.print(_decomposition(facts))
    console.print(_serving(facts))
    if "token_budget" not in facts["storage"]["int8"]["gpus"][0]:
        console.print(f"Training: activations of {facts['architecture']['model_type']} models cannot be estimated.")
        return
    console.print(_training(estimate, work))
    console.print(_budgets(facts, work))
    console.print(
        "A budget is the largest --token-budget that fits: without / with --gradient-checkpointing. "
        f"{size(RESERVED)} of each GPU are left to its driver. '2 GPUs' means that the model does not fit one and "
        "would have to be sharded, which t2 does not do."
    )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _matrices(facts: dict[str, Any]) -> Table:
    table = _table(f"{facts['model']}, {facts['model_dtype']}", "matrix", "count", "out x in", "rank")
    for shape in facts["shapes"]:
        rows, columns = shape["out_features"], shape["in_features"]
        table.add_row(shape["example"], str(shape["count"]), f"{rows} x {columns}", str(shape["rank"]))
    return table


def _decomposition(facts: dict[str, Any]) -> Table:
    found = facts["decompose"]
    table = _table("Decomposition, once, on a CPU", "resource", "")
    if found["seconds"] is not None:
        table.add_row("time, from a probe of this machine, without file access", duration(found["seconds"]))
    table.add_row("memory, one matrix at a time", size(found["peak"]))
    table.add_row("disk: float32 factors and base weights", size(facts["disk"]))
    return table


def _serving(facts: dict[str, Any]) -> Table:
    gpus = [f"{gpu['gb']} GB" for gpu in facts["storage"]["int8"]["gpus"]]
    title = f"Serving: tokens in the KV cache ({size(facts['cache_per_token'])} each)"
    table = _table(title, "factor dtype", "factors", "whole model", *gpus)
    for name, entry in facts["storage"].items():
        fits = [f"{g['cached_tokens']:,}" if g["serves"] else f"{g['gpus_to_serve']} GPUs" for g in entry["gpus"]]
        table.add_row(name, size(entry["factors"]), size(entry["serving"]), *fits)
    return table


def _training(estimate: ModelEstimate, work: StepSizes) -> Table:
    smallest, whole = work.micro_batches()[0], (1, work.samples_per_prompt)
    title = (
        f"Training: {work.prompts_per_step} prompts of {work.prompt_tokens} tokens, "
        f"{work.samples_per_prompt} completions of {work.new_tokens} each"
    )
    table = _table(title, "beside the model", "one completion at a time", "one prompt's completions")
    table.add_row("z, gradient, Adam", *[size(estimate.learnt)] * 2)
    table.add_row("rollout: KV cache, logits", *[size(estimate.rollout(work))] * 2)
    for name, checkpointing in (("update", False), ("update, gradient checkpointing", True)):
        both = [estimate.update(work, *batch, checkpointing=checkpointing) for batch in (smallest, whole)]
        table.add_row(name, *map(size, both))
    return table


def _budgets(facts: dict[str, Any], work: StepSizes) -> Table:
    gpus = [f"{gpu['gb']} GB" for gpu in facts["storage"]["int8"]["gpus"]]
    table = _table("Training on one GPU: largest token budget", "factor dtype", *gpus)
    for name, entry in facts["storage"].items():
        if entry["gpus"]:
            table.add_row(name, *[_budget(gpu) for gpu in entry["gpus"]])
    return table


def _budget(gpu: dict[str, Any]) -> str:
    plain, again = gpu["token_budget"], gpu["token_budget_checkpointing"]
    if plain is None and again is None:
        return f"{gpu['gpus_to_train']} GPUs"
    return f"{'-' if plain is None else f'{plain:,}'} / {'-' if again is None else f'{again:,}'}"
