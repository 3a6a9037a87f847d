"""The `t2 transfer` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from t2.cli.options import OPTIONAL, FactorDtype, Model, ResultsFile, Targets, TaskOptions
from t2.cli.options import target_modules as as_targets

File = Annotated[Path, arg(metavar="FILE")]


def run(
    model: Model,
    expert: File,
    output: File,
    target_modules: Targets = ("all-linear",),
    depth: Literal["relative", "absolute"] = "relative",
    ranks: Literal["leading", "relative"] = "leading",
    unmatched: Literal["error", "base"] = "error",
    shuffle_seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint=OPTIONAL)] = None,
    task: Annotated[str | None, arg(metavar="TASK", help_behavior_hint=OPTIONAL)] = None,
    task_options: TaskOptions = "{}",
    problems: int = 200,
    shuffles: int = 3,
    results: ResultsFile = None,
    factor_dtype: FactorDtype = "float32",
) -> int:
    """Convert an expert of another model into one of this model; with --task, compare it with shuffled controls.

    Example: t2 transfer other/model --expert runs/sums/best.safetensors --output moved.safetensors --task gsm8k

    Args:
        expert: Expert file of the other model.
        output: File for the converted expert.
        depth: Match layers by relative depth, or by number (absolute).
        ranks: Match singular values from the largest on (leading), or stretch one spectrum over the other (relative).
        unmatched: Matrices without a counterpart in the expert: an error, or z = 1 (base).
        shuffle_seed: Write a shuffled control instead; also the first seed of --shuffles.
        task: Task whose test split compares the base, the converted expert and the shuffled controls.
        problems: Number of test examples.
        shuffles: Number of shuffled controls.
        results: JSON file for the figures; the default is the output's name with .json.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from t2 import tasks
    from t2.eval.transfer import measure
    from t2.experts import transfer as transfers
    from t2.experts.expert import Expert
    from t2.experts.layout import layout_of
    from t2.model.svf_model import SVFConfig, SVFModel
    from t2.weights.factor_cache import weight_key
    from t2.weights.loading import load
    from t2.weights.targets import matrices_of, select_targets
    from t2kernels.files import write_text

    source, out, targets = Expert.load(expert), Console(), as_targets(target_modules)
    options = transfers.TransferOptions(depth, ranks, unmatched)
    scored_task = tasks.get(task, **tasks.options_of(task_options)) if task else None
    loaded, tokenizer = load(model)
    svf = SVFModel(loaded, SVFConfig(targets, getattr(torch, factor_dtype))) if scored_task else None
    if svf is None:
        weights = matrices_of(loaded, select_targets(loaded, targets))
        keys = {name: weight_key(w if isinstance(w, torch.Tensor) else w()) for name, w in weights.items()}
        layout = layout_of(loaded, weights, keys)
    else:
        layout = svf.layout
    transfers.transfer(source, layout, options, shuffle_seed=shuffle_seed).save(output)
    found = transfers.match(source.layout, layout, depth)
    out.print(
        f"{output}: {len(layout.names) - len(found.unmatched)} of {len(layout.names)} matrices have the z of one of "
        f"the expert's, {len(found.unused)} of its {len(source.layout.names)} were not used"
    )
    if svf is None or scored_task is None:
        return 0
    seeds = range(shuffle_seed or 0, (shuffle_seed or 0) + shuffles)
    measured = measure(svf, source, scored_task, tokenizer, options, problems=problems, shuffle_seeds=seeds)
    table = Table(str(task), "right", "95% interval")
    for name, row in measured["conditions"].items():
        low, high = row["interval"]
        table.add_row(name, f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")
    out.print(table)
    write_text(results or output.with_suffix(".json"), json.dumps({"expert": str(expert)} | measured, indent=1) + "\n")
    return 0
