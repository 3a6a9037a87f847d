"""Results as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t2kernels.files import replacing

STYLES = ("-", ":", "-.")
"""Line styles by incumbent."""


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """A file for each section that has a plot: `dispatch.png`, `alphas.png`, `sizes.png`."""
    from matplotlib.figure import Figure

    written = []
    for name, draw in _DRAWN.items():
        if name in results["sections"]:
            figure, path = Figure(layout="constrained"), folder / f"{name}.png"
            draw(figure, results["sections"][name])
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            written.append(path)
    return written


def _dispatch(figure: Any, section: Mapping[str, Any]) -> None:
    """A heat map for each strategy: shares of a task's prompts."""
    labels, strategies = section["labels"], section["strategies"]
    figure.set_size_inches(5 * len(strategies), 5)
    for axes, (strategy, found) in zip(
        figure.subplots(1, len(strategies), squeeze=False)[0], strategies.items(), strict=True
    ):
        counts = {label: row for part in found.values() for label, row in part["matrix"].items()}
        axes.imshow([[n / max(sum(row), 1) for n in row] for row in counts.values()], cmap="Blues", vmin=0, vmax=1)
        for y, row in enumerate(counts.values()):
            for x, count in enumerate(row):
                dark = count > sum(row) / 2
                axes.text(x, y, str(count), ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set_yticks(range(len(counts)), list(counts))
        axes.set_xlabel("taken for")
        right = found["seen"]["accuracy"]
        axes.set_title(f"{strategy}: {right:.1%} of the seen", fontsize=10)


def _alphas(figure: Any, section: Mapping[str, Any]) -> None:
    """A group of bars for each task, a bar for each expert."""
    names = next(iter(section.values()))["names"]
    figure.set_size_inches(max(6, 1.6 * len(section)), 4)
    axes, width = figure.subplots(), 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(section))]
        axes.bar(places, [found["mean_alpha"][name] for found in section.values()], width, label=name)
    axes.set_xticks(range(len(section)), list(section), rotation=20, ha="right")
    axes.set_ylabel("weight")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


def _sizes(figure: Any, section: Mapping[str, Any]) -> None:
    """A line for each task and incumbent through the means over seeds; points are seeds, dashed the base."""
    figure.set_size_inches(9, 4.5)
    axes = figure.subplots()
    tasks = list(dict.fromkeys(row["task"] for row in section.values()))
    incumbents = list(dict.fromkeys(row["incumbent"] for row in section.values()))
    for label, row in section.items():
        color, style = f"C{tasks.index(row['task'])}", STYLES[incumbents.index(row["incumbent"])]
        sizes = [int(size) for size in row["sizes"]]
        runs = [[100 * one["accuracy"] for one in found] for found in row["sizes"].values()]
        axes.plot(sizes, [statistics.fmean(run) for run in runs], style, label=label, color=color)
        for size, run in zip(sizes, runs, strict=True):
            axes.plot([size] * len(run), run, ".", color=color)
        axes.axhline(100 * row["base"]["accuracy"], linestyle="--", linewidth=0.8, color=color)
    axes.set_xlabel("few-shot problems")
    axes.set_ylabel("right answers, % (dashed: base)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


_DRAWN: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "dispatch": _dispatch,
    "alphas": _alphas,
    "sizes": _sizes,
}
