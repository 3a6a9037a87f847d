"""Sections of the results, assembled from the measurements of an `EvalRunner`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2.eval.report import SECTIONS, Section
from t2.eval.runner import EvalRunner, MissingResult
from t2.experts.expert import Expert
from t2.model.svf_model import ExpertChoice
from t2.tasks.classify import BASE, OTHERS
from t2.tasks.statistics import better_worse, paired_p, wilson_interval


def measure(runner: EvalRunner, only: Iterable[Section] = SECTIONS) -> dict[str, Any]:
    """Sections in `only`, plus any other section whose results are all in the cache.

    Sections that the spec has no tasks for are left out. An interruption loses at most a few examples: the next call
    continues from the cache.

    Raises:
        ValueError: there is no such section.
    """
    chosen = tuple(only)
    if unknown := set(chosen) - set(SECTIONS):
        raise ValueError(f"only: expected some of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    for label in runner.spec.tasks:
        if columns := _columns(runner, label, chosen):
            runner.scores(label, columns)
    found: dict[str, Any] = {}
    for name in SECTIONS:
        runner.allowed = name in chosen
        try:
            section = _MADE[name](runner)
        except MissingResult:
            continue
        finally:
            runner.allowed = True
        if section:
            found[name] = section
    return found


def _columns(runner: EvalRunner, label: str, chosen: Sequence[Section]) -> dict[str, ExpertChoice]:
    """Columns that these sections need for one task, so that all of them share the same batches."""
    spec, columns = runner.spec, dict[str, ExpertChoice]()
    if "table2" in chosen or ("table1" in chosen and label in spec.seen):
        columns |= _singles(runner)
    if "table2" in chosen:
        columns |= _mixes(runner, label)
    if "sizes" in chosen and label in spec.ablated:
        columns |= {BASE: None} | {
            f"few-shot {size}, seed {seed}, {incumbent}": runner.mix(runner.settled(label, size, seed, incumbent))
            for size in spec.few_shot_sizes
            for seed in spec.few_shot_seeds
            for incumbent in spec.incumbents
        }
    if "variants" in chosen and label in spec.seen and spec.variants:
        columns |= {BASE: None, label: label} | _variants(runner, label)
    return columns


def _singles(runner: EvalRunner) -> dict[str, ExpertChoice]:
    """Columns of the base and of each expert."""
    return {BASE: None, **{name: name for name in runner.bank.experts}}


def _mixes(runner: EvalRunner, label: str) -> dict[str, ExpertChoice]:
    """Few-shot columns of table 2."""
    spec, seed = runner.spec, runner.spec.few_shot_seeds[0]
    made: dict[str, ExpertChoice] = {}
    for incumbent in spec.incumbents:
        for size in spec.few_shot:
            name = _after(incumbent, f"few-shot {size}")
            made[name] = runner.mix(runner.settled(label, size, seed, incumbent))
            if spec.few_shot_per_layer:
                made[f"{name}, per layer"] = runner.mix(runner.settled(label, size, seed, incumbent, "layer"))
    return made


def _after(incumbent: str, name: str) -> str:
    """Name of a column or row that starts from an incumbent."""
    return name if incumbent == BASE else f"{incumbent}, {name}"


def _variants(runner: EvalRunner, label: str) -> dict[str, ExpertChoice]:
    made: dict[str, ExpertChoice] = {}
    for variant, files in runner.spec.variants.items():
        if label in files:
            if not runner.allowed and not Path(files[label]).is_file():
                raise MissingResult(files[label])
            expert = Expert.load(files[label])
            made[f"variant {variant}"] = runner.widened(expert, f"variants.{variant}.{label}")
    return made


def figures(scores: Sequence[float], base: Sequence[float] | None = None) -> dict[str, Any]:
    """Accuracy with Wilson's 95% interval; beside a base also the normalised score (accuracy over the base's, None if
    that is 0), how many problems were answered better and worse, and McNemar's exact p."""
    accuracy = sum(scores) / len(scores)
    found = {"accuracy": accuracy, "interval": list(wilson_interval(accuracy, len(scores))), "scores": list(scores)}
    if base is not None:
        before = sum(base) / len(base)
        better, worse = better_worse(base, scores)
        found |= {
            "normalised": accuracy / before if before else None,
            "better": better,
            "worse": worse,
            "p": paired_p(base, scores),
        }
    return found


