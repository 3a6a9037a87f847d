"""Result files, and tables that are built once for the terminal and for the docs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Table:
    """A table with the text before and after it; without `head` it is text alone. Cells are markdown."""

    caption: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""

    def markdown(self) -> str:
        """Markdown with numbers to the right."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows] if self.head else []
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (self.caption, grid, self.note) if part)

    def show(self) -> None:
        """Prints the table with rich."""
        from rich import table
        from rich.console import Console

        out, grid = Console(markup=False), table.Table(*self.head)
        for row in self.rows:
            grid.add_row(*(cell.replace("**", "") for cell in row))
        for part in (self.caption, grid if self.head else "", self.note):
            if part:
                out.print(part)


def read_results(name: str) -> Any:
    """Parsed JSON of one file in benchmarks/results/."""
    return json.loads((RESULTS / name).read_text())


def write_results(path: Path, results: Any) -> None:
    """Writes results as JSON, whole or not at all."""
    from t2kernels.files import write_text

    write_text(path, json.dumps(results, indent=1) + "\n")


def with_interval(found: Mapping[str, Any]) -> str:
    """Accuracy with its 95% interval, like "61.0% (54 to 68)"."""
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def machine_and_limits(machine: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the machine, one on its read bandwidth and FLOP/s during the measurements."""
    kinds = ("read", "float32", "bfloat16", "int16")
    rates = {kind: [rate for result in measured for rate in result["rates"][kind]] for kind in kinds}
    limits = {kind: statistics.median(found) for kind, found in rates.items() if found}
    flops = ", ".join(f"{2 * rate / 1e9:.0f} {kind}" for kind, rate in limits.items() if kind != "read")
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['kernels']['chosen']} kernels. Limits in the same run: {limits['read'] / 1e9:.0f} GB/s read; "
        f"GFLOP/s {flops}."
    )
