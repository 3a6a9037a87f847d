"""Results as markdown. `benchmarks/readme.py` makes the tables of the docs with this too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

Section = Literal["table1", "table2", "dispatch", "times", "alphas", "sizes", "variants"]
SECTIONS: tuple[Section, ...] = get_args(Section)
TITLES: dict[str, str] = {
    "table1": "Fine-tuned (table 1)",
    "table2": "Adaptation (table 2)",
    "dispatch": "Dispatcher",
    "times": "Times of both passes",
    "alphas": "Learned weights",
    "sizes": "Few-shot sizes",
    "variants": "Modules and objectives",
}
PER_PROBLEM = ("scores", "alpha")


def summary(results: Any) -> Any:
    """The results without their per-example and per-layer entries."""
    if isinstance(results, dict):
        return {name: summary(value) for name, value in results.items() if name not in PER_PROBLEM}
    return [summary(value) for value in results] if isinstance(results, list) else results


def document(results: Mapping[str, Any]) -> str:
    """One markdown page with all sections of the results."""
    machine, parts = results["machine"], [f"# {results['model']}, {results['dtype']}"]
    parts.append(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.")
    parts += [f"## {TITLES[name]}\n\n{text}" for name, text in tables(results).items()]
    return "\n\n".join(parts) + "\n"


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of each section, by name."""
    return {name: _MADE[name](section) for name, section in results["sections"].items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns after the first are right-aligned."""
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, alignment, *rows))


def accuracy(found: Mapping[str, Any] | None) -> str:
    """Accuracy and interval, such as "61.0% (54.1 to 67.5)"."""
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _p(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def _beside_base(found: Mapping[str, Any] | None) -> str:
    """Accuracy with the normalised score and the p-value of the difference to the base."""
    if found is None or "p" not in found:
        return accuracy(found)
    normalised = "" if found["normalised"] is None else f"{found['normalised']:.2f}, "
    return f"{accuracy(found)}; {normalised}{_p(found['p'])}"


def _accuracies(section: Mapping[str, Any]) -> str:
    columns = list(dict.fromkeys(name for row in section.values() for name in row["columns"]))
    rows = []
    for label, row in section.items():
        seen = "" if row.get("seen", True) else " (unseen)"
        cells = (_beside_base(row["columns"].get(name)) for name in columns)
        rows.append([f"{label}{seen}, {row['problems']} problems", *cells])
    return (
        "Right answers with 95% interval; beside the base also accuracy over that of the base, and McNemar's exact p "
        "of the difference:\n\n" + table(["task", *columns], rows)
    )


def _dispatch(section: Mapping[str, Any]) -> str:
    labels, parts = section["labels"], []
    for strategy, found in section["strategies"].items():
        kinds = ("seen" if name == "seen" else "unseen" for name in found)
        said = [
            f"{part['prompts']} prompts of {kind} tasks: {accuracy(part)} right"
            for kind, part in zip(kinds, found.values(), strict=True)
        ]
        rows = [[label, *map(str, row)] for part in found.values() for label, row in part["matrix"].items()]
        parts.append(f"**{strategy}**: {'; '.join(said)}.\n\n" + table(["prompts of, taken for", *labels], rows))
    return "\n\n".join(parts)


def _times(section: Mapping[str, Any]) -> str:
    rows, strategies = [], [name for name in next(iter(section.values()))["seconds"] if name != "base"]
    for label, found in section.items():
        seconds = found["seconds"]
        base = statistics.median(seconds["base"])
        row = [label, str(found["requests"]), str(found["new_tokens"]), f"{base:.2f}"]
        for name in strategies:
            first, second = (statistics.median(seconds[name][which]) for which in ("first", "second"))
            row += [f"{first:.2f}", f"{second:.2f}", f"{(first + second) / base:.2f}"]
        rows.append(row)
    head = ["batch", "requests", "most new tokens", "base, s"]
    for name in strategies:
        head += [f"{name}: first pass, s", "second, s", "both / base"]
    rounds = len(next(iter(section.values()))["seconds"]["base"])
    return f"Paths in turns, medians of {rounds} rounds:\n\n" + table(head, rows)


def _alphas(section: Mapping[str, Any]) -> str:
    names = next(iter(section.values()))["names"]
    rows = [
        [
            label,
            *(f"{found['mean_alpha'][name]:.2f}" for name in names),
            f"{found['score']:.0%}",
            f"{max(found['singles'].values()):.0%}",
            f"{found['seconds']:.0f}",
        ]
        for label, found in section.items()
    ]
    return table(["task", *names, "right of the few", "best alone", "search, s"], rows)


def _sizes(section: Mapping[str, Any]) -> str:
    sizes = list(next(iter(section.values()))["sizes"])
    rows = [
        [label, accuracy(row["base"]), *(_over_seeds(row["sizes"][size]) for size in sizes)]
        for label, row in section.items()
    ]
    return "Right answers by number of few-shot problems; the mean over seeds, and each:\n\n" + table(
        ["task", "base", *sizes], rows
    )


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> str:
    if len(found) == 1:
        return accuracy(found[0])
    each = ", ".join(f"{100 * one['accuracy']:.1f}" for one in found)
    return f"{statistics.fmean(one['accuracy'] for one in found):.1%} ({each})"


_MADE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "table1": _accuracies,
    "table2": _accuracies,
    "dispatch": _dispatch,
    "times": _times,
    "alphas": _alphas,
    "sizes": _sizes,
    "variants": _accuracies,
}