def _row(runner: EvalRunner, label: str, columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Row of a task: its columns, the base first."""
    base = columns[BASE]
    found = {name: figures(scores, None if name == BASE else base) for name, scores in columns.items()}
    entry = runner.task(label)
    return {"task": entry.task.name, "problems": len(entry.problems), "columns": found}


def _table1(runner: EvalRunner) -> dict[str, Any]:
    rows = {}
    for label in runner.spec.seen:
        columns = runner.scores(label, _singles(runner))
        rows[label] = _row(runner, label, _with_lora(runner, label, columns))
    return rows


def _with_lora(runner: EvalRunner, label: str, columns: dict[str, list[float]]) -> dict[str, list[float]]:
    return columns | ({"LoRA": runner.lora(label)} if runner.adapter is not None else {})


def dispatched(labels: Sequence[str], columns: Mapping[str, Sequence[float]]) -> list[float]:
    """Scores of dispatched requests, each taken from the column of the expert that pass one chose.

    Pass two need not be run again: a row of a mixed batch has the answer that it has in a batch of one expert alone,
    since the products of a row do not depend on the rows around it (docs/cpu.md).
    """
    return [columns[label][index] for index, label in enumerate(labels)]


def _table2(runner: EvalRunner) -> dict[str, Any]:
    spec, rows = runner.spec, {}
    for label in spec.tasks:
        mixes = _mixes(runner, label)
        answered = runner.scores(label, _singles(runner) | mixes)
        columns = {BASE: answered[BASE]}
        if label in spec.seen:
            columns["right expert"] = answered[label]
        for name, labels in runner.labels(label).items():
            columns[name] = dispatched(labels, answered)
        columns |= {name: answered[name] for name in mixes}
        rows[label] = _row(runner, label, _with_lora(runner, label, columns)) | {"seen": label in spec.seen}
    return rows


def _dispatch(runner: EvalRunner) -> dict[str, Any]:
    """Confusion matrices by strategy: rows are tasks, columns what their prompts were taken for."""
    spec = runner.spec
    labels = [*runner.bank.experts, OTHERS]
    chosen = {label: runner.labels(label) for label in spec.tasks}
    found = {}
    for strategy in chosen[next(iter(spec.seen))]:
        parts = {}
        for part, tasks in (("seen", spec.seen), (OTHERS, spec.unseen)):
            if not tasks:
                continue
            each = -(-spec.dispatch_prompts // len(tasks))
            said = {label: [OTHERS if x == BASE else x for x in chosen[label][strategy][:each]] for label in tasks}
            right = [float(x == (label if part == "seen" else OTHERS)) for label in tasks for x in said[label]]
            matrix = {label: [said[label].count(x) for x in labels] for label in tasks}
            parts[part] = {"prompts": len(right), "matrix": matrix} | figures(right)
        found[strategy] = parts
    return {"labels": labels, "strategies": found}


def _times(runner: EvalRunner) -> dict[str, Any]:
    return {label or "mixed batch": runner.times(label) for label in (None, *runner.spec.timed)}


def _alphas(runner: EvalRunner) -> dict[str, Any]:
    """Weights of the mixes of table 2, with the first size and incumbent."""
    spec = runner.spec
    first = spec.few_shot[0], spec.few_shot_seeds[0], spec.incumbents[0]
    return {label: runner.settled(label, *first) for label in spec.tasks}


def _sizes(runner: EvalRunner) -> dict[str, Any]:
    """Accuracy by task, incumbent, size and seed, and the base's."""
    spec, rows = runner.spec, {}
    for label, incumbent in itertools.product(spec.ablated, spec.incumbents):
        searches = {
            (size, seed): runner.settled(label, size, seed, incumbent)
            for size in spec.few_shot_sizes
            for seed in spec.few_shot_seeds
        }
        columns: dict[str, ExpertChoice] = {BASE: None}
        columns |= {f"{size} {seed}": runner.mix(found) for (size, seed), found in searches.items()}
        scores = runner.scores(label, columns)
        rows[_after(incumbent, label)] = {
            "task": label,
            "incumbent": incumbent,
            "base": figures(scores[BASE]),
            "sizes": {
                str(size): [
                    figures(scores[f"{size} {seed}"], scores[BASE])
                    | {"seed": seed, "few_shot_score": searches[size, seed]["score"]}
                    for seed in spec.few_shot_seeds
                ]
                for size in spec.few_shot_sizes
            },
        }
    return rows


def _variants_section(runner: EvalRunner) -> dict[str, Any]:
    rows = {}
    for label in runner.spec.seen:
        if variants := _variants(runner, label):
            scores = runner.scores(label, {BASE: None, "expert of the bank": label, **variants})
            named = {name.removeprefix("variant "): column for name, column in scores.items()}
            rows[label] = _row(runner, label, named)
    return rows


_MADE: dict[Section, Callable[[EvalRunner], dict[str, Any]]] = {
    "table1": _table1,
    "table2": _table2,
    "dispatch": _dispatch,
    "times": _times,
    "alphas": _alphas,
    "sizes": _sizes,
    "variants": _variants_section,
}
