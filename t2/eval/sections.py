"""What each section of the results holds, from measurements."""

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


def measure(measuring: EvalRunner, only: Iterable[Section] = SECTIONS) -> dict[str, Any]:
    """The sections asked for; of the others those that were measured before, as a whole.

    A section that the plan has nothing for is left out. An interruption loses a few problems' answers at most: the
    next call goes on from the cells.

    Raises:
        ValueError: there is no such section.
    """
    chosen = tuple(only)
    if unknown := set(chosen) - set(SECTIONS):
        raise ValueError(f"only: expected some of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    for label in measuring.plan.tasks:
        if columns := _columns(measuring, label, chosen):
            measuring.scores(label, columns)
    found: dict[str, Any] = {}
    for name in SECTIONS:
        measuring.allowed = name in chosen
        try:
            section = _MADE[name](measuring)
        except MissingResult:
            continue
        finally:
            measuring.allowed = True
        if section:
            found[name] = section
    return found


def _columns(measuring: EvalRunner, label: str, chosen: Sequence[Section]) -> dict[str, ExpertChoice]:
    """All that answers a task's problems for these sections, so that it does so as rows of the same batches."""
    plan, columns = measuring.plan, dict[str, ExpertChoice]()
    if "table2" in chosen or ("table1" in chosen and label in plan.seen):
        columns |= _singles(measuring)
    if "table2" in chosen:
        columns |= _mixes(measuring, label)
    if "sizes" in chosen and label in plan.ablated:
        columns |= {BASE: None} | {
            f"few-shot {size}, seed {seed}, {incumbent}": measuring.mix(measuring.settled(label, size, seed, incumbent))
            for size in plan.few_shot_sizes
            for seed in plan.few_shot_seeds
            for incumbent in plan.incumbents
        }
    if "variants" in chosen and label in plan.seen and plan.variants:
        columns |= {BASE: None, label: label} | _variants(measuring, label)
    return columns


def _singles(measuring: EvalRunner) -> dict[str, ExpertChoice]:
    """The base and each expert."""
    return {BASE: None, **{name: name for name in measuring.bank.experts}}


def _mixes(measuring: EvalRunner, label: str) -> dict[str, ExpertChoice]:
    """Few-shot columns of table 2."""
    plan, seed = measuring.plan, measuring.plan.few_shot_seeds[0]
    made: dict[str, ExpertChoice] = {}
    for incumbent in plan.incumbents:
        for size in plan.few_shot:
            name = _after(incumbent, f"few-shot {size}")
            made[name] = measuring.mix(measuring.settled(label, size, seed, incumbent))
            if plan.few_shot_per_layer:
                made[f"{name}, per layer"] = measuring.mix(measuring.settled(label, size, seed, incumbent, "layer"))
    return made


def _after(incumbent: str, name: str) -> str:
    """The name of what starts from an incumbent."""
    return name if incumbent == BASE else f"{incumbent}, {name}"


def _variants(measuring: EvalRunner, label: str) -> dict[str, ExpertChoice]:
    made: dict[str, ExpertChoice] = {}
    for variant, files in measuring.plan.variants.items():
        if label in files:
            if not measuring.allowed and not Path(files[label]).is_file():
                raise MissingResult(files[label])
            expert = Expert.load(files[label])
            made[f"variant {variant}"] = measuring.widened(expert, f"variants.{variant}.{label}")
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


def _row(measuring: EvalRunner, label: str, columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The columns of a task, the base first."""
    base = columns[BASE]
    found = {name: figures(scores, None if name == BASE else base) for name, scores in columns.items()}
    judged = measuring.judged(label)
    return {"task": judged.task.name, "problems": len(judged.problems), "columns": found}


def _table1(measuring: EvalRunner) -> dict[str, Any]:
    rows = {}
    for label in measuring.plan.seen:
        columns = measuring.scores(label, _singles(measuring))
        rows[label] = _row(measuring, label, _with_lora(measuring, label, columns))
    return rows


def _with_lora(measuring: EvalRunner, label: str, columns: dict[str, list[float]]) -> dict[str, list[float]]:
    return columns | ({"LoRA": measuring.lora(label)} if measuring.adapter is not None else {})


def dispatched(labels: Sequence[str], columns: Mapping[str, Sequence[float]]) -> list[float]:
    """Scores of requests that pass one dispatched, from the columns of what they were dispatched to.

    Pass two need not be run again: a row of a mixed batch has the answer that it has in a batch of one expert alone,
    since the products of a row do not depend on the rows around it (docs/cpu.md).
    """
    return [columns[label][index] for index, label in enumerate(labels)]


def _table2(measuring: EvalRunner) -> dict[str, Any]:
    plan, rows = measuring.plan, {}
    for label in plan.tasks:
        mixes = _mixes(measuring, label)
        answered = measuring.scores(label, _singles(measuring) | mixes)
        columns = {BASE: answered[BASE]}
        if label in plan.seen:
            columns["right expert"] = answered[label]
        for name, labels in measuring.labels(label).items():
            columns[name] = dispatched(labels, answered)
        columns |= {name: answered[name] for name in mixes}
        rows[label] = _row(measuring, label, _with_lora(measuring, label, columns)) | {"seen": label in plan.seen}
    return rows


def _dispatch(measuring: EvalRunner) -> dict[str, Any]:
    """Confusion matrices by strategy: rows are tasks, columns what their prompts were taken for."""
    plan = measuring.plan
    labels = [*measuring.bank.experts, OTHERS]
    chosen = {label: measuring.labels(label) for label in plan.tasks}
    found = {}
    for strategy in chosen[next(iter(plan.seen))]:
        parts = {}
        for part, tasks in (("seen", plan.seen), (OTHERS, plan.unseen)):
            if not tasks:
                continue
            each = -(-plan.dispatch_prompts // len(tasks))
            said = {label: [OTHERS if x == BASE else x for x in chosen[label][strategy][:each]] for label in tasks}
            right = [float(x == (label if part == "seen" else OTHERS)) for label in tasks for x in said[label]]
            matrix = {label: [said[label].count(x) for x in labels] for label in tasks}
            parts[part] = {"prompts": len(right), "matrix": matrix} | figures(right)
        found[strategy] = parts
    return {"labels": labels, "strategies": found}


def _times(measuring: EvalRunner) -> dict[str, Any]:
    return {label or "mixed batch": measuring.times(label) for label in (None, *measuring.plan.timed)}


def _alphas(measuring: EvalRunner) -> dict[str, Any]:
    """Weights of the mixes of table 2, with the first size and incumbent."""
    plan = measuring.plan
    first = plan.few_shot[0], plan.few_shot_seeds[0], plan.incumbents[0]
    return {label: measuring.settled(label, *first) for label in plan.tasks}


def _sizes(measuring: EvalRunner) -> dict[str, Any]:
    """Accuracy by task, incumbent, size and seed, and the base's."""
    plan, rows = measuring.plan, {}
    for label, incumbent in itertools.product(plan.ablated, plan.incumbents):
        searches = {
            (size, seed): measuring.settled(label, size, seed, incumbent)
            for size in plan.few_shot_sizes
            for seed in plan.few_shot_seeds
        }
        columns: dict[str, ExpertChoice] = {BASE: None}
        columns |= {f"{size} {seed}": measuring.mix(found) for (size, seed), found in searches.items()}
        scores = measuring.scores(label, columns)
        rows[_after(incumbent, label)] = {
            "task": label,
            "incumbent": incumbent,
            "base": figures(scores[BASE]),
            "sizes": {
                str(size): [
                    figures(scores[f"{size} {seed}"], scores[BASE])
                    | {"seed": seed, "few_shot_score": searches[size, seed]["score"]}
                    for seed in plan.few_shot_seeds
                ]
                for size in plan.few_shot_sizes
            },
        }
    return rows


def _variants_section(measuring: EvalRunner) -> dict[str, Any]:
    rows = {}
    for label in measuring.plan.seen:
        if variants := _variants(measuring, label):
            scores = measuring.scores(label, {BASE: None, "expert of the bank": label, **variants})
            named = {name.removeprefix("variant "): column for name, column in scores.items()}
            rows[label] = _row(measuring, label, named)
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
