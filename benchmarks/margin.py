"""How cautious a few-shot search has to be: its margin and incumbent, and what few problems tell of the rest of a task.

    python benchmarks/margin.py    # some minutes

Every mix of a fixed set answers many problems of tasks that no expert was trained on. A few of these are then drawn at
random, again and again: the mix that answers them best takes the incumbent's place, or does not by its margin. What is
chosen is judged beside the base on the problems that were not drawn. The incumbent is the base, or what the
classification expert takes most of the few for. Answers are given once, so draws cost nothing. Writes
benchmarks/results/margin.json, task by task; an interrupted run goes on with the task that it stopped at.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2
from t2.adaptation import ClassifierStrategy, FewShotStrategy, few_shot_problems, load_bank_folder
from t2.adaptation.bank_folder import CLASSIFIER
from t2.adaptation.few_shot import keeper
from t2.adaptation.search import Fitness
from t2.eval.result_cache import tensor_digest
from t2.tasks import get
from t2.tasks.classify import BASE
from t2.weights.machine import machine
from t2kernels.files import write_text

ROOT = Path(__file__).parent.parent
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


def drawn(
    scores: list[list[float]], size: int, margin: float, singles: Sequence[str], labels: Sequence[str]
) -> list[float]:
    """By how much what was chosen is above the base on the other problems, in each of `DRAWS` draws.

    Args:
        scores: by candidate and problem, the singles first.
        singles: their names, "base" first.
        labels: the single that each problem was dispatched to; that of most of the few is the incumbent.
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
    """Of each number of problems, margin and incumbent, by task: how far above the base a choice is, the mean over
    draws, and the share of draws in which it is below."""
    rows = []
    for size, margin, incumbent in itertools.product(SIZES, MARGINS, (BASE, CLASSIFIER)):
        if margin or incumbent == BASE:  # without a margin the incumbent does not matter
            above = {}
            for name, task in tasks.items():
                labels = task["labels"] if incumbent == CLASSIFIER else [BASE] * len(task["labels"])
                above[name] = drawn(task["scores"], size, margin, task["singles"], labels)
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


def main(
    bank: Path = ROOT / "t2" / "banks" / MODEL,
    problems: int = 150,
    candidates: int = 16,
    results: Path = ROOT / "benchmarks" / "results" / "margin.json",
) -> None:
    """Args:
    bank: Folder with the experts.
    problems: Of each task.
    candidates: Mixes that answer all of them.
    results: File for the figures.
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
    table = Table("problems", "margin", "incumbent", "above the base", "draws below it")
    for row in found["rows"]:
        gain, below = (statistics.fmean(row[key].values()) for key in ("gain", "below"))
        table.add_row(
            str(row["problems"]), f"{row['margin']:g}", row["incumbent"], f"{100 * gain:+.1f}", f"{below:.0%}"
        )
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
