"""A run's metrics: a JSON line for every step, and curves as in the paper's figure 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t2.storage import FileFormatError, parse_json
from t2kernels.files import replacing, write_text

Row = dict[str, Any]


class Metrics:
    """The rows of a run, one a step, kept in `metrics.jsonl`; step 0 holds the scores that it starts from."""

    def __init__(self, path: Path | None, last_step: int | None = None) -> None:
        """Starts empty, or with the rows up to `last_step` of an earlier run: a later one is of a step that is lost.

        Without a path the rows are in memory alone.
        """
        self.path = path
        self.rows: list[Row] = []
        if path is None:
            return
        if last_step is not None and path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            self.rows = [row for row in map(_parse, lines) if row is not None and row["step"] <= last_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have the metric, and its values."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]


def _parse(line: str) -> Row | None:
    """None for the line that a crash cut short."""
    try:
        row = parse_json(line, "metrics")
    except FileFormatError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


PANELS = (
    ("validation", "validation accuracy", "%"),
    ("reward", "mean reward", ""),
    ("kl", "KL to the base, nats a token", ""),
    ("length", "answer length, tokens", ""),
)


def plot(metrics: Metrics, path: Path, title: str, best_step: int | None = None) -> None:
    """Validation accuracy with the base as a dashed line, reward, KL and length over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, label, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        steps, values = metrics.series(name)
        values = [100 * value for value in values] if unit == "%" else values
        axes.plot(steps, values, marker="o" if name == "validation" else None, markersize=3, color="tab:blue")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{label}, {unit}" if unit else label)
        axes.grid(alpha=0.3)
        if name == "validation" and values:
            axes.axhline(100 * metrics.rows[0]["base"], linestyle="--", color="gray", label="base")
            if best_step is not None and best_step in steps:
                best = values[steps.index(best_step)]
                axes.plot(best_step, best, "*", markersize=12, color="tab:orange", label="best")
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
