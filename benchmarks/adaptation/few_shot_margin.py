"""Margin and incumbent of a few-shot search: how well a few problems predict the rest of a task.

    python -m benchmarks.adaptation.few_shot_margin    # some minutes

Every mix of a fixed set solves many problems of tasks that no expert was trained on. A few of these are then drawn at
random, again and again: the mix with the best score on them replaces the incumbent, or does not by its margin. The
choice is judged against the base on the problems that were not drawn. The incumbent is the base, or the expert that the
classification expert assigns to most of the few. Completions are generated once, so draws cost nothing. Writes
benchmarks/results/margin.json, task by task; an interrupted run resumes at the task where it stopped.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table
from t2.adaptation import ClassifierStrategy, FewShotStrategy, few_shot_problems, load_bank_folder
from t2.adaptation.bank_folder import CLASSIFIER
from t2.adaptation.few_shot import keeper
from t2.adaptation.search import Fitness
from t2.eval.result_cache import tensor_digest
from t2.tasks import get
from t2.tasks.classify import BASE
from t2.weights.machine import machine
from t2kernels.files import write_text

MODEL = "smollm2-135m-instruct"
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "three numbers": ("basic_arithmetic", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "four terms": ("chain_sum", {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "multiples": ("lcm", {"min_value": 1, "max_value": 20}),
    "divisors": ("gcd", {"min_value": 1, "max_value": 30}),
    "letters": ("letter_counting", {}),
    "long reading": ("needle_haystack", {"min_num_statements": 8, "max_num_statements": 10}),
}
SIZES = (10, 20, 40)
MARGINS = (0.0, 1.0, 1.5, 2.0)
DRAWS = 1000


def mixes(experts: int, count: int) -> Tensor:
    """[count, 1 + experts]: the base and each expert alone, all in equal parts, then uniform ones that sum to 1."""
    alone = torch.cat([torch.eye(1 + experts), torch.full((1, 1 + experts), 1 / (1 + experts))])
    waits = torch.rand(count - len(alone), 1 + experts, generator=torch.Generator().manual_seed(0)).log().neg()
    return torch.cat([alone, waits / waits.sum(-1, keepdim=True)])


def gains_over_draws(
    scores: list[list[float]], size: int, margin: float, singles: Sequence[str], labels: Sequence[str]
) -> list[float]:
    """Score of the choice above the base on the problems not drawn, for each of `DRAWS` draws.

    Args:
        scores: Scores by candidate and problem, the singles first.
        singles: Names of the singles, "base" first.
        labels: Single that each problem was dispatched to; the most frequent of the few is the incumbent.
    """
    table, random, above = numpy.array(scores), numpy.random.default_rng(0), []
    for _ in range(DRAWS):
        order = random.permutation(table.shape[1])
        few, others = table[:, order[:size]], table[:, order[size:]]
        chosen = int(few.mean(1).argmax())
        fitness = [Fitness(float(row.mean()), 0.0, tuple(row)) for row in few]
        votes = [labels[index] for index in order[:size]]
        incumbent = max(singles, key=votes.count)
        kept = keeper(fitness[chosen], dict(zip(singles, fitness, strict=False)), incumbent, margin)
        chosen = chosen if kept is None else singles.index(kept)
        above.append(float(others[chosen].mean() - others[0].mean()))
    return above


def summary(tasks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by number of problems, margin and incumbent: for each task, the mean gain over the base and the share of
    draws below it."""
    rows = []
    for size, margin, incumbent in itertools.product(SIZES, MARGINS, (BASE, CLASSIFIER)):
        if margin or incumbent == BASE:  # without a margin the incumbent does not matter
            above = {}
            for name, task in tasks.items():
                labels = task["labels"] if incumbent == CLASSIFIER else [BASE] * len(task["labels"])
                above[name] = gains_over_draws(task["scores"], size, margin, task["singles"], labels)
            rows.append(
                {
                    "problems": size,
                    "margin": margin,
                    "incumbent": incumbent,
                    "gain": {name: statistics.fmean(each) for name, each in above.items()},
                    "below": {name: sum(x < 0 for x in each) / len(each) for name, each in above.items()},
                }
            )
    return rows


def margin_table(results: Any) -> Table:
    """Gain of a choice over the base, by number of few-shot problems, margin and incumbent."""
    rows = []
    for row in results["rows"]:
        gain, below = (statistics.fmean(row[key].values()) for key in ("gain", "below"))
        by_task = zip(row["gain"].values(), row["below"].values(), strict=True)
        rows.append(
            [
                str(row["problems"]),
                f"{row['margin']:g}",
                row["incumbent"],
                f"{100 * gain:+.1f}",
                f"{100 * below:.0f}%",
                *(f"{100 * gain:+.1f}, {100 * below:.0f}%" for gain, below in by_task),
            ]
        )
    settings = results["settings"]
    return Table(
        f"{settings['candidates']} mixes, {settings['problems']} problems of each task, {settings['draws']:,} draws of "
        "a few of them; the choice is judged on the others. Mean over tasks, then each "
        "(`python -m benchmarks.adaptation.few_shot_margin`):",
        ["few-shot problems", "margin", "incumbent", "points above the base", "draws below it", *results["tasks"]],
        rows,
    )


def main(
    bank: Path = ROOT / "t2" / "banks" / MODEL,
    problems: int = 150,
    candidates: int = 16,
    results: Path = RESULTS / "margin.json",
) -> None:
    """Args:
    bank: Folder with the experts.
    problems: Problems of each task.
    candidates: Number of mixes.
    results: File for the results as JSON.
    """
    if problems <= max(SIZES):
        raise ValueError(f"problems: expected more than {max(SIZES)}, got {problems}")
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True))
    folder = load_bank_folder(bank)
    folder.add_to(svf)
    names = [domain.name for domain in folder.domains]
    alpha = mixes(len(names), candidates)
    settings = {
        "problems": problems,
        "candidates": candidates,
        "draws": DRAWS,
        "experts": {name: tensor_digest(svf.bank[name].z) for name in (*names, CLASSIFIER)},
    }
    tasks: dict[str, dict[str, Any]] = {}
    if results.is_file() and (saved := json.loads(results.read_text()))["settings"] == settings:
        tasks = saved["tasks"]
    for label, (name, config) in tqdm(TASKS.items(), desc="tasks"):
        if label not in tasks:
            task = get(f"reasoning-gym:{name}", config=config, train_size=problems, validation_size=1, test_size=200)
            drawn_from = few_shot_problems(task, problems)
            strategy = FewShotStrategy(svf, tokenizer, task, drawn_from, experts=names)
            adaptation = ClassifierStrategy(svf, tokenizer, folder.domains).adapt(drawn_from)
            tasks[label] = {
                "task": name,
                "config": config,
                "singles": strategy.names,
                "labels": [adaptation.names[index] for index in adaptation.alpha.argmax(-1).tolist()],
                "scores": [list(fitness.scores) for fitness in strategy.evaluate(alpha)],
            }
        found = {"machine": machine(), "settings": settings, "tasks": tasks, "rows": summary(tasks)}
        write_text(results, json.dumps(found) + "\n")
    margin_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
