"""`t2 eval MODEL --expert FILE --task TASK`: an expert, or several, beside the base on one task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from t2.experts.expert import Expert
from t2.generation.evaluate import Evaluation, evaluate_experts, figures
from t2.model.load import load_svf
from t2.model.svf_model import SVFConfig
from t2.tasks import Split, get, options_of
from t2.tasks.statistics import better_worse, paired_p
from t2.weights.loading import tokenizer_of
from t2.weights.machine import machine
from t2kernels.files import write_text

BASE = "base"


def score_experts(
    model: str,
    paths: Sequence[Path],
    task_name: str,
    *,
    task_options: str = "{}",
    problems: int = 200,
    split: Split = "test",
    output: Path | None = None,
    dtype: str = "float32",
    bf16_products: bool = False,
    max_new_tokens: int | None = None,
    token_budget: int = 16384,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answers the first problems of a split greedily with the base and each expert; prints and returns the figures.

    Files, task and data are checked before the model is loaded.

    Args:
        paths: files of experts; one is named by its file, or its folder where two files have one name.
        problems: most problems; fewer where the split has fewer.
        output: file for the figures as JSON; None writes none.

    Raises:
        ValueError, FileNotFoundError, FileFormatError: no experts, files that are none or are of different models, a
            task or options that are unknown, data that is missing or damaged.
    """
    console = console or Console()
    if problems < 1:
        raise ValueError(f"problems: expected an integer >= 1, got {problems}")
    experts = _named(paths)
    first = next(iter(experts.values()))
    for name, expert in experts.items():
        first.layout.check_same(expert.layout, f"expert {name}")
    task = get(task_name, **options_of(task_options))
    asked = list(task.problems(split)[:problems])
    if not asked:
        raise ValueError(f"split: expected one with problems, got {split!r} of {task_name}, which has none")
    config = SVFConfig(list(first.layout.names), getattr(torch, dtype), bf16_products=bf16_products)
    svf, processor = load_svf(model, config)
    for name, expert in experts.items():
        svf.add_expert(name, expert)
    choices = {BASE: None} | {name: name for name in experts}
    every = 0.1 if console.is_terminal else 10.0
    with tqdm(total=len(asked), desc=task_name, unit="problem", mininterval=every, ncols=78) as bar:
        found = evaluate_experts(
            svf,
            choices,
            task,
            asked,
            tokenizer_of(processor),
            new_tokens=max_new_tokens,
            token_budget=token_budget,
            announce=lambda done: bar.update(done - bar.n),
        )
    results = {
        "model": model,
        "task": task_name,
        "task_options": json.loads(task_options),
        "split": split,
        "problems": len(asked),
        "factor_dtype": dtype,
        "machine": machine(),
        "scores": {name: each | _beside(found[BASE], found[name]) for name, each in figures(found).items()},
    }
    if output is not None:
        write_text(output, json.dumps(results, indent=1) + "\n")
    console.print(_table(results))
    return results


def _named(paths: Sequence[Path]) -> dict[str, Expert]:
    if not paths:
        raise ValueError("expert: expected at least one file, got none")
    stems = [path.stem for path in paths]
    found: dict[str, Expert] = {}
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"
        if name == BASE or name in found:
            raise ValueError(f"expert: expected files that names tell apart, none of them {BASE!r}, got {path}")
        found[name] = Expert.load(path)
    return found


def _beside(base: Evaluation, own: Evaluation) -> dict[str, Any]:
    better, worse = better_worse(base.scores, own.scores)
    return {"better": better, "worse": worse, "p": paired_p(base.scores, own.scores), "answers": own.answers}


def _table(results: Mapping[str, Any]) -> Table:
    caption = f"{results['task']}, {results['problems']} problems of {results['split']}, greedy; intervals of 95%"
    table = Table("", "accuracy", "right where base is wrong, the reverse", "p", title=caption, title_justify="left")
    for name, found in results["scores"].items():
        low, high = found["interval"]
        accuracy = f"{found['accuracy']:.1%} ({100 * low:.0f} to {100 * high:.0f})"
        beside = [] if name == BASE else [f"{found['better']}, {found['worse']}", f"{found['p']:.2g}"]
        table.add_row(name, accuracy, *beside)
    return table
