"""The `t2 eval` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from t2.cli.options import OPTIONAL, FactorDtype, Model, TaskOptions
from t2.eval.report import SECTIONS, Section
from t2.tasks.base import Split


def run(
    model: Model,
    expert: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint=OPTIONAL)] = (),
    task: Annotated[str | None, arg(metavar="TASK", help_behavior_hint=OPTIONAL)] = None,
    task_options: TaskOptions = "{}",
    problems: int = 200,
    split: Split = "test",
    max_new_tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint=OPTIONAL)] = None,
    bank: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint=OPTIONAL)] = None,
    spec: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    output: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint=OPTIONAL)] = None,
    only: tuple[Section, ...] = SECTIONS,
    factor_dtype: FactorDtype = "float32",
    bf16_products: bool = False,
    token_budget: int = 16384,
) -> int:
    """Score experts beside the base on a task; or evaluate a bank: the paper's tables, timings and ablations.

    Example: t2 eval smollm2-135m-instruct --expert runs/mine/best.safetensors --task jsonl:mine.jsonl
    Example: t2 eval smollm2-135m-instruct --bank experts/mine --spec eval.json --output runs/eval

    Args:
        expert: Expert files to score on --task.
        task: Task, such as gsm8k, reasoning-gym:chain_sum or jsonl:FILE.
        problems: Maximum number of problems of --task.
        split: Split of --task that they come from.
        max_new_tokens: Maximum length of a completion, in tokens; the default is the task's.
        bank: Bank of experts: a folder with domains.json (docs/adaptation.md).
        spec: JSON file with the tasks and sizes to evaluate a bank on (docs/adaptation.md).
        output: With --task a JSON file for the figures; with --bank a folder for results.json, summary.json,
            tables.md, plots, and the cache that a second run continues from.
        only: Sections of a bank's evaluation.
        bf16_products: Round activations to bfloat16 where they meet bfloat16 factors.
        token_budget: Maximum tokens of a batch, padding and completions included.
    """
    if expert or task is not None:
        if not expert or task is None or bank is not None or spec is not None:
            raise ValueError("expert: expected --expert and --task together, without --bank and --spec")
        from t2.eval.score import score_experts

        score_experts(
            model,
            expert,
            task,
            task_options=task_options,
            problems=problems,
            split=split,
            output=output,
            dtype=factor_dtype,
            bf16_products=bf16_products,
            max_new_tokens=max_new_tokens,
            token_budget=token_budget,
        )
        return 0
    if bank is None or spec is None or output is None:
        raise ValueError("bank: expected --bank, --spec and --output together, or --expert and --task")
    from t2.eval.command import run_evaluation

    finished = run_evaluation(
        model,
        bank,
        spec,
        output,
        only=only,
        dtype=factor_dtype,
        bf16_products=bf16_products,
        token_budget=token_budget,
    )
    return 0 if finished else 130
