"""A run's metrics: a JSON line for every step, and curves as in the paper's figure 4."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from t2.weights.files import FileFormatError
from t2kernels.files import replacing, strict_json, write_text

Row = dict[str, Any]


class Metrics:
    """The rows of a run, one a step, kept in `metrics.jsonl`; step 0 holds the scores that it starts from."""

    def __init__(self, path: Path | None, last_step: int | None = None) -> None:
        """Start empty, or with an earlier run's rows up to `last_step`, its last saved step.

        Without a path the rows are only in memory.
        """
        self.path = path
        self.rows: list[Row] = []
        if path is None:
            return
        if last_step is not None and path.is_file():
            self.rows = [row for row in _read(path) if row["step"] <= last_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps that have the metric, and its values."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]


def _read(path: Path) -> list[Row]:
    """The rows of a file, without a last line that a crash cut short; FileFormatError names any other bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected lines of JSON, got {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = strict_json(line, finite=False)
        except ValueError as error:
            if number == len(lines):
                break
            raise FileFormatError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise FileFormatError(f"{path}, line {number}: expected an object with a whole number step, got {line:.80}")
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                raise FileFormatError(f"{path}, line {number}: {name}: expected a number, got {value!r:.80}")
        rows.append(row)
    return rows


PANELS = (
    ("validation", "validation accuracy", "%"),
    ("reward", "mean reward", ""),
    ("loss", "loss", ""),
    ("kl", "KL to the base, nats a token", ""),
    ("entropy", "entropy, nats a token", ""),
    ("length", "completion length, tokens", ""),
)
FEW = 30
"""Values of a panel that are marked by points; more are a line."""


def plot(metrics: Metrics, path: Path, title: str, best_step: int | None = None) -> None:
    """Validation accuracy with the base as a dashed line, and the other `PANELS` over the steps, as a PNG.

    A metric that the run does not have (rewards of a next-token run) has no panel. Accuracy runs from 0 to 100%, and
    all panels have the same steps.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if panel[0] == "validation" or metrics.series(panel[0])[0]]
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.2 * columns, 3.2 * math.ceil(len(panels) / columns)), layout="constrained")
    figure.suptitle(title)
    last = max((row["step"] for row in metrics.rows), default=0) or 1
    grid = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, label, unit) in zip(grid, panels, strict=False):
        steps, values = metrics.series(name)
        values = [100 * value for value in values] if unit == "%" else values
        axes.plot(steps, values, marker="o" if len(values) <= FEW else None, markersize=3, color="tab:blue")
        axes.set_xlim(-0.02 * last, 1.02 * last)
        if unit == "%":
            axes.set_ylim(-3, 103)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{label}, {unit}" if unit else label)
        axes.grid(alpha=0.3)
        if name == "validation" and values:
            if (base := metrics.rows[0].get("base")) is not None:
                axes.axhline(100 * base, linestyle="--", color="gray", label="base")
            if best_step is not None and best_step in steps:
                best = values[steps.index(best_step)]
                axes.plot(best_step, best, "*", markersize=12, color="tab:orange", label="best")
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
