"""The `t2 eval` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from t2.cli.options import FactorDtype, Model
from t2.eval.report import SECTIONS, Section


def run(
    model: Model,
    bank: Annotated[Path, arg(metavar="FOLDER")],
    spec: Annotated[Path, arg(metavar="FILE")],
    output: Annotated[Path, arg(metavar="FOLDER")],
    only: tuple[Section, ...] = SECTIONS,
    factor_dtype: FactorDtype = "float32",
    bf16_products: bool = False,
    token_budget: int = 16384,
) -> int:
    """Evaluate a bank of experts: the paper's tables, timings and ablations. Ctrl-C keeps the results so far.

    Example: t2 eval smollm2-135m-instruct --bank experts/mine --spec eval.json --output runs/eval

    Args:
        bank: Bank of experts: a folder with domains.json (docs/adaptation.md).
        spec: JSON file with the tasks and sizes to evaluate (docs/adaptation.md).
        output: Folder for results.json, summary.json, tables.md, plots, and the cache that a second run continues from.
        only: Sections to evaluate.
        bf16_products: Round activations to bfloat16 where they meet bfloat16 factors.
        token_budget: Maximum tokens of a batch, padding and completions included.
    """
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
