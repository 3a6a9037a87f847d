"""Tables of `t2 eval` from its summary, benchmarks/results/eval.json (the plan is benchmarks/eval_plan.json)."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import Table
from t2.eval.report import TITLES, tables


def eval_text(results: Any) -> Table:
    """Every section that the summary has."""
    machine = results["machine"]
    products = ", bfloat16 products" if results["bf16_products"] else ""
    sections = [f"### {TITLES[name]}\n\n{text}" for name, text in tables(results).items()]
    return Table(
        f"{results['model']}, {results['dtype']}{products}, on {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}:\n\n" + "\n\n".join(sections)
    )
